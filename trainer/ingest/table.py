"""Tables of images: CSV text to path, label and split of each row.

Everything that could assign an image to the wrong class is an error with its line, rather than a
guess.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence

from trainer.core.errors import ConfigError, DataError
from trainer.ingest.labels import clean
from trainer.ingest.listing import IMAGE_SUFFIXES
from trainer.io import files, text

# Headers that name a column of a table, as `_header_key` leaves them, in order of preference.
_COLUMN_NAMES = {
    "path": (
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "image_file",
        "image_name",
        "img",
        "img_path",
    ),
    "label": (
        "label",
        "class",
        "class_name",
        "category",
        "target",
        "labels",
        "label_name",
        "category_name",
        "classname",
        "class_id",
        "label_id",
        "category_id",
        "species",
    ),
    "split": ("split", "subset", "partition"),
}
_INDEX_TITLES = ("", "index", "unnamed:_0")
# Titles of columns that are a split in many tables, and something else in others.
_SPLIT_TITLES = (
    "fold",
    "kfold",
    "set",
    "data_set",
    "dataset",
    "phase",
    "usage",
    "is_valid",
    "is_val",
    "is_test",
    "is_train",
)
_SEPARATORS = ",;\t|"
# A line of a list such as those of ImageNet: path, blank, label.
_LISTED = re.compile(rf"(.+(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\s+(\S.*)", re.IGNORECASE)
# First bytes of files that are taken for tables.
_NOT_CSV = {
    b"PK\x03\x04": "a workbook or a zip file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed",
    b"{": "JSON",
    b"[": "JSON",
}
_SAMPLE_ROWS, _SAMPLE_CHARACTERS = 20, 1 << 16  # of the text, by which the separator is found


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """An image of a table.

    Attributes:
        line: in the file, from 1.
        path: as the table has it.
        label: as `clean` leaves it; "": none.
        split: "": the table has none.
    """

    line: int
    path: str
    label: str
    split: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a table, and lines for the user about how they were understood."""

    rows: list[Row]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


Cells = tuple[int, list[str]]  # line and cells of a row; empty cells at its end are left out


def read_table(
    path: str, flag: str, columns: dict[str, str], encoding: str, split_names: Sequence[str], *, labelled: bool
) -> Table:
    """Reads a table.

    The first row is a header if it has the name of a column that is looked for, or else if none of
    its cells is the path of an image.

    Args:
        path: of the table.
        flag: the table as given by the user, for messages.
        columns: of path, label and split: names in the header, or numbers from 0.
        encoding: of the text, a Python codec; empty: UTF-8, or what a byte order mark says.
        split_names: texts by which a column without a header is known as the split.
        labelled: whether labels are needed, so that it must be clear which column has them.

    Raises:
        ConfigError: a column in `columns` does not exist, or two are the same.
        DataError: not such a table; the message has the line.
    """
    encoded = files.read(path, "a table")
    if kind := next((kind for magic, kind in _NOT_CSV.items() if encoded.startswith(magic)), ""):
        raise DataError(f"{flag} is {kind}: save it as CSV")
    content = text.decode(encoded, path, encoding)
    rows = _without_comments(_cells(content, flag))
    if not rows:
        raise DataError(f"{flag} is empty")
    header = _header(rows[0][1], columns, posixpath.dirname(path))
    rows = rows[1:] if header else rows
    if not rows:
        raise DataError(f"{flag} has a header and no images")
    width = len(header) or len(rows[0][1])
    for line, cells in rows:
        if len(cells) > width:
            raise DataError(
                f"{flag}: line {line} has {len(cells)} cells and {'the header' if header else 'the first row'} has {width}: "
                "put quotation marks around a cell that contains the separator, or complete the first row"
            )
    if header and all(cells[-1].endswith(";") for cells in (header, *(cells for _, cells in rows))):
        raise DataError(
            f"{flag}: every line ends with ; but commas separate the cells: delete it, since it would be in each label"
        )
    notes: list[str] = []
    warnings: list[str] = []
    positions = _positions(flag, header, rows, columns, split_names, notes)
    if labelled and "label" not in positions and not columns:
        _refuse_unclear_label(flag, header, rows, positions)
    return Table(list(_rows(flag, header, rows, positions, columns, notes, warnings)), tuple(notes), tuple(warnings))


def _cells(content: str, flag: str) -> Iterator[Cells]:
    """Yields the rows that are not empty."""
    lines_before = 0
    if declared := re.match(r"sep=(.)\r?\n", content):  # as Excel writes it
        separator, content, lines_before = declared[1], content[declared.end() :], 1
    else:
        fits = {separator: _fit(content[:_SAMPLE_CHARACTERS], separator) for separator in _SEPARATORS}
        separator = max(fits, key=lambda separator: fits[separator])
        if not fits[separator][0] and (listed := _listed(content)):
            yield from listed
            return
    reader = csv.reader(io.StringIO(content, newline=None), delimiter=separator, skipinitialspace=True)
    line = lines_before + 1
    try:
        for row in reader:
            cells = _stripped(row)
            if cells and reader.line_num + lines_before > line and any("\n" in cell for cell in cells):
                raise DataError(
                    f"{flag}: a quotation mark in line {line} is closed in another line, so that what is between is one cell: "
                    "close it, or double it if it belongs to the text"
                )
            if cells:
                yield line, cells
            line = reader.line_num + lines_before + 1
    except csv.Error as error:
        raise DataError(f"{flag}: line {line} is not CSV: {error}") from error


