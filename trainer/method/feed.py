"""What the device's loops take in: which examples, and their images where those do not live on the device.

A loop's input is a function of (configuration, seed, first step, steps). It is made on the host one loop ahead: while the
device runs a loop, the next one's images are read and decoded. Nothing here is saved, and nothing is lost with it.
"""

from __future__ import annotations

import concurrent.futures

import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.data.memory import free_memory
from trainer.data.order import ExampleSampler
from trainer.data.store import ImageStore
from trainer.method import views

_LOOP_BYTES = 1 << 30  # of images that a loop takes at most, or one step's if that is more

# For each replica of this process its rows' images, sizes, labels and each teacher's constant logits, all [steps, rows, ...].
Streamed = tuple[tuple[tf.Tensor, ...], ...]


def table_rows(replica: int, replicas: int, batch_size: int, partner: str) -> np.ndarray:
    """Rows of the global batch that a replica is given, int [m]: its own and their partners, or all if it is alone."""
    if replicas == 1:
        return np.arange(batch_size)
    return views.BatchRows.of(replica, replicas, batch_size, partner).numbers.numpy()


def row_positions(rows: views.BatchRows, replicas: int) -> tf.Tensor:
    """Where `rows.numbers` are among a replica's `table_rows`: int32 [m]."""
    return rows.numbers if replicas == 1 else tf.range(tf.shape(rows.numbers)[0])


def signature(
    config: Config, replicas: int, local: int, classes: int, targets: int
) -> tuple[tuple[tf.TensorSpec, ...], ...]:
    """Shapes and types of what is streamed to the `local` of all `replicas`, for so many teachers whose outputs are fixed."""
    side, m = config.store_size, len(table_rows(0, replicas, config.batch_size, views.mixup_partner(config)))
    one = (
        tf.TensorSpec([None, m, side, side, 3], tf.uint8),
        tf.TensorSpec([None, m, 2], tf.float32),
        tf.TensorSpec([None, m], tf.int32),
        *[tf.TensorSpec([None, m, classes], tf.float32)] * targets,
    )
    return (one,) * local


class BatchPrefetcher:
    """Makes the inputs of loops.

    Attributes:
        most_steps: of a loop, so that its images and those of the next fit into memory; 0: any number.
    """

    def __init__(
        self,
        config: Config,
        replicas: int,
        local: tuple[int, ...],
        store: ImageStore | None = None,
        targets: tuple[np.ndarray, ...] = (),
    ) -> None:
        """
        Args:
            config: batch_size, store_size and what says which rows are partners.
            replicas: in all.
            local: numbers of the replicas that this process feeds. Only their rows are read.
            store: where images are taken from; None where they live on the device.
            targets: for each teacher its constant logits float32 [examples, classes], where the views fix them.
        """
        self._store, self._targets = store, targets
        partner = views.mixup_partner(config)
        self._rows = [table_rows(replica, replicas, config.batch_size, partner) for replica in local]
        # A row that two replicas of this process need is decoded once.
        self._needed, places = np.unique(np.concatenate(self._rows), return_inverse=True)
        self._parts = np.split(places, np.cumsum([len(rows) for rows in self._rows])[:-1])
        # On several devices the step moves its own rows; on one, the whole loop is moved ahead of time.
        self._device = "CPU:0" if replicas > 1 else None
        self.most_steps = 0
        if store is not None:
            step = sum(len(rows) for rows in self._rows) * config.store_size**2 * 3
            self.most_steps = max(1, min(_LOOP_BYTES, free_memory() // 8) // step)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._next: tuple[tuple[int, int, ExampleSampler], concurrent.futures.Future] | None = None

    def take(self, first: int, steps: int, order: ExampleSampler) -> tuple[tf.Tensor, Streamed]:
        """The input of the loop over steps `first` .. `first + steps - 1`.

        Returns:
            ids int32 [steps, batch], and what is streamed (nothing where images live on the device).

        Raises:
            DataError: an image cannot be read or decoded.
        """
        known, self._next = self._next, None
        if known is not None and known[0] == (first, steps, order):
            return known[1].result()
        return self._thread.submit(self._make, first, steps, order).result()

    def ahead(self, first: int, steps: int, order: ExampleSampler) -> None:
        """Begins to make what `take` will be asked for next."""
        self._next = (first, steps, order), self._thread.submit(self._make, first, steps, order)

    def _make(self, first: int, steps: int, order: ExampleSampler) -> tuple[tf.Tensor, Streamed]:
        ids = order.batches(first, steps)
        if self._store is None:
            return tf.constant(ids), ()
        wanted = ids[:, self._needed]
        tables = [
            self._store.take(wanted.ravel()).reshape(*wanted.shape, *self._store.shape),
            *(table[wanted] for table in (self._store.sizes, self._store.labels, *self._targets)),
        ]
        with tf.device(self._device):
            parts = []
            for place in self._parts:
                # A replica that is alone needs all rows, in order: no copy but the device's.
                whole = np.array_equal(place, np.arange(len(self._needed)))
                parts.append(tuple(tf.constant(table if whole else table[:, place]) for table in tables))
            return tf.constant(ids), tuple(parts)

    def close(self) -> None:
        """Drops what was made ahead."""
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)
