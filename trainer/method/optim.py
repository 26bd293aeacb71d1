"""Schedule and update: p -= sched(t) * (lr * adam(clip_by_global_norm(g, c)) + wd * p), decay on kernels only.

That is big_vision's algebra (its optax chain), on Keras's optimizers. Two translations are easy to get wrong: Keras multiplies
decay by the learning rate, so it is given wd / lr; and Keras clips before the all-reduce, so clipping is ours.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from trainer.core.config import Config

ADAM_EPSILON = 1e-8  # optax's
MOMENTUM = 0.9  # BiT-HyperRule's; the rate is inside of what is accumulated, as in Keras and big_transfer's bit_tf2
EXAMPLE_EPSILON = 1e-7  # Keras's default, and so the Keras example's


@keras.saving.register_keras_serializable(package="funmatch")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear from 0 at step 0 to `peak` at step `warmup`, then a half cosine to 0 at step `total` (steps >= 0)."""

    def __init__(self, peak: float, warmup: int, total: int) -> None:
        self.peak, self.warmup, self.total = peak, warmup, total

    def __call__(self, step: Any) -> tf.Tensor:
        """Learning rate of the update after `step` updates, float32 scalar."""
        t = tf.cast(step, tf.float32)
        rise = tf.minimum(1.0, t / max(1, self.warmup)) if self.warmup else 1.0
        progress = tf.clip_by_value((t - self.warmup) / max(1, self.total - self.warmup), 0.0, 1.0)
        return self.peak * rise * 0.5 * (1.0 + tf.cos(math.pi * progress))

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {"peak": self.peak, "warmup": self.warmup, "total": self.total}


@keras.saving.register_keras_serializable(package="funmatch")
class WarmupSteps(keras.optimizers.schedules.LearningRateSchedule):
    """Linear from 0 at step 0 to `peak` at step `warmup`, then a tenth as much after each of `boundaries` (BiT-HyperRule).

    As in google-research/big_transfer, the update after exactly as many as a boundary says is still made with the larger rate.
    """

    def __init__(self, peak: float, warmup: int, boundaries: tuple[int, ...]) -> None:
        self.peak, self.warmup, self.boundaries = peak, warmup, tuple(boundaries)

    def __call__(self, step: Any) -> tf.Tensor:
        """Learning rate of the update after `step` updates, float32 scalar."""
        t = tf.cast(step, tf.float32)
        rise = tf.minimum(1.0, t / max(1, self.warmup)) if self.warmup else 1.0
        passed = tf.reduce_sum(tf.cast(t > tf.constant(self.boundaries, tf.float32), tf.float32))
        return self.peak * rise * tf.pow(0.1, passed)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {"peak": self.peak, "warmup": self.warmup, "boundaries": self.boundaries}


def schedule(config: Config) -> WarmupCosine | WarmupSteps:
    """The learning rate of a resolved configuration."""
    if config.schedule == "step":
        return WarmupSteps(config.learning_rate, config.warmup_steps, config.boundaries)
    return WarmupCosine(config.learning_rate, config.warmup_steps, config.schedule_steps or config.steps)


def is_kernel(variable: Any) -> bool:
    """True for what weight decay applies to: kernels of convolutions and dense layers."""
    return str(variable.path).rsplit("/", 1)[-1].endswith("kernel")


