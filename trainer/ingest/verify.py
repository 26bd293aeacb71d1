"""Verifies a prepared data set: counts, checksums, and every image decoded (`--verify`)."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Iterator

import google_crc32c
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.data import image_header
from trainer.data.dataset import INDEX_FILE, Dataset, Shard
from trainer.data.records import check_pixels, check_record, decode
from trainer.data.tfrecord import location, payloads
from trainer.ingest.sources import Progress, run_in_order
from trainer.io import files


def verify(path: str, progress: Progress, *, workers: int = 0) -> str:
    """Reads a data set: checks counts, lengths and CRCs, and decodes every image as training does.

    Args:
        path: local folder or gs:// prefix.
        progress: called with what is being done, how many are done, and how many in all.
        workers: threads, which share the images of a shard; 0: one per core.

    Returns:
        One line for users.

    Raises:
        DataError: the first problem; the message has file, record and offset.
    """
    dataset = Dataset.load(path, "verify")
    if not dataset.splits:
        raise DataError(f"{path}/{INDEX_FILE} has no splits: prepare the data set again")
    workers = workers or os.cpu_count() or 1
    total = sum(split.examples for split in dataset.splits.values())
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    done = 0
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        concurrent.futures.ThreadPoolExecutor(1) as reader,
    ):
        # The next shard is read while this one's images are decoded.
        reads = run_in_order(reader, (functools.partial(_read_shard, dataset, shard) for shard in shards), ahead=2)
        for shard, read in zip(shards, reads, strict=True):
            jobs = (functools.partial(_check_image, dataset, *record) for record in _records(dataset, shard, read()))
            count = 0
            for result in run_in_order(pool, jobs, ahead=4 * workers):
                result()
                count, done = count + 1, done + 1
                progress("verify", done, total)
            if count != shard.examples:
                raise DataError(
                    f"{dataset.folder}/{shard.file} has {count} records; {INDEX_FILE} says {shard.examples}: "
                    "prepare or copy the data set again"
                )
    return f"{path}: {total:,} images in {len(dataset.splits)} splits are whole and decodable"


def _read_shard(dataset: Dataset, shard: Shard) -> bytes:
    return files.read(files.join(dataset.folder, shard.file), "a shard")


def _records(dataset: Dataset, shard: Shard, content: bytes) -> Iterator[tuple[bytes, str]]:
    """Yields payload and location of each record of a shard, whose checksum is checked first."""
    path = files.join(dataset.folder, shard.file)
    if (len(content), google_crc32c.value(content)) != (shard.bytes, shard.crc32c):
        for _ in payloads(content, path):
            pass  # if a record is damaged, this error is more precise
        raise DataError(
            f"{path} has {len(content)} bytes and not the length ({shard.bytes}) and CRC32C in {INDEX_FILE}: prepare or "
            "copy the data set again"
        )
    for number, (offset, payload) in enumerate(payloads(content, path)):
        yield bytes(payload), location(path, number, offset)


def _check_image(dataset: Dataset, payload: bytes, where: str) -> None:
    try:
        image = check_record(dataset, payload)
    except image_header.InvalidImage as error:
        raise DataError(f"{where}: {error}") from error
    try:
        check_pixels(image)
    except image_header.InvalidImage as error:
        raise DataError(f"{where} ({image.filename}): the image cannot be decoded: {error}") from error
    try:
        height, width, _ = decode(tf.constant(image.encoded)).shape
    except tf.errors.OpError as error:
        raise DataError(f"{where} ({image.filename}): the image cannot be decoded") from error
    if (height, width) != (image.height, image.width):
        raise DataError(
            f"{where}: the image decodes to {height} x {width} pixels; its record says {image.height} x {image.width}"
        )
