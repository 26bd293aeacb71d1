"""Image records in TFRecord shards, checked on every read and located by file, number and offset.

A data set is a folder with shards `SPLIT-00000-of-00004.tfrecord` and `dataset.json`, which is
written last and makes the data set complete. A record is a tf.train.Example: image/encoded (bytes
of an image file), image/height and image/width (pixels of the original), image/filename, and label
(absent if there is none).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence

import google_crc32c
import numpy as np
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.data import image_header, strict_decode
from trainer.data.dataset import INDEX_FILE, Dataset, Shard, Split
from trainer.data.tfrecord import FOOTER, HEADER, frame, location, masked_crc, read_frames
from trainer.io import files


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One encoded image.

    Attributes:
        encoded: bytes of an image file (JPEG, PNG, GIF or BMP).
        height: of the original, in pixels.
        width: of the original, in pixels.
        label: class number; -1: none.
        filename: display name.
    """

    encoded: bytes
    height: int
    width: int
    label: int = -1
    filename: str = ""

    def serialize(self) -> bytes:
        """Serializes to a tf.train.Example, deterministically (map entries in sorted order)."""
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
        """Parses the output of `serialize`.

        Raises:
            DataError: not such a record. The message begins with `where`.
        """
        try:
            feature = tf.train.Example.FromString(payload).features.feature
        except Exception as error:  # protobuf's DecodeError differs between its implementations
            raise DataError(f"{where}: not a tf.train.Example") from error
        encoded = feature["image/encoded"].bytes_list.value
        height, width = feature["image/height"].int64_list.value, feature["image/width"].int64_list.value
        label, filename = feature["label"].int64_list.value, feature["image/filename"].bytes_list.value
        if len(encoded) != 1 or len(height) != 1 or len(width) != 1 or len(label) > 1:
            raise DataError(f"{where}: a tf.train.Example without image/encoded, image/height and image/width")
        if height[0] < 1 or width[0] < 1:
            raise DataError(f"{where}: image size {height[0]} x {width[0]} pixels")
        name = filename[0].decode(errors="replace") if filename else ""
        return cls(encoded[0], height[0], width[0], label[0] if label else -1, name)


def _bytes(value: bytes) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _int(value: int) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def write_shard(folder: str, file: str, images: Iterable[ImageRecord]) -> Shard:
    """Writes one shard atomically: the file appears complete or not at all.

    Holds one image in memory at a time.

    Args:
        folder: a local folder.
        file: name of the shard in it.
        images: consumed in order.

    Returns:
        The shard's entry for dataset.json.

    Raises:
        DataError: it cannot be written.
    """
    path, count, size, crc = files.join(folder, file), 0, 0, 0
    try:
        with files.replacing(path, "a shard") as output:
            for image in images:
                record = frame(image.serialize())
                output.write(record)
                count, size, crc = count + 1, size + len(record), google_crc32c.extend(crc, record)
    except OSError as error:
        raise DataError(f"cannot write a shard {path}: {files.reason(error)}") from error
    return Shard(file, count, size, crc)


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP or GIF (first frame): string scalar -> uint8 [height, width, 3]."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


# The index of a shard: byte offset and length of each record's payload, and what is needed without
# reading the payload.
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<i4"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
_CORRUPT_ENTRY = np.array((-1, 0, -1, 0, 0), INDEX_DTYPE)


@dataclasses.dataclass(frozen=True, order=True)
class CorruptRecord:
    """A record that cannot be used.

    Attributes:
        file: name of its shard.
        record: number in the shard, from 0.
        offset: byte offset in the shard.
        reason: what is wrong with it, as the predicate of a sentence.
    """

    file: str
    record: int
    offset: int
    reason: str


