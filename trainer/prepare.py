"""Any images -> TFRecord shards and dataset.json, in a folder or on gs://.

    funmatch prepare --dataset=tfds:NAME[/CONFIG][:VERSION] --out=OUT   a set of tensorflow-datasets, the paper's splits
    funmatch prepare --dataset=folder:PATH --out=OUT                    PATH/SPLIT/CLASS/*.{jpg,png,...}; less levels: docs/data.md
    funmatch prepare --dataset=csv:FILE --out=OUT                       lines of path,label[,split]
    funmatch prepare --dataset=tfrecord:GLOB --out=OUT                  shards that are there already
    funmatch prepare --dataset=synthetic --out=OUT                      drawn flowers, no download
    funmatch prepare --verify=OUT                                       reads everything back

Same input and flags, same bytes, for any number of workers. Shards first, dataset.json last: a folder without it is no
data set. The same command again goes on with the shards that are missing.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import posixpath
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trainer.places import Place
    from trainer.records import Dataset, Picture, Shard
    from trainer.sources import Part, Source, Wanted

SYNTHETIC_SPLITS = {
    "train": 1020,
    "validation": 1020,
    "test": 6149,
    "pretrain": 40800,
}  # Flowers102's, and one for teachers
_SHARD_BYTES = 128 << 20
_SAMPLE = 64  # first pictures of a split, whose mean length decides how many shards there are
_AHEAD = 32  # pictures that a shard's writer has under way; what bounds memory
_MAKING = ".making"  # folder in which the work is noted until dataset.json is there
_SHARDS = f"{_MAKING}/shards.json"  # names of all shards that work at this place ever made, or was about to make
_COMPLETE = f"{_MAKING}/complete"  # the SHA-256 of the plan and dataset.json, noted just before the latter is written

Progress = Callable[[str, int, int], None]


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags."""
    group: dict[str, Any] = {"flag_values": values, "module_name": "prepare"}
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("dataset", "", "tfds:NAME[/CONFIG][:VERSION], folder:PATH, csv:FILE, tfrecord:GLOB or synthetic.", **group)
    text("out", "", "Folder or gs:// prefix to write to.", **group)
    text("verify", "", "A prepared data set to read back: counts, CRCs, every image decoded.", **group)
    text(
        "splits",
        "",
        "NAME=WHERE items: a split expression of tensorflow-datasets (train=train[:90%]), a split of the source, or, for "
        "tfrecord, a pattern of paths. Or NAME:SHARE items (train:0.9,validation:0.1), for a source without splits: dealt "
        "out class by class, by a hash of each picture's bytes and --seed. Empty: the paper's, else the source's own.",
        **group,
    )
    text(
        "data_dir",
        "",
        "Where tensorflow-datasets keeps its files, on a disk or gs://; empty: ~/tensorflow_datasets.",
        **group,
    )
    text("image", "", "The feature with the picture, where a set of tensorflow-datasets has several.", **group)
    text("label", "", "The feature with the class, likewise.", **group)
    text(
        "features",
        "",
        "Layout of tfrecord: image:KEY,label:KEY,filename:KEY (the last two may be left out), or funmatch, notebook (the "
        "FunMatch-Distillation notebooks) or tfds. Empty: found from the first record.",
        **group,
    )
    text(
        "columns",
        "",
        "Columns of csv: path:COLUMN,label:COLUMN,split:COLUMN, by name or number from 0. Empty: found.",
        **group,
    )
    text(
        "classes",
        "",
        "Synthetic: species, at least 2 (102). Others: a file with a class name a line, in order. Empty: from the source.",
        **group,
    )
    switch(
        "unlabelled", False, "Leave the labels out: pictures to distil on, for --data beside an --eval_data.", **group
    )
    flags.DEFINE_enum(
        "exif",
        "keep",
        ["keep", "upright"],
        "keep: pictures as they are stored, the bytes untouched. upright: those with an EXIF rotation are turned, as PNG.",
        **group,
    )
    switch(
        "skip_bad",
        False,
        "Leave pictures out that cannot be decoded, and say how many; else they are an error.",
        **group,
    )
    number("workers", 0, "Threads, at least 1; 0: one for each core. It changes no byte.", **group)
    switch("overwrite", False, "Replace the data set that is at --out.", **group)
    number("seed", 0, "Seed of the synthetic garden, and of --splits by share; at least 0.", **group)
    number("size", 256, "Longer side of synthetic pictures in pixels, at least 16.", **group)
    for split, count in SYNTHETIC_SPLITS.items():
        number(split, count, f"Synthetic pictures in the split {split}; 0 leaves it out.", **group)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _run, argv)


