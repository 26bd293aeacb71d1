"""What a model sees of a stored image in a given step: crop, flip, resize, mixup; on the device, stateless.

Random numbers are Threefry-2x32 of (seed, step) and (row of the batch, draw): the same on CPU, GPU and TPU, compiled or
not, for any number of replicas. Crop, resize and flip together are two small matrix products an image, so a view has a static
shape and no image operation that XLA lacks.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from trainer.core.config import Config

ASPECT = (3 / 4, 4 / 3)  # width over height of the crop, in the original's pixels
EXAMPLE_ZOOM = 160 / 128  # the Keras example: resize to 160, random crop of 128
EXAMPLE_CENTRE = 0.875  # the Keras example's central crop, of each side
_ATTEMPTS = 8  # shapes drawn before the whole image is taken; one is enough unless the image is very long
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_DRAWS = _ATTEMPTS * 2 + 3  # of one crop and its flip
# Where a row's random numbers are: the student's crop, the teacher's own crop, the row's mixup coefficient, and the crops
# whose mean is a fixed target. A row number that no batch has holds what belongs to the step.
_OWN_CROP, _TEACHER_CROP, _OWN_SHARE, _FIXED_CROP = 0, _DRAWS, 2 * _DRAWS, 2 * _DRAWS + 1
_BETA = _FIXED_CROP + _DRAWS  # mixup coefficients that are not uniform
_STEP_ROW = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Mode:
    """Which views the two models get (paper, section 3.1.1).

    Attributes:
        student: "whole" image, "mild" random crop or "inception" crop. The last two are mirrored half of the time.
        teacher: "same" view as the student; a view of its "own", drawn in the student's way; or a fixed one for each
            example: the "whole" image, its "central" crop, or the mean of its outputs on many inception crops ("crops").
        mixup: mix each view with its neighbour's.
    """

    student: str
    teacher: str
    mixup: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the teacher's output is a constant of the example."""
        return self.teacher in ("whole", "central", "crops")


VIEWS = {
    "fix/rs": Mode("whole", "whole"),
    "fix/cc": Mode("mild", "central"),
    "fix/ic_ens": Mode("inception", "crops"),
    "ind/rc": Mode("mild", "own"),
    "ind/ic": Mode("inception", "own"),
    "same/rc": Mode("mild", "same"),
    "same/ic": Mode("inception", "same"),
    "mix": Mode("inception", "same", mixup=True),
}


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


def uniform(seed: int, step: tf.Tensor | int, rows: tf.Tensor, draws: int, first: int = 0) -> tf.Tensor:
    """Uniform float32 [len(rows), draws] in [0, 1), a function of seed, step and the row's number alone.

    Args:
        seed: 0 to 2^31 - 1.
        step: int scalar >= 0.
        rows: int32 [n], numbers of rows in the global batch.
        draws: numbers a row.
        first: position of the first of them in the row's endless stream.
    """
    key = (tf.constant(seed, tf.uint32), tf.cast(step, tf.uint32))
    row = tf.cast(rows, tf.uint32)[:, None]
    bits, _ = threefry(key, (row, tf.cast(tf.range(first, first + draws), tf.uint32)[None, :]))
    return tf.cast(tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.int32), tf.float32) * 2.0**-24


def beta(draws: tf.Tensor, alpha: float) -> tf.Tensor:
    """Beta(alpha, alpha) numbers, float32 [n, 1], by the method of Johnk (1964), in logarithms.

    Args:
        draws: float32 [n, 2 * attempts] uniform in [0, 1). An attempt fails in 1.4 % of all cases for alpha 0.1, in half of
            them for 1; if all fail, the last one counts.
        alpha: in (0, 1].
    """
    attempts = draws.shape[1] // 2
    x, y = (tf.math.log(tf.maximum(part, 2.0**-25)) / alpha for part in (draws[:, :attempts], draws[:, attempts:]))
    taken = tf.cast(tf.math.reduce_logsumexp(tf.stack([x, y]), axis=0) <= 0, tf.int32)
    which = tf.where(tf.reduce_any(taken > 0, axis=1), tf.argmax(taken, axis=1, output_type=tf.int32), attempts - 1)
    return tf.gather(tf.sigmoid(x - y), which[:, None], batch_dims=1)


