"""Stores of decoded square images, in memory or decoded from disk on demand.

An image is resized to a square whatever its aspect ratio. Its original height and width are kept
beside it, so that a crop sampled in the original's proportions is still exact
(trainer.method.views).
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
    """Resizes images to squares, whatever their aspect ratio, with antialiasing.

    The exported model resizes with this function too, so its inputs equal those of the evaluation.

    Args:
        images: uint8 [..., height, width, 3].
        side: in pixels.

    Returns:
        uint8 [..., side, side, 3].
    """
    resized = tf.image.resize(images, [side, side], method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


@tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)], autograph=False)
def decode_square(encoded: tf.Tensor, side: tf.Tensor) -> tf.Tensor:
    """Decodes an image to a square: string scalar, int32 scalar -> uint8 [side, side, 3]."""
    return squash(records.decode(encoded), side)


class ImageStore:
    """The images of a split as squares, read by example id.

    Attributes:
        labels: int32 [examples], -1 where there is none.
        sizes: float32 [examples, 2], height and width of the originals in pixels.
        classes: class names.
        shape: shape of one image, (side, side, 3).
    """

    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Returns the images of examples `ids` (int [n]) in that order: uint8 [n, side, side, 3].

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
        corrupt: CorruptRecordLog | None = None,
    ) -> None:
        """Reads, checks and decodes the whole split, with a thread per core.

        Holds one encoded shard in memory at a time.

        Args:
            dataset: the data set of the split.
            split: which split to decode.
            side: height and width of the decoded images, in pixels.
            progress: called with the number of images decoded so far and in all.
            corrupt: collects corrupt records, which are left out; by default the first one raises.

        Raises:
            DataError: a shard is damaged, an image cannot be decoded (the message has file,
                record, offset and name), or the decoded split does not fit into this machine's
                memory.
        """
        required, available = decoded_bytes(split, side), free_memory()
        if required > available:
            raise DataError(
                f"split {split.name!r} of {dataset.folder} needs {required / 2**30:.1f} GiB decoded at {side} x {side} "
                f"pixels; {available / 2**30:.1f} GiB of memory are free: use --store=disk, a smaller --store_size or a "
                "machine with more memory"
            )
        self.classes, self.shape = dataset.classes, (side, side, 3)
        self.images = np.empty((split.examples, side, side, 3), np.uint8)
        entries, start = [], 0
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            for shard in records.read_shards(dataset, split, corrupt):
                output = self.images[start : start + len(shard.entries)]
                for done, _ in enumerate(pool.map(_decoder(shard, side, output), range(len(output))), start + 1):
                    if done % 64 == 0 or done == split.examples:
                        progress(done, split.examples)
                entries.append(shard.entries)
                start += len(output)
        self.images = self.images[:start]
        index = np.concatenate(entries)
        self.labels, self.sizes = index["label"].astype(np.int32), records.original_sizes(index)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `ImageStore`."""
        return self.images[ids]


class DiskStore(ImageStore):
    """A split whose images stay encoded on disk.

    Requested images are read and decoded by a pool of threads.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        side: int,
        cache: Cache,
        progress: Callable[[int, int], None],
        threads: int = 0,
        corrupt: CorruptRecordLog | None = None,
    ) -> None:
        """
        Args:
            dataset: the data set of the split.
            split: which split to read.
            side: height and width of the decoded images, in pixels.
            cache: keeps copies of remote shards. This store keeps it alive, and with it the lease
                on the copies.
            progress: called with the number of bytes copied or checked so far and in all.
            threads: number of decoding threads; 0: one per core.
            corrupt: collects corrupt records, which are left out; by default the first one raises.

        Raises:
            DataError: a shard is missing or damaged, or the copies do not fit on the disk.
        """
        self._cache, self.shape = cache, (side, side, 3)
        self._encoded = EncodedSplit(dataset, split, cache.open(dataset, split, progress, corrupt))
        self.labels, self.sizes, self.classes = self._encoded.labels, self._encoded.sizes, dataset.classes
        self._pool = concurrent.futures.ThreadPoolExecutor(threads or cores(), "decode")

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `ImageStore`."""
        images = np.empty((len(ids), *self.shape), np.uint8)
        decode = _decoder(self._encoded, self.shape[0], images)
        for _ in self._pool.map(decode, range(len(ids)), ids.tolist()):
            pass
        return images


class ConcatenatedStore(ImageStore):
    """Several stores as one: the ids of each store follow those of the store before."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        """
        Args:
            stores: with images of one shape. The classes are those of the first.
        """
        self._stores = tuple(stores)
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        self.labels = np.concatenate([store.labels for store in stores])
        self.sizes = np.concatenate([store.sizes for store in stores])
        self.classes, self.shape = stores[0].classes, stores[0].shape

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `ImageStore`."""
        images = np.empty((len(ids), *self.shape), np.uint8)
        store_of_id = np.searchsorted(self._starts, ids, side="right") - 1
        for number, store in enumerate(self._stores):
            rows = store_of_id == number
            if rows.any():
                images[rows] = store.take(ids[rows] - self._starts[number])
        return images


Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetched(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `function(item)` for each item in order.

    A thread computes the next result while the caller uses the last.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        pending: concurrent.futures.Future[Result] | None = None
        for item in items:
            submitted = thread.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = submitted
        if pending is not None:
            yield pending.result()


def _decoder(encoded: EncodedShard | EncodedSplit, side: int, images: np.ndarray) -> Callable[..., None]:
    """Returns a function that decodes example `number` (by default `row`) into `images[row]`."""

    def decode(row: int, number: int | None = None) -> None:
        example = row if number is None else number
        record = encoded.record(example)
        try:
            images[row] = decode_square(tf.constant(record.encoded), tf.constant(side)).numpy()
        except tf.errors.OpError as error:
            raise DataError(
                f"{encoded.location(example)} ({record.filename}): the image cannot be decoded; "
                "replace it and prepare the data set again"
            ) from error

    return decode