def _run(values: Any) -> None:
    from trainer.journal import Screen

    screen = Screen()
    # Pillow warns of odd EXIF and of big pictures; both are told by our own words, or do not matter.
    warnings.filterwarnings("ignore", module="PIL")
    if values.workers < 0:
        raise ConfigError(f"--workers={values.workers}: it must be at least 1, or 0 for one for each core")
    if values.verify:
        screen.say(verify(values.verify, screen.progress, workers=values.workers))
        return
    if not values.out:
        raise ConfigError("--out is missing: the folder or gs:// prefix to write to")
    began = time.monotonic()
    dataset = write(
        lambda: _source(values, screen.progress),
        values.out,
        screen.progress,
        plan=_plan(values),
        overwrite=values.overwrite,
        skip_bad=values.skip_bad,
        workers=values.workers,
        say=screen.say,
    )
    screen.close()
    seconds = time.monotonic() - began
    counts = ", ".join(f"{split.name} {split.examples:,}" for split in dataset.splits.values())
    images = sum(split.examples for split in dataset.splits.values())
    size = sum(shard.bytes for split in dataset.splits.values() for shard in split.shards)
    screen.say(
        f"{values.out}: {len(dataset.classes) or 'no'} classes; {counts}; {size / 1e6:,.1f} MB in {seconds:,.1f} s "
        f"({images / seconds:,.0f} images/s, {size / 1e6 / seconds:,.1f} MB/s)"
    )


def _plan(values: Any) -> dict[str, Any]:
    """The flags that decide bytes: who goes on with the work of another must have the same."""
    names: tuple[str, ...] = (
        "dataset",
        "splits",
        "image",
        "label",
        "features",
        "columns",
        "classes",
        "unlabelled",
        "exif",
        "seed",
    )
    if values.dataset == "synthetic":
        names = ("dataset", "seed", "classes", "size", *SYNTHETIC_SPLITS)
    return {name: getattr(values, name) for name in names}


def _source(values: Any, progress: Progress) -> Source:
    from trainer import sources

    kind, _, rest = values.dataset.partition(":")
    if values.seed < 0:
        raise ConfigError(f"--seed={values.seed}: it must be at least 0")
    if kind == "synthetic" and not rest:
        if values.classes and not values.classes.lstrip("-").isdigit():
            raise ConfigError(f"--classes={values.classes}: with --dataset=synthetic it is a number of species")
        splits = {name: getattr(values, name) for name in SYNTHETIC_SPLITS}
        return sources.garden(values.seed, int(values.classes or 102), values.size, splits)
    if not rest or kind not in ("tfds", "folder", "csv", "tfrecord"):
        raise ConfigError(
            f"--dataset={values.dataset}: it must be tfds:NAME, folder:PATH, csv:FILE, tfrecord:GLOB or synthetic"
        )
    for flag, owners in (
        ("data_dir", ("tfds",)),
        ("image", ("tfds",)),
        ("label", ("tfds",)),
        ("features", ("tfrecord",)),
        ("columns", ("csv",)),
    ):
        if getattr(values, flag) and kind not in owners:
            raise ConfigError(f"--{flag} is for --dataset={owners[0]}:..., not for {kind}")
    chosen, shares = sources.parse_splits(values.splits)
    wanted = sources.Wanted(
        splits=chosen,
        shares=shares,
        seed=values.seed,
        labelled=not values.unlabelled,
        upright=values.exif == "upright",
        classes=sources.names_in(values.classes) if values.classes else (),
    )
    if kind == "tfds":
        from trainer import tfds_sets

        return tfds_sets.source(rest, values.data_dir, values.image, values.label, wanted)
    if kind == "csv":
        columns = sources.parse_pairs("columns", values.columns, ("path", "label", "split"))
        return sources.table(rest, columns, wanted, progress)
    if kind == "tfrecord":
        from trainer import tfrecord_sets

        return tfrecord_sets.source(rest, values.features, wanted, progress)
    return sources.folder(rest, wanted, progress)


