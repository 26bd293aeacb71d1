"""Schedule and update: p -= sched(t) * (lr * adam(clip_by_global_norm(g, c)) + wd * p).

Decay is on kernels only. That is big_vision's algebra (its optax chain), on Keras's optimizers.
Two translations are easy to get wrong: Keras multiplies decay by the learning rate, so it is given
wd / lr; and Keras clips before the all-reduce, so gradients are clipped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from trainer.core.config import Config
from trainer.method.keras_example import replacements

ADAM_EPSILON = 1e-8  # optax's
MOMENTUM = 0.9  # BiT-HyperRule's; velocity accumulates rate times gradient, as in Keras and big_transfer's bit_tf2


@keras.saving.register_keras_serializable(package="funmatch")
class WarmupCosine(LearningRateSchedule):
    """Linear from 0 at step 0 to `peak` at step `warmup`, a half cosine to 0 at step `total`."""

    def __init__(self, peak: float, warmup: int, total: int) -> None:
        """
        Args:
            peak: largest learning rate, > 0.
            warmup: steps, >= 0.
            total: steps, >= `warmup`.
        """
        self.peak, self.warmup, self.total = peak, warmup, total

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Learning rate of the update after `step` updates, float32 scalar."""
        t = tf.cast(step, tf.float32)
        rise = tf.minimum(1.0, t / max(1, self.warmup)) if self.warmup else 1.0
        progress = tf.clip_by_value((t - self.warmup) / max(1, self.total - self.warmup), 0.0, 1.0)
        return self.peak * rise * 0.5 * (1.0 + tf.cos(math.pi * progress))

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"peak": self.peak, "warmup": self.warmup, "total": self.total}


@keras.saving.register_keras_serializable(package="funmatch")
class WarmupSteps(LearningRateSchedule):
    """Linear from 0 to `peak` at step `warmup`, then divided by 10 after each of `boundaries`.

    This is BiT-HyperRule's. As in google-research/big_transfer, the update number `boundary` still
    has the larger rate.
    """

    def __init__(self, peak: float, warmup: int, boundaries: tuple[int, ...]) -> None:
        """
        Args:
            peak: largest learning rate, > 0.
            warmup: steps, >= 0.
            boundaries: numbers of updates, ascending.
        """
        self.peak, self.warmup, self.boundaries = peak, warmup, tuple(boundaries)

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Learning rate of the update after `step` updates, float32 scalar."""
        t = tf.cast(step, tf.float32)
        rise = tf.minimum(1.0, t / max(1, self.warmup)) if self.warmup else 1.0
        passed = tf.reduce_sum(tf.cast(t > tf.constant(self.boundaries, tf.float32), tf.float32))
        return self.peak * rise * tf.pow(0.1, passed)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"peak": self.peak, "warmup": self.warmup, "boundaries": self.boundaries}


SCHEDULES: dict[str, Callable[[Config], LearningRateSchedule]] = {
    "cosine": lambda config: WarmupCosine(
        config.learning_rate, config.warmup_steps, config.schedule_steps or config.steps
    ),
    "step": lambda config: WarmupSteps(config.learning_rate, config.warmup_steps, config.boundaries),
}


def schedule(config: Config) -> LearningRateSchedule:
    """The learning rate of a resolved configuration."""
    return SCHEDULES[config.schedule](config)


def is_kernel(variable: keras.Variable) -> bool:
    """True for what weight decay applies to: kernels of convolutions and dense layers."""
    return str(variable.path).rsplit("/", 1)[-1].endswith("kernel")


class ConvolutionalMuon(keras.optimizers.Muon):
    """Keras's Muon, with kernels of convolutions as matrices.

    The method is by Jordan et al. 2024, scaled as in Liu et al. 2025. Keras gives Muon's step to
    two-dimensional variables only, of which a convolutional network has few. Here a kernel
    [height, width, in, out] is the matrix [height * width * in, out]. All variables without Muon's
    step take AdamW's.
    """

    def __init__(self, muon_paths: list[str], **options: Any) -> None:
        """
        Args:
            muon_paths: paths of the variables that take Muon's step.
            options: Keras's.
        """
        super().__init__(**options)
        self._muon_paths = frozenset(muon_paths)

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        return variable.path not in self._muon_paths

    def zeropower_via_newtonschulz5(self, x: tf.Tensor, steps: int) -> tf.Tensor:
        """Keras's iteration on a kernel as a matrix."""
        return ops.reshape(super().zeropower_via_newtonschulz5(_matrix(x), steps), x.shape)

    def lr_adjust(self, x: tf.Tensor) -> tf.Tensor:
        """Keras's scale of a kernel as a matrix."""
        return ops.reshape(super().lr_adjust(_matrix(x)), x.shape)

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        # Keras's Muon assigns here without regard to tf.distribute; its base class does not.
        super(keras.optimizers.Muon, self)._apply_weight_decay(variables)


