"""Where pictures come from: what a source is, how it is split, and the plainest ones: folders, tables, drawn gardens.

A source knows its classes and, for each split, how many pictures there are and how to load any range of them. Order is
fixed: two machines with any number of workers read the same pictures in the same order.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from trainer.core.errors import ConfigError, DataError
from trainer.ingest.images import ValidatedImage
from trainer.io import files

Load = Callable[[], ValidatedImage]
Progress = Callable[[str, int, int], None]
T = TypeVar("T")
_CHUNK = 256
# Names that mean a split where a folder or a file could as well mean a class.
SPLITS = (
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
    """A split to be.

    Attributes:
        name: of the split.
        count: pictures, usable or not.
        loads: for a range [start, stop), yields what loads each picture; a load may run in any thread, and raises
            `pictures.Unusable` for one that cannot be used.
        key: for a range, a text that changes when its pictures do.
    """

    name: str
    count: int
    loads: Callable[[int, int], Iterator[Load]]
    key: Callable[[int, int], str]


@dataclasses.dataclass(frozen=True)
class Source:
    """All of a data set to be.

    Attributes:
        name: for people.
        classes: class names; empty: unlabelled.
        parts: its splits.
        facts: for dataset.json's `source`.
        close: ends what was started for it.
    """

    name: str
    classes: tuple[str, ...]
    parts: tuple[SourceSplit, ...]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def in_order(
    pool: concurrent.futures.Executor, jobs: Iterable[Callable[[], T]], ahead: int
) -> Iterator[Callable[[], T]]:
    """Runs jobs in a pool, at most `ahead` of them at a time, and yields what gives (or raises) each result, in order."""
    waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= ahead:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        for future in waiting:
            future.cancel()


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What the flags say, for every kind of source.

    Attributes:
        splits: by our name, what the source calls it: a split of its own, a pattern, an expression. Empty: its own.
        shares: by our name, the share of all pictures, in (0, 1]. Excludes `splits`.
        seed: of the shares.
        labelled: take the labels that there are.
        upright: obey EXIF.
        classes: class names in their order; empty: from the source.
    """

    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    labelled: bool = True
    upright: bool = False
    classes: tuple[str, ...] = ()