def _listed(content: str) -> list[Cells]:
    """Returns path and label of each line, if all lines have the form of `_LISTED`."""
    lines = [(number, line.strip()) for number, line in enumerate(io.StringIO(content, newline=None), 1)]
    matches = [(number, _LISTED.fullmatch(line)) for number, line in lines if line and not line.startswith("#")]
    if not all(match for _, match in matches):
        return []
    return [(number, [match[1], match[2]]) for number, match in matches if match]


def _fit(content: str, separator: str) -> tuple[bool, int, int]:
    """Rates a separator: whether it cuts the first row, and how many rows it cuts alike."""
    reader = csv.reader(io.StringIO(content, newline=None), delimiter=separator, skipinitialspace=True)
    try:
        rows = list(itertools.islice(filter(None, map(_stripped, reader)), _SAMPLE_ROWS))
    except csv.Error:
        return False, 0, 0
    rows = [row for row in rows if not row[0].startswith("#")] or rows
    width = len(rows[0]) if rows else 0
    return width > 1, sum(len(row) == width for row in rows), width


def _stripped(row: list[str]) -> list[str]:
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _is_image(cell: str) -> bool:
    return cell.lower().endswith(IMAGE_SUFFIXES)


def _header_key(cell: str) -> str:
    return re.sub(r"[\s-]+", "_", cell.strip().lower())


def _without_comments(rows: Iterator[Cells]) -> list[Cells]:
    """Leaves out rows that begin with # and hold no image, except a header written so."""
    usual = {name for names in _COLUMN_NAMES.values() for name in names}
    kept: list[Cells] = []
    for line, cells in rows:
        if cells[0].startswith("#") and not any(map(_is_image, cells)):
            without = [cells[0].lstrip("# "), *cells[1:]]
            if kept or not usual.intersection(map(_header_key, without)):
                continue
            cells = without
        kept.append((line, cells))
    return kept


def _header(cells: list[str], columns: dict[str, str], folder: str) -> list[str]:
    """Returns the first row's cells if it is a header, else an empty list."""
    keys = {_header_key(cell) for cell in cells}
    asked = {_header_key(column) for column in columns.values() if not column.isdigit()}
    if any(map(_is_image, cells)):
        return []
    if asked & keys:
        return cells
    usual = {name for names in _COLUMN_NAMES.values() for name in names}
    if usual & keys or files.is_remote(folder):
        return cells
    # Files need no suffix, so a path may look like any word.
    if any(cell and os.path.isfile(files.join(folder, cell)) for cell in cells):
        return []
    return cells


def _positions(
    flag: str,
    header: list[str],
    rows: list[Cells],
    columns: dict[str, str],
    split_names: Sequence[str],
    notes: list[str],
) -> dict[str, int]:
    """Returns the position of path, label and split in a row, as far as the table has them.

    Args:
        flag: the table as given by the user, for messages.
        header: names of the columns; empty: none.
        rows: what follows.
        columns: as the user gave them.
        split_names: see `read_table`.
        notes: gets lines about choices among several columns.
    """
    keys, width = [_header_key(name) for name in header], max(len(cells) for _, cells in rows)
    positions: dict[str, int] = {}
    for name, column in columns.items():
        matches = [number for number, title in enumerate(header) if title == column] or [
            number for number, key in enumerate(keys) if key == _header_key(column)
        ]
        if len(matches) > 1:
            raise ConfigError(
                f"--columns: {flag} has {len(matches)} columns {column!r}; take one by number, as --columns={name}:{matches[0]}"
            )
        if matches:
            positions[name] = matches[0]
        elif column.isdigit() and int(column) < max(width, len(header)):
            positions[name] = int(column)
        else:
            available = ", ".join(header) if header else f"{width} without a header: 0 to {width - 1}"
            raise ConfigError(f"--columns: {flag} has no column {column!r} for {name}; there are {available}")
    for name, usual_names in _COLUMN_NAMES.items():
        taken = set(positions.values())
        matches = [
            number for usual in usual_names for number, key in enumerate(keys) if key == usual and number not in taken
        ]
        if name in positions or not matches:
            continue
        first = matches[0]
        if keys.count(keys[first]) > 1:
            raise DataError(
                f"{flag} has {keys.count(keys[first])} columns {header[first]!r}; say which is the {name}, as "
                f"--columns={name}:{first} (numbers from 0)"
            )
        positions[name] = first
        if len(matches) > 1:
            others = ", ".join(header[number] for number in matches[1:])
            notes.append(
                f"the column {header[first]!r} is taken as {name}, not {others}; --columns={name}:... takes another"
            )
    if "path" not in positions:
        taken = set(positions.values())
        free = [number for number in range(max(width, len(header))) if number not in taken]
        first_cells = dict(enumerate(rows[0][1]))
        positions["path"] = next((n for n in free if _is_image(first_cells.get(n, ""))), free[0] if free else 0)
    if not columns:
        _default_positions(header, rows, width, positions, split_names)
    used = sorted(positions.values())
    if len(set(used)) < len(used):
        raise ConfigError(f"--columns: {flag}: path, label and split must be different columns")
    return positions


