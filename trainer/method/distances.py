"""Distances between a teacher's and a student's output (paper, eq. 1 and its baselines)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from trainer.core.config import Config


def kl(teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float = 1.0) -> tf.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), per example.

    The paper's eq. 1; the factor T^2 is big_vision's.

    Args:
        teacher_logits: [n, classes], any float dtype. Computed in float32 from log-softmax, so
            that even a student far from the teacher has a gradient.
        student_logits: [n, classes], any float dtype.
        temperature: > 0.

    Returns:
        float32 [n], in nats, >= 0 up to rounding.
    """
    teacher_log_probs = tf.nn.log_softmax(tf.cast(teacher_logits, tf.float32) / temperature)
    student_log_probs = tf.nn.log_softmax(tf.cast(student_logits, tf.float32) / temperature)
    teacher_probs = tf.exp(teacher_log_probs)
    return temperature**2 * tf.reduce_sum(teacher_probs * (teacher_log_probs - student_log_probs), axis=-1)


def cross_entropy(target_probs: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Cross-entropy in nats of probabilities with a student's logits, both [n, classes]: float32
    [n].
    """
    return -tf.reduce_sum(target_probs * tf.nn.log_softmax(tf.cast(student_logits, tf.float32)), axis=-1)


def hard(teacher_logits: tf.Tensor, student_logits: tf.Tensor, label_smoothing: float = 0.0) -> tf.Tensor:
    """KL to the teacher's most likely class, per example (big_vision's `hard`).

    Args:
        teacher_logits: [n, classes], any float dtype.
        student_logits: [n, classes], any float dtype.
        label_smoothing: probability given to the other classes together, in [0, 1).

    Returns:
        float32 [n], in nats.
    """
    classes = teacher_logits.shape[-1]
    off_value = label_smoothing / max(1, classes - 1)
    target_probs = tf.one_hot(tf.argmax(teacher_logits, axis=-1), classes, 1.0 - label_smoothing, off_value)
    negative_entropy = tf.reduce_sum(tf.math.xlogy(target_probs, target_probs), axis=-1)
    return cross_entropy(target_probs, student_logits) + negative_entropy


def l2(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Squared Euclidean distance of logits [n, classes], per example: float32 [n]."""
    difference = tf.cast(student_logits, tf.float32) - tf.cast(teacher_logits, tf.float32)
    return tf.reduce_sum(difference**2, axis=-1)


def euclidean(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Euclidean distance of logits [n, classes], per example: float32 [n]."""
    # The constant keeps the gradient finite at 0.
    return tf.sqrt(l2(teacher_logits, student_logits) + 1e-12)


def agreement(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """1.0 where the most likely classes of two [n, classes] are the same: float32 [n]."""
    return tf.cast(tf.equal(tf.argmax(a, axis=-1), tf.argmax(b, axis=-1)), tf.float32)


@dataclasses.dataclass(frozen=True)
class Distance:
    """A choice of `--distance`.

    Attributes:
        loss: a function of target [n, classes], student_logits [n, classes] and the configuration
            to float32 [n].
        needs_teacher: the target is the teacher's logits. False: the target is probabilities made
            from labels.
        compares_logits: the target must be the teacher's own logits. Logits recovered from
            probabilities are known up to a constant only.
    """

    loss: Callable[[tf.Tensor, tf.Tensor, Config], tf.Tensor]
    needs_teacher: bool = True
    compares_logits: bool = False


DISTANCES = {
    # Without the factor, Grappler merges this loss with the metric `kl` where T is 1, and the last
    # bit of what several replicas log differs from version 0.1.
    "kl": Distance(lambda target, student_logits, config: 1.0 * kl(target, student_logits, config.temperature)),
    "hard": Distance(lambda target, student_logits, config: hard(target, student_logits, config.label_smoothing)),
    "l2": Distance(lambda target, student_logits, _: l2(target, student_logits), compares_logits=True),
    "euclidean": Distance(lambda target, student_logits, _: euclidean(target, student_logits), compares_logits=True),
    "labels": Distance(lambda target, student_logits, _: cross_entropy(target, student_logits), needs_teacher=False),
}
