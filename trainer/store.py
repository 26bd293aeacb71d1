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

from trainer.errors import DataError
from trainer.records import Dataset, EncodedSplit, Split, decode


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
    return squash(decode(encoded), side)


class Store:
    """A split's images in memory.

    Attributes:
        images: uint8 [examples, side, side, 3].
        labels: int32 [examples], -1 where there is none.
        sizes: float32 [examples, 2], height and width of the originals in pixels.
        classes: class names.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        side: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Reads, checks and decodes the whole split with a thread per core.

        Raises:
            DataError: a shard is damaged, an image cannot be decoded (file, record, offset and name are given), or the
                decoded split does not fit into this machine's memory.
        """
        encoded = EncodedSplit(dataset, split)
        need = len(encoded) * side * side * 3
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        if need > have:
            raise DataError(
                f"split {split.name!r} of {dataset.folder} needs {need / 2**30:.1f} GiB decoded at {side} x {side} pixels; "
                f"{have / 2**30:.1f} GiB of memory are free: use a smaller --store_size or a machine with more memory"
            )
        self.labels, self.sizes, self.classes = encoded.labels, encoded.sizes, dataset.classes
        self.images = np.empty((len(encoded), side, side, 3), np.uint8)

        def decode(example: int) -> None:
            picture = encoded.picture(example)
            try:
                self.images[example] = _square(tf.constant(picture.encoded), tf.constant(side)).numpy()
            except tf.errors.OpError as error:
                raise DataError(
                    f"{encoded.where(example)} ({picture.filename}): the image cannot be decoded; "
                    "replace it and prepare the data set again"
                ) from error

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(decode, range(len(encoded))), 1):
                if done % 64 == 0 or done == len(encoded):
                    progress(done, len(encoded))

    def __len__(self) -> int:
        return len(self.images)
