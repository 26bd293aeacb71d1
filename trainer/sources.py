"""Where pictures come from: what a source is, how it is split, and the plainest ones: folders, tables, drawn gardens.

A source knows its classes and, for each split, how many pictures there are and how to load any range of them. Order is
fixed: two machines with any number of workers read the same pictures in the same order.
"""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import io
import multiprocessing
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from trainer import files, pictures, places
from trainer.errors import ConfigError, DataError
from trainer.pictures import SUFFIXES, Found
from trainer.records import Picture

Load = Callable[[], Found]
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
class Part:
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
    parts: tuple[Part, ...]
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
class Wanted:
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


# -- image files


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """An image file: where it is, what its record is called, its class ("" for none), and what changes with it."""

    path: str
    name: str
    label: str
    mark: str


def folder(path: str, wanted: Wanted, progress: Progress) -> Source:
    """Image files in folders: PATH/SPLIT/CLASS/IMAGE, PATH/CLASS/IMAGE, PATH/SPLIT/IMAGE or PATH/IMAGE.

    Of two levels, the upper one are splits if all of its names mean a split (`SPLITS`), and classes otherwise. Without a
    split, all is `train`; without a class, pictures are unlabelled.

    Raises:
        DataError: no folder, no image, or images at different depths.
    """
    flag = f"--dataset=folder:{path}"
    if not files.is_remote(path) and not os.path.isdir(path):
        raise DataError(f"{flag}: there is no such folder")
    entries = [entry for entry in places.tree(path) if entry[0][-1].lower().endswith(SUFFIXES)]
    if not entries:
        raise DataError(
            f"{flag} has no images: they must lie as SPLIT/CLASS/NAME, for example train/daisy/1.jpg, as CLASS/NAME, or, "
            f"without labels, as SPLIT/NAME or NAME, and end in {' '.join(SUFFIXES)}"
        )
    depths = {len(parts): "/".join(parts) for parts, _ in entries}
    if len(depths) > 1 or max(depths) > 3:
        shown = " and ".join(sorted(depths.values())[:2])
        raise DataError(
            f"{flag} has images at {shown}: all must lie at one depth, as SPLIT/CLASS/NAME, CLASS/NAME, SPLIT/NAME or NAME"
        )
    depth = max(depths)
    split_level = depth == 3 or (depth == 2 and all(parts[0].lower() in SPLITS for parts, _ in entries))
    class_level = depth - split_level > 1
    found: dict[str, list[_File]] = {}
    for parts, mark in entries:
        name = "/".join(parts)
        label = parts[-2] if class_level and wanted.labelled else ""
        found.setdefault(parts[0] if split_level else "", []).append(_File(files.join(path, *parts), name, label, mark))
    name = f"folder {posixpath.basename(path.rstrip('/'))}"
    return of_files(name, flag, found, wanted, progress)


def table(path: str, columns: dict[str, str], wanted: Wanted, progress: Progress) -> Source:
    """A CSV file with a line for each picture: path, label, split; the last two may be missing.

    The first line is a header if no cell of it ends as an image file does. Paths are relative to the table's folder,
    absolute, or gs://. Labels are names, or, if all are numbers, positions in the classes.

    Args:
        path: the table; comma, semicolon or tab separate.
        columns: of path, label and split: names in the header, or numbers from 0. Empty: found by their names, else
            path and label come first, and a third column is the split if it holds nothing but split names.
        wanted: the rest.
        progress: called with what, done, total.

    Raises:
        ConfigError: no such column.
        DataError: not such a table; the line is named.
    """
    flag = f"--dataset=csv:{path}"
    text = files.read(path, "a table").decode("utf-8-sig", errors="replace")
    first = text.split("\n", 1)[0]
    separator = max(",;\t", key=first.count)
    rows = [
        (number, [cell.strip() for cell in row])
        for number, row in enumerate(csv.reader(io.StringIO(text), delimiter=separator), 1)
    ]
    rows = [(number, row) for number, row in rows if any(row)]
    if not rows:
        raise DataError(f"{flag} is empty")
    header = [] if any(cell.lower().endswith(SUFFIXES) for cell in rows[0][1]) else rows[0][1]
    if header:
        rows = rows[1:]
    where = _columns(flag, header, rows, columns)
    base = posixpath.dirname(path)
    found: dict[str, list[_File]] = {}
    for number, row in rows:
        cells = {name: row[column] if column < len(row) else "" for name, column in where.items()}
        if not cells["path"]:
            raise DataError(f"{flag}: line {number} names no file")
        if "split" in where and not cells["split"]:
            raise DataError(f"{flag}: line {number} ({cells['path']}) has no split")
        label = cells.get("label", "") if wanted.labelled else ""
        place = cells["path"] if files.is_remote(cells["path"]) else files.join(base, cells["path"])
        entry = _File(place, cells["path"], label, places.mark(place))
        found.setdefault(cells.get("split", ""), []).append(entry)
    if not found:
        raise DataError(f"{flag} has a header and no pictures")
    return of_files(f"csv {posixpath.basename(path)}", flag, found, wanted, progress)


