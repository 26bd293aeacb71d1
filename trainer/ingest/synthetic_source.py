"""Drawn flowers (trainer.ingest.synthetic) as a source: `--dataset=synthetic`."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Iterator

from trainer.core.errors import ConfigError
from trainer.data.dataset import Dataset
from trainer.data.records import ImageRecord
from trainer.ingest import synthetic
from trainer.ingest.images import ValidatedImage
from trainer.ingest.sources import Loader, Progress, Source, SourceSplit, run_in_order
from trainer.ingest.writer import SHARD_BYTES, write_dataset

_IMAGES_PER_JOB = 256  # drawn by a worker process at a time


def synthetic_source(seed: int, classes: int, size: int, splits: dict[str, int]) -> Source:
    """Flowers drawn by a process per core.

    Args:
        seed: >= 0.
        classes: number of species, >= 2.
        size: longer side of the images in pixels, >= 16.
        splits: number of images by split; splits of 0 are left out.

    Raises:
        ConfigError: a number out of range.
    """
    for name, value, minimum in (("seed", seed, 0), ("classes", classes, 2), ("size", size, 16)):
        if value < minimum:
            raise ConfigError(f"--{name}={value}: it must be at least {minimum}")
    if negative := [name for name, count in splits.items() if count < 0]:
        raise ConfigError(f"--{negative[0]}={splits[negative[0]]}: it must not be negative")
    if not any(splits.values()):
        raise ConfigError("every split is empty: give --train, or another split, a number of images")

    # Not forked: TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context)

    def source_split(split: str, count: int) -> SourceSplit:
        def loaders(start: int, stop: int) -> Iterator[Loader]:
            starts = range(start, stop, _IMAGES_PER_JOB)
            jobs = (
                functools.partial(synthetic.examples, seed, split, s, min(s + _IMAGES_PER_JOB, stop), classes, size)
                for s in starts
            )
            for first, drawn in zip(starts, run_in_order(pool, jobs, 2 * (os.cpu_count() or 1)), strict=True):
                for number, (encoded, label, (height, width)) in enumerate(drawn(), first):
                    image = ValidatedImage(ImageRecord(encoded, height, width, label, f"{split}/{number}.jpg"))
                    yield functools.partial(_identity, image)

        return SourceSplit(split, count, loaders, lambda start, stop: f"{seed} {classes} {size} {split} {start} {stop}")

    class_names = tuple(map(synthetic.species_name, range(classes)))
    source_splits = tuple(source_split(split, count) for split, count in splits.items() if count)
    return Source(f"synthetic, seed {seed}", class_names, source_splits, close=pool.shutdown)


def _identity(image: ValidatedImage) -> ValidatedImage:
    return image


def write_synthetic_dataset(
    out: str,
    seed: int,
    classes: int,
    size: int,
    splits: dict[str, int],
    progress: Progress,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Dataset:
    """Writes a data set of drawn flowers.

    Args:
        out: local folder or gs:// prefix.
        seed: see `synthetic_source`, as for `classes`, `size` and `splits`.
        classes: number of species.
        size: longer side in pixels.
        splits: number of images by split.
        progress: called with what is being done, how many are done, and how many in all.
        overwrite: replace the data set at `out`, if any.
        shard_bytes: about how long each shard becomes.

    Raises:
        ConfigError: a number out of range.
        DataError: `out` cannot be written, or holds a data set and `overwrite` is false.
    """
    return write_dataset(
        lambda: synthetic_source(seed, classes, size, splits),
        out,
        progress,
        plan={"dataset": "synthetic", "seed": seed, "classes": classes, "size": size, **splits},
        overwrite=overwrite,
        shard_bytes=shard_bytes,
    )
