"""TFRecord shards and their index: written once, checked on every read, each record known by file, number and offset.

A data set is a folder with `dataset.json` (written last: it commits the rest) and shards `SPLIT-00000-of-00004.tfrecord`.
A record is a tf.train.Example: image/encoded (bytes as they came), image/height, image/width (pixels of the original),
image/filename, and label (absent where there is none).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.data import image_header
from trainer.data.dataset import INDEX, Dataset, Shard, Split
from trainer.data.tfrecord import FOOTER, HEADER, frame, location, masked_crc, read_frames
from trainer.io import files


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One encoded image: `encoded` bytes, `height` and `width` of the original in pixels, `label` (-1: none), name."""

    encoded: bytes
    height: int
    width: int
    label: int = -1
    filename: str = ""

    def serialize(self) -> bytes:
        """The tf.train.Example's bytes, the same on every run (map entries in sorted order)."""
        feature = {
            "image/encoded": _bytes(self.encoded),
            "image/filename": _bytes(self.filename.encode()),
            "image/height": _int(self.height),
            "image/width": _int(self.width),
        }
        if self.label >= 0:
            feature["label"] = _int(self.label)
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        return example.SerializeToString(deterministic=True)

    @classmethod
    def parse(cls, payload: bytes, where: str) -> ImageRecord:
        """The inverse of `serialize`.

        Raises:
            DataError: not such a record; `where` is named.
        """
        try:
            feature = tf.train.Example.FromString(payload).features.feature
        except Exception as error:  # protobuf's DecodeError differs between its implementations
            raise DataError(f"{where}: not a tf.train.Example") from error
        encoded = feature["image/encoded"].bytes_list.value
        height, width = (
            feature["image/height"].int64_list.value,
            feature["image/width"].int64_list.value,
        )
        label, name = feature["label"].int64_list.value, feature["image/filename"].bytes_list.value
        if len(encoded) != 1 or len(height) != 1 or len(width) != 1 or len(label) > 1:
            raise DataError(f"{where}: a tf.train.Example without image/encoded, image/height and image/width")
        if height[0] < 1 or width[0] < 1:
            raise DataError(f"{where}: image size {height[0]} x {width[0]} pixels")
        text = name[0].decode(errors="replace") if name else ""
        return cls(encoded[0], height[0], width[0], label[0] if label else -1, text)


def _bytes(value: bytes) -> Any:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _int(value: int) -> Any:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def write_shard(folder: str, file: str, pictures: Iterable[ImageRecord]) -> Shard:
    """Writes one shard to a local folder, whole or not at all; one picture at a time is in memory.

    Raises:
        DataError: it cannot be written.
    """
    path, count, size, crc = files.join(folder, file), 0, 0, 0
    try:
        with files.replacing(path, "a shard") as target:
            for picture in pictures:
                record = frame(picture.serialize())
                target.write(record)
                count, size, crc = count + 1, size + len(record), google_crc32c.extend(crc, record)
    except OSError as error:
        raise DataError(f"cannot write a shard {path}: {files.reason(error)}") from error
    return Shard(file, count, size, crc)


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes one JPEG, PNG, BMP or GIF (its first frame): string scalar -> uint8 [height, width, 3]."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


