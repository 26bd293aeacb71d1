"""The interface of sources of images, and what they share: options and splits.

A source has class names and, for each split, the number of images and a way to load any range of
them. The order is fixed: any number of workers on any machine reads the same images in the same
order.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from trainer.core.errors import ConfigError, DataError
from trainer.ingest.images import ValidatedImage

Loader = Callable[[], ValidatedImage]
Progress = Callable[[str, int, int], None]  # (phase, items done, items in all)
T = TypeVar("T")
_EPSILON = 1e-9  # rounding error allowed where shares add up to 1

# Names of files and folders that mean a split rather than a class.
SPLIT_NAMES = (
    "train",
    "training",
    "validation",
    "val",
    "valid",
    "dev",
    "test",
    "testing",
    "eval",
    "unlabelled",
    "unlabeled",
)


@dataclasses.dataclass(frozen=True)
class SourceSplit:
    """One split that a source offers.

    Attributes:
        name: of the split.
        count: number of images, usable or not.
        loaders: for a range [start, stop), yields a function for each image that loads it. It may
            be called in any thread, and raises `UnusableImage` for an image that cannot be used.
        key: for a range [start, stop), a text that changes when its images do.
    """

    name: str
    count: int
    loaders: Callable[[int, int], Iterator[Loader]]
    key: Callable[[int, int], str]


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that a data set is written from.

    Attributes:
        name: display name.
        classes: class names; empty: unlabelled.
        splits: in the order in which they are written.
        metadata: for the field `source` of dataset.json.
        notes: lines about how the source was understood.
        warnings: lines about what probably is a mistake in it.
        close: releases what the source holds, such as worker processes.
    """

    name: str
    classes: tuple[str, ...]
    splits: tuple[SourceSplit, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    close: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """The flags that apply to every kind of source.

    Attributes:
        splits: by the name to write, what to take from the source: one of its splits, a pattern of
            paths, or a split expression. Empty: the source's own splits.
        shares: by the name to write, its share of all images, in (0, 1]. Excludes `splits`.
        seed: of the random assignment by `shares`, >= 0.
        labelled: whether labels are taken.
        upright: whether EXIF rotations are applied.
        classes: class names in order; empty: the source's.
        class_order: of the source's class names: auto, natural or text.
        encoding: of text files, a Python codec; empty: UTF-8, or what a byte order mark says.
    """

    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    labelled: bool = True
    upright: bool = False
    classes: tuple[str, ...] = ()
    class_order: str = "auto"
    encoding: str = ""


def parse_splits(text: str) -> tuple[dict[str, str], dict[str, float]]:
    """Parses `--splits`: comma-separated NAME=WHERE or NAME:SHARE items.

    Returns:
        WHERE by name, and share by name; at least one of them is empty.

    Raises:
        ConfigError: an item of neither form, both forms, a repeated name, or shares out of range.
    """
    splits: dict[str, str] = {}
    shares: dict[str, float] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, sign, value = re.fullmatch(r"([\w.-]*)([=:]?)(.*)", item, re.DOTALL).groups()  # type: ignore[union-attr]
        if not name or not sign or not value:
            raise ConfigError(
                f"--splits={text}: {item!r} is neither NAME=WHERE nor NAME:SHARE, as train=train or train:0.9"
            )
        if name in splits or name in shares:
            raise ConfigError(f"--splits={text}: {name!r} is there twice; name each split once")
        if sign == "=":
            splits[name] = value
            continue
        try:
            shares[name] = float(value)
        except ValueError:
            raise ConfigError(f"--splits={text}: {value!r} is not a share; write train:0.9, or train=WHERE") from None
        if not 0 < shares[name] <= 1:
            raise ConfigError(f"--splits={text}: a share must be above 0 and at most 1")
    if splits and shares:
        raise ConfigError(f"--splits={text} mixes NAME=WHERE and NAME:SHARE; use one of them")
    if sum(shares.values()) > 1 + _EPSILON:
        raise ConfigError(f"--splits={text}: the shares add up to {sum(shares.values()):g}, which is more than 1")
    return splits, shares


def parse_pairs(flag: str, text: str, names: tuple[str, ...]) -> dict[str, str]:
    """Parses comma-separated NAME:VALUE items.

    Args:
        flag: name of the flag, for messages.
        text: value of the flag.
        names: the allowed names.

    Raises:
        ConfigError: an item of another form, or with another name.
    """
    pairs: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, value = item.partition(":")
        if name not in names or not value:
            raise ConfigError(f"--{flag}={text}: {item!r} must be one of {', '.join(f'{n}:...' for n in names)}")
        pairs[name] = value
    return pairs


def split_by_share(
    shares: dict[str, float], seed: int, labels: Sequence[int], hashes: Sequence[bytes]
) -> dict[str, list[int]]:
    """Assigns images to splits at random, by their content.

    Within each class, images are ordered by a hash of their bytes and cut at the shares, so every
    split has its share of every class. Names and order of the images do not matter, and equal
    images of a class go to the same split.

    Args:
        shares: by split, in (0, 1], together at most 1; the remaining images are left out.
        seed: another seed gives another assignment.
        labels: class number of each image.
        hashes: `content_hash` of each image.

    Returns:
        Image numbers by split, ascending.
    """
    images_of_class: dict[int, list[int]] = {}
    for number, label in enumerate(labels):
        images_of_class.setdefault(label, []).append(number)
    names, edges = list(shares), np.cumsum(list(shares.values()))
    assigned: dict[str, list[int]] = {name: [] for name in names}
    for label, members in images_of_class.items():
        ranked = sorted(members, key=lambda number: (hashes[number], number))
        # Each class rounds its cuts by an offset of its own, so that small classes do not all
        # round the same way.
        drawn = hashlib.blake2b(f"{seed}:{label}".encode(), digest_size=8).digest()
        offset = int.from_bytes(drawn, "big") / 2.0**64
        ends = [int(np.floor(edge * len(ranked) + offset)) for edge in edges]
        if edges[-1] > 1 - _EPSILON:
            ends[-1] = len(ranked)
        split, previous = 0, b""
        for rank, number in enumerate(ranked):
            if hashes[number] != previous:
                while split < len(names) and rank >= ends[split]:
                    split += 1
            previous = hashes[number]
            if split < len(names):
                assigned[names[split]].append(number)
    return {name: sorted(numbers) for name, numbers in assigned.items()}


def content_hash(content: bytes | memoryview, seed: int) -> bytes:
    """Returns the hash by which `split_by_share` orders images: 8 bytes, keyed by `seed`."""
    return hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "big")).digest()


