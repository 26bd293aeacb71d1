"""Crops of stored images: boxes, and the resampling that turns a box into a view.

Boxes are in fractions of the image and are drawn in the original's proportions. Crop, resize and
flip together are two small matrix products for each image: static shapes, and no image operation
that XLA lacks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from trainer.core.config import Config

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width over height of an inception crop, in the original's pixels
_ATTEMPTS = 8  # shapes drawn before the whole image is used; one suffices unless the image is very long
DRAWS_PER_CROP = 2 * _ATTEMPTS + 3  # shapes of an inception crop, top, left, flip


def inception_box(draws: tf.Tensor, sizes: tf.Tensor, min_area: float = 0.05) -> tf.Tensor:
    """A random crop, distributed as tf.image.sample_distorted_bounding_box.

    The whole image is the one bounding box. As there, the aspect ratio is uniform, then the height
    is uniform over the pixels that the area allows, then the position.

    Args:
        draws: float32 [n, 2 * attempts + 2] uniform in [0, 1).
        sizes: float32 [n, 2], height and width of the originals in pixels.
        min_area: least area of a crop as a share of the image, in (0, 1] (big_vision: 0.05; the
            paper names the style only).

    Returns:
        float32 [n, 4]: top, left, height, width as fractions of the image.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    attempts = (draws.shape[1] - 2) // 2
    aspect = ASPECT_RATIOS[0] + (ASPECT_RATIOS[1] - ASPECT_RATIOS[0]) * draws[:, :attempts]
    smallest_area, largest_area = min_area * height * width, height * width
    lowest = tf.round(tf.sqrt(smallest_area / aspect))
    highest = tf.round(tf.sqrt(largest_area / aspect))
    highest = tf.where(tf.round(highest * aspect) > width, tf.floor((width + 0.5 - 1e-4) / aspect), highest)
    highest = tf.minimum(highest, height)
    lowest = tf.minimum(lowest, highest)
    h = lowest + tf.floor(draws[:, attempts : 2 * attempts] * (highest - lowest + 1.0))
    w = tf.round(h * aspect)
    # One pixel more or less where rounding left the permitted area.
    h = tf.where(h * w < smallest_area, h + 1.0, h)
    w = tf.round(h * aspect)
    h = tf.where(h * w > largest_area, h - 1.0, h)
    w = tf.round(h * aspect)
    valid = (h * w >= smallest_area) & (h * w <= largest_area) & (h <= height) & (w <= width) & (h > 0) & (w > 0)
    attempt = tf.argmax(tf.cast(valid, tf.int32), axis=1, output_type=tf.int32)
    any_valid = tf.reduce_any(valid, axis=1, keepdims=True)
    h = tf.where(any_valid, tf.gather(h, attempt, axis=1, batch_dims=1)[:, None], height)
    w = tf.where(any_valid, tf.gather(w, attempt, axis=1, batch_dims=1)[:, None], width)
    # TensorFlow draws the corner from [0, size - crop), so the far edge is never touched.
    y, x = draws[:, -2:-1], draws[:, -1:]
    top, left = tf.floor(y * (height - h)), tf.floor(x * (width - w))
    return tf.concat([top / height, left / width, h / height, w / width], axis=1)


def central_box(sizes: tf.Tensor, fraction: float) -> tf.Tensor:
    """The centred square of side `fraction` of the smaller side: float32 [n, 4] as
    `inception_box`.
    """
    extent = fraction * tf.reduce_min(sizes, axis=1, keepdims=True) / sizes
    return tf.concat([(1.0 - extent) / 2.0, extent], axis=1)


def mild_box(draws: tf.Tensor, sizes: tf.Tensor, fraction: float) -> tf.Tensor:
    """A square as large as `central_box`'s at a uniformly random position.

    Args:
        draws: float32 [n, 2] uniform in [0, 1), for top and left.
        sizes: float32 [n, 2], height and width of the originals in pixels.
        fraction: side of the square as a share of the smaller side, in (0, 1].

    Returns:
        float32 [n, 4] as `inception_box`.
    """
    extent = fraction * tf.reduce_min(sizes, axis=1, keepdims=True) / sizes
    return tf.concat([draws * (1.0 - extent), extent], axis=1)


def squashed_box(draws: tf.Tensor, size: int, resized: int) -> tf.Tensor:
    """A crop of the image squashed to a square, at whole pixels (BiT-HyperRule, Keras example).

    Args:
        draws: float32 [n, 2] uniform in [0, 1), for top and left.
        size: side of the crop in pixels.
        resized: side of the squashed image in pixels, at least `size`.

    Returns:
        float32 [n, 4] as `inception_box`.
    """
    corner = tf.floor(draws * (resized - size + 1)) / resized
    return tf.concat([corner, tf.fill(tf.shape(corner), size / resized)], axis=1)


def whole_box(sizes: tf.Tensor) -> tf.Tensor:
    """The whole image, squashed: float32 [n, 4] as `inception_box`."""
    return tf.concat([tf.zeros_like(sizes), tf.ones_like(sizes)], axis=1)


def padded_box(sizes: tf.Tensor) -> tf.Tensor:
    """The smallest square around the whole image, centred on it: float32 [n, 4] as
    `inception_box`; it reaches beyond the image.
    """
    extent = tf.reduce_max(sizes, axis=1, keepdims=True) / sizes
    return tf.concat([(1.0 - extent) / 2.0, extent], axis=1)