def _matrix(x: tf.Tensor) -> tf.Tensor:
    return ops.reshape(x, (-1, x.shape[-1]))


def _adamw(config: Config, learning_rate: LearningRateSchedule, _: list[keras.Variable]) -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(learning_rate=learning_rate, weight_decay=_keras_decay(config), epsilon=ADAM_EPSILON)


def _muon(
    config: Config, learning_rate: LearningRateSchedule, variables: list[keras.Variable]
) -> keras.optimizers.Optimizer:
    return ConvolutionalMuon(
        muon_variables(variables),
        learning_rate=learning_rate,
        weight_decay=_keras_decay(config),
        adam_weight_decay=_keras_decay(config),
        epsilon=ADAM_EPSILON,
    )


def _sgdm(config: Config, learning_rate: LearningRateSchedule, _: list[keras.Variable]) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(
        learning_rate=learning_rate, momentum=MOMENTUM, weight_decay=_keras_decay(config) or None
    )


def _keras_decay(config: Config) -> float:
    """Weight decay as Keras takes it: Keras multiplies it by the learning rate."""
    return config.weight_decay / config.learning_rate


# Functions of the configuration, the learning rate and the student's trainable variables. `build`
# then excludes all but kernels from weight decay.
OPTIMIZERS = {"adamw": _adamw, "muon": _muon, "sgdm": _sgdm}


def build(config: Config, variables: list[keras.Variable]) -> keras.optimizers.Optimizer:
    """The optimizer of a configuration, built for `variables` under the current strategy."""
    make = replacements(config).optimizer or OPTIMIZERS[config.optimizer]
    optimizer = make(config, schedule(config), variables)
    if not_decayed := [v for v in variables if not is_kernel(v)]:
        optimizer.exclude_from_weight_decay(var_list=not_decayed)
    optimizer.build(variables)
    return optimizer


def muon_variables(variables: list[keras.Variable]) -> list[str]:
    """Paths of the kernels that take Muon's step: not the last, the classifier's, nor depthwise
    ones.
    """
    kernels = [v for v in variables if is_kernel(v) and len(v.shape) >= 2]
    return [v.path for v in kernels[:-1] if v.shape[-1] > 1 and math.prod(v.shape[:-1]) > 1]


def clip_by_global_norm(gradients: list[tf.Tensor], clip_norm: float, global_norm: tf.Tensor) -> list[tf.Tensor]:
    """Scales all gradients by the same factor where their norm exceeds the bound.

    Args:
        gradients: float32, of any shapes.
        clip_norm: bound of the global L2 norm, > 0.
        global_norm: float32 scalar, L2 norm of all gradients together.
    """
    return tf.clip_by_global_norm(gradients, clip_norm, use_norm=global_norm)[0]


def apply_gradients(
    config: Config,
    optimizer: keras.optimizers.Optimizer,
    gradients: list[tf.Tensor],
    variables: list[keras.Variable],
) -> tf.Tensor:
    """One update: reduces over replicas, then clips, then applies. Call it in a replica context.

    Args:
        config: clip_norm, compat.
        optimizer: built for `variables`.
        gradients: of the loss summed over this replica and divided by the *global* batch, float32,
            one for each variable.
        variables: updated in place.

    Returns:
        The global L2 norm of the whole gradient before clipping, float32 scalar.
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    if replicas > 1:
        gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    global_norm = tf.linalg.global_norm(gradients)
    if config.clip_norm:
        clip = replacements(config).clip or clip_by_global_norm
        gradients = clip(gradients, config.clip_norm, global_norm)
    # Keras sums over replicas once more.
    optimizer.apply_gradients([(g / replicas, v) for g, v in zip(gradients, variables, strict=True)])
    return global_norm
