"""Images of a split as squares, in memory or decoded from the disk when asked for, and which of them make batch t.

Order is a function of (seed, position): there is no shuffle buffer and nothing to save. An image is kept as a
square uint8 picture, squashed to it whatever its aspect ratio; its original height and width stay beside it, so that a
crop sampled in the original's proportions is still exact (trainer.views).
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

import numpy as np
import tensorflow as tf

from trainer import records
from trainer.cache import Cache
from trainer.errors import ConfigError, DataError
from trainer.records import Damage, Dataset, EncodedShard, EncodedSplit, Split

_SHARE_OF_MEMORY = 0.7  # that images may take; the rest is for models, encoded images and what is made ahead
_CYCLE = 10_000  # rows over which sets are mixed in exact shares
_PATTERN = 0xFFFFFFFF  # the stream that says which set a row is from


def permutation(seed: int, epoch: int, examples: int, stream: int = 0) -> np.ndarray:
    """The order of epoch `epoch`: int32 [examples], each id once.

    Sorting Philox's raw 64-bit stream, because NumPy promises that stream for ever and does not promise
    `Generator.permutation`'s.

    Args:
        seed: 0 to 2^31 - 1.
        epoch: from 0.
        examples: below 2^31.
        stream: 0 to 2^32 - 1, one for each set that has epochs of its own.
    """
    raw = np.random.Philox(key=[seed + (stream << 32), epoch]).random_raw(examples)
    return np.argsort(raw, kind="stable").astype(np.int32)


class _Epochs:
    """Permutations of one stream, one after the other without a seam; those in use are kept."""

    def __init__(self, seed: int, examples: int, stream: int) -> None:
        self._seed, self._examples, self._stream = seed, examples, stream
        self._kept: dict[int, np.ndarray] = {}

    def ids(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start], in time independent of `start`."""
        epochs = range(start // self._examples, -(-stop // self._examples))
        self._kept = {e: self._kept[e] if e in self._kept else self._make(e) for e in epochs}
        parts = [self._kept[e][max(0, start - e * self._examples) : max(0, stop - e * self._examples)] for e in epochs]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _make(self, epoch: int) -> np.ndarray:
        return permutation(self._seed, epoch, self._examples, self._stream)


class Order:
    """Which example ids make batch t: epochs follow one another without a seam, each shows every example once.

    Of several sets, an id is a position in all of them, one after the other. Without weights they are one set. With weights,
    each set goes through epochs of its own, and each 10,000 rows, counted from the start of the run, hold every set in its
    exact share (to a ten-thousandth), in an order drawn anew. Which set a row is from is a function of (seed, step, row).
    """

    def __init__(
        self, seed: int, examples: int | Sequence[int], batch_size: int, weights: Sequence[float] = ()
    ) -> None:
        """
        Args:
            seed: 0 to 2^31 - 1.
            examples: of the set, or of each set.
            batch_size: rows of the global batch.
            weights: of each set, > 0, of any sum; none: the sets are one.

        Raises:
            ConfigError: a set would be in no row of 10,000.
            DataError: more examples than an int32 counts.
        """
        sets = [examples] if isinstance(examples, int) else list(examples)
        if sum(sets) >= 2**31:
            raise DataError(f"{sum(sets):,} examples; at most {2**31 - 1:,} can be trained on at once")
        self._batch, self._seed = batch_size, seed
        self._shares = np.array([_CYCLE])
        if len(sets) > 1 and weights:
            self._shares = _shares(weights)
        else:
            sets = [sum(sets)]
        self._starts = np.cumsum([0, *sets])[:-1]
        self._sets = [_Epochs(seed, size, number) for number, size in enumerate(sets)]

    def batches(self, first: int, count: int) -> np.ndarray:
        """Ids int32 [count, batch] of batches `first` .. `first + count - 1`, in time independent of `first`."""
        start, stop = first * self._batch, (first + count) * self._batch
        if len(self._sets) == 1:
            return self._sets[0].ids(start, stop).reshape(count, self._batch)
        cycles = range(start // _CYCLE, -(-stop // _CYCLE))
        which = np.concatenate([self._pattern(cycle) for cycle in cycles])
        skip = start - cycles[0] * _CYCLE
        before, which = which[:skip], which[skip : skip + stop - start]
        found = np.empty(stop - start, np.int32)
        for number, epochs in enumerate(self._sets):
            own = which == number
            seen = cycles[0] * int(self._shares[number]) + int((before == number).sum())
            found[own] = epochs.ids(seen, seen + int(own.sum())) + self._starts[number]
        return found.reshape(count, self._batch)

    def _pattern(self, cycle: int) -> np.ndarray:
        """The set of each row of a cycle."""
        rows = np.repeat(np.arange(len(self._shares)), self._shares)
        return rows[permutation(self._seed, cycle, _CYCLE, _PATTERN)]


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Rows of each set in a cycle: weights rounded so that they sum to it, the largest remainders up."""
    exact = [Fraction(weight) * _CYCLE / sum(map(Fraction, weights)) for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_rest[: _CYCLE - sum(shares)]:
        shares[k] += 1
    if min(shares) < 1:
        raise ConfigError(f"--data_weights={','.join(map(str, weights))}: a share below 1 in {_CYCLE:,} is no share")
    return np.array(shares)


def squash(images: tf.Tensor, side: int | tf.Tensor) -> tf.Tensor:
    """Resizes to a square whatever the aspect, antialiased: uint8 [..., height, width, 3] -> uint8 [..., side, side, 3].

    The exported model uses this function too: what it sees is what was evaluated.
    """
    resized = tf.image.resize(images, [side, side], method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


@tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)], autograph=False)
def _square(encoded: tf.Tensor, side: tf.Tensor) -> tf.Tensor:
    return squash(records.decode(encoded), side)


class Store:
    """The images of a split as squares, reached by example id.

    Attributes:
        labels: int32 [examples], -1 where there is none.
        sizes: float32 [examples, 2], height and width of the originals in pixels.
        classes: class names.
        shape: of a square: (side, side, 3).
    """

    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    shape: tuple[int, int, int]

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
        self.classes, self.shape = dataset.classes, (side, side, 3)
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
        self._cache, self.shape = cache, (side, side, 3)  # with the cache goes the lease on the copies
        self._encoded = EncodedSplit(dataset, split, cache.open(dataset, split, progress, damage))
        self.labels, self.sizes, self.classes = self._encoded.labels, self._encoded.sizes, dataset.classes
        self._pool = concurrent.futures.ThreadPoolExecutor(threads or cores(), "decode")

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `Store`."""
        images = np.empty((len(ids), *self.shape), np.uint8)
        one = _decoder(self._encoded, self.shape[0], images)
        for _ in self._pool.map(one, range(len(ids)), ids.tolist()):
            pass
        return images


class SeveralStores(Store):
    """Sets one after the other: the ids of each follow those of the one before."""

    def __init__(self, parts: Sequence[Store]) -> None:
        """
        Args:
            parts: with the same square; the classes are those of the first.
        """
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.labels = np.concatenate([part.labels for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.classes, self.shape = parts[0].classes, parts[0].shape

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `Store`."""
        images = np.empty((len(ids), *self.shape), np.uint8)
        which = np.searchsorted(self._starts, ids, side="right") - 1
        for number, part in enumerate(self.parts):
            own = which == number
            if own.any():
                images[own] = part.take(ids[own] - self._starts[number])
        return images


Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yields `make` of each item in turn; the next one is made, on a thread, while the last one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting: concurrent.futures.Future[Made] | None = None
        for item in items:
            begun = thread.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = begun
        if waiting is not None:
            yield waiting.result()


def choose(kind: str, device: int, memory: int, train: int, held_out: int) -> tuple[str, str]:
    """Where the training images and the evaluation images are kept.

    Args:
        kind: of --store: "device", "host", "disk", or "auto" for the first of these that has room.
        device: bytes that the accelerator has for images.
        memory: bytes that are free on the host.
        train, held_out: bytes of the decoded images.

    Returns:
        A kind for each; held-out images are on the "host" or the "disk".
    """
    room = int(_SHARE_OF_MEMORY * memory)
    if kind == "auto":
        # What goes to the device is held on the host too.
        kind = "device" if train <= device and 2 * train + held_out <= room else "host"
        if kind == "host" and train + held_out > room:
            return "disk", "host" if held_out <= room // 2 else "disk"
    return kind, "disk" if kind == "disk" else "host"


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