class CorruptRecordLog:
    """Collects the corrupt records of a split and raises once their share exceeds the limit.

    Attributes:
        max_fraction: largest share of corrupt records, 0..1; 0: the first one raises.
    """

    def __init__(self, dataset: Dataset, split: Split, max_fraction: float = 0.0) -> None:
        """
        Args:
            dataset: the data set of the split.
            split: whose records are counted.
            max_fraction: largest share of corrupt records, 0..1 (--max_bad_fraction); 0: the first
                one raises.
        """
        self._folder, self._split, self.max_fraction = dataset.folder, split, max_fraction
        self._records: list[CorruptRecord] = []

    def add(self, record: CorruptRecord) -> None:
        """Adds a corrupt record.

        Raises:
            DataError: the share of corrupt records now exceeds the limit.
        """
        self._records.append(record)
        if len(self._records) > self.max_fraction * self._split.examples:
            share = ""
            if self.max_fraction:
                share = (
                    f"; with it {len(self._records)} of {self._split.examples:,} records of {self._split.name!r} are bad, "
                    f"more than --max_bad_fraction={self.max_fraction:g}"
                )
            raise DataError(f"{self._describe(record)}{share}: prepare or copy the data set again")

    @property
    def records(self) -> list[CorruptRecord]:
        """All corrupt records so far, in the split's order of files and records."""
        return sorted(self._records)

    def messages(self) -> list[str]:
        """Returns a line for each corrupt record: file, number, byte offset and reason."""
        return [self._describe(record) for record in self.records]

    def _describe(self, record: CorruptRecord) -> str:
        return f"{location(files.join(self._folder, record.file), record.record, record.offset)} {record.reason}"


def index_shard(
    dataset: Dataset, shard: Shard, content: bytes | memoryview, path: str, corrupt: CorruptRecordLog | None = None
) -> np.ndarray:
    """Checks every record of a shard and locates it.

    Every image store reads shards through this function.

    Args:
        dataset: the data set; labels must be among its classes.
        shard: the shard's entry in dataset.json.
        content: the whole file.
        path: where the content came from, for messages.
        corrupt: collects corrupt records, which get an offset of -1; by default the first one
            raises.

    Returns:
        `INDEX_DTYPE` [shard.examples].

    Raises:
        DataError: more corrupt records than `corrupt` allows, more records than dataset.json
            lists, or all records are intact but the file's CRC32C differs.
    """
    corrupt = corrupt or CorruptRecordLog(dataset, Split("", (shard,)))
    entries = np.full(shard.examples, _CORRUPT_ENTRY, INDEX_DTYPE)
    number = -1
    for number, (offset, payload, problem) in enumerate(read_frames(content)):
        if number >= shard.examples:
            extra = len(content) - offset
            raise DataError(
                f"{path} has {extra:,} bytes after its {number:,} records, which {INDEX_FILE} does not list"
            )
        if payload is None:
            corrupt.add(CorruptRecord(shard.file, number, offset, problem))
            continue
        try:
            image = check_record(dataset, bytes(payload))
        except image_header.InvalidImage as error:
            corrupt.add(CorruptRecord(shard.file, number, offset, f"is unusable: {error}"))
            continue
        entries[number] = (offset + HEADER.size, len(payload), image.label, image.height, image.width)
    reason = "its header was lost in the damage before it"
    if len(content) < shard.bytes:
        reason = f"the file has {len(content):,} of {shard.bytes:,} bytes"
    for missing in range(number + 1, shard.examples):
        corrupt.add(CorruptRecord(shard.file, missing, len(content), f"is missing: {reason}"))
    if corrupt.max_fraction:
        _decode_all(content, entries, shard, corrupt)
    if (entries["offset"] >= 0).all() and google_crc32c.value(bytes(content)) != shard.crc32c:
        raise DataError(
            f"{path} does not have the CRC32C in {INDEX_FILE}: it is another file; prepare or copy the data set again"
        )
    return entries


def check_record(dataset: Dataset, payload: bytes) -> ImageRecord:
    """Parses a payload and checks all that can be checked without decoding the image.

    Raises:
        InvalidImage: it cannot be used; the message says why.
    """
    try:
        image = ImageRecord.parse(payload, "")
    except DataError as error:
        raise image_header.InvalidImage(str(error).removeprefix(": ")) from error
    if image.label >= max(1, len(dataset.classes)):
        raise image_header.InvalidImage(f"label {image.label}, but {INDEX_FILE} has {len(dataset.classes)} classes")
    try:
        header = image_header.parse_header(image.encoded)
    except image_header.InvalidImage as error:
        raise image_header.InvalidImage(f"{error} ({image.filename or 'without a name'})") from error
    if (header.height, header.width) != (image.height, image.width):
        raise image_header.InvalidImage(
            f"its image has {header.height} x {header.width} pixels; its record says {image.height} x {image.width}"
        )
    return image


def check_pixels(image: ImageRecord) -> None:
    """Decodes an image strictly, at little cost.

    Raises:
        InvalidImage: it is damaged; the message says how.
    """
    header = image_header.parse_header(image.encoded)
    strict_decode.decode_strictly(image.encoded, header.format, image.height, image.width)