# Where a record's payload lies in its shard, in bytes, and what the store wants to know of it without reading it.
ENTRY = np.dtype([("offset", "<i8"), ("length", "<i4"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
_NOWHERE = np.array((-1, 0, -1, 0, 0), ENTRY)  # a bad record's


@dataclasses.dataclass(frozen=True, order=True)
class CorruptRecord:
    """A record that cannot be used: its shard's file name, number and byte offset there, and why."""

    file: str
    record: int
    offset: int
    reason: str


class CorruptRecordLog:
    """The bad records of a split, and how many of them a run bears."""

    def __init__(self, dataset: Dataset, split: Split, limit: float = 0.0) -> None:
        """`limit`: largest share of bad records, 0..1 (--max_bad_fraction); at 0 the first one is an error."""
        self._folder, self._split, self.limit = dataset.folder, split, limit
        self._found: list[CorruptRecord] = []

    def add(self, file: str, record: int, offset: int, reason: str) -> None:
        """Counts one.

        Raises:
            DataError: that was one too many.
        """
        self._found.append(CorruptRecord(file, record, offset, reason))
        if len(self._found) > self.limit * self._split.examples:
            place = location(files.join(self._folder, file), record, offset)
            share = ""
            if self.limit:
                share = f"; with it {len(self._found)} of {self._split.examples:,} records of {self._split.name!r} are bad, "
                share += f"more than --max_bad_fraction={self.limit:g}"
            raise DataError(f"{place} {reason}{share}: prepare or copy the data set again")

    @property
    def bad(self) -> list[CorruptRecord]:
        """All so far, in the split's order of files and records."""
        return sorted(self._found)

    def lines(self) -> list[str]:
        """One for each, for people."""
        return [f"{location(files.join(self._folder, b.file), b.record, b.offset)} {b.reason}" for b in self.bad]


def index_shard(
    dataset: Dataset, shard: Shard, content: bytes | memoryview, path: str, damage: CorruptRecordLog | None = None
) -> np.ndarray:
    """Checks every record of a shard and says where each is: `ENTRY` [examples]. All ways into a store come through here.

    Args:
        dataset: whose classes a label must be among.
        shard: what dataset.json says of it.
        content: the whole file.
        path: where it came from, for messages.
        damage: counts bad records, whose entries are left at an offset of -1; by default the first one is an error.

    Raises:
        DataError: more bad records than `damage` bears; more records than dataset.json says; or no bad one and another CRC.
    """
    damage = damage or CorruptRecordLog(dataset, Split("", (shard,)))
    table = np.full(shard.examples, _NOWHERE, ENTRY)
    number = -1
    for number, (offset, payload, trouble) in enumerate(read_frames(content)):
        if number >= shard.examples:
            more = len(content) - offset
            raise DataError(f"{path} has {more:,} bytes after its {number:,} records; {INDEX} knows none")
        if payload is None:
            damage.add(shard.file, number, offset, trouble)
            continue
        try:
            picture = check_record(dataset, bytes(payload))
        except image_header.InvalidImage as error:
            damage.add(shard.file, number, offset, f"is unusable: {error}")
            continue
        table[number] = (offset + HEADER.size, len(payload), picture.label, picture.height, picture.width)
    lost = "it was lost in the damage before it"
    if len(content) < shard.bytes:
        lost = f"the file has {len(content):,} of {shard.bytes:,} bytes"
    for missing in range(number + 1, shard.examples):
        damage.add(shard.file, missing, len(content), f"is not there: {lost}")
    if damage.limit:
        _decode_all(content, table, shard, damage)
    if (table["offset"] >= 0).all() and google_crc32c.value(bytes(content)) != shard.crc32c:
        raise DataError(
            f"{path} does not have the CRC32C that {INDEX} says: it is another file; prepare or copy it again"
        )
    return table


def check_record(dataset: Dataset, payload: bytes) -> ImageRecord:
    """The picture of a record's payload, everything about it checked that can be without decoding it.

    Raises:
        Unfit: it cannot be used; the text says why.
    """
    try:
        picture = ImageRecord.parse(payload, "")
    except DataError as error:
        raise image_header.InvalidImage(str(error).removeprefix(": ")) from error
    if picture.label >= max(1, len(dataset.classes)):
        raise image_header.InvalidImage(f"label {picture.label}, but {INDEX} names {len(dataset.classes)} classes")
    try:
        header = image_header.parse_header(picture.encoded)
    except image_header.InvalidImage as error:
        raise image_header.InvalidImage(f"{error} ({picture.filename or 'without a name'})") from error
    if (header.height, header.width) != (picture.height, picture.width):
        raise image_header.InvalidImage(
            f"its image has {header.height} x {header.width} pixels; its record says {picture.height} x {picture.width}"
        )
    return picture


def _decode_all(content: bytes | memoryview, table: np.ndarray, shard: Shard, damage: CorruptRecordLog) -> None:
    """Where bad records are left out, all of them must be known before the first step: so every image is decoded once."""

    def trouble(number: int) -> str:
        start = int(table[number]["offset"])
        encoded = ImageRecord.parse(bytes(content[start : start + int(table[number]["length"])]), "").encoded
        try:
            if encoded.startswith(b"\xff\xd8"):
                tf.io.decode_jpeg(encoded, channels=3, ratio=8)  # reads every byte and leaves most arithmetic out
            else:
                decode(tf.constant(encoded))
        except tf.errors.OpError:
            return "is unusable: its image cannot be decoded"
        return ""

    good = np.flatnonzero(table["offset"] >= 0).tolist()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, reason in zip(good, pool.map(trouble, good), strict=True):
            if reason:
                damage.add(shard.file, number, int(table[number]["offset"]) - HEADER.size, reason)
                table[number] = _NOWHERE


class EncodedShard:
    """The records of one shard, still encoded, reached by number.

    Attributes:
        table: `ENTRY` of the records that can be used; a number is a position in it.
    """

    def __init__(self, path: str, table: np.ndarray, content: bytes | int) -> None:
        """
        Args:
            path: for messages.
            table: made by `index`.
            content: the whole file, or the handle of the open file, which is read record by record and closed with this
                object. Reads are positional, not through a memory map: a thread that waits for the disk lets the others
                run, what the kernel keeps is not counted as the job's memory, and a file cut short is an error and no crash.
        """
        self._records = np.flatnonzero(table["offset"] >= 0)
        self.table = table if len(self._records) == len(table) else table[self._records]
        self._path, self._content = path, content
        if isinstance(content, int):
            weakref.finalize(self, os.close, content)

    def picture(self, number: int) -> ImageRecord:
        """Record `number`, parsed.

        Raises:
            DataError: what is in the file now is not what was indexed.
        """
        entry, where = self.table[number], self.where(number)
        offset, length = int(entry["offset"]), int(entry["length"])
        if isinstance(self._content, bytes):
            return ImageRecord.parse(self._content[offset : offset + length], where)
        try:
            raw = os.pread(self._content, length + FOOTER.size, offset)
        except OSError as error:
            raise DataError(f"{where} cannot be read: {files.reason(error)}") from error
        payload, footer = raw[:length], raw[length:]
        if len(footer) != FOOTER.size or masked_crc(payload) != FOOTER.unpack(footer)[0]:
            raise DataError(
                f"{where} is damaged (its CRC32C does not match): the file has changed since it was checked"
            )
        return ImageRecord.parse(payload, where)

    def where(self, number: int) -> str:
        """File, record number and byte offset, for messages."""
        return location(self._path, int(self._records[number]), int(self.table[number]["offset"]) - HEADER.size)


class EncodedSplit:
    """All records of a split, still encoded, reached by example id.

    An example's id is its position in the split: shard after shard, record after record.

    Attributes:
        labels: int32 [examples], -1 where a record has none.
        sizes: float32 [examples, 2], height and width of the originals in pixels.
    """

    def __init__(self, dataset: Dataset, split: Split, shards: Sequence[EncodedShard] = ()) -> None:
        """
        Args:
            dataset: that the split is of.
            split: which.
            shards: its shards, opened and checked; by default they are read whole into memory, and checked.

        Raises:
            DataError: a shard is missing, has another length or count than dataset.json says, or is damaged.
        """
        self._shards = list(shards) or list(read_shards(dataset, split))
        self._starts = np.cumsum([0, *(len(shard.table) for shard in self._shards)])
        tables = [shard.table for shard in self._shards]
        self.labels = np.concatenate([table["label"] for table in tables]).astype(np.int32)
        self.sizes = np.concatenate([original_sizes(table) for table in tables])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def picture(self, example: int) -> ImageRecord:
        """The record with id `example`, parsed."""
        shard, number = self._place(example)
        return shard.picture(number)

    def where(self, example: int) -> str:
        """File, record number and byte offset of an example, for messages."""
        shard, number = self._place(example)
        return shard.where(number)

    def _place(self, example: int) -> tuple[EncodedShard, int]:
        shard = int(np.searchsorted(self._starts, example, side="right")) - 1
        return self._shards[shard], int(example - self._starts[shard])


def original_sizes(table: np.ndarray) -> np.ndarray:
    """Heights and widths of `ENTRY` [n] in pixels: float32 [n, 2]."""
    return np.stack([table["height"], table["width"]], axis=1).astype(np.float32)


def read_shards(dataset: Dataset, split: Split, damage: CorruptRecordLog | None = None) -> Iterator[EncodedShard]:
    """The shards of a split, each read whole into memory and checked.

    Raises:
        DataError: one is missing, or more records are bad than `damage` bears (none, by default).
    """
    for shard in split.shards:
        path = files.join(dataset.folder, shard.file)
        content = files.read(path, "a shard")
        yield EncodedShard(path, index_shard(dataset, shard, content, path, damage), content)
