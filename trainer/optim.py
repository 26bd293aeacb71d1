"""Schedule and update: p -= sched(t) * (lr * adam(clip_by_global_norm(g, c)) + wd * p), decay on kernels only.

That is big_vision's algebra (its optax chain), on Keras's AdamW. Two translations are easy to get wrong: Keras multiplies
decay by the learning rate, so it is given wd / lr; and Keras clips before the all-reduce, so clipping is ours.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from trainer.config import Config

ADAM_EPSILON = 1e-8  # optax's; Keras's own default is 1e-7


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


def is_kernel(variable: Any) -> bool:
    """True for what weight decay applies to: kernels of convolutions and dense layers."""
    return str(variable.path).rsplit("/", 1)[-1].endswith("kernel")


def build(config: Config, variables: list[Any]) -> keras.optimizers.Optimizer:
    """The optimizer of a resolved configuration, with its slots made for `variables`, under the current strategy."""
    schedule = WarmupCosine(config.learning_rate, config.warmup_steps, config.steps)
    optimizer = keras.optimizers.AdamW(
        learning_rate=schedule,
        weight_decay=config.weight_decay / config.learning_rate,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=ADAM_EPSILON,
    )
    if bare := [v for v in variables if not is_kernel(v)]:
        optimizer.exclude_from_weight_decay(var_list=bare)
    optimizer.build(variables)
    return optimizer


def apply(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[tf.Tensor],
    variables: list[Any],
    clip_norm: float,
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
    if clip_norm:
        gradients, _ = tf.clip_by_global_norm(gradients, clip_norm, use_norm=norm)
    # Keras sums over replicas once more.
    optimizer.apply_gradients([(g / replicas, v) for g, v in zip(gradients, variables, strict=True)])
    return norm
