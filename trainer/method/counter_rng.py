"""Counter-based random numbers: a function of (seed, step) and (row of the batch, position).

Threefry-2x32 gives the same numbers on CPU, GPU and TPU, compiled or not, for any number of
replicas. There is no generator state to save or to distribute.
"""

from __future__ import annotations

import tensorflow as tf

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Threefry-2x32, 20 rounds (Salmon et al. 2011): uint32 tensors that broadcast -> two random
    words.
    """
    parity = tf.constant(0x1BD11BDA, tf.uint32) ^ key[0] ^ key[1]
    keys = (key[0], key[1], parity)
    x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x0 += x1
            left = tf.bitwise.left_shift(x1, tf.constant(bits, tf.uint32))
            right = tf.bitwise.right_shift(x1, tf.constant(32 - bits, tf.uint32))
            x1 = (left | right) ^ x0
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3] + tf.constant(group + 1, tf.uint32)
    return x0, x1


def uniform(seed: int, step: tf.Tensor | int, rows: tf.Tensor, draws: int, first: int = 0) -> tf.Tensor:
    """Uniform numbers in [0, 1) that depend on seed, step, row and position alone.

    Args:
        seed: 0 to 2^31 - 1.
        step: int scalar >= 0.
        rows: int32 [n], rows of the global batch.
        draws: numbers for each row.
        first: position of the first of them in the row's endless sequence.

    Returns:
        float32 [n, draws], multiples of 2^-24.
    """
    key = (tf.constant(seed, tf.uint32), tf.cast(step, tf.uint32))
    row = tf.cast(rows, tf.uint32)[:, None]
    position = tf.cast(tf.range(int(first), int(first) + draws), tf.uint32)[None, :]
    bits, _ = threefry(key, (row, position))
    return tf.cast(tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.int32), tf.float32) * 2.0**-24


def beta(draws: tf.Tensor, alpha: float) -> tf.Tensor:
    """Beta(alpha, alpha) numbers, float32 [n, 1], by the method of Johnk (1964), in logarithms.

    Args:
        draws: float32 [n, 2 * attempts] uniform in [0, 1). An attempt is rejected in 1.4 % of all
            cases for alpha 0.1, in half of them for 1; if all are rejected, the last one is used.
        alpha: in (0, 1].
    """
    attempts = draws.shape[1] // 2
    x, y = (tf.math.log(tf.maximum(part, 2.0**-25)) / alpha for part in (draws[:, :attempts], draws[:, attempts:]))
    accepted = tf.cast(tf.math.reduce_logsumexp(tf.stack([x, y]), axis=0) <= 0, tf.int32)
    any_accepted = tf.reduce_any(accepted > 0, axis=1)
    attempt = tf.where(any_accepted, tf.argmax(accepted, axis=1, output_type=tf.int32), attempts - 1)
    return tf.gather(tf.sigmoid(x - y), attempt[:, None], batch_dims=1)