def select_splits(flag: str, available: Collection[str], options: SourceOptions) -> dict[str, str] | None:
    """Chooses the source's split for each split to write.

    Args:
        flag: the source as given by the user, for messages.
        available: names of the source's splits; "" stands for all images of a source without
            splits.
        options: its `splits` and `shares`.

    Returns:
        The source's split by the name to write; None: images are assigned by `options.shares`.

    Raises:
        DataError: --splits names a split that the source does not have.
    """
    named = [name for name in available if name]
    if options.shares:
        if named:
            raise DataError(
                f"{flag} has splits of its own ({', '.join(named)}): name them as --splits=train={named[0]},..., or leave "
                "--splits out; shares are for sources without splits"
            )
        return None
    if options.splits:
        if missing := [name for name in options.splits.values() if name not in named]:
            hint = ", ".join(named) or "none; give shares, as --splits=train:0.9,validation:0.1"
            raise DataError(f"{flag} has no split {missing[0]!r} (from --splits); it has: {hint}")
        return options.splits
    return {name or "train": name for name in available}


def run_in_order(
    pool: concurrent.futures.Executor, jobs: Iterable[Callable[[], T]], ahead: int
) -> Iterator[Callable[[], T]]:
    """Runs jobs in a pool and yields, in order, functions that return a result or raise its error.

    Args:
        pool: runs the jobs.
        jobs: consumed as they are submitted.
        ahead: number of jobs under way at a time.
    """
    pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) >= ahead:
                yield pending.popleft().result
        while pending:
            yield pending.popleft().result
    finally:
        for future in pending:
            future.cancel()