def _default_positions(
    header: list[str], rows: list[Cells], width: int, positions: dict[str, int], split_names: Sequence[str]
) -> None:
    """Adds split and label where only one column can be meant.

    Args:
        header: names of the columns; empty: none.
        rows: what follows.
        width: cells of the longest row.
        positions: gets label and split.
        split_names: see `read_table`.
    """
    if header:
        # pandas writes the numbers of the rows in a column without a name.
        named = [number for number, title in enumerate(header) if _header_key(title) not in _INDEX_TITLES]
    else:
        named = list(range(width))
        splits = [n for n in named if all(len(cells) > n and cells[n].lower() in split_names for _, cells in rows)]
        if width > 2 and len(splits) == 1:
            positions["split"] = splits[0]
    rest = [number for number in named if number not in positions.values()]
    if "label" not in positions and len(rest) == 1 and ("split" not in positions or not header):
        positions["label"] = rest[0]


def _refuse_unclear_label(flag: str, header: list[str], rows: list[Cells], positions: dict[str, int]) -> None:
    """Raises if a table has no label column, but several columns that could be labels together.

    Args:
        flag: the table as given by the user, for messages.
        header: names of the columns; empty: none.
        rows: what follows.
        positions: of path and split.
    """
    width = max(len(header), *(len(cells) for _, cells in rows))
    rest = [number for number in range(width) if number not in positions.values()]
    binary = [n for n in rest if all(len(cells) > n and cells[n] in ("0", "1", "0.0", "1.0") for _, cells in rows)]
    if header and len(binary) > 1:
        some = ", ".join(header[number] for number in binary[:3])
        raise DataError(
            f"{flag} has no column of labels but {len(binary)} columns of 0 and 1 ({some}{', ...' if len(binary) > 3 else ''}): "
            "write one column 'label' with the name of the class, or take the images alone with --unlabelled"
        )
    if not header and len(rest) > 1:
        columns = f"--columns=path:{positions['path']},label:{rest[-1]}"
        raise DataError(
            f"{flag} has no header and {width} columns, of which {', '.join(map(str, rest))} could be the label: say which, as "
            f"{columns} (numbers from 0)"
        )


def _rows(
    flag: str,
    header: list[str],
    rows: list[Cells],
    positions: dict[str, int],
    columns: dict[str, str],
    notes: list[str],
    warnings: list[str],
) -> Iterator[Row]:
    """Yields path, label and split of each row.

    Args:
        flag: the table as given by the user, for messages.
        header: names of the columns; empty: none.
        rows: what follows.
        positions: of path, label and split.
        columns: as the user gave them.
        notes: gets lines about rows without a label.
        warnings: gets a line about a missing or empty column.
    """
    unlabelled = 0
    for line, cells in rows:
        cell = {name: cells[column] if column < len(cells) else "" for name, column in positions.items()}
        if not cell["path"]:
            raise DataError(f"{flag}: line {line} names no file")
        if "split" in positions and not cell["split"]:
            raise DataError(f"{flag}: line {line} ({cell['path']}) has no split")
        label = clean(cell.get("label", ""))
        unlabelled += not label
        yield Row(line, cell["path"], label, clean(cell.get("split", "")))
    width = max(len(header), *(len(cells) for _, cells in rows))
    if not header and not columns and width > len(positions):
        chosen = ", ".join(f"{name} is column {number}" for name, number in positions.items())
        notes.append(f"the table has no header and {width} columns: {chosen} (from 0); --columns=... takes others")
    if header and "split" not in positions:
        for number, title in enumerate(header):
            if _header_key(title) in _SPLIT_TITLES and number not in positions.values():
                warnings.append(
                    f"the column {title!r} is not used, so all images are in one split; --columns=split:{title} takes its values "
                    "as the names of splits"
                )
    if "label" not in positions:
        if width > len(positions):
            titles = header or map(str, range(width))
            names = ", ".join(name for number, name in enumerate(titles) if name and number not in positions.values())
            warnings.append(
                f"no column is known as the label, so no image has one; --columns=label:... takes one of {names}"
            )
    elif unlabelled == len(rows):
        name = header[positions["label"]] if header else positions["label"]
        if "label" in columns:
            raise DataError(f"{flag}: the column {name!r} (from --columns) is empty in every row")
        warnings.append(f"the column {name!r} is empty in every row, so no image has a label")
    elif unlabelled:
        notes.append(f"{unlabelled:,} of {len(rows):,} rows have no label")
