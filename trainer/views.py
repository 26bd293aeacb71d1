"""What a model sees of a stored image in a given step: crop, flip, resize, mixup; on the device, stateless.

Random numbers are Threefry-2x32 of (seed, step) and (row of the batch, draw): the same on CPU, GPU and TPU, compiled or
not, for any number of replicas. Crop, resize and flip together are two small matrix products an image, so a view has a static
shape and no image operation that XLA lacks.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

AREA = (0.05, 1.0)  # of the image (big_vision's inception_crop; the paper names the style only)
ASPECT = (3 / 4, 4 / 3)  # width over height of the crop, in the original's pixels
EVAL_FRACTION = 0.8  # big_vision: small side to 160, central 128 (small sets)
_ATTEMPTS = 8  # shapes drawn before the whole image is taken; one is enough unless the image is very long
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_DRAWS = _ATTEMPTS * 2 + 3


def threefry(key: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): uint32 tensors that broadcast -> two uint32 tensors of bits."""
    extra = tf.constant(0x1BD11BDA, tf.uint32) ^ key[0] ^ key[1]
    keys = (key[0], key[1], extra)
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


def uniform(seed: int, step: tf.Tensor, rows: tf.Tensor, draws: int) -> tf.Tensor:
    """Uniform float32 [len(rows), draws] in [0, 1), a function of seed, step and the row's number alone.

    Args:
        seed: 0 to 2^31 - 1.
        step: int scalar >= 0.
        rows: int32 [n], numbers of rows in the global batch.
        draws: numbers a row.
    """
    key = (tf.constant(seed, tf.uint32), tf.cast(step, tf.uint32))
    row = tf.cast(rows, tf.uint32)[:, None]
    bits, _ = threefry(key, (row, tf.cast(tf.range(draws), tf.uint32)[None, :]))
    return tf.cast(tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.int32), tf.float32) * 2.0**-24


def inception_box(draws: tf.Tensor, sizes: tf.Tensor) -> tf.Tensor:
    """A random crop, distributed as tf.image.sample_distorted_bounding_box with the whole image as its one box.

    As there, the aspect is uniform, then the height is uniform over the pixels that the area allows, then the place.

    Args:
        draws: float32 [n, 2 * attempts + 2] uniform in [0, 1).
        sizes: float32 [n, 2], height and width of the originals in pixels.

    Returns:
        float32 [n, 4]: top, left, height, width as fractions of the image.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    attempts = (draws.shape[1] - 2) // 2
    aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * draws[:, :attempts]
    low, high = (bound * height * width for bound in AREA)
    least = tf.round(tf.sqrt(low / aspect))
    most = tf.round(tf.sqrt(high / aspect))
    most = tf.where(tf.round(most * aspect) > width, tf.floor((width + 0.5 - 1e-4) / aspect), most)
    most = tf.minimum(most, height)
    least = tf.minimum(least, most)
    h = least + tf.floor(draws[:, attempts : 2 * attempts] * (most - least + 1.0))
    w = tf.round(h * aspect)
    # One pixel more or less where rounding left the permitted area.
    h = tf.where(h * w < low, h + 1.0, h)
    w = tf.round(h * aspect)
    h = tf.where(h * w > high, h - 1.0, h)
    w = tf.round(h * aspect)
    fits = (h * w >= low) & (h * w <= high) & (h <= height) & (w <= width) & (h > 0) & (w > 0)
    first = tf.argmax(tf.cast(fits, tf.int32), axis=1, output_type=tf.int32)
    found = tf.reduce_any(fits, axis=1, keepdims=True)
    h = tf.where(found, tf.gather(h, first, axis=1, batch_dims=1)[:, None], height)
    w = tf.where(found, tf.gather(w, first, axis=1, batch_dims=1)[:, None], width)
    # TensorFlow draws the corner from [0, size - crop), so the far edge is never touched.
    y, x = draws[:, -2:-1], draws[:, -1:]
    top, left = tf.floor(y * (height - h)), tf.floor(x * (width - w))
    return tf.concat([top / height, left / width, h / height, w / width], axis=1)


def central_box(sizes: tf.Tensor, fraction: float = EVAL_FRACTION) -> tf.Tensor:
    """The centred square whose side is `fraction` of the image's smaller side: float32 [n, 4] as `inception_box`."""
    side = fraction * tf.reduce_min(sizes, axis=1, keepdims=True)
    extent = side / sizes
    return tf.concat([(1.0 - extent) / 2.0, extent], axis=1)


