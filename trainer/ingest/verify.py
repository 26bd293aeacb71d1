"""Reads a prepared data set back: counts, checksums, and every image decoded (`trainer.prepare --verify`)."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.core.errors import DataError

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset, Shard
from trainer.ingest.writer import Progress


def verify(path: str, progress: Progress, *, workers: int = 0) -> str:
    """Reads a whole data set back: counts, lengths, CRCs, and decodes every image as training does.

    Args:
        path: local folder or gs:// prefix.
        progress: called with what, done, total.
        workers: threads, which share the images of a shard; 0: one for each core.

    Returns:
        One line that says so.

    Raises:
        DataError: the first thing that is wrong, with file, record and offset.
    """
    from trainer.data.dataset import Dataset
    from trainer.ingest.sources import in_order

    dataset = Dataset.load(path, "verify")
    workers = workers or os.cpu_count() or 1
    total = sum(split.examples for split in dataset.splits.values())
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    done = 0
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        concurrent.futures.ThreadPoolExecutor(1) as reader,
    ):
        # The next shard is read while this one's images are decoded.
        reads = in_order(reader, (functools.partial(_read_shard, dataset, shard) for shard in shards), 2)
        for shard, read in zip(shards, reads, strict=True):
            jobs = (functools.partial(_decodable, dataset, *record) for record in _records(dataset, shard, read()))
            count = 0
            for result in in_order(pool, jobs, 4 * workers):
                result()
                count, done = count + 1, done + 1
                progress("verify", done, total)
            if count != shard.examples:
                raise DataError(
                    f"{dataset.folder}/{shard.file} has {count} records; dataset.json says {shard.examples}"
                )
    return f"{path}: {total:,} images in {len(dataset.splits)} splits are whole and decodable"


def _read_shard(dataset: Dataset, shard: Shard) -> bytes:
    from trainer.io import files

    return files.read(files.join(dataset.folder, shard.file), "a shard")


def _records(dataset: Dataset, shard: Shard, content: bytes) -> Iterator[tuple[bytes, str]]:
    """Payloads of a shard that is whole, and where each lies."""
    import google_crc32c

    from trainer.data.tfrecord import payloads
    from trainer.io import files

    path = files.join(dataset.folder, shard.file)
    if (len(content), google_crc32c.value(content)) != (shard.bytes, shard.crc32c):
        for _ in payloads(content, path):
            pass  # names the record, if a record is what is damaged
        raise DataError(
            f"{path} has {len(content)} bytes and not the length ({shard.bytes}) and CRC32C that dataset.json says"
        )
    for number, (offset, payload) in enumerate(payloads(content, path)):
        yield bytes(payload), f"{path}: record {number} at byte {offset}"


def _decodable(dataset: Dataset, payload: bytes, where: str) -> None:
    import tensorflow as tf

    from trainer.data import image_header
    from trainer.data.records import check_record, decode

    try:
        picture = check_record(dataset, payload)
    except image_header.InvalidImage as error:
        raise DataError(f"{where}: {error}") from error
    try:
        height, width, _ = decode(tf.constant(picture.encoded)).shape
    except tf.errors.OpError as error:
        raise DataError(f"{where} ({picture.filename}): the image cannot be decoded") from error
    if (height, width) != (picture.height, picture.width):
        raise DataError(f"{where}: {height} x {width} pixels; its record says {picture.height} x {picture.width}")
