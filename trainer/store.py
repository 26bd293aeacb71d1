"""Images of a split, decoded once into squares, and which of them make batch t.

Order is a function of (seed, position): there is no shuffle buffer and nothing to save. An image is kept as a
square uint8 picture, squashed to it whatever its aspect ratio; its original height and width stay beside it, so that a
crop sampled in the original's proportions is still exact (trainer.views).
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer import records
from trainer.cache import Cache
from trainer.errors import DataError
from trainer.records import Damage, Dataset, EncodedShard, EncodedSplit, Split


def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of epoch `epoch`: int64 [examples], each id once.

    Sorting Philox's raw 64-bit stream, because NumPy promises that stream for ever and does not promise
    `Generator.permutation`'s.
    """
    raw = np.random.Philox(key=[seed, epoch]).random_raw(examples)
    return np.argsort(raw, kind="stable")


class Order:
    """Which example ids make batch t: epochs follow one another without a seam, each shows every example once."""

    def __init__(self, seed: int, examples: int, batch_size: int) -> None:
        self._seed, self._examples, self._batch = seed, examples, batch_size
        self._epochs: dict[int, np.ndarray] = {}

    def batches(self, first: int, count: int) -> np.ndarray:
        """Ids int32 [count, batch] of batches `first` .. `first + count - 1`, in time independent of `first`."""
        start, stop = first * self._batch, (first + count) * self._batch
        epochs = range(start // self._examples, -(-stop // self._examples))
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._make(e) for e in epochs}
        ids = np.concatenate([self._epochs[e] for e in epochs])
        skip = start - epochs[0] * self._examples
        return ids[skip : skip + stop - start].astype(np.int32).reshape(count, self._batch)

    def _make(self, epoch: int) -> np.ndarray:
        return permutation(self._seed, epoch, self._examples)


def squash(images: tf.Tensor, side: int | tf.Tensor) -> tf.Tensor:
    """Resizes to a square whatever the aspect, antialiased: uint8 [..., height, width, 3] -> uint8 [..., side, side, 3].

    The exported model uses this function too: what it sees is what was evaluated.
    """
    resized = tf.image.resize(images, [side, side], method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


@tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)])
def _square(encoded: tf.Tensor, side: tf.Tensor) -> tf.Tensor:
    return squash(records.decode(encoded), side)


class Store:
    """The images of a split as squares, reached by example id.

    Attributes:
        labels: int32 [examples], -1 where there is none.
        sizes: float32 [examples, 2], height and width of the originals in pixels.
        classes: class names.
    """

    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The squares of examples `ids` (int [n]) in that order: uint8 [n, side, side, 3].

        Raises:
            DataError: an image cannot be read or decoded.
        """
        raise NotImplementedError


class MemoryStore(Store):
    """A split decoded once into memory.

    Attributes:
        images: uint8 [examples, side, side, 3].
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        side: int,
        progress: Callable[[int, int], None],
        damage: Damage | None = None,
    ) -> None:
        """Reads, checks and decodes the whole split with a thread per core; of the encoded images, one shard at a time is held.

        Args:
            dataset, split: which.
            side: of a square, in pixels.
            progress: called with images decoded so far and in all.
            damage: counts bad records, which are left out; by default the first one is an error.

        Raises:
            DataError: a shard is damaged, an image cannot be decoded (file, record, offset and name are given), or the
                decoded split does not fit into this machine's memory.
        """
        need, have = decoded_bytes(split, side), free_memory()
        if need > have:
            raise DataError(
                f"split {split.name!r} of {dataset.folder} needs {need / 2**30:.1f} GiB decoded at {side} x {side} pixels; "
                f"{have / 2**30:.1f} GiB of memory are free: use --store=disk, a smaller --store_size or a machine with more memory"
            )
        self.classes = dataset.classes
        self.images = np.empty((split.examples, side, side, 3), np.uint8)
        tables, start = [], 0
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            for shard in records.read_shards(dataset, split, damage):
                place = self.images[start : start + len(shard.table)]
                for done, _ in enumerate(pool.map(_decoder(shard, side, place), range(len(place))), start + 1):
                    if done % 64 == 0 or done == split.examples:
                        progress(done, split.examples)
                tables.append(shard.table)
                start += len(place)
        self.images = self.images[:start]
        table = np.concatenate(tables)
        self.labels, self.sizes = table["label"].astype(np.int32), records.sides(table)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `Store`."""
        return self.images[ids]


class DiskStore(Store):
    """A split whose images stay encoded on the disk; those asked for are read and decoded, a thread per core."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        side: int,
        cache: Cache,
        progress: Callable[[int, int], None],
        threads: int = 0,
        damage: Damage | None = None,
    ) -> None:
        """
        Args:
            dataset, split: which.
            side: of a square, in pixels.
            cache: where copies of shards are kept that do not lie on a disk.
            progress: called with bytes copied or checked so far and in all.
            threads: that decode; 0: one for each core.
            damage: counts bad records, which are left out; by default the first one is an error.

        Raises:
            DataError: a shard is missing or damaged, or there is no room for the copies.
        """
        self._cache, self._side = cache, side  # with the cache goes the lease on the copies
        self._encoded = EncodedSplit(dataset, split, cache.open(dataset, split, progress, damage))
        self.labels, self.sizes, self.classes = self._encoded.labels, self._encoded.sizes, dataset.classes
        self._pool = concurrent.futures.ThreadPoolExecutor(threads or cores(), "decode")

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `Store`."""
        images = np.empty((len(ids), self._side, self._side, 3), np.uint8)
        one = _decoder(self._encoded, self._side, images)
        for _ in self._pool.map(one, range(len(ids)), ids.tolist()):
            pass
        return images


def _decoder(encoded: EncodedShard | EncodedSplit, side: int, images: np.ndarray) -> Callable[..., None]:
    """A function that decodes example `number` (by default `place`) into `images[place]`."""

    def decode(place: int, number: int | None = None) -> None:
        example = place if number is None else number
        picture = encoded.picture(example)
        try:
            images[place] = _square(tf.constant(picture.encoded), tf.constant(side)).numpy()
        except tf.errors.OpError as error:
            raise DataError(
                f"{encoded.where(example)} ({picture.filename}): the image cannot be decoded; "
                "replace it and prepare the data set again"
            ) from error

    return decode


def decoded_bytes(split: Split, side: int) -> int:
    """Bytes of a split's squares."""
    return split.examples * side * side * 3


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container if that allows less."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as top, open(used) as now:
                free = min(free, int(top.read()) - int(now.read()))
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
    return max(0, free)
