"""The drawn flowers of `--dataset=synthetic` as a source."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Iterator

from trainer.core.errors import ConfigError
from trainer.data.records import ImageRecord
from trainer.ingest.images import ValidatedImage
from trainer.ingest.sources import _CHUNK, Load, Source, SourceSplit, in_order


def synthetic_source(seed: int, classes: int, size: int, splits: dict[str, int]) -> Source:
    """Drawn flowers (trainer.ingest.synthetic), with a process per core.

    Args:
        seed: >= 0.
        classes: species, >= 2.
        size: longer side in pixels, >= 16.
        splits: pictures in each split; those of 0 are left out.

    Raises:
        ConfigError: a number out of range.
    """
    from trainer.ingest import synthetic

    for name, value, least in (("seed", seed, 0), ("classes", classes, 2), ("size", size, 16)):
        if value < least:
            raise ConfigError(f"--{name}={value}: it must be at least {least}")
    if negative := [name for name, count in splits.items() if count < 0]:
        raise ConfigError(f"--{negative[0]}={splits[negative[0]]}: it must not be negative")
    if not any(splits.values()):
        raise ConfigError("every split is empty: give --train and the others a number of pictures")

    # Fresh processes: TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context)

    def part(split: str, count: int) -> SourceSplit:
        def loads(start: int, stop: int) -> Iterator[Load]:
            starts = range(start, stop, _CHUNK)
            jobs = (
                functools.partial(synthetic.examples, seed, split, s, min(s + _CHUNK, stop), classes, size)
                for s in starts
            )
            for first, drawn in zip(starts, in_order(pool, jobs, 2 * (os.cpu_count() or 1)), strict=True):
                for number, (encoded, label, (height, width)) in enumerate(drawn(), first):
                    found = ValidatedImage(ImageRecord(encoded, height, width, label, f"{split}/{number}.jpg"))
                    yield functools.partial(_given, found)

        return SourceSplit(split, count, loads, lambda start, stop: f"{seed} {classes} {size} {split} {start} {stop}")

    names = tuple(map(synthetic.species_name, range(classes)))
    parts = tuple(part(split, count) for split, count in splits.items() if count)
    return Source(f"synthetic, seed {seed}", names, parts, close=pool.shutdown)


def _given(found: ValidatedImage) -> ValidatedImage:
    return found
