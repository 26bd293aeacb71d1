"""Folders of image files, and CSV tables of them, as sources."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.core.errors import DataError
from trainer.core.wording import NAMED, first_few, plural
from trainer.data.dataset import INDEX_FILE
from trainer.ingest import images
from trainer.ingest.images import ValidatedImage
from trainer.ingest.labels import NO_LABEL, Classes, clean, number_classes, tally
from trainer.ingest.listing import IMAGE_SUFFIXES, Listing, list_images, printable
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
from trainer.ingest.table import Row, read_table
from trainer.io import destination, files

_HASHES_AHEAD = 256  # files read at a time to assign them to splits by their content
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_WEB = ("http://", "https://")
_NEARBY, _EACH_LEVEL = 3, 5  # levels below a table, and folders of each, in which a missing image is looked for


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

    Of two levels, the upper one is the split if all its names mean a split (`SPLIT_NAMES`) or
    --splits names some of them, and the class otherwise. Without a split level, all images are
    `train`; without a class level, images are unlabelled.

    Args:
        path: local folder or gs:// prefix.
        options: flags common to all sources.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        DataError: the folder is missing, or has no images, or has images at different depths.
    """
    flag = f"--dataset=folder:{path}"
    _require_folder(flag, path)
    listing = list_images(path, progress)
    depth = _depth(flag, path, listing)
    notes, warnings = list[str](), list[str]()
    if line := listing.left_out.line():
        (warnings if "unreadable" in listing.left_out.counts else notes).append(line)
    split_level = depth == 3 or (depth == 2 and _has_splits(flag, listing, options, warnings))
    class_level = depth - split_level > 1
    by_split: dict[str, list[_File]] = {}
    for parts, mark in listing.images:
        label = clean(parts[-2]) if class_level and options.labelled else ""
        file = _File(files.join(path, *parts), "/".join(parts), label, mark)
        by_split.setdefault(clean(parts[0]) if split_level else "", []).append(file)
    if depth == 3:
        _require_splits_above(flag, listing)
        unusual = [split for split in by_split if split.lower() not in SPLIT_NAMES]
        if unusual:
            notes.append(f"taken as splits, since they hold folders of images: {_first(unusual)}")
    found = tally((file.label, file.name) for members in by_split.values() for file in members)
    if class_level and options.labelled and "" in found:
        raise DataError(f"{flag}: the folder of {found[''].where} has a blank name: name the class")
    classes = number_classes(flag, found, options)
    if class_level and options.labelled and len(found) == 1:
        (only,) = found
        warnings.append(f"the folders name one class only, {printable(only)!r}: each class needs a folder of its own")
    if empty := listing.empty_folders():
        # An empty class folder in one split is reported as a class without images there.
        lacking = [parts for parts in empty if len(parts) == depth - 1 and clean(parts[-1]) not in classes.names]
        (warnings if lacking else notes).append(
            f"{plural(len(empty), 'folder has', 'folders have')} no image: "
            f"{_first(['/'.join(parts) for parts in lacking + [e for e in empty if e not in lacking]])}"
            + ("; a class needs at least one" if lacking else "")
        )
    metadata = {"not_images": dict(sorted(listing.left_out.counts.items()))} if listing.left_out.counts else {}
    name = f"folder {printable(posixpath.basename(path.rstrip('/')))}"
    return _source_of_files(name, flag, by_split, classes, options, progress, metadata, notes, warnings)


def _require_folder(flag: str, path: str) -> None:
    """Raises if `path` is not a folder, on a disk."""
    if files.is_remote(path) or os.path.isdir(path):
        return
    if not os.path.exists(path):
        raise DataError(f"{flag}: there is no such folder")
    if path.lower().endswith(_ARCHIVES):
        raise DataError(f"{flag} is an archive: unpack it, and give the folder")
    kind = "csv:" if path.lower().endswith((".csv", ".tsv")) else "tfrecord:" if ".tfrec" in path.lower() else ""
    advice = f"for this kind of file, --dataset={kind}{path}" if kind else "give the folder that holds the images"
    raise DataError(f"{flag} is a file: {advice}")


def _depth(flag: str, path: str, listing: Listing) -> int:
    """Returns the number of parts in the paths of all images.

    Raises:
        DataError: there are no images, or they lie at different depths or too deep.
    """
    depths: dict[int, list[str]] = {}
    for parts, _ in listing.images:
        depths.setdefault(len(parts), []).append("/".join(parts))
    if len(depths) == 1 and max(depths) <= 3:
        return max(depths)
    if depths:
        examples = " and ".join(
            f"{names[0]}" + (f" (and {len(names) - 1:,} more so)" if len(names) > 1 else "")
            for _, names in sorted(depths.items(), key=lambda item: len(item[1]))
        )
        raise DataError(
            f"{flag} has images at {examples}: all must lie at one depth, as SPLIT/CLASS/NAME, CLASS/NAME, SPLIT/NAME or "
            "NAME"
        )
    if not files.is_remote(path) and os.path.exists(os.path.join(path, INDEX_FILE)):
        raise DataError(f"{flag} is a data set that is prepared already: give it to the job, as --data={path}")
    others = listing.left_out.line()
    raise DataError(
        f"{flag} has no images: they must lie as SPLIT/CLASS/NAME, for example train/daisy/1.jpg, as CLASS/NAME, or, "
        f"without labels, as SPLIT/NAME or NAME, and be files of kinds such as {' '.join(IMAGE_SUFFIXES[:6])}"
        + (f"; {others}" if others else "")
    )