def inception_box(draws: tf.Tensor, sizes: tf.Tensor, min_area: float = 0.05) -> tf.Tensor:
    """A random crop, distributed as tf.image.sample_distorted_bounding_box with the whole image as its one box.

    As there, the aspect is uniform, then the height is uniform over the pixels that the area allows, then the place.

    Args:
        draws: float32 [n, 2 * attempts + 2] uniform in [0, 1).
        sizes: float32 [n, 2], height and width of the originals in pixels.
        min_area: least area of a crop as a share of the image, in (0, 1] (big_vision: 0.05; the paper names the style only).

    Returns:
        float32 [n, 4]: top, left, height, width as fractions of the image.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    attempts = (draws.shape[1] - 2) // 2
    aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * draws[:, :attempts]
    low, high = min_area * height * width, height * width
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


def central_box(sizes: tf.Tensor, fraction: float) -> tf.Tensor:
    """The centred square whose side is `fraction` of the image's smaller side: float32 [n, 4] as `inception_box`."""
    extent = fraction * tf.reduce_min(sizes, axis=1, keepdims=True) / sizes
    return tf.concat([(1.0 - extent) / 2.0, extent], axis=1)


def mild_box(draws: tf.Tensor, sizes: tf.Tensor, fraction: float) -> tf.Tensor:
    """A square as large as `central_box`'s at a uniformly random place: float32 [n, 4] as `inception_box`.

    Args:
        draws: float32 [n, 2] uniform in [0, 1), for top and left.
        sizes: float32 [n, 2], height and width of the originals in pixels.
        fraction: side of the square as a share of the smaller side, in (0, 1].
    """
    extent = fraction * tf.reduce_min(sizes, axis=1, keepdims=True) / sizes
    return tf.concat([draws * (1.0 - extent), extent], axis=1)


def squashed_box(draws: tf.Tensor, size: int, zoomed: int) -> tf.Tensor:
    """The crop of the Keras example and of BiT-HyperRule: of the image squashed to a square, at a whole number of pixels.

    Args:
        draws: float32 [n, 2] uniform in [0, 1), for top and left.
        size: side of the view in pixels.
        zoomed: side of the squashed image, at least that.
    """
    corner = tf.floor(draws * (zoomed - size + 1)) / zoomed
    return tf.concat([corner, tf.fill(tf.shape(corner), size / zoomed)], axis=1)


def whole_box(sizes: tf.Tensor) -> tf.Tensor:
    """The whole image, squashed: float32 [n, 4] as `inception_box`."""
    return tf.concat([tf.zeros_like(sizes), tf.ones_like(sizes)], axis=1)


