"""Folders of image files, and CSV tables of them, as sources."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import functools
import io
import os
import posixpath
from collections.abc import Iterator

from trainer.core.errors import ConfigError, DataError
from trainer.ingest import images
from trainer.ingest.images import SUFFIXES, ValidatedImage
from trainer.ingest.sources import (
    _CHUNK,
    SPLITS,
    Load,
    Progress,
    Source,
    SourceOptions,
    SourceSplit,
    by_share,
    choose,
    class_numbers,
    digest,
    in_order,
)
from trainer.io import destination, files


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """An image file: where it is, what its record is called, its class ("" for none), and what changes with it."""

    path: str
    name: str
    label: str
    mark: str


def folder_source(path: str, wanted: SourceOptions, progress: Progress) -> Source:
    """Image files in folders: PATH/SPLIT/CLASS/IMAGE, PATH/CLASS/IMAGE, PATH/SPLIT/IMAGE or PATH/IMAGE.

    Of two levels, the upper one are splits if all of its names mean a split (`SPLITS`), and classes otherwise. Without a
    split, all is `train`; without a class, pictures are unlabelled.

    Raises:
        DataError: no folder, no image, or images at different depths.
    """
    flag = f"--dataset=folder:{path}"
    if not files.is_remote(path) and not os.path.isdir(path):
        raise DataError(f"{flag}: there is no such folder")
    entries = [entry for entry in destination.tree(path) if entry[0][-1].lower().endswith(SUFFIXES)]
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


def csv_source(path: str, columns: dict[str, str], wanted: SourceOptions, progress: Progress) -> Source:
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
        entry = _File(place, cells["path"], label, destination.mark(place))
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


def of_files(name: str, flag: str, found: dict[str, list[_File]], wanted: SourceOptions, progress: Progress) -> Source:
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

    def part(split: str, members: list[_File]) -> SourceSplit:
        def loads(start: int, stop: int) -> Iterator[Load]:
            for file in members[start:stop]:
                yield functools.partial(_load, file, numbers[file.label], wanted.upright)

        def key(start: int, stop: int) -> str:
            return "\n".join(f"{file.path}\t{numbers[file.label]}\t{file.mark}" for file in members[start:stop])

        return SourceSplit(split, len(members), loads, key)

    return Source(name, classes, tuple(part(split, members) for split, members in chosen.items()))


def _digest(path: str, seed: int) -> bytes:
    """Of a file that cannot be read, its path's: that it cannot be read is told later."""
    try:
        return digest(files.read(path, "an image"), seed)
    except DataError:
        return digest(path.encode(), seed)


def _load(file: _File, label: int, upright: bool) -> ValidatedImage:
    try:
        encoded = files.read(file.path, "an image")
    except DataError as error:
        raise images.UnusableImage(str(error)) from error
    return images.validate_image(encoded, label, file.name, file.path, upright)