def _weights(start: tf.Tensor, extent: tf.Tensor, flip: tf.Tensor | None, side: int, out: int, area: bool) -> tf.Tensor:
    """Interpolation matrices float32 [n, out, side] of one axis, for crops in fractions of it (float32 [n])."""
    start, extent = (start * side)[:, None], (extent * side)[:, None]
    cell = tf.range(out, dtype=tf.float32)[None, :]
    if flip is not None:
        cell = tf.where(flip[:, None], out - 1.0 - cell, cell)
    source = tf.range(side, dtype=tf.float32)[None, None, :]
    step = extent / out
    centre = start + (cell + 0.5) * step - 0.5
    if not area:
        # Samples outside the crop take its border pixel, as in tf.image.resize of the crop.
        centre = tf.clip_by_value(centre, start, start + tf.maximum(extent - 1.0, 0.0))
        centre = tf.clip_by_value(centre, 0.0, side - 1.0)
        return tf.nn.relu(1.0 - tf.abs(source - centre[:, :, None]))
    # A cell averages what it covers, a pixel at the least, each pixel by the share of it that is covered.
    half = tf.maximum(step, 1.0) / 2.0
    low = tf.clip_by_value(centre + 0.5 - half, 0.0, side - 1.0)[:, :, None]
    high = tf.clip_by_value(centre + 0.5 + half, 1.0, float(side))[:, :, None]
    cover = tf.nn.relu(tf.minimum(high, source + 1.0) - tf.maximum(low, source))
    return cover / tf.reduce_sum(cover, axis=2, keepdims=True)


def render(images: tf.Tensor, box: tf.Tensor, flip: tf.Tensor | None, size: int, *, area: bool = False) -> tf.Tensor:
    """Crops, resizes and flips.

    Args:
        images: uint8 [n, side, side, 3].
        box: float32 [n, 4]: top, left, height, width as fractions of the image.
        flip: bool [n], true for a left-right mirror; None for none.
        size: side of the result in pixels.
        area: average over what each pixel covers (evaluation) instead of bilinear interpolation (training).

    Returns:
        float32 [n, size, size, 3] in [-1, 1].
    """
    side = images.shape[1]
    rows = _weights(box[:, 0], box[:, 2], None, side, size, area)
    columns = _weights(box[:, 1], box[:, 3], flip, side, size, area)
    n = tf.shape(images)[0]
    # float32 holds 0..255 exactly; [n, size, side] x [n, side, side * 3], then the other axis.
    pixels = tf.reshape(tf.cast(images, tf.float32), [n, side, side * 3])
    tall = tf.reshape(tf.matmul(rows, pixels), [n, size, side, 3])
    tall = tf.reshape(tf.transpose(tall, [0, 2, 1, 3]), [n, side, size * 3])
    wide = tf.reshape(tf.matmul(columns, tall), [n, size, size, 3])
    return tf.transpose(wide, [0, 2, 1, 3]) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of the global batch that one replica computes, and one more: the row before its first.

    The partner of row i in mixup is row i - 1 of the *global* batch. A view is a function of its row, so a replica makes
    that one extra view itself and no pixel crosses between replicas.
    """

    numbers: tf.Tensor  # int32 [n + 1], of which the first is the partner only

    @classmethod
    def of(cls, replica: tf.Tensor | int, replicas: int, batch_size: int) -> Rows:
        """Rows of replica `replica` of `replicas`, for a global batch of `batch_size` (a multiple of `replicas`)."""
        share = batch_size // replicas
        first = tf.cast(replica, tf.int32) * share
        return cls(tf.math.floormod(first - 1 + tf.range(share + 1), batch_size))


def training_views(
    images: tf.Tensor,
    sizes: tf.Tensor,
    rows: Rows,
    seed: int,
    step: tf.Tensor,
    resolutions: tuple[int, ...],
    *,
    mixup: bool,
) -> tuple[tuple[tf.Tensor, ...], tf.Tensor]:
    """One consistent crop of each image, resized for each model, mixed with its neighbour (paper, section 2).

    Args:
        images: uint8 [n + 1, side, side, 3], the images of `rows`.
        sizes: float32 [n + 1, 2], original heights and widths.
        rows: which rows of the global batch these are.
        seed: of the run.
        step: int scalar, the number of updates made so far.
        resolutions: side in pixels of each view to make.
        mixup: mix each image with the row before it, with one coefficient a step.

    Returns:
        Views float32 [n, size, size, 3] in [-1, 1], one for each resolution, and the share of an image itself in its
        mixture, float32 scalar in [0, 1].
    """
    draws = uniform(seed, step, rows.numbers, _DRAWS)
    box = inception_box(draws[:, : _DRAWS - 1], sizes)
    flip = draws[:, -1] < 0.5
    # A row number that no batch has: the coefficient belongs to the step.
    own = uniform(seed, step, tf.constant([2**31 - 1]), 1)[0, 0] if mixup else tf.constant(1.0)
    views = []
    for size in resolutions:
        view = render(images, box, flip, size)
        views.append(own * view[1:] + (1.0 - own) * view[:-1] if mixup else view[1:])
    return tuple(views), own


def evaluation_view(images: tf.Tensor, sizes: tf.Tensor, size: int) -> tf.Tensor:
    """The central crop, area-resized: uint8 [n, side, side, 3] -> float32 [n, size, size, 3] in [-1, 1]."""
    return render(images, central_box(sizes), None, size, area=True)