def synthetic(
    out: str,
    seed: int,
    classes: int,
    size: int,
    splits: dict[str, int],
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Dataset:
    """Draws a garden (trainer.sources.garden) and writes it to `out`.

    Raises:
        ConfigError: a number out of range.
        DataError: `out` cannot be written, or holds a data set already.
    """
    from trainer import sources

    plan = {"dataset": "synthetic", "seed": seed, "classes": classes, "size": size, **splits}
    return write(lambda: sources.garden(seed, classes, size, splits), out, progress, plan=plan, overwrite=overwrite)


def folder(
    path: str, out: str, progress: Progress, *, wanted: Wanted | None = None, overwrite: bool = False
) -> Dataset:
    """Writes the image files in `path` (trainer.sources.folder) to `out`.

    Raises:
        DataError: no images, an image that cannot be used (it is named), or `out` cannot be written.
    """
    from trainer import sources

    wanted = wanted or sources.Wanted()
    plan = {"dataset": f"folder:{path}", "wanted": repr(wanted)}
    return write(lambda: sources.folder(path, wanted, progress), out, progress, plan=plan, overwrite=overwrite)


@dataclasses.dataclass
class _Made:
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
    def parse(cls, content: bytes) -> _Made | None:
        """None if it is not one, as after a power cut."""
        try:
            made = cls(**json.loads(content))
        except (ValueError, TypeError):
            return None
        made.heights = {int(size): count for size, count in made.heights.items()}
        made.widths = {int(size): count for size, count in made.widths.items()}
        return made


def write(
    make_source: Callable[[], Source],
    out: str,
    progress: Progress,
    *,
    plan: dict[str, Any],
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
    say: Callable[[str], None] = lambda _: None,
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
        say: told of what was left out or changed.

    Raises:
        DataError: `out` is taken or cannot be written, or pictures cannot be used and `skip_bad` is false.
    """
    from trainer import places
    from trainer.records import INDEX, Dataset

    place = places.open_place(out)
    try:
        old = place.read(INDEX)
        if old is not None and not overwrite:
            if place.read(_COMPLETE) == _complete(plan, old):
                # This very command was killed when all was done but for the clearing up.
                _clear(place, old, _noted_shards(place))
                return Dataset.load(out, "out")
            raise DataError(f"--out={out} holds a data set already: give another folder, or --overwrite")
        source = make_source()
        try:
            earlier = _noted_shards(place) | _shard_files(old)
            _claim(place, plan, overwrite)
            if earlier:
                _note_shards(place, earlier)  # else nobody would know of them after a kill
            # From here on there is no data set at `out` until the new one is complete.
            place.remove(INDEX)
            return _Writer(place, source, plan, progress, workers or os.cpu_count() or 1, skip_bad, say).run(earlier)
        finally:
            source.close()
    finally:
        place.close()


def _claim(place: Place, plan: dict[str, Any], overwrite: bool) -> None:
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


def _clear(place: Place, index: bytes, earlier: set[str]) -> None:
    """Removes shards of before that the data set with this index does not name, and the notes."""
    for name in earlier - _shard_files(index):
        place.remove(name)
    place.remove_folder(_MAKING, last=posixpath.basename(_COMPLETE))


def _noted_shards(place: Place) -> set[str]:
    """Names of shards that unfinished work here made, or was about to make."""
    try:
        return set(map(str, json.loads(place.read(_SHARDS) or b"[]")))
    except (ValueError, TypeError):
        return set()


def _note_shards(place: Place, names: set[str]) -> None:
    place.write(_SHARDS, json.dumps(sorted(names)).encode())


class _Writer:
    """Makes the shards of a source in its place, then the index."""

    def __init__(
        self,
        place: Place,
        source: Source,
        plan: dict[str, Any],
        progress: Progress,
        workers: int,
        skip_bad: bool,
        say: Callable[[str], None],
    ) -> None:
        self._place, self._source, self._plan, self._progress = place, source, plan, progress
        self._workers, self._skip, self._say = workers, skip_bad, say
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
        made: dict[str, list[_Made]] = {}
        for (part, _, _), job in zip(shards, jobs, strict=True):
            made.setdefault(part.name, []).append(job.result())
        self._judge([one for ones in made.values() for one in ones])
        return self._finish(made, earlier)

    def _shards(self, part: Part) -> int:
        """Shards of about 128 MiB, as the first pictures' lengths foretell."""
        from trainer.pictures import Unusable
        from trainer.sources import in_order

        lengths = []
        for result in in_order(self._pool, part.loads(0, min(part.count, _SAMPLE)), _SAMPLE):
            try:
                lengths.append(len(result().picture.encoded))
            except Unusable:
                continue
        mean = sum(lengths) / max(1, len(lengths))
        return min(part.count, max(1, round(part.count * mean / _SHARD_BYTES)))

    def _shard(self, part: Part, number: int, shards: int) -> _Made:
        """Makes one shard, unless an earlier run did."""
        from trainer.records import write_shard

        start, stop = part.count * number // shards, part.count * (number + 1) // shards
        file = _shard_name(part, number, shards)
        key = hashlib.sha256(f"{file} {start} {stop}\n{part.key(start, stop)}".encode()).hexdigest()
        note = f"{_MAKING}/{file}.json"
        content = self._place.read(note)
        made = _Made.parse(content) if content else None
        if made and made.key == key and (not made.examples or self._place.holds(file, made.size, made.crc32c)):
            self._count(part, stop - start)
            return made
        made = _Made(key, file, 0, 0, 0, {}, {}, 0, 0, [])
        shard = write_shard(self._place.local, file, self._pictures(part, start, stop, made))
        made.examples, made.size, made.crc32c = shard.examples, shard.bytes, shard.crc32c
        if made.examples:
            self._place.send(file, made.size, made.crc32c)
        else:
            os.unlink(os.path.join(self._place.local, file))
        self._place.write(note, json.dumps(dataclasses.asdict(made), sort_keys=True).encode())
        return made

    def _pictures(self, part: Part, start: int, stop: int, made: _Made) -> Iterator[Picture]:
        from trainer.pictures import Unusable
        from trainer.sources import in_order

        for result in in_order(self._pool, part.loads(start, stop), _AHEAD):
            if self._stop.is_set():
                raise _Stopped("stopped, since another shard failed")
            self._count(part, 1)
            try:
                found = result()
            except Unusable as error:
                made.bad.append(str(error))
                continue
            made.heights[found.picture.height] = made.heights.get(found.picture.height, 0) + 1
            made.widths[found.picture.width] = made.widths.get(found.picture.width, 0) + 1
            made.turned += found.turned
            made.converted += found.converted
            yield found.picture

    def _count(self, part: Part, pictures: int) -> None:
        with self._lock:
            self._done += pictures
            self._progress(f"prepare {part.name}", self._done, self._total)

    def _judge(self, made: list[_Made]) -> None:
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
            self._say(f"left out {len(bad):,} of {self._total:,} pictures that cannot be used: {first}")
        if converted := sum(one.converted for one in made):
            self._say(f"{converted:,} pictures became PNG, since TensorFlow does not decode theirs everywhere alike")
        if turned := sum(one.turned for one in made):
            self._say(
                f"{turned:,} pictures have an EXIF rotation, which is not applied (docs/data.md); --exif=upright does"
            )

    def _finish(self, made: dict[str, list[_Made]], earlier: set[str]) -> Dataset:
        """Writes dataset.json, if every shard is still what was made, and clears up."""
        from trainer.records import INDEX, Dataset, Shard, Split

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
        index = dataset.index()
        self._place.write(_COMPLETE, _complete(self._plan, index))
        self._place.write(INDEX, index)
        _clear(self._place, index, earlier)
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


def _shard_name(part: Part, number: int, shards: int) -> str:
    return f"{part.name}-{number:05d}-of-{shards:05d}.tfrecord"


def _shard_files(index: bytes | None) -> set[str]:
    """The shards that an index names, as far as it can be read."""
    try:
        splits = json.loads(index or b"{}").get("splits", {}).values()
        return {os.path.basename(shard["file"]) for split in splits for shard in split["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


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
    from trainer.records import Dataset
    from trainer.sources import in_order

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
    from trainer import files

    return files.read(files.join(dataset.folder, shard.file), "a shard")


def _records(dataset: Dataset, shard: Shard, content: bytes) -> Iterator[tuple[bytes, str]]:
    """Payloads of a shard that is whole, and where each lies."""
    import google_crc32c

    from trainer import files
    from trainer.records import payloads

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

    from trainer import headers
    from trainer.records import check, decode

    try:
        picture = check(dataset, payload)
    except headers.Unfit as error:
        raise DataError(f"{where}: {error}") from error
    try:
        height, width, _ = decode(tf.constant(picture.encoded)).shape
    except tf.errors.OpError as error:
        raise DataError(f"{where} ({picture.filename}): the image cannot be decoded") from error
    if (height, width) != (picture.height, picture.width):
        raise DataError(f"{where}: {height} x {width} pixels; its record says {picture.height} x {picture.width}")


if __name__ == "__main__":
    sys.exit(main())
