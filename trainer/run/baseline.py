"""The best constant answer: what a student would reach that ignores its image.

Every student must beat it. With teachers it is their mean probability of each class on training
images, which minimises the mean KL there; with labels only, the commonest class.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

MAX_IMAGES = 2048  # of the training split, that the teachers are run on
_MIN_IMAGES = 256  # with a smaller evaluation split; else never more than it has, which bounds the cost
_Z95 = 1.96


@dataclasses.dataclass(frozen=True)
class Constant:
    """The best constant answer, from training images.

    Attributes:
        logits: float32 [classes], the logarithm of the teachers' mean probabilities at T = 1; None
            without a teacher.
        top1: the commonest class, among the teachers' top-1 classes or the labels.
        images: number of images that it was computed from.
    """

    logits: np.ndarray | None
    top1: int
    images: int


def of_teacher(logits: np.ndarray) -> Constant:
    """The best constant answer for teacher logits [n, classes] on training images."""
    logits = logits.astype(np.float64)
    log_probabilities = logits - _log_sum_exp(logits, axis=1)[:, None]
    mean = _log_sum_exp(log_probabilities, axis=0) - math.log(len(logits))
    counts = np.bincount(logits.argmax(1), minlength=logits.shape[1])
    return Constant(mean.astype(np.float32), int(counts.argmax()), len(logits))


def of_labels(labels: np.ndarray) -> Constant:
    """The best constant answer for training labels int [n], of which at least one is not -1."""
    labels = labels[labels >= 0]
    return Constant(None, int(np.bincount(labels).argmax()), len(labels))


def sample(examples: int, evaluated: int) -> np.ndarray:
    """Ids of the training images that the constant is computed from, evenly spaced.

    Args:
        examples: in the training split, >= 1.
        evaluated: images of the split that is evaluated during the run.

    Returns:
        int32, ascending: all if there are few, at most `MAX_IMAGES`, and about as many as one
        evaluation has, so that this pass never takes much longer than an evaluation.
    """
    count = min(examples, MAX_IMAGES, max(evaluated, _MIN_IMAGES))
    return (np.arange(count, dtype=np.int64) * examples // count).astype(np.int32)


def is_better(student: np.ndarray, constant: np.ndarray) -> bool:
    """Whether a student is better than the constant beyond chance.

    Args:
        student: float [n], a loss of each image; a value that is not finite is not better.
        constant: float [n], the constant's on the same images.

    Returns:
        Whether the 95 % interval of the mean paired difference lies below 0.
    """
    difference = student.astype(np.float64) - constant
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return bool(difference.mean() + _Z95 * error < 0)


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return np.squeeze(largest, axis) + np.log(np.exp(values - largest).sum(axis=axis))