def blacken_outside(views: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Views with black where their box (float32 [n, 4]) reaches beyond the image.

    float32 [n, size, size, 3] in [-1, 1] -> the same.
    """
    centres = (tf.range(views.shape[1], dtype=tf.float32)[None, :] + 0.5) / float(views.shape[1])
    rows, columns = (box[:, axis, None] + centres * box[:, axis + 2, None] for axis in (0, 1))
    rows_inside, columns_inside = ((axis >= 0) & (axis <= 1) for axis in (rows, columns))
    inside = rows_inside[:, :, None] & columns_inside[:, None, :]
    return tf.where(inside[..., None], views, -1.0)


def inception_draws(draws: tf.Tensor) -> tf.Tensor:
    """Of [n, DRAWS_PER_CROP] numbers those of `inception_box`: all but the flip's."""
    return draws[:, :-1]


def corner_draws(draws: tf.Tensor) -> tf.Tensor:
    """Of [n, DRAWS_PER_CROP] numbers the two for a crop's top and left: [n, 2]."""
    return draws[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 2]


@dataclasses.dataclass(frozen=True)
class Crop:
    """One kind of crop.

    Attributes:
        box: a function of the configuration, sizes float32 [n, 2] of the originals in pixels, and
            draws float32 [n, DRAWS_PER_CROP] uniform in [0, 1) (None unless `random`), to boxes
            float32 [n, 4] as `inception_box`.
        random: drawn anew for each row and step, and mirrored in half of all cases.
        area: average over what each pixel covers instead of bilinear interpolation.
        crop_first: crop, then resize, so that pixels beside the crop have no influence. False:
            resize, then crop.
    """

    box: Callable[[Config, tf.Tensor, tf.Tensor | None], tf.Tensor]
    random: bool = True
    area: bool = False
    crop_first: bool = True


CROPS = {
    "whole": Crop(lambda _config, sizes, _draws: whole_box(sizes), random=False, area=True),
    "central": Crop(
        lambda config, sizes, _draws: central_box(sizes, config.central_fraction),
        random=False,
        area=True,
    ),
    "padded": Crop(lambda _config, sizes, _draws: padded_box(sizes), random=False, area=True),
    "mild": Crop(lambda config, sizes, draws: mild_box(corner_draws(draws), sizes, config.central_fraction)),
    "inception": Crop(lambda config, sizes, draws: inception_box(inception_draws(draws), sizes, config.min_crop_area)),
    "squashed": Crop(
        lambda config, _sizes, draws: squashed_box(corner_draws(draws), config.image_size, config.resize_size),
        crop_first=False,
    ),
}


def _interpolation(
    start: tf.Tensor,
    extent: tf.Tensor,
    flip: tf.Tensor | None,
    side: int,
    size: int,
    *,
    area: bool,
    crop_first: bool,
) -> tf.Tensor:
    """Interpolation matrices float32 [n, size, side] of one axis; start, extent: float32 [n] of
    it.
    """
    start, extent = (start * side)[:, None], (extent * side)[:, None]
    pixel = tf.range(size, dtype=tf.float32)[None, :]
    if flip is not None:
        pixel = tf.where(flip[:, None], size - 1.0 - pixel, pixel)
    source = tf.range(side, dtype=tf.float32)[None, None, :]
    stride = extent / size
    centre = start + (pixel + 0.5) * stride - 0.5
    if not area:
        # Samples outside the crop take its border pixel, as in tf.image.resize of the crop.
        if crop_first:
            centre = tf.clip_by_value(centre, start, start + tf.maximum(extent - 1.0, 0.0))
        centre = tf.clip_by_value(centre, 0.0, side - 1.0)
        return tf.nn.relu(1.0 - tf.abs(source - centre[:, :, None]))
    # A pixel averages what it covers, at least one source pixel, each by the share covered.
    half = tf.maximum(stride, 1.0) / 2.0
    low = tf.clip_by_value(centre + 0.5 - half, 0.0, side - 1.0)[:, :, None]
    high = tf.clip_by_value(centre + 0.5 + half, 1.0, float(side))[:, :, None]
    cover = tf.nn.relu(tf.minimum(high, source + 1.0) - tf.maximum(low, source))
    return cover / tf.reduce_sum(cover, axis=2, keepdims=True)


def render(
    images: tf.Tensor,
    box: tf.Tensor,
    flip: tf.Tensor | None,
    size: int,
    *,
    area: bool = False,
    crop_first: bool = True,
) -> tf.Tensor:
    """Crops, resizes and flips.

    Args:
        images: uint8 [n, side, side, 3].
        box: float32 [n, 4]: top, left, height, width as fractions of the image.
        flip: bool [n], true for a left-right mirror; None for none.
        size: side of the result in pixels.
        area: see `Crop`.
        crop_first: see `Crop`.

    Returns:
        float32 [n, size, size, 3] in [-1, 1].
    """
    side = images.shape[1]
    rows = _interpolation(box[:, 0], box[:, 2], None, side, size, area=area, crop_first=crop_first)
    columns = _interpolation(box[:, 1], box[:, 3], flip, side, size, area=area, crop_first=crop_first)
    n = tf.shape(images)[0]
    # float32 holds 0..255 exactly; [n, size, side] x [n, side, side * 3], then the other axis.
    pixels = tf.reshape(tf.cast(images, tf.float32), [n, side, side * 3])
    tall = tf.reshape(tf.matmul(rows, pixels), [n, size, side, 3])
    tall = tf.reshape(tf.transpose(tall, [0, 2, 1, 3]), [n, side, size * 3])
    wide = tf.reshape(tf.matmul(columns, tall), [n, size, size, 3])
    return tf.transpose(wide, [0, 2, 1, 3]) / 127.5 - 1.0
