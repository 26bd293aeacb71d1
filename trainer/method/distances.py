"""Distances between a teacher's and a student's output (paper, eq. 1, and what it is compared with)."""

from __future__ import annotations

import tensorflow as tf

from trainer.core.config import Config


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


def hard(teacher_logits: tf.Tensor, student_logits: tf.Tensor, label_smoothing: float = 0.0) -> tf.Tensor:
    """KL to the teacher's most likely class, per example, in nats (big_vision's `hard`): float32 [n].

    Args:
        teacher_logits, student_logits: [n, classes].
        label_smoothing: probability given to the other classes together, in [0, 1).
    """
    classes = teacher_logits.shape[-1]
    rest = label_smoothing / max(1, classes - 1)
    target = tf.one_hot(tf.argmax(teacher_logits, axis=-1), classes, 1.0 - label_smoothing, rest)
    return cross_entropy(target, student_logits) + tf.reduce_sum(tf.math.xlogy(target, target), axis=-1)


def l2(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Squared Euclidean distance of logits [n, classes], per example: float32 [n]."""
    difference = tf.cast(student_logits, tf.float32) - tf.cast(teacher_logits, tf.float32)
    return tf.reduce_sum(difference**2, axis=-1)


def euclidean(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Euclidean distance of logits [n, classes], per example: float32 [n]; a small constant keeps the gradient finite at 0."""
    return tf.sqrt(l2(teacher_logits, student_logits) + 1e-12)


def example_kl(teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float) -> tf.Tensor:
    """The Keras example's distance: KL of softmaxes at T, clipped to [1e-7, 1], without T^2: float32 [n], in nats."""
    target, guess = (
        tf.clip_by_value(tf.nn.softmax(tf.cast(logits, tf.float32) / temperature), 1e-7, 1.0)
        for logits in (teacher_logits, student_logits)
    )
    return tf.reduce_sum(target * tf.math.log(target / guess), axis=-1)


def distance(config: Config, teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """The configuration's distance between logits [n, classes]: float32 [n]."""
    if config.distance == "kl":
        if config.like_example("distance"):
            return example_kl(teacher_logits, student_logits, config.temperature)
        factor = 1.0 / config.temperature**2 if config.like_example("t2") else 1.0
        return factor * kl(teacher_logits, student_logits, config.temperature)
    if config.distance == "hard":
        return hard(teacher_logits, student_logits, config.label_smoothing)
    return {"l2": l2, "euclidean": euclidean}[config.distance](teacher_logits, student_logits)


def agreement(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """1.0 where the most likely classes of two [n, classes] are the same: float32 [n]."""
    return tf.cast(tf.equal(tf.argmax(a, axis=-1), tf.argmax(b, axis=-1)), tf.float32)
