"""The input of the device's loops: example ids, and images where those are not on the device.

A loop's input is a function of (configuration, seed, first step, steps). It is made on the host
one loop ahead: while the device runs a loop, the next one's images are read and decoded. Nothing
here is saved.
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

_MAX_LOOP_BYTES = 1 << 30  # of the images of one loop, unless a single step needs more

# For each replica of this process its rows' images, sizes, labels and each fixed teacher's logits,
# all [steps, rows, ...].
StreamedBatches = tuple[tuple[tf.Tensor, ...], ...]


def streamed_rows(replica: int, replicas: int, batch_size: int, partner: str) -> np.ndarray:
    """Rows of the global batch that are streamed to a replica.

    Its own and their partners; all rows if there is one replica.

    Args:
        replica: 0 to `replicas` - 1.
        replicas: in all.
        batch_size: of the global batch.
        partner: see `views.BatchRows`.

    Returns:
        int [m].
    """
    if replicas == 1:
        return np.arange(batch_size)
    return views.BatchRows.of(replica, replicas, batch_size, partner).rows.numpy()


def row_positions(batch_rows: views.BatchRows, replicas: int) -> tf.Tensor:
    """Where the rows of `batch_rows` are among a replica's `streamed_rows`: int32 [m]."""
    return batch_rows.rows if replicas == 1 else tf.range(tf.shape(batch_rows.rows)[0])


def input_signature(
    config: Config, replicas: int, local_replicas: tuple[int, ...], classes: int, fixed_teachers: int
) -> tuple[tuple[tf.TensorSpec, ...], ...]:
    """Shapes and types of `StreamedBatches`.

    Args:
        config: batch_size, store_size and what decides which rows are partners.
        replicas: in all.
        local_replicas: numbers of the replicas that this process feeds.
        classes: width of a teacher's logits.
        fixed_teachers: number of teachers whose logits are streamed, because the views fix them.
    """
    side, m = config.store_size, len(streamed_rows(0, replicas, config.batch_size, views.mixup_partner(config)))
    replica_inputs = (
        tf.TensorSpec([None, m, side, side, 3], tf.uint8),
        tf.TensorSpec([None, m, 2], tf.float32),
        tf.TensorSpec([None, m], tf.int32),
        *[tf.TensorSpec([None, m, classes], tf.float32)] * fixed_teachers,
    )
    return (replica_inputs,) * len(local_replicas)


class BatchPrefetcher:
    """Makes the inputs of loops.

    Attributes:
        max_steps: of a loop, so that two loops' images fit into memory; 0: any number.
    """

    def __init__(
        self,
        config: Config,
        replicas: int,
        local_replicas: tuple[int, ...],
        store: ImageStore | None = None,
        targets: tuple[np.ndarray, ...] = (),
    ) -> None:
        """
        Args:
            config: batch_size, store_size and what decides which rows are partners.
            replicas: in all.
            local_replicas: numbers of the replicas that this process feeds. Only their rows are
                read.
            store: source of the images; None where they are on the device.
            targets: for each teacher its constant logits float32 [examples, classes], where the
                views fix them.
        """
        self._store, self._targets = store, targets
        partner = views.mixup_partner(config)
        rows = [streamed_rows(replica, replicas, config.batch_size, partner) for replica in local_replicas]
        # A row that two replicas of this process need is decoded once.
        self._unique_rows, positions = np.unique(np.concatenate(rows), return_inverse=True)
        self._replica_positions = np.split(positions, np.cumsum([len(part) for part in rows])[:-1])
        # On several devices each step moves its rows; on one, the whole loop is moved in advance.
        self._device = "CPU:0" if replicas > 1 else None
        self.max_steps = 0
        if store is not None:
            step_bytes = sum(len(part) for part in rows) * config.store_size**2 * 3
            self.max_steps = max(1, min(_MAX_LOOP_BYTES, free_memory() // 8) // step_bytes)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._next: tuple[tuple[int, int, ExampleSampler], concurrent.futures.Future] | None = None

    def take(self, first_step: int, steps: int, sampler: ExampleSampler) -> tuple[tf.Tensor, StreamedBatches]:
        """The input of the loop over steps `first_step` .. `first_step + steps - 1`.

        Args:
            first_step: updates made before the loop.
            steps: of the loop.
            sampler: which examples make which batch.

        Returns:
            ids int32 [steps, batch], and what is streamed (nothing without a store).

        Raises:
            DataError: an image cannot be read or decoded.
        """
        prefetched, self._next = self._next, None
        if prefetched is not None and prefetched[0] == (first_step, steps, sampler):
            return prefetched[1].result()
        return self._thread.submit(self._load, first_step, steps, sampler).result()

    def prefetch(self, first_step: int, steps: int, sampler: ExampleSampler) -> None:
        """Starts to make what the next `take` with the same arguments returns.

        Args:
            first_step: updates made before the loop.
            steps: of the loop.
            sampler: which examples make which batch.
        """
        future = self._thread.submit(self._load, first_step, steps, sampler)
        self._next = (first_step, steps, sampler), future

    def _load(self, first_step: int, steps: int, sampler: ExampleSampler) -> tuple[tf.Tensor, StreamedBatches]:
        ids = sampler.batches(first_step, steps)
        if self._store is None:
            return tf.constant(ids), ()
        needed = ids[:, self._unique_rows]
        tables = [
            self._store.take(needed.ravel()).reshape(*needed.shape, *self._store.shape),
            *(table[needed] for table in (self._store.sizes, self._store.labels, *self._targets)),
        ]
        with tf.device(self._device):
            batches = []
            for positions in self._replica_positions:
                # A single replica needs all rows, in order: no copy but the device's.
                all_rows = np.array_equal(positions, np.arange(len(self._unique_rows)))
                batches.append(tuple(tf.constant(table if all_rows else table[:, positions]) for table in tables))
            return tf.constant(ids), tuple(batches)

    def close(self) -> None:
        """Drops what was prefetched."""
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)
