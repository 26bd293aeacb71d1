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
from trainer.ingest.labels import number_classes, tally
from trainer.ingest.sources import (
    SPLIT_NAMES,
    Loader,
    Progress,
    Source,
    SourceOptions,
    SourceSplit,
    content_hash,
    run_in_order,
    select_splits,
    split_by_share,
)
from trainer.io import destination, files

_HASHES_AHEAD = 256  # files read at a time to assign them to splits by their content
# Headers that name a column of a table, in lower case.
_COLUMN_NAMES = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "subset", "partition"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """An image file.

    Attributes:
        path: where it is.
        name: file name for its record.
        label: class name; "": none.
        mark: a text that changes when the file does.
    """

    path: str
    name: str
    label: str
    mark: str


def folder_source(path: str, options: SourceOptions, progress: Progress) -> Source:
    """Image files as PATH/SPLIT/CLASS/IMAGE, PATH/CLASS/IMAGE, PATH/SPLIT/IMAGE or PATH/IMAGE.

    Of two levels, the upper one is the split if all its names mean a split (`SPLIT_NAMES`), and the
    class otherwise. Without a split level, all images are `train`; without a class level, images
    are unlabelled.

    Args:
        path: local folder or gs:// prefix.
        options: flags common to all sources.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        DataError: the folder is missing, or has no images, or has images at different depths.
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
        examples = " and ".join(sorted(depths.values())[:2])
        raise DataError(
            f"{flag} has images at {examples}: all must lie at one depth, as SPLIT/CLASS/NAME, CLASS/NAME, SPLIT/NAME or "
            "NAME"
        )
    depth = max(depths)
    split_level = depth == 3 or (depth == 2 and all(parts[0].lower() in SPLIT_NAMES for parts, _ in entries))
    class_level = depth - split_level > 1
    by_split: dict[str, list[_File]] = {}
    for parts, mark in entries:
        label = parts[-2] if class_level and options.labelled else ""
        file = _File(files.join(path, *parts), "/".join(parts), label, mark)
        by_split.setdefault(parts[0] if split_level else "", []).append(file)
    name = f"folder {posixpath.basename(path.rstrip('/'))}"
    return _source_of_files(name, flag, by_split, options, progress)


def csv_source(path: str, columns: dict[str, str], options: SourceOptions, progress: Progress) -> Source:
    """A CSV file with a line for each image: path, label, split; the last two may be missing.

    The first line is a header unless one of its cells ends like an image file. Paths are relative
    to the table's folder, absolute, or gs://. Labels are class names, or, if all are whole
    numbers, class numbers.

    Args:
        path: the table, separated by comma, semicolon or tab.
        columns: of path, label and split: names in the header, or numbers from 0. Empty: found by
            usual names in the header; without one, path and label come first, and a third column
            that holds only split names is the split.
        options: flags common to all sources.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        ConfigError: a column in `columns` does not exist.
        DataError: not such a table; the message has the line number.
    """
    flag = f"--dataset=csv:{path}"
    text = files.read(path, "a table").decode("utf-8-sig", errors="replace")
    separator = max(",;\t", key=text.split("\n", 1)[0].count)
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
    positions = _column_positions(flag, header, rows, columns)
    folder = posixpath.dirname(path)
    by_split: dict[str, list[_File]] = {}
    for number, row in rows:
        cells = {name: row[column] if column < len(row) else "" for name, column in positions.items()}
        if not cells["path"]:
            raise DataError(f"{flag}: line {number} names no file")
        if "split" in positions and not cells["split"]:
            raise DataError(f"{flag}: line {number} ({cells['path']}) has no split")
        label = cells.get("label", "") if options.labelled else ""
        image_path = cells["path"] if files.is_remote(cells["path"]) else files.join(folder, cells["path"])
        file = _File(image_path, cells["path"], label, destination.mark(image_path))
        by_split.setdefault(cells.get("split", ""), []).append(file)
    if not by_split:
        raise DataError(f"{flag} has a header and no images")
    name = f"csv {posixpath.basename(path)}"
    return _source_of_files(name, flag, by_split, options, progress, numeric_labels=True)


def _column_positions(
    flag: str, header: list[str], rows: list[tuple[int, list[str]]], columns: dict[str, str]
) -> dict[str, int]:
    """Returns the position of path, label and split in a row, as far as the table has them."""
    names, width = [name.lower() for name in header], max((len(row) for _, row in rows), default=0)
    positions: dict[str, int] = {}
    for name, column in columns.items():
        if column in header:
            positions[name] = header.index(column)
        elif column.isdigit() and int(column) < max(width, len(header)):
            positions[name] = int(column)
        else:
            available = ", ".join(header) if header else f"{width} without a header: 0 to {width - 1}"
            raise ConfigError(f"--columns: {flag} has no column {column!r} for {name}; there are {available}")
    for name, usual_names in _COLUMN_NAMES.items():
        if name not in positions and (matches := [names.index(usual) for usual in usual_names if usual in names]):
            positions[name] = matches[0]
    positions.setdefault("path", 0)
    if not header and not columns:
        if width > 1:
            positions["label"] = 1
        if width == 3 and all(len(row) == 3 and row[2].lower() in SPLIT_NAMES for _, row in rows):
            positions["split"] = 2
    elif "label" not in positions and not columns and len(header) == 2 and positions["path"] == 0:
        positions["label"] = 1
    return positions


def _source_of_files(
    name: str,
    flag: str,
    by_split: dict[str, list[_File]],
    options: SourceOptions,
    progress: Progress,
    *,
    numeric_labels: bool = False,
) -> Source:
    """A source of image files, given by the source's own split ("" where it has none)."""
    all_files = [file for members in by_split.values() for file in members]
    classes = number_classes(
        flag, tally((file.label, file.name) for file in all_files), options, numeric=numeric_labels
    )
    numbers = classes.number
    selected = select_splits(flag, by_split, options)
    if selected is None:
        hashes: list[bytes] = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = (functools.partial(_hash, file.path, options.seed) for file in all_files)
            for result in run_in_order(pool, jobs, _HASHES_AHEAD):
                hashes.append(result())
                progress("hash", len(hashes), len(all_files))
        labels = [numbers[file.label] for file in all_files]
        assigned = split_by_share(options.shares, options.seed, labels, hashes)
        members_of = {split: [all_files[number] for number in members] for split, members in assigned.items()}
    else:
        members_of = {split: by_split[source_split] for split, source_split in selected.items()}

    def source_split(split: str, members: list[_File]) -> SourceSplit:
        def loaders(start: int, stop: int) -> Iterator[Loader]:
            for file in members[start:stop]:
                yield functools.partial(_load, file, numbers[file.label], options.upright)

        def key(start: int, stop: int) -> str:
            return "\n".join(f"{file.path}\t{numbers[file.label]}\t{file.mark}" for file in members[start:stop])

        return SourceSplit(split, len(members), loaders, key)

    splits = tuple(source_split(split, members) for split, members in members_of.items())
    return Source(name, classes.names, splits, notes=classes.notes, warnings=classes.warnings)


def _hash(path: str, seed: int) -> bytes:
    """Hashes a file's content; its path if it cannot be read, which `_load` reports later."""
    try:
        return content_hash(files.read(path, "an image"), seed)
    except DataError:
        return content_hash(path.encode(), seed)


def _load(file: _File, label: int, upright: bool) -> ValidatedImage:
    try:
        encoded = files.read(file.path, "an image")
    except DataError as error:
        raise images.UnusableImage(file.path, str(error)) from error
    return images.validate_image(encoded, label, file.name, file.path, upright)