def _weights(
    start: tf.Tensor, extent: tf.Tensor, flip: tf.Tensor | None, side: int, out: int, area: bool, inside: bool
) -> tf.Tensor:
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
        if inside:
            centre = tf.clip_by_value(centre, start, start + tf.maximum(extent - 1.0, 0.0))
        centre = tf.clip_by_value(centre, 0.0, side - 1.0)
        return tf.nn.relu(1.0 - tf.abs(source - centre[:, :, None]))
    # A cell averages what it covers, a pixel at the least, each pixel by the share of it that is covered.
    half = tf.maximum(step, 1.0) / 2.0
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
    inside: bool = True,
) -> tf.Tensor:
    """Crops, resizes and flips.

    Args:
        images: uint8 [n, side, side, 3].
        box: float32 [n, 4]: top, left, height, width as fractions of the image.
        flip: bool [n], true for a left-right mirror; None for none.
        size: side of the result in pixels.
        area: average over what each pixel covers (evaluation) instead of bilinear interpolation (training).
        inside: see nothing beside the crop: crop, then resize. False: resize, then crop.

    Returns:
        float32 [n, size, size, 3] in [-1, 1].
    """
    side = images.shape[1]
    rows = _weights(box[:, 0], box[:, 2], None, side, size, area, inside)
    columns = _weights(box[:, 1], box[:, 3], flip, side, size, area, inside)
    n = tf.shape(images)[0]
    # float32 holds 0..255 exactly; [n, size, side] x [n, side, side * 3], then the other axis.
    pixels = tf.reshape(tf.cast(images, tf.float32), [n, side, side * 3])
    tall = tf.reshape(tf.matmul(rows, pixels), [n, size, side, 3])
    tall = tf.reshape(tf.transpose(tall, [0, 2, 1, 3]), [n, side, size * 3])
    wide = tf.reshape(tf.matmul(columns, tall), [n, size, size, 3])
    return tf.transpose(wide, [0, 2, 1, 3]) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of the global batch that one replica computes: its own, and their partners in mixup.

    The partner of a row is a row of the *global* batch. A view is a function of its row, so a replica makes the extra
    views that it needs itself and no pixel crosses between replicas.

    Attributes:
        numbers: int32 [m], rows to make views of; each own row once.
        partner: "roll" (row i - 1: numbers is the row before the first, then the own rows), "reverse" (row batch - 1 - i:
            the own rows, then their partners) or "" (no mixup: the own rows).
    """

    numbers: tf.Tensor
    partner: str

    @classmethod
    def of(cls, replica: tf.Tensor | int, replicas: int, batch_size: int, partner: str) -> BatchRows:
        """Rows of replica `replica` of `replicas`, for a global batch of `batch_size` (a multiple of `replicas`)."""
        share = batch_size // replicas
        first = tf.cast(replica, tf.int32) * share
        own = first + tf.range(share)
        if partner == "roll":
            return cls(tf.math.floormod(first - 1 + tf.range(share + 1), batch_size), partner)
        return cls(tf.concat([own, batch_size - 1 - own], 0) if partner == "reverse" else own, partner)

    def split(self, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """What belongs to the own rows and to their partners, of a tensor [m, ...] that is in the order of `numbers`."""
        if self.partner == "roll":
            return values[1:], values[:-1]
        if self.partner == "reverse":
            share = values.shape[0] // 2 if values.shape[0] else tf.shape(values)[0] // 2
            return values[:share], values[share:]
        return values, values


def mode(config: Config) -> Mode:
    """The mode of a configuration."""
    return VIEWS[config.views]


def mixup_partner(config: Config) -> str:
    """Which partner `Rows` needs: that of the mode and of `--compat`."""
    if not mode(config).mixup:
        return ""
    return "reverse" if config.like_example("mixup") else "roll"


@dataclasses.dataclass(frozen=True)
class Views:
    """What the models see in one step.

    Attributes:
        student: float32 [n, size, size, 3] in [-1, 1].
        teachers: the same for teachers, by size in pixels; none for sizes that were not asked for.
        share: float32 [n, 1], the share of an image itself in its mixture, in [0, 1]; 1 without mixup.
    """

    student: tf.Tensor
    teachers: dict[int, tf.Tensor]
    share: tf.Tensor


def training_views(
    config: Config,
    images: tf.Tensor,
    sizes: tf.Tensor,
    rows: BatchRows,
    step: tf.Tensor,
    teacher_sizes: tuple[int, ...],
) -> Views:
    """Crops each image as `--views` says, resizes the crop for each model, and mixes (paper, sections 2 and 3.1.1).

    Args:
        config: image_size, views, mixup, seed and what describes the crops.
        images: uint8 [m, side, side, 3], the images of `rows.numbers`.
        sizes: float32 [m, 2], original heights and widths.
        rows: which rows of the global batch these are.
        step: int scalar, the number of updates made so far.
        teacher_sizes: sides in pixels of the teachers' views; none where the teachers' outputs are fixed.
    """
    chosen = mode(config)

    def make(first: int, wanted: tuple[int, ...]) -> dict[int, tf.Tensor]:
        if chosen.student == "whole":
            box, flip = whole_box(sizes), None
        else:
            draws = uniform(config.seed, step, rows.numbers, _DRAWS, first)
            box, flip = _box(config, chosen.student, draws, sizes), draws[:, -1] < 0.5
        cropped_first = not _zoomed(config)
        return {
            size: mixed(render(images, box, flip, size, area=flip is None, inside=cropped_first)) for size in wanted
        }

    n = tf.shape(rows.split(rows.numbers)[0])[0]
    share = tf.ones([n, 1])
    if chosen.mixup and config.mixup_alpha < 1:
        own_rows = rows.split(rows.numbers)[0] if config.mixup == "example" else tf.constant([_STEP_ROW])
        share = beta(uniform(config.seed, step, own_rows, 2 * _ATTEMPTS, _BETA), config.mixup_alpha)
        share = tf.tile(share, [n // tf.shape(share)[0], 1])
    elif chosen.mixup and config.mixup == "example":
        share = uniform(config.seed, step, rows.split(rows.numbers)[0], 1, _OWN_SHARE)
    elif chosen.mixup:
        share = tf.tile(uniform(config.seed, step, tf.constant([_STEP_ROW]), 1), [n, 1])

    def mixed(view: tf.Tensor) -> tf.Tensor:
        own, other = rows.split(view)
        if not chosen.mixup:
            return own
        return share[:, :, None, None] * own + (1.0 - share[:, :, None, None]) * other

    same = chosen.teacher == "same"
    made = make(_OWN_CROP, tuple(dict.fromkeys([config.image_size, *(teacher_sizes if same else ())])))
    others = made if same else make(_TEACHER_CROP, tuple(dict.fromkeys(teacher_sizes))) if teacher_sizes else {}
    return Views(made[config.image_size], {size: others[size] for size in teacher_sizes}, share)


def _zoomed(config: Config) -> int:
    """Side in pixels of the squashed image that crops are taken of; 0: they are taken of the image itself."""
    return config.resize_size or (round(EXAMPLE_ZOOM * config.image_size) if config.like_example("crop") else 0)


def _box(config: Config, kind: str, draws: tf.Tensor, sizes: tf.Tensor) -> tf.Tensor:
    """The box of a random crop from its draws [n, _DRAWS]."""
    place = draws[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 2]
    if zoomed := _zoomed(config):
        return squashed_box(place, config.image_size, zoomed)
    if kind == "mild":
        return mild_box(place, sizes, config.central_fraction)
    return inception_box(draws[:, : _DRAWS - 1], sizes, config.min_crop_area)


def fixed_view(
    config: Config, images: tf.Tensor, sizes: tf.Tensor, ids: tf.Tensor, crop: tf.Tensor | int, size: int
) -> tf.Tensor:
    """The view whose outputs a fixed teacher is asked for: float32 [n, size, size, 3] in [-1, 1].

    Args:
        config: its mode is a fixed one.
        images: uint8 [n, side, side, 3].
        sizes: float32 [n, 2], original heights and widths.
        ids: int32 [n], examples of the split.
        crop: int scalar, which of the crops whose outputs are averaged; only fix/ic_ens has more than one.
        size: side of the view in pixels.
    """
    kind = mode(config).teacher
    if kind == "whole":
        return render(images, whole_box(sizes), None, size, area=True)
    if kind == "central":
        return evaluation_view(config, images, sizes, size)
    draws = uniform(config.seed, crop, ids, _DRAWS, _FIXED_CROP)
    box = _box(config, "inception", draws, sizes)
    return render(images, box, draws[:, -1] < 0.5, size, inside=not _zoomed(config))


def evaluation_view(config: Config, images: tf.Tensor, sizes: tf.Tensor, size: int) -> tf.Tensor:
    """The central crop, area-resized: uint8 [n, side, side, 3] -> float32 [n, size, size, 3] in [-1, 1]."""
    if config.like_example("central"):
        edge, extent = (1.0 - EXAMPLE_CENTRE) / 2.0, EXAMPLE_CENTRE
        box = tf.tile(tf.constant([[edge, edge, extent, extent]]), [tf.shape(images)[0], 1])
        return render(images, box, None, size)
    if config.resize_size:
        return render(images, whole_box(sizes), None, size, area=True)
    return render(images, central_box(sizes, config.central_fraction), None, size, area=True)
