"""Writes a source as TFRecord shards and dataset.json.

A killed run resumes, and the bytes are the same.

Until dataset.json is written, the folder `.incomplete` beside the shards holds what is needed to
resume:

    plan.json           what is being written; a run with another plan does not mix with it
    shards.json         names of all shards that may have been written here, with any plan
    SHARD.json          a `ShardRecord` for each finished shard
    unusable.txt        the images that cannot be used, one per line
    commit              SHA-256 of plan and dataset.json, written just before dataset.json
"""

from __future__ import annotations

import array
import base64
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import posixpath
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from trainer.core.console import Console, SilentConsole
from trainer.core.errors import DataError
from trainer.core.wording import plural
from trainer.data import records
from trainer.data.dataset import INDEX_FILE, Dataset, Shard, Split
from trainer.data.records import ImageRecord
from trainer.ingest.duplicates import UNUSABLE, SplitImages, find_duplicates
from trainer.ingest.images import NO_DIGEST, UnusableImage
from trainer.ingest.labels import NO_LABEL, coverage_warnings
from trainer.ingest.sources import Progress, Source, SourceSplit, run_in_order
from trainer.io.destination import Destination, open_destination

SHARD_BYTES = 128 << 20  # about how long a shard becomes
SAMPLE_IMAGES = 64  # first images of a split, whose mean length determines the number of shards
IMAGES_AHEAD = 32  # images that the writer of one shard has under way; bounds memory

INCOMPLETE = ".incomplete"
_PLAN = f"{INCOMPLETE}/plan.json"
_SHARDS = f"{INCOMPLETE}/shards.json"
_UNUSABLE = f"{INCOMPLETE}/unusable.txt"
_COMMIT = f"{INCOMPLETE}/commit"
_RECORD_FORMAT = 2  # of `ShardRecord`; shards with notes of another format are written again
_REASONS = 3  # that a message lists, at most

K = TypeVar("K", int, str)