class ConvolutionalMuon(keras.optimizers.Muon):
    """Keras's Muon (Jordan et al. 2024, scaled as in Liu et al. 2025) with kernels of convolutions as matrices.

    Keras gives Muon's step to two-dimensional variables only, which a convolutional network hardly has. Here a kernel
    [height, width, in, out] is the matrix [height * width * in, out]. Chosen kernels take Muon's step, everything else AdamW's.
    """

    def __init__(self, chosen: list[str], **options: Any) -> None:
        """
        Args:
            chosen: paths of the variables for Muon's step.
            options: Keras's.
        """
        super().__init__(**options)
        self._chosen = frozenset(chosen)

    def _should_use_adamw(self, variable: Any) -> bool:
        return variable.path not in self._chosen

    def zeropower_via_newtonschulz5(self, x: Any, steps: int) -> Any:
        """Keras's iteration on the kernel as a matrix."""
        return ops.reshape(super().zeropower_via_newtonschulz5(_matrix(x), steps), x.shape)

    def lr_adjust(self, x: Any) -> Any:
        """Keras's scale, of the kernel as a matrix."""
        return ops.reshape(super().lr_adjust(_matrix(x)), x.shape)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        # Keras's Muon assigns here without regard to tf.distribute; every other optimizer of Keras does it this way.
        super(keras.optimizers.Muon, self)._apply_weight_decay(variables)


def _matrix(x: Any) -> Any:
    return ops.reshape(x, (-1, x.shape[-1]))


class ExampleAdamW(keras.optimizers.Adam):
    """The Keras example's update (TensorFlow Addons' AdamW): p -= wd * p on every variable, whatever the rate; then Adam."""

    def __init__(self, decay: float, **options: Any) -> None:
        """
        Args:
            decay: share of each weight taken off at each step, in [0, 1).
            options: Keras's.
        """
        super().__init__(**options)
        self._decay = decay

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Decays, then updates one variable."""
        self.assign_sub(variable, variable * self._decay)
        super().update_step(gradient, variable, learning_rate)


def build(config: Config, variables: list[Any]) -> keras.optimizers.Optimizer:
    """The optimizer of a resolved configuration, with its slots made for `variables`, under the current strategy."""
    rate = schedule(config)
    decay = config.weight_decay / config.learning_rate
    optimizer: keras.optimizers.Optimizer
    if config.like_example("decay"):
        optimizer = ExampleAdamW(config.weight_decay, learning_rate=rate, epsilon=EXAMPLE_EPSILON)
    elif config.optimizer == "muon":
        optimizer = ConvolutionalMuon(
            muon_variables(variables),
            learning_rate=rate,
            weight_decay=decay,
            adam_weight_decay=decay,
            epsilon=ADAM_EPSILON,
        )
    elif config.optimizer == "sgdm":
        optimizer = keras.optimizers.SGD(learning_rate=rate, momentum=MOMENTUM, weight_decay=decay or None)
    else:
        optimizer = keras.optimizers.AdamW(learning_rate=rate, weight_decay=decay, epsilon=ADAM_EPSILON)
    if bare := [v for v in variables if not is_kernel(v)]:
        optimizer.exclude_from_weight_decay(var_list=bare)
    optimizer.build(variables)
    return optimizer


def muon_variables(variables: list[Any]) -> list[str]:
    """Paths of the kernels that are matrices in more than name: not the classifier's, which is last, nor depthwise ones."""
    kernels = [v for v in variables if is_kernel(v) and len(v.shape) >= 2]
    return [v.path for v in kernels[:-1] if v.shape[-1] > 1 and math.prod(v.shape[:-1]) > 1]


def apply_gradients(
    config: Config,
    optimizer: keras.optimizers.Optimizer,
    gradients: list[tf.Tensor],
    variables: list[Any],
) -> tf.Tensor:
    """One update from gradients of the loss summed over this replica and divided by the *global* batch.

    Reduces over replicas, then clips, then applies. To be called in a replica context.

    Returns:
        The global L2 norm of the whole gradient before clipping, float32 scalar.
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    if replicas > 1:
        gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    norm = tf.linalg.global_norm(gradients)
    if config.clip_norm and config.like_example("clip"):
        gradients = [tf.clip_by_norm(g, config.clip_norm) for g in gradients]
    elif config.clip_norm:
        gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm, use_norm=norm)
    # Keras sums over replicas once more.
    optimizer.apply_gradients([(g / replicas, v) for g, v in zip(gradients, variables, strict=True)])
    return norm
