"""Writes a source as TFRecord shards and dataset.json; a killed run resumes, with the same bytes."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from trainer.core.console import Console, SilentConsole
from trainer.core.errors import DataError

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.data.records import ImageRecord
    from trainer.ingest.sources import Source, SourceSplit
    from trainer.io.destination import LocalDestination


_SHARD_BYTES = 128 << 20
_SAMPLE = 64  # first pictures of a split, whose mean length decides how many shards there are
_AHEAD = 32  # pictures that a shard's writer has under way; what bounds memory
_MAKING = ".making"  # folder in which the work is noted until dataset.json is there
_SHARDS = f"{_MAKING}/shards.json"  # names of all shards that work at this place ever made, or was about to make
_COMPLETE = f"{_MAKING}/complete"  # the SHA-256 of the plan and dataset.json, noted just before the latter is written
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class ShardRecord:
    """A shard that is in its place, and what was met in making it; kept as JSON beside it until the data set is whole."""

    key: str
    file: str
    examples: int
    size: int
    crc32c: int
    heights: dict[int, int]
    widths: dict[int, int]
    turned: int
    converted: int
    bad: list[str]

    @classmethod
    def parse(cls, content: bytes) -> ShardRecord | None:
        """None if it is not one, as after a power cut."""
        try:
            made = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        made.heights = {int(size): count for size, count in made.heights.items()}
        made.widths = {int(size): count for size, count in made.widths.items()}
        return made


def write_dataset(
    make_source: Callable[[], Source],
    out: str,
    progress: Progress,
    *,
    plan: dict[str, Any],
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
    console: Console | None = None,
) -> Dataset:
    """Writes a data set. What an interrupted run of the same plan left is used.

    Several shards are made at a time, and for each some pictures: memory holds a few pictures for each worker, whatever
    the set's size. Shards are cut by their numbers of pictures, so the bytes do not depend on the workers.

    Args:
        make_source: gives the source, once `out` is known to be free.
        out: local folder or gs:// prefix.
        progress: called with what, done, total.
        plan: what decides the bytes; another plan's unfinished work is not gone on with.
        overwrite: replace the data set that is there, or such work.
        skip_bad: leave pictures out that cannot be used.
        workers: threads; 0: one for each core.
        console: gets lines about what was left out or changed; None: nothing is printed.

    Raises:
        DataError: `out` is taken or cannot be written, or pictures cannot be used and `skip_bad` is false.
    """
    from trainer.data.dataset import INDEX_FILE, Dataset
    from trainer.io import destination

    place = destination.open_destination(out)
    try:
        old = place.read(INDEX_FILE)
        if old is not None and not overwrite:
            if place.read(_COMPLETE) == _complete(plan, old):
                # This very command was killed when all was done but for the clearing up.
                clean_up(place, old, _noted_shards(place))
                return Dataset.load(out, "out")
            raise DataError(f"--out={out} holds a data set already: give another folder, or --overwrite")
        source = make_source()
        try:
            earlier = _noted_shards(place) | _shard_files(old)
            acquire(place, plan, overwrite)
            if earlier:
                _note_shards(place, earlier)  # else nobody would know of them after a kill
            # From here on there is no data set at `out` until the new one is complete.
            place.remove(INDEX_FILE)
            return _Writer(
                place, source, plan, progress, workers or os.cpu_count() or 1, skip_bad, console or SilentConsole()
            ).run(earlier)
        finally:
            source.close()
    finally:
        place.close()


def acquire(place: LocalDestination, plan: dict[str, Any], overwrite: bool) -> None:
    """Notes whose work lies at the place from now on, so that two data sets do not mix."""
    name, content = f"{_MAKING}/plan.json", _noted_plan(plan)
    if place.write(name, content, new=True) or (there := place.read(name)) == content:
        return
    if there is not None and content.startswith(there):
        place.write(name, content)  # its writer was killed before it was all there, and so before anything else
        return
    if not overwrite:
        raise DataError(
            f"at --out={place.folder} another data set was begun and not finished, or is being made now: "
            f"{(there or b'').decode(errors='replace')}. Give its flags to go on, another folder, or --overwrite"
        )
    place.remove_folder(_MAKING)
    place.write(name, content)


def _noted_plan(plan: dict[str, Any]) -> bytes:
    return json.dumps(plan, sort_keys=True).encode()


def _complete(plan: dict[str, Any], index: bytes) -> bytes:
    return hashlib.sha256(_noted_plan(plan) + index).hexdigest().encode()


def clean_up(place: LocalDestination, index: bytes, earlier: set[str]) -> None:
    """Removes shards of before that the data set with this index does not name, and the notes."""
    for name in earlier - _shard_files(index):
        place.remove(name)
    place.remove_folder(_MAKING, last=posixpath.basename(_COMPLETE))


def _noted_shards(place: LocalDestination) -> set[str]:
    """Names of shards that unfinished work here made, or was about to make."""
    try:
        return set(map(str, json.loads(place.read(_SHARDS) or b"[]")))
    except (ValueError, TypeError):
        return set()


def _note_shards(place: LocalDestination, names: set[str]) -> None:
    place.write(_SHARDS, json.dumps(sorted(names)).encode())


class _Writer:
    """Makes the shards of a source in its place, then the index."""

    def __init__(
        self,
        place: LocalDestination,
        source: Source,
        plan: dict[str, Any],
        progress: Progress,
        workers: int,
        skip_bad: bool,
        console: Console,
    ) -> None:
        self._place, self._source, self._plan, self._progress = place, source, plan, progress
        self._workers, self._skip, self._console = workers, skip_bad, console
        self._total = sum(part.count for part in source.parts)
        self._done, self._lock, self._stop = 0, threading.Lock(), threading.Event()

    def run(self, earlier: set[str]) -> Dataset:
        """Makes everything; `earlier` names the shards of what was there before, finished or not."""
        if empty := [part.name for part in self._source.parts if not part.count]:
            raise DataError(f"split {empty[0]!r} would be empty: {self._source.name} has no pictures for it")
        with concurrent.futures.ThreadPoolExecutor(self._workers) as self._pool:
            shards = [
                (part, number, count)
                for part, count in ((part, self._shards(part)) for part in self._source.parts)
                for number in range(count)
            ]
            earlier = earlier | {_shard_name(part, number, count) for part, number, count in shards}
            _note_shards(self._place, earlier)
            writers = max(self._place.writers, self._workers)
            with concurrent.futures.ThreadPoolExecutor(min(writers, len(shards))) as makers:
                jobs = [makers.submit(self._shard, *shard) for shard in shards]
                try:
                    concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_EXCEPTION)
                finally:
                    # Set before the pools are joined: what is under way stops at the next picture.
                    if not all(job.done() and not job.cancelled() and job.exception() is None for job in jobs):
                        self._stop.set()
                        for job in jobs:
                            job.cancel()
                failed = [job.exception() for job in jobs if job.done() and not job.cancelled() and job.exception()]
                for error in sorted(failed, key=lambda error: isinstance(error, _Stopped)):
                    raise error  # type: ignore[misc]
        made: dict[str, list[ShardRecord]] = {}
        for (part, _, _), job in zip(shards, jobs, strict=True):
            made.setdefault(part.name, []).append(job.result())
        self._judge([one for ones in made.values() for one in ones])
        return self._finish(made, earlier)

    def _shards(self, part: SourceSplit) -> int:
        """Shards of about 128 MiB, as the first pictures' lengths foretell."""
        from trainer.ingest.images import UnusableImage
        from trainer.ingest.sources import in_order

        lengths = []
        for result in in_order(self._pool, part.loads(0, min(part.count, _SAMPLE)), _SAMPLE):
            try:
                lengths.append(len(result().picture.encoded))
            except UnusableImage:
                continue
        mean = sum(lengths) / max(1, len(lengths))
        return min(part.count, max(1, round(part.count * mean / _SHARD_BYTES)))

    def _shard(self, part: SourceSplit, number: int, shards: int) -> ShardRecord:
        """Makes one shard, unless an earlier run did."""
        from trainer.data.records import write_shard

        start, stop = part.count * number // shards, part.count * (number + 1) // shards
        file = _shard_name(part, number, shards)
        key = hashlib.sha256(f"{file} {start} {stop}\n{part.key(start, stop)}".encode()).hexdigest()
        note = f"{_MAKING}/{file}.json"
        content = self._place.read(note)
        made = ShardRecord.parse(content) if content else None
        if made and made.key == key and (not made.examples or self._place.holds(file, made.size, made.crc32c)):
            self._count(part, stop - start)
            return made
        made = ShardRecord(key, file, 0, 0, 0, {}, {}, 0, 0, [])
        shard = write_shard(self._place.local, file, self._pictures(part, start, stop, made))
        made.examples, made.size, made.crc32c = shard.examples, shard.bytes, shard.crc32c
        if made.examples:
            self._place.send(file, made.size, made.crc32c)
        else:
            os.unlink(os.path.join(self._place.local, file))
        self._place.write(note, json.dumps(dataclasses.asdict(made), sort_keys=True).encode())
        return made

    def _pictures(self, part: SourceSplit, start: int, stop: int, made: ShardRecord) -> Iterator[ImageRecord]:
        from trainer.ingest.images import UnusableImage
        from trainer.ingest.sources import in_order

        for result in in_order(self._pool, part.loads(start, stop), _AHEAD):
            if self._stop.is_set():
                raise _Stopped("stopped, since another shard failed")
            self._count(part, 1)
            try:
                found = result()
            except UnusableImage as error:
                made.bad.append(str(error))
                continue
            made.heights[found.picture.height] = made.heights.get(found.picture.height, 0) + 1
            made.widths[found.picture.width] = made.widths.get(found.picture.width, 0) + 1
            made.turned += found.turned
            made.converted += found.converted
            yield found.picture

    def _count(self, part: SourceSplit, pictures: int) -> None:
        with self._lock:
            self._done += pictures
            self._progress(f"prepare {part.name}", self._done, self._total)

    def _judge(self, made: list[ShardRecord]) -> None:
        """Says, or refuses, what could not be used."""
        bad = [text for one in made for text in one.bad]
        if bad:
            first = "; ".join(bad[:3])
            self._place.write(f"{_MAKING}/unusable.txt", ("\n".join(bad) + "\n").encode())
            if not self._skip:
                listed = f"; all are listed in {self._place.folder}/{_MAKING}/unusable.txt" if len(bad) > 3 else ""
                raise DataError(
                    f"{len(bad):,} of {self._total:,} pictures cannot be used: {first}{listed}. Replace them, or leave them "
                    "out with --skip_bad"
                )
            self._console.info(f"left out {len(bad):,} of {self._total:,} pictures that cannot be used: {first}")
        if converted := sum(one.converted for one in made):
            self._console.info(
                f"{converted:,} pictures became PNG, since TensorFlow does not decode theirs everywhere alike"
            )
        if turned := sum(one.turned for one in made):
            self._console.info(
                f"{turned:,} pictures have an EXIF rotation, which is not applied (docs/data.md); --exif=upright does"
            )

    def _finish(self, made: dict[str, list[ShardRecord]], earlier: set[str]) -> Dataset:
        """Writes dataset.json, if every shard is still what was made, and clears up."""
        from trainer.data.dataset import INDEX_FILE, Dataset, Shard, Split

        every = [one for ones in made.values() for one in ones if one.examples]
        splits = {
            name: Split(name, tuple(Shard(o.file, o.examples, o.size, o.crc32c) for o in ones if o.examples))
            for name, ones in made.items()
        }
        if empty := [name for name, split in splits.items() if not split.shards]:
            raise DataError(f"split {empty[0]!r} would be empty: none of its pictures can be used")
        if changed := self._place.changed({one.file: (one.size, one.crc32c) for one in every}):
            raise DataError(
                f"{self._place.folder}/{changed[0]} was changed by somebody else meanwhile: let one job finish, then run "
                "this one again, or choose another --out"
            )
        heights, widths = _sum(one.heights for one in every), _sum(one.widths for one in every)
        facts = {
            "left_out": sum(len(one.bad) for ones in made.values() for one in ones),
            "became_png": sum(one.converted for one in every),
            "exif_rotation_not_applied": sum(one.turned for one in every),
        }
        dataset = Dataset(
            self._place.folder,
            self._source.name,
            self._source.classes,
            splits,
            {
                "max_height": max(heights),
                "max_width": max(widths),
                "median_height": _median_low(heights),
                "median_width": _median_low(widths),
            },
            self._source.facts | {name: count for name, count in facts.items() if count},
        )
        index = dataset.to_json()
        self._place.write(_COMPLETE, _complete(self._plan, index))
        self._place.write(INDEX_FILE, index)
        clean_up(self._place, index, earlier)
        return dataset


class _Stopped(DataError):
    """A shard that was given up because another failed."""


def _sum(counts: Iterable[dict[int, int]]) -> dict[int, int]:
    total: collections.Counter[int] = collections.Counter()
    for one in counts:
        total.update(one)
    return total


def _median_low(counts: dict[int, int]) -> int:
    """The median of values given by how often each occurs; of two in the middle, the lower."""
    middle, seen = (sum(counts.values()) - 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen > middle:
            return value
    raise ValueError("no values")


def _shard_name(part: SourceSplit, number: int, shards: int) -> str:
    return f"{part.name}-{number:05d}-of-{shards:05d}.tfrecord"


def _shard_files(index: bytes | None) -> set[str]:
    """The shards that an index names, as far as it can be read."""
    try:
        splits = json.loads(index or b"{}").get("splits", {}).values()
        return {os.path.basename(shard["file"]) for split in splits for shard in split["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
