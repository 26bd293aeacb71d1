"""Statistics of batch normalisation for evaluation and export, re-estimated from training views.

In training mode a batch normalisation uses its batch's mean and variance, and updates moving
averages of them, which inference uses. With momentum 0.999 (MobileNetV3, EfficientNet) the averages
lag by thousands of steps: a student that agrees with its teacher in training may be at chance in
evaluation. Here the averages are replaced, for the time of an evaluation or export, by statistics
of the current weights. Training and checkpoints keep the moving averages.

One mixup coefficient for a whole batch (`--mixup=batch`) gives each batch statistics of its own,
and batches that are hardly mixed, like the images of an evaluation, those of unmixed images. So
these are estimated. With a coefficient for each image, all are in one batch, and so in the
estimate.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.data.order import ExampleSampler
from trainer.data.store import ImageStore, prefetched
from trainer.method import feed, views
from trainer.models import students
from trainer.models.value_range import to_range

IMAGES, MIN_BATCHES = 2048, 4  # training views for an estimate: at least so many, of so many batches


class BatchStatistics:
    """Re-estimates the statistics of a student's batch normalisations.

    The estimate is a function of (configuration, seed, weights, number of updates): it uses the
    training views of the steps that would follow.

    Attributes:
        config: the job's, with the views of an estimate.
        layers: the batch normalisations whose statistics are re-estimated: neither frozen ones, nor
            those with momentum 1, which keep what they have; none with `--batch_norm=moving`.
        batches: of training views for an estimate.
    """

    def __init__(
        self,
        config: Config,
        strategy: tf.distribute.Strategy,
        student: keras.Model,
        store: ImageStore,
        sampler: ExampleSampler,
        *,
        jit_compile: bool,
    ) -> None:
        """
        Args:
            config: resolved.
            strategy: that the student was made under. On several replicas the student's batch
                normalisations are synchronized.
            student: whose statistics are estimated.
            store: the training images.
            sampler: which examples make which batch.
            jit_compile: let XLA compile the forward pass.
        """
        if views.mode(config).mixup and config.mixup == "batch":
            config = dataclasses.replace(config, views="same/ic")  # the same crops, not mixed
        self.config, self._strategy, self._student = config, strategy, student
        self._store, self._jit = store, jit_compile
        # A copy: the thread that makes the next loop's input may be using the original.
        self._sampler = copy.deepcopy(sampler)
        norms = students.batch_norms(student) if config.batch_norm == "reestimate" else []
        # The same layer may be in several nested models.
        self.layers = tuple({id(x): x for x in norms if x.trainable and x.momentum < 1.0}.values())
        self.batches = max(MIN_BATCHES, math.ceil(IMAGES / config.batch_size))
        self._forward: Callable | None = None
        self._active = False

    @contextlib.contextmanager
    def reestimated(self, step: int) -> Iterator[None]:
        """Within it the student has re-estimated statistics, and afterwards, to the bit, its own.

        Within another one it does nothing.

        Args:
            step: updates that made the student's weights.

        Raises:
            DataError: an image cannot be read or decoded.
        """
        if not self.layers or self._active:
            yield
            return
        estimates = self.estimate(step)
        own = [(variable, keras.ops.convert_to_numpy(variable)) for variable, _ in self._pairs(estimates)]
        self._active = True
        try:
            for variable, array in self._pairs(estimates):
                variable.assign(array)
            yield
        finally:
            self._active = False
            for variable, array in own:
                variable.assign(array)

    def estimate(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Mean and variance of what each layer normalises, over all batches together.

        Each batch is a forward pass in training mode. The variance is that of all the batches'
        values about their common mean: the mean of the batches' variances plus the variance of the
        batches' means.

        Args:
            step: updates that made the student's weights.

        Returns:
            For each of `layers` its mean and variance, float32 [channels].

        Raises:
            DataError: an image cannot be read or decoded.
        """
        if self._forward is None:
            self._forward = self._compile()
        moments: list[list[np.ndarray]] = []
        for values in prefetched(self._load, range(step, step + self.batches)):
            local = self._strategy.experimental_local_results(self._forward(*values))[0]
            moments.append([value.numpy().astype(np.float64) for value in local])
        estimates = []
        for number in range(len(self.layers)):
            means, variances = (
                np.concatenate([batch[2 * number + kind] for batch in moments]) for kind in (0, 1)
            )  # [batches x calls, channels]
            variance = variances.mean(0) + means.var(0)
            estimates.append((means.mean(0).astype(np.float32), variance.astype(np.float32)))
        return estimates

    def _pairs(self, estimates: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[keras.Variable, np.ndarray]]:
        """The variables of inference, each with its estimate."""
        for layer, (mean, variance) in zip(self.layers, estimates, strict=True):
            yield layer.moving_mean, mean
            yield layer.moving_variance, variance

    def _load(self, step: int) -> list[Any]:
        """Images and original sizes of a step's rows for each replica, and the step."""
        config, strategy = self.config, self._strategy
        ids = self._sampler.batches(step, 1)[0]
        partner, replicas = views.mixup_partner(config), strategy.num_replicas_in_sync

        def share(context: tf.distribute.ValueContext, number: int) -> tf.Tensor:
            replica = context.replica_id_in_sync_group
            rows = ids[feed.streamed_rows(replica, replicas, config.batch_size, partner)]
            return tf.constant((self._store.take, self._store.sizes.__getitem__)[number](rows))

        distribute = strategy.experimental_distribute_values_from_function
        return [*(distribute(lambda c, n=n: share(c, n)) for n in (0, 1)), tf.constant(step)]

    def _compile(self) -> Callable:
        config, strategy, student = self.config, self._strategy, self._student
        replicas, partner = strategy.num_replicas_in_sync, views.mixup_partner(config)

        def forward(images: tf.Tensor, sizes: tf.Tensor, step: tf.Tensor, replica: tf.Tensor) -> list[tf.Tensor]:
            batch_rows = views.BatchRows.of(replica, replicas, config.batch_size, partner)
            positions = feed.row_positions(batch_rows, replicas)
            inputs = tf.gather(images, positions), tf.gather(sizes, positions)
            view = views.training_views(config, *inputs, batch_rows, step, ()).student
            with _Updates() as updates:
                student(to_range(view, config.student_range), training=True)
            moving = [variable for layer in self.layers for variable in (layer.moving_mean, layer.moving_variance)]
            return [tf.stack(updates.of(variable)) for variable in moving]

        # Synchronized batch normalisation reduces over replicas; XLA compiles for one replica.
        single = self._jit and replicas == 1
        compiled = tf.function(forward, jit_compile=True, autograph=False) if single else forward

        def on_replica(images: tf.Tensor, sizes: tf.Tensor, step: tf.Tensor) -> list[tf.Tensor]:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            return compiled(images, sizes, step, tf.cast(replica, tf.int32))

        def run(*values: Any) -> Any:
            # With momentum 0 a layer updates its moving averages to the batch's own moments.
            with _momentum(self.layers, 0.0):
                return strategy.run(tf.autograph.experimental.do_not_convert(on_replica), values)

        return tf.function(run, autograph=False)


class _Updates(keras.StatelessScope):
    """Records what is assigned to variables, which keep their values.

    A layer that is called several times assigns as often.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[int, list[tf.Tensor]] = {}

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        variable, value = update
        self._values.setdefault(id(variable), []).append(value)
        super().add_update(update)

    def of(self, variable: keras.Variable) -> list[tf.Tensor]:
        """The values assigned to a variable, in order."""
        return self._values[id(variable)]


@contextlib.contextmanager
def _momentum(layers: tuple[keras.layers.BatchNormalization, ...], value: float) -> Iterator[None]:
    before = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = value
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