def _columns(flag: str, header: list[str], rows: list[tuple[int, list[str]]], asked: dict[str, str]) -> dict[str, int]:
    """Where path, label and split stand in a row."""
    known = {
        "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
        "label": ("label", "class", "class_name", "category", "target"),
        "split": ("split", "subset", "partition"),
    }
    lower, width = [name.lower() for name in header], max((len(row) for _, row in rows), default=0)
    where: dict[str, int] = {}
    for name, column in asked.items():
        if column in header:
            where[name] = header.index(column)
        elif column.isdigit() and int(column) < max(width, len(header)):
            where[name] = int(column)
        else:
            there = ", ".join(header) if header else f"{width} without a header: 0 to {width - 1}"
            raise ConfigError(f"--columns: {flag} has no column {column!r} for {name}; there are {there}")
    for name, words in known.items():
        if name not in where and (here := [lower.index(word) for word in words if word in lower]):
            where[name] = here[0]
    where.setdefault("path", 0)
    if not header and not asked:
        if width > 1:
            where["label"] = 1
        if width == 3 and all(len(row) == 3 and row[2].lower() in SPLITS for _, row in rows):
            where["split"] = 2
    elif "label" not in where and not asked and len(header) == 2 and where["path"] == 0:
        where["label"] = 1
    return where


def of_files(name: str, flag: str, found: dict[str, list[_File]], wanted: Wanted, progress: Progress) -> Source:
    """Splits, classes and loads of image files; `found` is by the source's own split, "" where it has none."""
    everything = [file for part in found.values() for file in part]
    classes, numbers = class_numbers(flag, (file.label for file in everything), wanted)
    splits = choose(flag, {own: list(range(len(part))) for own, part in found.items()}, wanted)
    if splits is None:
        hashes: list[bytes] = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = (functools.partial(_digest, file.path, wanted.seed) for file in everything)
            for result in in_order(pool, jobs, _CHUNK):
                hashes.append(result())
                progress("hash", len(hashes), len(everything))
        labels = [numbers[file.label] for file in everything]
        dealt = by_share(len(everything), wanted.shares, wanted.seed, labels, hashes)
        chosen = {split: [everything[position] for position in positions] for split, positions in dealt.items()}
    else:
        chosen = {ours: [file for own in owns for file in found[own]] for ours, owns in splits.items()}

    def part(split: str, members: list[_File]) -> Part:
        def loads(start: int, stop: int) -> Iterator[Load]:
            for file in members[start:stop]:
                yield functools.partial(_load, file, numbers[file.label], wanted.upright)

        def key(start: int, stop: int) -> str:
            return "\n".join(f"{file.path}\t{numbers[file.label]}\t{file.mark}" for file in members[start:stop])

        return Part(split, len(members), loads, key)

    return Source(name, classes, tuple(part(split, members) for split, members in chosen.items()))


def _digest(path: str, seed: int) -> bytes:
    """Of a file that cannot be read, its path's: that it cannot be read is told later."""
    try:
        return digest(files.read(path, "an image"), seed)
    except DataError:
        return digest(path.encode(), seed)


def _load(file: _File, label: int, upright: bool) -> Found:
    try:
        encoded = files.read(file.path, "an image")
    except DataError as error:
        raise pictures.Unusable(str(error)) from error
    return pictures.check(encoded, label, file.name, file.path, upright)


def class_numbers(flag: str, labels: Iterable[str], wanted: Wanted) -> tuple[tuple[str, ...], dict[str, int]]:
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


def choose(flag: str, own: dict[str, list[Any]], wanted: Wanted) -> dict[str, list[str]] | None:
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


# -- the drawn garden


def garden(seed: int, classes: int, size: int, splits: dict[str, int]) -> Source:
    """Drawn flowers (trainer.synthetic), with a process per core.

    Args:
        seed: >= 0.
        classes: species, >= 2.
        size: longer side in pixels, >= 16.
        splits: pictures in each split; those of 0 are left out.

    Raises:
        ConfigError: a number out of range.
    """
    from trainer import synthetic

    for name, value, least in (("seed", seed, 0), ("classes", classes, 2), ("size", size, 16)):
        if value < least:
            raise ConfigError(f"--{name}={value}: it must be at least {least}")
    if negative := [name for name, count in splits.items() if count < 0]:
        raise ConfigError(f"--{negative[0]}={splits[negative[0]]}: it must not be negative")
    if not any(splits.values()):
        raise ConfigError("every split is empty: give --train and the others a number of pictures")

    # Fresh processes: TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context)

    def part(split: str, count: int) -> Part:
        def loads(start: int, stop: int) -> Iterator[Load]:
            starts = range(start, stop, _CHUNK)
            jobs = (
                functools.partial(synthetic.examples, seed, split, s, min(s + _CHUNK, stop), classes, size)
                for s in starts
            )
            for first, drawn in zip(starts, in_order(pool, jobs, 2 * (os.cpu_count() or 1)), strict=True):
                for number, (encoded, label, (height, width)) in enumerate(drawn(), first):
                    found = Found(Picture(encoded, height, width, label, f"{split}/{number}.jpg"))
                    yield functools.partial(_given, found)

        return Part(split, count, loads, lambda start, stop: f"{seed} {classes} {size} {split} {start} {stop}")

    names = tuple(map(synthetic.species_name, range(classes)))
    parts = tuple(part(split, count) for split, count in splits.items() if count)
    return Source(f"synthetic, seed {seed}", names, parts, close=pool.shutdown)


def _given(found: Found) -> Found:
    return found