@dataclasses.dataclass
class ShardRecord:
    """A finished shard and statistics of its images; kept as JSON until the data set is complete.

    Attributes:
        key: changes when the shard's images or its place in the split do.
        file: name of the shard.
        examples: number of records; 0: none of its images can be used and there is no file.
        size: length of the file in bytes.
        crc32c: CRC32C of the file.
        heights: number of images by height in pixels.
        widths: number of images by width in pixels.
        rotation_ignored: number of images with an EXIF rotation that was not applied.
        dark: number of images of 16 bits that use 12 of them.
        converted: number of images re-encoded as PNG, by kind of file.
        first_of_several: number of files with several images, of which the first was taken, by kind
            of file.
        unusable: location and reason for each image that cannot be used.
        needs_decoder: number of those that an optional package would read.
        labels: class number of each image of the source, int32 as base64; -1: none, `UNUSABLE`: it
            cannot be used.
        digests: 8 bytes for each image of the source as base64, equal for equal pixels.
    """

    key: str
    file: str
    examples: int = 0
    size: int = 0
    crc32c: int = 0
    heights: dict[int, int] = dataclasses.field(default_factory=dict)
    widths: dict[int, int] = dataclasses.field(default_factory=dict)
    rotation_ignored: int = 0
    dark: int = 0
    converted: dict[str, int] = dataclasses.field(default_factory=dict)
    first_of_several: dict[str, int] = dataclasses.field(default_factory=dict)
    unusable: list[list[str]] = dataclasses.field(default_factory=list)
    needs_decoder: int = 0
    labels: str = ""
    digests: str = ""

    def to_json(self) -> bytes:
        """Serializes the record."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()

    @classmethod
    def parse(cls, content: bytes) -> ShardRecord | None:
        """Parses the output of `to_json`; None if it is damaged, as after a power cut."""
        try:
            record = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        record.heights = {int(size): count for size, count in record.heights.items()}
        record.widths = {int(size): count for size, count in record.widths.items()}
        return record


def write_dataset(
    make_source: Callable[[], Source],
    out: str,
    progress: Progress,
    *,
    plan: dict[str, Any],
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
) -> Dataset:
    """Writes a data set. Resumes what an interrupted run with the same plan left.

    Several shards are written at a time, and for each a few images are under way: memory does not
    depend on the size of the data set. Shards are cut by numbers of images, so the bytes do not
    depend on the workers.

    Args:
        make_source: returns the source; called once `out` is known to be free.
        out: local folder or gs:// prefix.
        progress: called with what is being done, how many are done, and how many in all.
        plan: what determines the bytes. Unfinished work with another plan is not resumed.
        overwrite: replace the data set at `out`, or unfinished work with another plan.
        skip_bad: leave out images that cannot be used.
        workers: number of threads; 0: one per core.
        shard_bytes: about how long each shard becomes.
        console: gets lines about images that were left out or changed; None: nothing is printed.

    Returns:
        The data set that was written.

    Raises:
        DataError: `out` is taken or cannot be written, or images cannot be used and `skip_bad` is
            false.
    """
    destination = open_destination(out)
    try:
        old_index = destination.read(INDEX_FILE)
        if old_index is not None and not overwrite:
            if destination.read(_COMMIT) == _commit(plan, old_index):
                # A run with this plan was killed after it wrote dataset.json and before it had
                # cleaned up.
                clean_up(destination, old_index, _noted_shards(destination))
                return Dataset.load(out, "out")
            raise DataError(f"--out={out} holds a data set already: give another folder, or --overwrite")
        source = make_source()
        try:
            if console:
                for line in source.notes:
                    console.info(line)
                for line in source.warnings:
                    console.warning(line)
            earlier_shards = _noted_shards(destination) | _shard_files(old_index)
            acquire(destination, plan, overwrite)
            if earlier_shards:  # noted so that a run after a kill can delete them
                _note_shards(destination, earlier_shards)
            # From here on there is no data set at `out` until the new one is complete.
            destination.remove(INDEX_FILE)
            writer = _Writer(
                destination,
                source,
                plan,
                progress,
                workers=workers or os.cpu_count() or 1,
                skip_bad=skip_bad,
                shard_bytes=shard_bytes,
                console=console or SilentConsole(),
            )
            return writer.run(earlier_shards)
        finally:
            source.close()
    finally:
        destination.close()


def acquire(destination: Destination, plan: dict[str, Any], overwrite: bool) -> None:
    """Reserves the destination for `plan`, so that two data sets do not mix.

    Args:
        destination: where the data set is written.
        plan: what determines the bytes.
        overwrite: delete unfinished work with another plan.

    Raises:
        DataError: there is unfinished work with another plan, and `overwrite` is false.
    """
    content = _plan_json(plan)
    if destination.write(_PLAN, content, new=True) or (existing := destination.read(_PLAN)) == content:
        return
    if existing is not None and content.startswith(existing):
        # Its writer was killed while it wrote the plan, so there is no other work.
        destination.write(_PLAN, content)
        return
    if not overwrite:
        raise DataError(
            f"--out={destination.folder} holds another data set that is unfinished, or is being written now: "
            f"{(existing or b'').decode(errors='replace')}. Give its flags to resume it, another folder, or --overwrite"
        )
    destination.remove_folder(INCOMPLETE)
    destination.write(_PLAN, content)


def clean_up(destination: Destination, index: bytes, shards: set[str]) -> None:
    """Deletes what a complete data set does not need.

    Args:
        destination: where the data set was written.
        index: content of dataset.json.
        shards: names of shards that may exist; those not in `index` are deleted.
    """
    for name in shards - _shard_files(index):
        destination.remove(name)
    destination.remove_folder(INCOMPLETE, last=posixpath.basename(_COMMIT))


def _plan_json(plan: dict[str, Any]) -> bytes:
    return json.dumps(plan, sort_keys=True).encode()


def _commit(plan: dict[str, Any], index: bytes) -> bytes:
    return hashlib.sha256(_plan_json(plan) + index).hexdigest().encode()


def _noted_shards(destination: Destination) -> set[str]:
    """Returns the names of shards that unfinished work may have written here."""
    try:
        return set(map(str, json.loads(destination.read(_SHARDS) or b"[]")))
    except (ValueError, TypeError):
        return set()


def _note_shards(destination: Destination, names: set[str]) -> None:
    destination.write(_SHARDS, json.dumps(sorted(names)).encode())


class _Writer:
    """Writes the shards of a source and then dataset.json."""

    def __init__(
        self,
        destination: Destination,
        source: Source,
        plan: dict[str, Any],
        progress: Progress,
        *,
        workers: int,
        skip_bad: bool,
        shard_bytes: int,
        console: Console,
    ) -> None:
        self._destination, self._source, self._plan, self._progress = destination, source, plan, progress
        self._workers, self._skip_bad, self._shard_bytes, self._console = workers, skip_bad, shard_bytes, console
        self._total = sum(split.count for split in source.splits)
        self._done, self._lock, self._stop = 0, threading.Lock(), threading.Event()

    def run(self, earlier_shards: set[str]) -> Dataset:
        """Writes the data set.

        `earlier_shards` are those of what was at the destination before, finished or not.
        """
        if empty := [split.name for split in self._source.splits if not split.count]:
            raise DataError(f"split {empty[0]!r} would be empty: {self._source.name} has no images for it")
        with concurrent.futures.ThreadPoolExecutor(self._workers) as self._pool:
            shards = [
                (split, number, count)
                for split, count in ((split, self._shard_count(split)) for split in self._source.splits)
                for number in range(count)
            ]
            all_shards = earlier_shards | {_shard_name(*shard) for shard in shards}
            _note_shards(self._destination, all_shards)
            writers = min(max(self._destination.writers, self._workers), len(shards))
            with concurrent.futures.ThreadPoolExecutor(writers) as shard_pool:
                jobs = [shard_pool.submit(self._write_shard, *shard) for shard in shards]
                try:
                    concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_EXCEPTION)
                finally:
                    # Set before the pools are joined, so that shards under way stop at their next
                    # image.
                    if not all(job.done() and not job.cancelled() and job.exception() is None for job in jobs):
                        self._stop.set()
                        for job in jobs:
                            job.cancel()
                errors = [job.exception() for job in jobs if job.done() and not job.cancelled() and job.exception()]
                for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
                    raise error  # type: ignore[misc]
        shard_records: dict[str, list[ShardRecord]] = {}
        for (split, _, _), job in zip(shards, jobs, strict=True):
            shard_records.setdefault(split.name, []).append(job.result())
        self._report([record for split_records in shard_records.values() for record in split_records])
        return self._finish(shard_records, all_shards)

    def _shard_count(self, split: SourceSplit) -> int:
        """Returns the number of shards, estimated from the lengths of the split's first images."""
        lengths = []
        loaders = split.loaders(0, min(split.count, SAMPLE_IMAGES))
        for result in run_in_order(self._pool, loaders, ahead=SAMPLE_IMAGES):
            try:
                lengths.append(len(result().record.encoded))
            except UnusableImage:
                continue
        mean = sum(lengths) / max(1, len(lengths))
        return min(split.count, max(1, round(split.count * mean / self._shard_bytes)))

    def _write_shard(self, split: SourceSplit, number: int, count: int) -> ShardRecord:
        """Writes shard `number` of `count`, unless an earlier run did."""
        start, stop = split.count * number // count, split.count * (number + 1) // count
        file = _shard_name(split, number, count)
        text = f"{_RECORD_FORMAT} {file} {start} {stop}\n{split.key(start, stop)}"
        key = hashlib.sha256(text.encode()).hexdigest()
        note = f"{INCOMPLETE}/{file}.json"
        content = self._destination.read(note)
        earlier = ShardRecord.parse(content) if content else None
        # A missing decoder may have been installed since.
        if earlier and earlier.key == key and not earlier.needs_decoder and self._is_intact(earlier):
            self._count(split, stop - start)
            return earlier
        record = ShardRecord(key, file)
        shard = records.write_shard(self._destination.local, file, self._images(split, start, stop, record))
        record.examples, record.size, record.crc32c = shard.examples, shard.bytes, shard.crc32c
        if record.examples:
            self._destination.send(file, record.size, record.crc32c)
        else:
            os.unlink(os.path.join(self._destination.local, file))
        self._destination.write(note, record.to_json())
        return record

    def _is_intact(self, record: ShardRecord) -> bool:
        return not record.examples or self._destination.holds(record.file, record.size, record.crc32c)

    def _images(self, split: SourceSplit, start: int, stop: int, record: ShardRecord) -> Iterator[ImageRecord]:
        """Yields the usable images [start, stop), and adds their statistics to `record`."""
        labels, digests = array.array("i"), bytearray()
        for result in run_in_order(self._pool, split.loaders(start, stop), ahead=IMAGES_AHEAD):
            if self._stop.is_set():
                raise _Stopped("stopped, since another shard failed")
            self._count(split, 1)
            try:
                image = result()
            except UnusableImage as error:
                record.unusable.append([error.location, error.reason])
                record.needs_decoder += error.needs_decoder
                labels.append(UNUSABLE)
                digests += NO_DIGEST
                continue
            labels.append(image.record.label)
            digests += image.digest
            record.heights[image.record.height] = record.heights.get(image.record.height, 0) + 1
            record.widths[image.record.width] = record.widths.get(image.record.width, 0) + 1
            record.rotation_ignored += image.rotation_ignored
            record.dark += image.dark
            for kinds, kind in (
                (record.converted, image.converted),
                (record.first_of_several, image.first_of_several),
            ):
                if kind:
                    kinds[kind] = kinds.get(kind, 0) + 1
            yield image.record
        record.labels, record.digests = base64.b64encode(labels).decode(), base64.b64encode(digests).decode()

    def _count(self, split: SourceSplit, images: int) -> None:
        with self._lock:
            self._done += images
            self._progress(f"prepare {split.name}", self._done, self._total)

    def _report(self, shard_records: list[ShardRecord]) -> None:
        """Reports images that were left out or changed.

        Raises:
            DataError: some cannot be used, and are not to be skipped.
        """
        unusable = [(location, reason) for record in shard_records for location, reason in record.unusable]
        if unusable:
            first = _by_reason(unusable)
            lines = "".join(f"{location}: {reason}\n" for location, reason in unusable)
            self._destination.write(_UNUSABLE, lines.encode())
            if not self._skip_bad:
                listed = f"; all are listed in {self._destination.folder}/{_UNUSABLE}" if len(unusable) > 3 else ""
                raise DataError(
                    f"{len(unusable):,} of {self._total:,} images cannot be used: {first}{listed}. Replace them, or leave "
                    "them out with --skip_bad"
                )
            self._console.info(f"left out {len(unusable):,} of {self._total:,} images that cannot be used: {first}")
        if converted := _sum(record.converted for record in shard_records):
            self._console.info(
                f"{plural(converted.total(), 'image was', 'images were')} converted to PNG, since TensorFlow does not decode "
                f"them everywhere alike: {_by_kind(converted)}"
            )
        if several := _sum(record.first_of_several for record in shard_records):
            self._console.info(
                f"of {several.total():,} files with several images the first was taken: {_by_kind(several)}"
            )
        if dark := sum(record.dark for record in shard_records):
            self._console.warning(
                f"{dark:,} images of 16 bits have no value above 4095 of 65535 and became nearly black: if they have 12 bits, "
                "scale their values by 16"
            )
        if rotated := sum(record.rotation_ignored for record in shard_records):
            self._console.info(
                f"{rotated:,} images have an EXIF rotation, which is not applied (docs/data.md); --exif=upright applies it"
            )

    def _statistics(self, shard_records: dict[str, list[ShardRecord]]) -> dict[str, Any]:
        """Reports classes without images and images that occur twice.

        Returns:
            Counts for the field `source` of dataset.json: `labels`, for each split the number of
            images of each class, `without_label` and `duplicates`.
        """
        splits = [
            SplitImages(
                name,
                np.concatenate([np.frombuffer(base64.b64decode(r.labels), np.int32) for r in split_records]),
                np.concatenate([np.frombuffer(base64.b64decode(r.digests), np.uint64) for r in split_records]),
            )
            for name, split_records in shard_records.items()
        ]
        statistics: dict[str, Any] = {}
        classes = self._source.classes
        if any((split.labels >= 0).any() for split in splits):
            statistics["labels"] = {
                split.name: np.bincount(split.labels[split.labels >= 0], minlength=len(classes)).tolist()
                for split in splits
            }
            without = {split.name: int((split.labels == NO_LABEL).sum()) for split in splits}
            if any(without.values()):
                statistics["without_label"] = {name: count for name, count in without.items() if count}
            counts = {
                name: dict(enumerate(labels)) | {NO_LABEL: without[name]}
                for name, labels in statistics["labels"].items()
            }
            for line in coverage_warnings(classes, counts):
                self._console.warning(line)
        # An image of train and test is reported as one of test.
        splits.sort(key=lambda split: split.name != "train")
        duplicates = find_duplicates(splits, classes, self._image_name)
        for line in duplicates.notes:
            self._console.info(line)
        for line in duplicates.warnings:
            self._console.warning(line)
        if duplicates.counts:
            statistics["duplicates"] = duplicates.counts
        return statistics

    def _image_name(self, split_name: str, number: int) -> str:
        """Names image `number` of a split, which is loaded again for it."""
        split = next(split for split in self._source.splits if split.name == split_name)
        try:
            name = next(iter(split.loaders(number, number + 1)))().record.filename
        except (DataError, StopIteration):
            name = f"image {number}"
        return name if name.startswith(f"{split_name}/") else f"{split_name}/{name}"

    def _finish(self, shard_records: dict[str, list[ShardRecord]], all_shards: set[str]) -> Dataset:
        """Writes dataset.json, if every shard is still what was written, and cleans up."""
        written = {name: [r for r in split_records if r.examples] for name, split_records in shard_records.items()}
        if empty := [name for name, split_records in written.items() if not split_records]:
            raise DataError(f"split {empty[0]!r} would be empty: none of its images can be used")
        splits = {
            name: Split(name, tuple(Shard(r.file, r.examples, r.size, r.crc32c) for r in split_records))
            for name, split_records in written.items()
        }
        all_written = [record for split_records in written.values() for record in split_records]
        if changed := self._destination.changed({r.file: (r.size, r.crc32c) for r in all_written}):
            raise DataError(
                f"{self._destination.folder}/{changed[0]} was changed by another process: let one job finish, then run "
                "this one again, or choose another --out"
            )
        statistics = self._statistics(shard_records)
        heights, widths = _sum(r.heights for r in all_written), _sum(r.widths for r in all_written)
        counts = {
            "left_out": sum(len(r.unusable) for split_records in shard_records.values() for r in split_records),
            "became_png": _sum(r.converted for r in all_written).total(),
            "exif_rotation_not_applied": sum(r.rotation_ignored for r in all_written),
        }
        dataset = Dataset(
            self._destination.folder,
            self._source.name,
            self._source.classes,
            splits,
            {
                "max_height": max(heights),
                "max_width": max(widths),
                "median_height": _median_low(heights),
                "median_width": _median_low(widths),
            },
            self._source.metadata | {name: count for name, count in counts.items() if count} | statistics,
        )
        index = dataset.to_json()
        self._destination.write(_COMMIT, _commit(self._plan, index))
        self._destination.write(INDEX_FILE, index)
        clean_up(self._destination, index, all_shards)
        return dataset