def _has_splits(flag: str, listing: Listing, options: SourceOptions, warnings: list[str]) -> bool:
    """Whether the upper of two levels is splits rather than classes.

    Args:
        flag: the source as given by the user, for messages.
        listing: images at a depth of two.
        options: its `splits` or `shares` decide where names alone do not.
        warnings: gets a line if names of splits are taken as classes.

    Raises:
        DataError: several names mean splits, and others do not.
    """
    tops = sorted({parts[0] for parts, _ in listing.images})
    meaning = [top for top in tops if clean(top).lower() in SPLIT_NAMES]
    others = [top for top in tops if top not in meaning]
    if not others or set(options.splits.values()) & {clean(top) for top in tops}:
        return True
    if len(meaning) > 1 and not options.shares:
        items, example = ",".join(f"{top}={top}" for top in meaning), "train" if "train" in meaning else meaning[0]
        raise DataError(
            f"{flag} has folders that are named as splits ({_first(meaning)}) beside others ({_first(others)}): put all "
            f"images into a split, as {example}/{others[0]}/NAME, or take some folders as unlabelled splits with "
            f"--splits={items}"
        )
    if meaning:
        taken = f"{meaning[0]} is taken as a class" if len(meaning) == 1 else f"{_first(meaning)} are taken as classes"
        warnings.append(f"{taken}, since folders beside are not named as splits: {_first(others)}")
    return False


def _require_splits_above(flag: str, listing: Listing) -> None:
    """Raises if the lower of two levels is named as splits, and the upper one is not."""
    upper, lower = ({clean(parts[level]).lower() for parts, _ in listing.images} for level in (0, 1))
    if lower <= set(SPLIT_NAMES) and not upper & set(SPLIT_NAMES):
        first = listing.images[0][0]
        raise DataError(
            f"{flag} has splits within other folders, as {'/'.join(first)}: put the folder of the split above, as "
            f"{first[1]}/{first[0]}/{first[2]}, or give the folder that holds the splits"
        )


def csv_source(path: str, columns: dict[str, str], options: SourceOptions, progress: Progress) -> Source:
    """A CSV file with a line for each image: path, label, split; the last two may be missing.

    Paths are relative to the table's folder, absolute, or gs://. Labels are class names, or, if all
    are whole numbers, class numbers.

    Args:
        path: the table, separated by comma, semicolon, tab or |.
        columns: of path, label and split: names in the header, or numbers from 0. Empty: found by
            usual names in the header; without one, a third column may hold split names.
        options: flags common to all sources.
        progress: called with what is being done, how many are done, and how many in all.

    Raises:
        ConfigError: a column in `columns` does not exist.
        DataError: not such a table, or an image has two labels; the message has the line.
    """
    flag = f"--dataset=csv:{path}"
    table = read_table(path, flag, columns, options.encoding, SPLIT_NAMES, labelled=options.labelled)
    folder = posixpath.dirname(path)
    by_split: dict[str, list[_File]] = {}
    paths = []
    for row in table.rows:
        paths.append(_locate(folder, row.path))
        label = row.label if options.labelled else ""
        file = _File(paths[-1], row.path, label, destination.mark(paths[-1]))
        by_split.setdefault(row.split, []).append(file)
    if not any(os.path.exists(p) or (files.is_remote(p) and not p.startswith(_WEB)) for p in paths):
        _refuse_missing(flag, folder, table.rows[0], len(paths))
    found = tally((row.label if options.labelled else "", f"line {row.line}") for row in table.rows)
    classes = number_classes(flag, found, options, numeric=True)
    notes, warnings = list(table.notes), list(table.warnings) if options.labelled else []
    _check_repetitions(flag, table.rows, paths, classes if options.labelled else None, notes, warnings)
    name = f"csv {printable(posixpath.basename(path))}"
    return _source_of_files(name, flag, by_split, classes, options, progress, {}, notes, warnings)


