"""The loss of a batch, and the compiled loop of training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.method import feed, optim, views
from trainer.method.distances import DISTANCES, agreement, kl
from trainer.method.keras_example import replacements
from trainer.models import value_range
from trainer.models.teachers import Teacher, ensemble, teacher_logits

METRICS = ("loss", "kl", "agreement", "grad_norm")
# What a step checks for values that are not finite, in the order in which one leads to the next.
FINITE_CHECKS = ("the teacher's output", "the student's weights", "the loss", "the gradient")


def first_non_finite(non_finite: np.ndarray) -> str:
    """The likely cause: the first of `FINITE_CHECKS` whose entry in `non_finite` (float [4]) is
    above 0.
    """
    names = (name for name, failed in zip(FINITE_CHECKS, non_finite, strict=True) if failed > 0)
    return next(names, FINITE_CHECKS[-1])


@dataclasses.dataclass(frozen=True)
class ExampleTables:
    """Examples on the device: a whole split, or the rows that one replica needs in one step.

    Attributes:
        images: uint8 [examples, side, side, 3].
        sizes: float32 [examples, 2], heights and widths of the originals in pixels.
        labels: int32 [examples], -1 where there is none.
        targets: for each teacher its constant logits float32 [examples, classes], where the views
            fix them; else none.
    """

    images: tf.Variable | tf.Tensor
    sizes: tf.Variable | tf.Tensor
    labels: tf.Variable | tf.Tensor
    targets: tuple[tf.Variable | tf.Tensor, ...] = ()


def example_losses(
    config: Config,
    student: keras.Model,
    teachers: tuple[Teacher, ...],
    tables: ExampleTables,
    positions: tf.Tensor,
    batch_rows: views.BatchRows,
    step: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """Loss and metrics per example of one replica.

    Args:
        config: resolved.
        student: called in training mode.
        teachers: none with `--distance=labels`.
        tables: the examples.
        positions: int32 [m], where in `tables` the examples of `batch_rows.rows` are.
        batch_rows: which rows of the global batch this replica computes.
        step: int scalar, updates made so far.

    Returns:
        loss, kl (T = 1, nats), agreement (of top-1) and teacher_non_finite (1 where a teacher's
        output is not finite, else 0), each float32 [n]. Against labels, kl is the cross-entropy
        with them.
    """
    images, sizes = tf.gather(tables.images, positions), tf.gather(tables.sizes, positions)
    teacher_sizes = () if tables.targets else tuple(dict.fromkeys(teacher.size for teacher in teachers))
    batch = views.training_views(config, images, sizes, batch_rows, step, teacher_sizes)
    student_images = value_range.to_range(batch.student, config.student_range)
    student_logits = tf.cast(student(student_images, training=True), tf.float32)
    distance = DISTANCES[config.distance]
    if not distance.needs_teacher:
        labels = tf.one_hot(tf.gather(tables.labels, positions), student_logits.shape[-1])
        own, partners = batch_rows.split_partners(labels)
        target_probs = batch.mixup_ratios * own + (1.0 - batch.mixup_ratios) * partners
        loss = distance.loss(target_probs, student_logits, config)
        top1 = agreement(target_probs, student_logits)
        return {"loss": loss, "kl": loss, "agreement": top1, "teacher_non_finite": tf.zeros_like(loss)}
    distance = replacements(config).distance or distance
    if tables.targets:
        own_positions, _ = batch_rows.split_partners(positions)
        logits_by_teacher = [tf.gather(table, own_positions) for table in tables.targets]
    else:
        logits_by_teacher = teacher_logits(teachers, batch.teachers)
    if config.ensemble == "sum_losses":
        loss = tf.add_n([distance.loss(logits, student_logits, config) for logits in logits_by_teacher])
    else:
        loss = distance.loss(ensemble(logits_by_teacher, config.ensemble, config.temperature), student_logits, config)
    ensemble_logits = ensemble(logits_by_teacher, config.ensemble)
    finite = [tf.reduce_all(tf.math.is_finite(logits), axis=-1) for logits in logits_by_teacher]
    return {
        "loss": loss,
        "kl": kl(ensemble_logits, tf.stop_gradient(student_logits)),
        "agreement": agreement(ensemble_logits, student_logits),
        "teacher_non_finite": 1.0 - tf.cast(tf.reduce_all(finite, axis=0), tf.float32),
    }


def make_train_loop(
    config: Config,
    strategy: tf.distribute.Strategy,
    student: keras.Model,
    teachers: tuple[Teacher, ...],
    optimizer: keras.optimizers.Optimizer,
    resident: ExampleTables | None,
    *,
    jit_compile: bool,
    local_replicas: tuple[int, ...] = (0,),
) -> Callable[..., dict[str, tf.Tensor]]:
    """The compiled inner loop: several steps on the device without the host.

    Args:
        config: resolved.
        strategy: under whose scope student, teachers, optimizer and tables were made.
        student: updated in place.
        teachers: frozen; none with `--distance=labels`.
        optimizer: built for the student's trainable variables.
        resident: the training split, if it is on the device; None if each loop gets its images.
        jit_compile: let XLA compile what a replica computes (TPUs always do).
        local_replicas: numbers of the replicas that this process feeds, if `resident` is None.

    Returns:
        A function of ids int32 [steps, batch], the number of updates made before (int64 scalar)
        and, without `resident`, what `feed.BatchPrefetcher` streams. It returns the mean over
        these steps of each of `METRICS`, float32 scalars, not finite if any step was not;
        `non_finite_step`, int32: how many updates were made before the first step that was not
        finite, or -1; and for that step `non_finite`, float32 [4]: above 0 for each of
        `FINITE_CHECKS` that failed.
    """
    replicas = strategy.num_replicas_in_sync
    variables = student.trainable_variables
    partner = views.mixup_partner(config)

    def compute_gradients(
        ids: tf.Tensor, step: tf.Tensor, replica: tf.Tensor, streamed: tuple[tf.Tensor, ...]
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        batch_rows = views.BatchRows.of(replica, replicas, config.batch_size, partner)
        if resident is not None:
            tables, positions = resident, tf.gather(ids, batch_rows.rows)
        else:
            images, sizes, labels, *targets = streamed
            tables = ExampleTables(images, sizes, labels, tuple(targets))
            positions = feed.row_positions(batch_rows, replicas)
        with tf.GradientTape() as tape:
            metrics = example_losses(config, student, teachers, tables, positions, batch_rows, step)
            # Divided by the global batch: the sum over replicas is the mean over the batch.
            loss = tf.reduce_sum(metrics["loss"]) / config.batch_size
        gradients = tape.gradient(loss, [v.value for v in variables])
        return gradients, {name: tf.reduce_sum(value) / config.batch_size for name, value in metrics.items()}

    def train_step(ids: tf.Tensor, step: tf.Tensor, *streamed: tf.Tensor) -> dict[str, tf.Tensor]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradients, metrics = run_gradients(ids, step, tf.cast(replica, tf.int32), streamed)
        teacher_finite = tf.logical_not(metrics.pop("teacher_non_finite") > 0)
        loss_finite = tf.math.is_finite(metrics["loss"])
        # Weights are checked before the update, which would make them NaN too, and only if the
        # loss is not finite.
        weights_finite = tf.cond(loss_finite, lambda: tf.constant(True), lambda: _all_finite(variables))
        metrics["grad_norm"] = optim.apply_gradients(config, optimizer, gradients, variables) / replicas
        grad_norm_finite = tf.math.is_finite(metrics["grad_norm"])
        finite = (teacher_finite, weights_finite, loss_finite, grad_norm_finite)
        metrics["non_finite"] = tf.stack([1.0 - tf.cast(check, tf.float32) for check in finite])
        return metrics

    # XLA cannot compile the all-reduce between replicas here, so only each one's part is compiled.
    run_gradients = _compiled(compute_gradients) if jit_compile and replicas > 1 else compute_gradients
    # Without AutoGraph, which would rewrite Keras and all that a step calls: slower than the
    # tracing itself.
    without_autograph = tf.autograph.experimental.do_not_convert
    run_step = _compiled(train_step) if jit_compile and replicas == 1 else without_autograph(train_step)

    def inputs_of_step(streamed: feed.StreamedBatches, i: tf.Tensor) -> list[tf.Tensor]:
        """Step `i` of each tensor that the replicas are given."""

        def on_replica(context: tf.distribute.ValueContext, number: int) -> tf.Tensor:
            return streamed[local_replicas.index(context.replica_id_in_sync_group)][number][i]

        distribute = strategy.experimental_distribute_values_from_function
        return [
            distribute(lambda context, number=number: on_replica(context, number)) for number in range(len(streamed[0]))
        ]

    signature: list = [tf.TensorSpec([None, config.batch_size], tf.int32), tf.TensorSpec([], tf.int64)]
    if resident is None:
        fixed_teachers = len(teachers) if views.mode(config).fixed else 0
        classes = student.output_shape[-1]
        signature.append(feed.input_signature(config, replicas, local_replicas, classes, fixed_teachers))

    @tf.function(input_signature=signature)
    def loop(ids: tf.Tensor, first_step: tf.Tensor, streamed: feed.StreamedBatches = ()) -> dict[str, tf.Tensor]:
        steps = tf.shape(ids)[0]
        totals = {name: tf.constant(0.0) for name in METRICS}
        non_finite_step, non_finite = tf.constant(-1), tf.zeros(len(FINITE_CHECKS))
        for i in tf.range(steps):
            step = tf.cast(first_step, tf.int32) + i
            inputs = inputs_of_step(streamed, i) if streamed else []
            result = strategy.run(run_step, (ids[i], step, *inputs))
            result = {
                name: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None) for name, value in result.items()
            }
            totals = {name: totals[name] + result[name] for name in METRICS}
            is_first = tf.logical_and(non_finite_step < 0, tf.reduce_any(result["non_finite"] > 0))
            non_finite_step = tf.where(is_first, step, non_finite_step)
            non_finite = tf.where(is_first, result["non_finite"], non_finite)
        means = {name: total / tf.cast(steps, tf.float32) for name, total in totals.items()}
        return means | {"non_finite_step": non_finite_step, "non_finite": non_finite}

    return loop


def _compiled(function: Callable) -> Callable:
    return tf.function(function, jit_compile=True, autograph=False)


def _all_finite(variables: list[keras.Variable]) -> tf.Tensor:
    """Whether all values of the variables are finite."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(variable.value)) for variable in variables])
