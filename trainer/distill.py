"""The distance between two classifiers, and one training step."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer import optim, views
from trainer.config import Config
from trainer.models.teachers import Teacher, mean_logits

METRICS = ("loss", "kl", "agreement", "grad_norm")


def kl(teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), per example, in nats (paper, eq. 1; T^2: big_vision).

    Args:
        teacher_logits, student_logits: [n, classes], any float dtype; computed in float32 from log-softmax, so that a student
            that is utterly wrong still has a gradient.
        temperature: > 0.

    Returns:
        float32 [n], >= 0 up to rounding.
    """
    target = tf.nn.log_softmax(tf.cast(teacher_logits, tf.float32) / temperature)
    guess = tf.nn.log_softmax(tf.cast(student_logits, tf.float32) / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(target) * (target - guess), axis=-1)


def cross_entropy(target: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Cross-entropy in nats, per example, of probabilities [n, classes] with a student's logits: float32 [n]."""
    return -tf.reduce_sum(target * tf.nn.log_softmax(tf.cast(student_logits, tf.float32)), axis=-1)


def agreement(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """1.0 where the most likely classes of two [n, classes] are the same: float32 [n]."""
    return tf.cast(tf.equal(tf.argmax(a, axis=-1), tf.argmax(b, axis=-1)), tf.float32)


def example_losses(
    config: Config,
    student: keras.Model,
    teachers: tuple[Teacher, ...],
    images: tf.Tensor,
    sizes: tf.Tensor,
    labels: tf.Tensor,
    rows: views.Rows,
    step: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """Loss and what it tells, per example of one replica.

    Args:
        images, sizes, labels: uint8 [n + 1, side, side, 3], float32 [n + 1, 2], int32 [n + 1]: the examples of `rows`.
        rows: which rows of the global batch; the first is the mixup partner only.
        step: updates made so far.

    Returns:
        loss, kl (T = 1, nats) and agreement (of top-1), each float32 [n]. Against labels, kl is the cross-entropy with them.
    """
    resolutions = tuple(dict.fromkeys([config.image_size, *(t.size for t in teachers)]))
    made, own = views.training_views(images, sizes, rows, config.seed, step, resolutions, mixup=config.mixup == "batch")
    by_size = dict(zip(resolutions, made, strict=True))
    guess = tf.cast(student(by_size[config.image_size], training=True), tf.float32)
    if config.distance == "labels":
        truth = tf.one_hot(labels, guess.shape[-1])
        target = own * truth[1:] + (1.0 - own) * truth[:-1]
        loss = cross_entropy(target, guess)
        return {"loss": loss, "kl": loss, "agreement": agreement(target, guess)}
    target = mean_logits(teachers, by_size)
    return {
        "loss": kl(target, guess, config.temperature),
        "kl": kl(target, tf.stop_gradient(guess)),
        "agreement": agreement(target, guess),
    }


def make_loop(
    config: Config,
    strategy: tf.distribute.Strategy,
    student: keras.Model,
    teachers: tuple[Teacher, ...],
    optimizer: keras.optimizers.Optimizer,
    data: tuple[tf.Variable, tf.Variable, tf.Variable],
    *,
    jit_compile: bool,
) -> Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]:
    """The compiled inner loop: several steps on the device without the host.

    Args:
        config: resolved.
        strategy: whose scope made student, teachers, optimizer and data.
        data: images uint8 [examples, side, side, 3], sizes float32 [examples, 2], labels int32 [examples].
        jit_compile: let XLA compile what a replica computes (TPUs always do).

    Returns:
        A function of ids int32 [steps, batch] and the number of updates made before (int64 scalar) to the metrics: the mean
        over these steps of each of `METRICS`, float32 scalars; not finite if any step was not.
    """
    replicas = strategy.num_replicas_in_sync
    variables = student.trainable_variables
    images, sizes, labels = data

    def gradients(ids: tf.Tensor, step: tf.Tensor, replica: tf.Tensor) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        rows = views.Rows.of(replica, replicas, config.batch_size)
        chosen = tf.gather(ids, rows.numbers)
        with tf.GradientTape() as tape:
            values = example_losses(
                config,
                student,
                teachers,
                tf.gather(images, chosen),
                tf.gather(sizes, chosen),
                tf.gather(labels, chosen),
                rows,
                step,
            )
            # The global batch divides, so that a sum over replicas is the mean over the batch.
            loss = tf.reduce_sum(values["loss"]) / config.batch_size
        found = tape.gradient(loss, [v.value for v in variables])
        return found, {name: tf.reduce_sum(value) / config.batch_size for name, value in values.items()}

    def update(ids: tf.Tensor, step: tf.Tensor) -> dict[str, tf.Tensor]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        found, metrics = compute(ids, step, tf.cast(replica, tf.int32))
        metrics["grad_norm"] = optim.apply(optimizer, found, variables, config.clip_norm) / replicas
        return metrics

    # Several replicas cannot meet inside one compiled program here, so only what each does alone is compiled.
    compute = tf.function(gradients, jit_compile=True) if jit_compile and replicas > 1 else gradients
    one_step = tf.function(update, jit_compile=True) if jit_compile and replicas == 1 else update

    signature = [tf.TensorSpec([None, config.batch_size], tf.int32), tf.TensorSpec([], tf.int64)]

    @tf.function(input_signature=signature)
    def loop(ids: tf.Tensor, first: tf.Tensor) -> dict[str, tf.Tensor]:
        steps = tf.shape(ids)[0]
        totals = {name: tf.constant(0.0) for name in METRICS}
        for i in tf.range(steps):
            step = tf.cast(first, tf.int32) + i
            result = strategy.run(one_step, (ids[i], step))
            totals = {
                name: totals[name] + strategy.reduce(tf.distribute.ReduceOp.SUM, result[name], axis=None)
                for name in METRICS
            }
        return {name: total / tf.cast(steps, tf.float32) for name, total in totals.items()}

    return loop