def _decode_all(content: bytes | memoryview, entries: np.ndarray, shard: Shard, corrupt: CorruptRecordLog) -> None:
    """Decodes every image once.

    Corrupt records that are left out must all be known before the first step.
    """

    def problem(number: int) -> str:
        start = int(entries[number]["offset"])
        image = ImageRecord.parse(bytes(content[start : start + int(entries[number]["length"])]), "")
        try:
            check_pixels(image)
        except image_header.InvalidImage:
            return "is unusable: its image cannot be decoded"
        return ""

    intact = np.flatnonzero(entries["offset"] >= 0).tolist()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, reason in zip(intact, pool.map(problem, intact), strict=True):
            if reason:
                offset = int(entries[number]["offset"]) - HEADER.size
                corrupt.add(CorruptRecord(shard.file, number, offset, reason))
                entries[number] = _CORRUPT_ENTRY


class EncodedShard:
    """The encoded records of one shard, read by number.

    Attributes:
        entries: `INDEX_DTYPE` of the usable records; a record's number is an index into it.
    """

    def __init__(self, path: str, entries: np.ndarray, content: bytes | int) -> None:
        """
        Args:
            path: of the file, for messages.
            entries: from `index_shard`.
            content: the whole file, or a file descriptor, which is read record by record and
                closed with this object. Reads are positional, not through a memory map: threads
                that wait for the disk release the GIL, the page cache does not count as this
                process's memory, and a truncated file raises an error instead of SIGBUS.
        """
        self._records = np.flatnonzero(entries["offset"] >= 0)
        self.entries = entries if len(self._records) == len(entries) else entries[self._records]
        self._path, self._content = path, content
        if isinstance(content, int):
            weakref.finalize(self, os.close, content)

    def record(self, number: int) -> ImageRecord:
        """Reads and parses record `number`.

        Raises:
            DataError: the file no longer holds what was indexed.
        """
        entry, where = self.entries[number], self.location(number)
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

    def location(self, number: int) -> str:
        """Describes a record for messages: file, record number, byte offset."""
        return location(self._path, int(self._records[number]), int(self.entries[number]["offset"]) - HEADER.size)


class EncodedSplit:
    """All encoded records of a split, read by example id: the position in the split.

    Attributes:
        labels: int32 [examples], -1 where a record has none.
        sizes: float32 [examples, 2], height and width of the originals in pixels.
    """

    def __init__(self, dataset: Dataset, split: Split, shards: Sequence[EncodedShard] = ()) -> None:
        """
        Args:
            dataset: the data set of the split.
            split: which split to read.
            shards: its shards, opened and checked; by default they are read whole into memory and
                checked.

        Raises:
            DataError: a shard is missing or damaged, or differs from dataset.json in length or
                number of records.
        """
        self._shards = list(shards) or list(read_shards(dataset, split))
        self._starts = np.cumsum([0, *(len(shard.entries) for shard in self._shards)])
        entries = [shard.entries for shard in self._shards]
        self.labels = np.concatenate([part["label"] for part in entries]).astype(np.int32)
        self.sizes = np.concatenate([original_sizes(part) for part in entries])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, example: int) -> ImageRecord:
        """Reads and parses the record with id `example`.

        Raises:
            DataError: the file no longer holds what was indexed.
        """
        shard, number = self._find(example)
        return shard.record(number)

    def location(self, example: int) -> str:
        """Describes an example for messages: file, record number, byte offset."""
        shard, number = self._find(example)
        return shard.location(number)

    def _find(self, example: int) -> tuple[EncodedShard, int]:
        shard = int(np.searchsorted(self._starts, example, side="right")) - 1
        return self._shards[shard], int(example - self._starts[shard])


def original_sizes(entries: np.ndarray) -> np.ndarray:
    """Returns heights and widths in pixels of `INDEX_DTYPE` [n]: float32 [n, 2]."""
    return np.stack([entries["height"], entries["width"]], axis=1).astype(np.float32)


def read_shards(dataset: Dataset, split: Split, corrupt: CorruptRecordLog | None = None) -> Iterator[EncodedShard]:
    """Yields the shards of a split, each read whole into memory and checked.

    Args:
        dataset: the data set of the split.
        split: which split to read.
        corrupt: collects corrupt records, which are left out; by default the first one raises.

    Raises:
        DataError: a shard is missing, or has more corrupt records than `corrupt` allows.
    """
    for shard in split.shards:
        path = files.join(dataset.folder, shard.file)
        content = files.read(path, "a shard")
        yield EncodedShard(path, index_shard(dataset, shard, content, path, corrupt), content)
