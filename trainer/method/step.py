"""The distance between two classifiers, and one training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.method import feed, optim, views
from trainer.method.distances import agreement, cross_entropy, distance, kl
from trainer.models import value_range
from trainer.models.teachers import Teacher, ensemble, teacher_logits

METRICS = ("loss", "kl", "agreement", "grad_norm")
# What may be the first that is not finite, in the order in which one leads to the next.
CAUSES = ("the teacher's output", "the student's weights", "the loss", "the gradient")


def cause(faults: np.ndarray) -> str:
    """The likely cause of a step whose `faults` (for each of `CAUSES` whether it was not finite) are given, float [4]."""
    return next((name for name, bad in zip(CAUSES, faults, strict=True) if bad > 0), CAUSES[-1])


@dataclasses.dataclass(frozen=True)
class ExampleTables:
    """Tables of examples on the device: of a whole split, or of the rows that one replica needs in one step.

    Attributes:
        images: uint8 [examples, side, side, 3].
        sizes: float32 [examples, 2], heights and widths of the originals in pixels.
        labels: int32 [examples], -1 where there is none.
        targets: for each teacher its constant logits float32 [examples, classes], where the views fix them; else none.
    """

    images: tf.Variable | tf.Tensor
    sizes: tf.Variable | tf.Tensor
    labels: tf.Variable | tf.Tensor
    targets: tuple[tf.Variable | tf.Tensor, ...] = ()


def example_losses(
    config: Config,
    student: keras.Model,
    teachers: tuple[Teacher, ...],
    data: ExampleTables,
    chosen: tf.Tensor,
    rows: views.BatchRows,
    step: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """Loss and what it tells, per example of one replica.

    Args:
        data: holds the examples.
        chosen: int32 [m], where in `data` the examples of `rows.numbers` are.
        rows: which rows of the global batch this replica computes.
        step: updates made so far.

    Returns:
        loss, kl (T = 1, nats), agreement (of top-1) and asked (0 where what the student shall say is finite, else 1), each
        float32 [n]. Against labels, kl is the cross-entropy with them.
    """
    images, sizes = tf.gather(data.images, chosen), tf.gather(data.sizes, chosen)
    teacher_sizes = () if data.targets else tuple(dict.fromkeys(t.size for t in teachers))
    made = views.training_views(config, images, sizes, rows, step, teacher_sizes)
    guess = tf.cast(student(value_range.to_range(made.student, config.student_range), training=True), tf.float32)
    if config.distance == "labels":
        own, other = rows.split(tf.one_hot(tf.gather(data.labels, chosen), guess.shape[-1]))
        target = made.share * own + (1.0 - made.share) * other
        loss = cross_entropy(target, guess)
        return {"loss": loss, "kl": loss, "agreement": agreement(target, guess), "asked": tf.zeros_like(loss)}
    if data.targets:
        said = [tf.gather(table, rows.split(chosen)[0]) for table in data.targets]
    else:
        said = teacher_logits(teachers, made.teachers)
    if config.ensemble == "sum_losses":
        loss = tf.add_n([distance(config, logits, guess) for logits in said])
    else:
        loss = distance(config, ensemble(said, config.ensemble, config.temperature), guess)
    one = ensemble(said, config.ensemble)
    fine = [tf.reduce_all(tf.math.is_finite(logits), axis=-1) for logits in said]
    asked = 1.0 - tf.cast(tf.reduce_all(fine, axis=0), tf.float32)
    return {"loss": loss, "kl": kl(one, tf.stop_gradient(guess)), "agreement": agreement(one, guess), "asked": asked}


def make_train_loop(
    config: Config,
    strategy: tf.distribute.Strategy,
    student: keras.Model,
    teachers: tuple[Teacher, ...],
    optimizer: keras.optimizers.Optimizer,
    data: ExampleTables | None,
    *,
    jit_compile: bool,
    local: tuple[int, ...] = (0,),
) -> Callable[..., dict[str, tf.Tensor]]:
    """The compiled inner loop: several steps on the device without the host.

    Args:
        config: resolved.
        strategy: whose scope made student, teachers, optimizer and data.
        data: the training split, on the device; None if each loop is given the images that it needs.
        jit_compile: let XLA compile what a replica computes (TPUs always do).
        local: numbers of the replicas that this process feeds, where it does.

    Returns:
        A function of ids int32 [steps, batch], the number of updates made before (int64 scalar) and, without `data`, what
        `trainer.method.feed` streams, to the metrics: the mean over these steps of each of `METRICS`, float32 scalars; not finite if
        any step was not. Beside them `bad_step`, int32: how many updates were made before the first step that was not finite, or
        -1; and its `faults`, float32 [4]: what of `CAUSES` was not.
    """
    replicas = strategy.num_replicas_in_sync
    variables = student.trainable_variables
    partner = views.mixup_partner(config)

    def gradients(
        ids: tf.Tensor, step: tf.Tensor, replica: tf.Tensor, tables: tuple[tf.Tensor, ...]
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        rows = views.BatchRows.of(replica, replicas, config.batch_size, partner)
        # The same gathering from the same kind of tables, of the split or of this step alone.
        found = data or ExampleTables(tables[0], tables[1], tables[2], tables[3:])
        chosen = tf.gather(ids, rows.numbers) if data else feed.row_positions(rows, replicas)
        with tf.GradientTape() as tape:
            values = example_losses(config, student, teachers, found, chosen, rows, step)
            # The global batch divides, so that a sum over replicas is the mean over the batch.
            loss = tf.reduce_sum(values["loss"]) / config.batch_size
        slopes = tape.gradient(loss, [v.value for v in variables])
        return slopes, {name: tf.reduce_sum(value) / config.batch_size for name, value in values.items()}

    def update(ids: tf.Tensor, step: tf.Tensor, *tables: tf.Tensor) -> dict[str, tf.Tensor]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        slopes, metrics = compute(ids, step, tf.cast(replica, tf.int32), tables)
        asked = metrics.pop("asked")
        lost = tf.logical_not(tf.math.is_finite(metrics["loss"]))
        # Weights are looked at before the update, which would spoil them too; and only where there is something to explain.
        spoilt = tf.cond(lost, lambda: tf.logical_not(_finite(student.trainable_variables)), lambda: tf.constant(False))
        metrics["grad_norm"] = optim.apply_gradients(config, optimizer, slopes, variables) / replicas
        steep = tf.logical_not(tf.math.is_finite(metrics["grad_norm"]))
        metrics["faults"] = tf.stack([tf.cast(bad, tf.float32) for bad in (asked > 0, spoilt, lost, steep)])
        return metrics

    # Several replicas cannot meet inside one compiled program here, so only what each does alone is compiled.
    compute = _compiled(gradients) if jit_compile and replicas > 1 else gradients
    # AutoGraph would rewrite Keras and everything else that a step calls, which takes longer than tracing it.
    one_step = _compiled(update) if jit_compile and replicas == 1 else tf.autograph.experimental.do_not_convert(update)

    def of_step(streamed: feed.Streamed, i: tf.Tensor) -> list[tf.Tensor]:
        """Step `i` of what each replica is given."""
        distribute = strategy.experimental_distribute_values_from_function
        return [
            distribute(
                lambda context, number=number: streamed[local.index(context.replica_id_in_sync_group)][number][i]
            )
            for number in range(len(streamed[0]))
        ]

    signature: list = [tf.TensorSpec([None, config.batch_size], tf.int32), tf.TensorSpec([], tf.int64)]
    if data is None:
        fixed = len(teachers) if views.mode(config).fixed else 0
        signature.append(feed.signature(config, replicas, len(local), student.output_shape[-1], fixed))

    @tf.function(input_signature=signature)
    def loop(ids: tf.Tensor, first: tf.Tensor, streamed: feed.Streamed = ()) -> dict[str, tf.Tensor]:
        steps = tf.shape(ids)[0]
        totals = {name: tf.constant(0.0) for name in METRICS}
        bad_step, faults = tf.constant(-1), tf.zeros(len(CAUSES))
        for i in tf.range(steps):
            step = tf.cast(first, tf.int32) + i
            tables = of_step(streamed, i) if streamed else []
            result = strategy.run(one_step, (ids[i], step, *tables))
            result = {
                name: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None) for name, value in result.items()
            }
            totals = {name: totals[name] + result[name] for name in METRICS}
            now_bad = tf.logical_and(bad_step < 0, tf.reduce_any(result["faults"] > 0))
            bad_step, faults = tf.where(now_bad, step, bad_step), tf.where(now_bad, result["faults"], faults)
        means = {name: total / tf.cast(steps, tf.float32) for name, total in totals.items()}
        return means | {"bad_step": bad_step, "faults": faults}

    return loop


def _compiled(function: Callable) -> Callable:
    return tf.function(function, jit_compile=True, autograph=False)


def _finite(variables: list[Any]) -> tf.Tensor:
    """Whether all values of the variables are finite."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(variable.value)) for variable in variables])