class _Stopped(DataError):
    """A shard was abandoned because another one failed."""


def _by_reason(unusable: Sequence[tuple[str, str]]) -> str:
    """Lists images that cannot be used: for each of the most frequent reasons, the first image."""
    first: dict[str, tuple[str, str]] = {}
    counts: collections.Counter[str] = collections.Counter()
    for location, reason in unusable:
        kind = re.sub(r"\d[\d,.]*", "#", reason)
        first.setdefault(kind, (location, reason))
        counts[kind] += 1
    return "; ".join(
        f"{first[kind][0]}{f' and {count - 1:,} more' if count > 1 else ''}: {first[kind][1]}"
        for kind, count in counts.most_common(_REASONS)
    )


def _by_kind(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in sorted(counts, key=lambda kind: (-counts[kind], kind)))


def _sum(histograms: Iterable[dict[K, int]]) -> collections.Counter[K]:
    total: collections.Counter[K] = collections.Counter()
    for histogram in histograms:
        total.update(histogram)
    return total


def _median_low(histogram: Mapping[int, int]) -> int:
    """Returns the median of values given with their counts; of the two middle ones, the lower."""
    middle, seen = (sum(histogram.values()) - 1) // 2, 0
    for value in sorted(histogram):
        seen += histogram[value]
        if seen > middle:
            return value
    raise ValueError("no values")


def _shard_name(split: SourceSplit, number: int, count: int) -> str:
    return f"{split.name}-{number:05d}-of-{count:05d}.tfrecord"


def _shard_files(index: bytes | None) -> set[str]:
    """Returns the names of the shards in a dataset.json, as far as it can be read."""
    try:
        splits = json.loads(index or b"{}").get("splits", {}).values()
        return {os.path.basename(shard["file"]) for split in splits for shard in split["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