def _locate(folder: str, cell: str) -> str:
    """Returns the path of an image that a table names.

    If there is no such local file, backslashes are tried as slashes, and each name in the composed
    and decomposed forms of Unicode: a table and the files often come from different systems.
    """
    path = cell if files.is_remote(cell) else files.join(folder, cell)
    if files.is_remote(path) or os.path.exists(path):
        return path
    for relative in dict.fromkeys((cell, cell.replace("\\", "/"))):
        found = "/" if relative.startswith("/") else folder
        for part in filter(None, relative.split("/")):
            forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
            found = files.join(found, next((form for form in forms if os.path.exists(files.join(found, form))), part))
        if os.path.exists(found):
            return found
    return path


def _refuse_missing(flag: str, folder: str, row: Row, count: int) -> None:
    """Raises for a table of which no file exists; looks for the first one nearby.

    Args:
        flag: the table as given by the user, for messages.
        folder: of the table.
        row: the first one.
        count: rows of the table.
    """
    name = posixpath.basename(row.path.replace("\\", "/"))
    advice = f"paths are relative to the table's folder ({folder or '.'}), absolute, or gs://"
    if row.path.startswith(_WEB):
        advice = "addresses are not downloaded: bring the images into a folder, and give their paths"
    for place, folders, members in os.walk(folder or ".") if name else ():
        folders[:] = sorted(folders)[:_EACH_LEVEL] if place.count("/") - folder.count("/") < _NEARBY else []
        if near := next((m for m in sorted(members) if m == name or os.path.splitext(m)[0] == name), ""):
            where = posixpath.relpath(posixpath.join(place, near), folder or ".")
            advice = f"write {where}, if that is the image: {advice}"
            break
    which = "the image does not exist" if count == 1 else f"none of the {count:,} images exists"
    raise DataError(f"{flag}: {which} (first: {row.path!r}, line {row.line}); {advice}")


def _check_repetitions(
    flag: str, rows: Sequence[Row], paths: Sequence[str], classes: Classes | None, notes: list[str], warnings: list[str]
) -> None:
    """Looks for images that a table names more than once.

    Args:
        flag: the table as given by the user, for messages.
        rows: of the table.
        paths: of the image of each row.
        classes: of the labels; None: labels are not used.
        notes: gets a line about repetitions within a split.
        warnings: gets a line about repetitions across splits.

    Raises:
        DataError: an image has two labels.
    """

    def label(row: Row) -> int:
        return classes.number[row.label] if classes else NO_LABEL

    first: dict[str, Row] = {}
    again: list[str] = []
    across: list[str] = []
    for row, path in zip(rows, paths, strict=True):
        place = path if files.is_remote(path) else posixpath.normpath(path)
        before = first.setdefault(place, row)
        if before is row:
            continue
        if NO_LABEL not in (label(before), label(row)) and label(before) != label(row):
            raise DataError(
                f"{flag}: lines {before.line} and {row.line} give {row.path} two labels, {before.label!r} and {row.label!r}: "
                "an image has one"
            )
        if before.split != row.split:
            across.append(f"{row.path} in {before.split} (line {before.line}) and {row.split} (line {row.line})")
        else:
            again.append(f"{row.path} (lines {before.line} and {row.line})")
        if label(before) == NO_LABEL:
            first[place] = row
    if across:
        warnings.append(f"{plural(len(across), 'image is', 'images are')} in two splits: {_first(across, '; ', 3)}")
    if again:
        notes.append(
            f"{plural(len(again), 'row repeats an image', 'rows repeat images')} of the same split: "
            f"{_first(again, '; ', 3)}"
        )


def _first(names: Sequence[str], separator: str = ", ", most: int = NAMED) -> str:
    """The first few of many names of files, printable."""
    return first_few([printable(name) for name in names], separator, most)


def _source_of_files(
    name: str,
    flag: str,
    by_split: dict[str, list[_File]],
    classes: Classes,
    options: SourceOptions,
    progress: Progress,
    metadata: dict[str, Any],
    notes: Sequence[str],
    warnings: Sequence[str],
) -> Source:
    """A source of image files.

    Args:
        name: of the source.
        flag: the source as given by the user, for messages.
        by_split: files by the source's own split; "" where it has none.
        classes: of the labels of all files.
        options: flags common to all sources.
        progress: see `folder_source`.
        metadata: of the source.
        notes: of the source, without those of `classes`.
        warnings: likewise.

    Raises:
        DataError: --splits does not fit the source's splits, or two of them differ only in case.
    """
    folded = collections.Counter(split.casefold() for split in by_split)
    if alike := [split for split in by_split if folded[split.casefold()] > 1]:
        raise DataError(
            f"{flag} has the splits {_first(alike)}, which differ only in case: make them one, or rename one"
        )
    if unfit := [split for split in by_split if "/" in split or split.startswith(".")]:
        raise DataError(
            f"{flag} has the split {unfit[0]!r}: names of files begin with it, so it cannot have / or begin with ."
        )
    all_files = [file for members in by_split.values() for file in members]
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
    all_notes, all_warnings = (*notes, *classes.notes), (*warnings, *classes.warnings)
    return Source(name, classes.names, splits, metadata, all_notes, all_warnings)


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