def parse_splits(text: str) -> tuple[dict[str, str], dict[str, float]]:
    """`--splits`: NAME=WHERE items or NAME:SHARE items, with commas between.

    Raises:
        ConfigError: neither, both, a name twice, or shares out of range.
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
            raise ConfigError(f"--splits={text}: {name!r} stands there twice")
        if sign == "=":
            splits[name] = value
            continue
        try:
            shares[name] = float(value)
        except ValueError:
            raise ConfigError(f"--splits={text}: {value!r} is no share; write train:0.9, or train=WHERE") from None
        if not 0 < shares[name] <= 1:
            raise ConfigError(f"--splits={text}: a share must be above 0 and at most 1")
    if splits and shares:
        raise ConfigError(f"--splits={text} mixes NAME=WHERE and NAME:SHARE; use one of them")
    if sum(shares.values()) > 1 + 1e-9:
        raise ConfigError(f"--splits={text}: the shares add up to {sum(shares.values()):g}, which is more than 1")
    return splits, shares


def parse_pairs(flag: str, text: str, names: tuple[str, ...]) -> dict[str, str]:
    """NAME:VALUE items with commas between, of known names.

    Raises:
        ConfigError: another form, or another name.
    """
    pairs: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, value = item.partition(":")
        if name not in names or not value:
            raise ConfigError(f"--{flag}={text}: {item!r} must be one of {', '.join(f'{n}:...' for n in names)}")
        pairs[name] = value
    return pairs


def names_in(path: str) -> tuple[str, ...]:
    """Class names, one a line.

    Raises:
        DataError: the file cannot be read, is empty, or has a name twice.
    """
    lines = files.read(path, "class names").decode("utf-8-sig", errors="replace").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise DataError(f"{path} names no classes: it must have one name a line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} names the class {twice!r} twice")
    return names


def by_share(
    count: int, shares: dict[str, float], seed: int, labels: Iterable[int], digests: list[bytes]
) -> dict[str, list[int]]:
    """Deals pictures out to splits by what is in them.

    Within each class, pictures are ordered by a hash of their bytes and cut at the shares, so that every split has its
    share of every class. Neither names nor order count, and equal pictures of a class go the same way.

    Args:
        count: pictures.
        shares: by split, in (0, 1], at most 1 together; the rest is left out.
        seed: another one deals otherwise.
        labels: of each picture.
        digests: a hash of each picture's bytes.

    Returns:
        Positions by split, ascending.
    """
    classes: dict[int, list[int]] = {}
    for number, label in enumerate(labels):
        classes.setdefault(label, []).append(number)
    names, edges = list(shares), np.cumsum(list(shares.values()))
    dealt: dict[str, list[int]] = {name: [] for name in names}
    for label, members in classes.items():
        ranked = sorted(members, key=lambda number: (digests[number], number))
        # The cut's remainder is rounded by a number of the class's own, so that small classes do not all round alike.
        drawn = hashlib.blake2b(f"{seed}:{label}".encode(), digest_size=8).digest()
        offset = int.from_bytes(drawn, "big") / 2.0**64
        ends = [int(np.floor(edge * len(ranked) + offset)) for edge in edges]
        if edges[-1] > 1 - 1e-9:
            ends[-1] = len(ranked)
        place, previous = 0, b""
        for rank, number in enumerate(ranked):
            if digests[number] != previous:
                while place < len(names) and rank >= ends[place]:
                    place += 1
            previous = digests[number]
            if place < len(names):
                dealt[names[place]].append(number)
    assert sum(map(len, dealt.values())) <= count
    return {name: sorted(numbers) for name, numbers in dealt.items()}


def digest(content: bytes | memoryview, seed: int) -> bytes:
    """What `by_share` orders by."""
    return hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "big")).digest()


def class_numbers(flag: str, labels: Iterable[str], wanted: SourceOptions) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names, and the number of each label text; "" is no label, -1."""
    texts = set(labels) - {""}
    numbers = {"": -1}
    if not texts:
        return wanted.classes if wanted.labelled else (), numbers
    if wanted.classes and texts <= set(wanted.classes):
        return wanted.classes, numbers | {text: wanted.classes.index(text) for text in texts}
    if all(re.fullmatch(r"\d+", text) for text in texts) and flag.startswith("--dataset=csv"):
        count = len(wanted.classes) or max(map(int, texts)) + 1
        if over := [text for text in texts if int(text) >= count]:
            raise DataError(f"{flag} has label {over[0]}; --classes names {count} classes, from 0 to {count - 1}")
        return wanted.classes or tuple(map(str, range(count))), numbers | {text: int(text) for text in texts}
    if wanted.classes:
        unknown = sorted(texts - set(wanted.classes))[0]
        raise DataError(f"{flag} has class {unknown!r}, which --classes does not name")
    classes = tuple(sorted(texts))
    return classes, numbers | {text: number for number, text in enumerate(classes)}


def choose(flag: str, own: dict[str, list[Any]], wanted: SourceOptions) -> dict[str, list[str]] | None:
    """Which of a source's own splits make each of ours; None: the shares decide.

    Args:
        flag: names the source in messages.
        own: the source's splits; "" stands for all where it has none.
        wanted: the flags.

    Raises:
        DataError: --splits asks for what is not there.
    """
    has = [name for name in own if name]
    if wanted.shares:
        if has:
            raise DataError(
                f"{flag} has splits of its own ({', '.join(has)}): name them as --splits=train={has[0]},..., or leave "
                "--splits out; shares are for sources without splits"
            )
        return None
    if wanted.splits:
        if missing := [name for name in wanted.splits.values() if name not in has]:
            there = ", ".join(has) or "none; give shares, as --splits=train:0.9,validation:0.1"
            raise DataError(f"{flag} has no split {missing[0]!r} (from --splits); it has: {there}")
        return {ours: [name] for ours, name in wanted.splits.items()}
    return {name or "train": [name] for name in own}
