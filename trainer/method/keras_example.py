"""What the Keras example does differently from the paper, for comparisons (`--compat`).

The example: https://keras.io/examples/keras_recipes/better_knowledge_distillation. `replacements`
is the one place that decides which of its functions a configuration uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from trainer.core.config import Config
from trainer.method.crops import Crop, corner_draws, squashed_box
from trainer.method.distances import Distance, kl

RESIZE_FACTOR = 160 / 128  # resize to 160, random crop of 128
CENTRAL_FRACTION = 0.875  # of each side
ADAM_EPSILON = 1e-7  # Keras's default


def _random_crop_box(config: Config, _: tf.Tensor, draws: tf.Tensor | None) -> tf.Tensor:
    """A crop of the image squashed to 160 / 128 of the crop's side."""
    return squashed_box(corner_draws(draws), config.image_size, round(RESIZE_FACTOR * config.image_size))


def _central_crop_box(_: Config, sizes: tf.Tensor, __: tf.Tensor | None) -> tf.Tensor:
    """The central part of each side, whatever the image's proportions."""
    margin = (1.0 - CENTRAL_FRACTION) / 2.0
    return tf.tile(tf.constant([[margin, margin, CENTRAL_FRACTION, CENTRAL_FRACTION]]), [tf.shape(sizes)[0], 1])


def clipped_kl(teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float) -> tf.Tensor:
    """KL of softmaxes at T, clipped to [1e-7, 1], without T^2, as keras.losses.KLDivergence.

    Args:
        teacher_logits: [n, classes], any float dtype.
        student_logits: [n, classes], any float dtype.
        temperature: > 0.

    Returns:
        float32 [n], in nats.
    """
    teacher_probs, student_probs = (
        tf.clip_by_value(tf.nn.softmax(tf.cast(logits, tf.float32) / temperature), 1e-7, 1.0)
        for logits in (teacher_logits, student_logits)
    )
    return tf.reduce_sum(teacher_probs * tf.math.log(teacher_probs / student_probs), axis=-1)


def unscaled_kl(teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float) -> tf.Tensor:
    """The paper's KL without the factor T^2.

    Args:
        teacher_logits: [n, classes], any float dtype.
        student_logits: [n, classes], any float dtype.
        temperature: > 0.

    Returns:
        float32 [n], in nats.
    """
    return 1.0 / temperature**2 * kl(teacher_logits, student_logits, temperature)


def _clip_each(gradients: list[tf.Tensor], clip_norm: float, _: tf.Tensor) -> list[tf.Tensor]:
    """Clips each variable's gradient by its own norm."""
    return [tf.clip_by_norm(gradient, clip_norm) for gradient in gradients]


class ExampleAdamW(keras.optimizers.Adam):
    """TensorFlow Addons' AdamW: p -= wd * p on every variable at any learning rate, then Adam."""

    def __init__(self, decay: float, **options: Any) -> None:
        """
        Args:
            decay: share of each weight taken off at each step, in [0, 1).
            options: Keras's.
        """
        super().__init__(**options)
        self._decay = decay

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Decays, then updates one variable.

        Args:
            gradient: of the variable's shape and dtype.
            variable: changed in place.
            learning_rate: scalar.
        """
        self.assign_sub(variable, variable * self._decay)
        super().update_step(gradient, variable, learning_rate)


def _adamw(config: Config, learning_rate: LearningRateSchedule, _: list[keras.Variable]) -> ExampleAdamW:
    return ExampleAdamW(config.weight_decay, learning_rate=learning_rate, epsilon=ADAM_EPSILON)


RANDOM_CROP = Crop(_random_crop_box, crop_first=False)
CENTRAL_CROP = Crop(_central_crop_box, random=False)
CLIPPED_KL = Distance(lambda target, student_logits, config: clipped_kl(target, student_logits, config.temperature))
UNSCALED_KL = Distance(lambda target, student_logits, config: unscaled_kl(target, student_logits, config.temperature))


@dataclasses.dataclass(frozen=True)
class Replacements:
    """What stands in for the paper's functions; None: the paper's own.

    Attributes:
        random_crop: for every random crop.
        central_crop: for the central crop.
        mixup_partner: see `views.BatchRows`.
        distance: for `distances.DISTANCES["kl"]`.
        clip: see `optim.clip_by_global_norm`.
        optimizer: see `optim.OPTIMIZERS`.
    """

    random_crop: Crop | None = None
    central_crop: Crop | None = None
    mixup_partner: str | None = None
    distance: Distance | None = None
    clip: Callable[[list[tf.Tensor], float, tf.Tensor], list[tf.Tensor]] | None = None
    optimizer: Callable[[Config, LearningRateSchedule, list[keras.Variable]], ExampleAdamW] | None = None


def replacements(config: Config) -> Replacements:
    """Which functions `--compat` replaces."""
    like_example = config.like_example
    return Replacements(
        random_crop=RANDOM_CROP if like_example("crop") else None,
        central_crop=CENTRAL_CROP if like_example("central") else None,
        mixup_partner="reverse" if like_example("mixup") else None,
        distance=CLIPPED_KL if like_example("distance") else UNSCALED_KL if like_example("t2") else None,
        clip=_clip_each if like_example("clip") else None,
        optimizer=_adamw if like_example("decay") else None,
    )
