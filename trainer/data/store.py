"""Images of a split as squares, in memory or decoded from the disk when asked for, and which of them make batch t.

Order is a function of (seed, position): there is no shuffle buffer and nothing to save. An image is kept as a
square uint8 picture, squashed to it whatever its aspect ratio; its original height and width stay beside it, so that a
crop sampled in the original's proportions is still exact (trainer.method.views).
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.data import records
from trainer.data.cache import Cache
from trainer.data.dataset import Dataset, Split
from trainer.data.memory import cores, decoded_bytes, free_memory
from trainer.data.records import CorruptRecordLog, EncodedShard, EncodedSplit


def squash(images: tf.Tensor, side: int | tf.Tensor) -> tf.Tensor:
    """Resizes to a square whatever the aspect, antialiased: uint8 [..., height, width, 3] -> uint8 [..., side, side, 3].

    The exported model uses this function too: what it sees is what was evaluated.
    """
    resized = tf.image.resize(images, [side, side], method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


@tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)], autograph=False)
def decode_square(encoded: tf.Tensor, side: tf.Tensor) -> tf.Tensor:
    """Decodes one image and squashes it to a square: string scalar -> uint8 [side, side, 3]."""
    return squash(records.decode(encoded), side)


class ImageStore:
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


class MemoryStore(ImageStore):
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
        damage: CorruptRecordLog | None = None,
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
        self.labels, self.sizes = table["label"].astype(np.int32), records.original_sizes(table)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `Store`."""
        return self.images[ids]


class DiskStore(ImageStore):
    """A split whose images stay encoded on the disk; those asked for are read and decoded, a thread per core."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        side: int,
        cache: Cache,
        progress: Callable[[int, int], None],
        threads: int = 0,
        damage: CorruptRecordLog | None = None,
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


class SeveralStores(ImageStore):
    """Sets one after the other: the ids of each follow those of the one before."""

    def __init__(self, parts: Sequence[ImageStore]) -> None:
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


def prefetched(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
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


def _decoder(encoded: EncodedShard | EncodedSplit, side: int, images: np.ndarray) -> Callable[..., None]:
    """A function that decodes example `number` (by default `place`) into `images[place]`."""

    def decode(place: int, number: int | None = None) -> None:
        example = place if number is None else number
        picture = encoded.picture(example)
        try:
            images[place] = decode_square(tf.constant(picture.encoded), tf.constant(side)).numpy()
        except tf.errors.OpError as error:
            raise DataError(
                f"{encoded.where(example)} ({picture.filename}): the image cannot be decoded; "
                "replace it and prepare the data set again"
            ) from error

    return decode
