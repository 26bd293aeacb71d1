"""What a model sees of a stored image in a step: crop, flip, resize, mixup; on the device.

A view is a function of (seed, step, row of the global batch), the same for any number of replicas.
"""

from __future__ import annotations

import dataclasses
import enum

import tensorflow as tf

from trainer.core.config import Config
from trainer.method.counter_rng import beta, uniform
from trainer.method.crops import CROPS, DRAWS_PER_CROP, Crop, blacken_outside, render
from trainer.method.keras_example import replacements

_BETA_ATTEMPTS = 8
_STEP_ROW = 2**31 - 1  # no batch has this row; its sequence serves the step as a whole


class Stream(enum.IntEnum):
    """Where in a row's sequence of random numbers each use begins.

    The numbers decide the weights of a run: append new uses, never move one.
    """

    STUDENT_CROP = 0
    TEACHER_CROP = DRAWS_PER_CROP
    MIXUP_RATIO = 2 * DRAWS_PER_CROP
    FIXED_CROP = 2 * DRAWS_PER_CROP + 1
    BETA_MIXUP_RATIO = 3 * DRAWS_PER_CROP + 1


@dataclasses.dataclass(frozen=True)
class Mode:
    """Which views the two models get (paper, section 3.1.1).

    Attributes:
        student: kind of crop, of `crops.CROPS`.
        teacher: "same" view as the student; a view of its "own", of the student's kind; or a fixed
            one for each example: the "whole" image, its "central" crop, or the mean of its outputs
            on many inception crops ("crops").
        mixup: mix each view with its partner's.
    """

    student: str
    teacher: str
    mixup: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the teacher's output is a constant of the example."""
        return self.teacher in ("whole", "central", "crops")


# A teacher's own view, which `--teacher_view` names: see `evaluation_view`.
TEACHER_VIEWS = ("central", "squash", "pad")

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


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of the global batch that one replica computes: its own and their mixup partners.

    The partner of a row is a row of the *global* batch. A view is a function of its row, so a
    replica makes the partners' views itself and no pixel crosses between replicas.

    Attributes:
        rows: int32 [m], rows to make views of; each own row once.
        partner: "roll" (row i - 1: `rows` is the row before the first, then the own rows),
            "reverse" (row batch - 1 - i: `rows` is the own rows, then their partners) or "" (no
            mixup: the own rows).
    """

    rows: tf.Tensor
    partner: str

    @classmethod
    def of(cls, replica: tf.Tensor | int, replicas: int, batch_size: int, partner: str) -> BatchRows:
        """The rows of one replica.

        Args:
            replica: int scalar, 0 to `replicas` - 1.
            replicas: in all.
            batch_size: of the global batch, a multiple of `replicas`.
            partner: see the attribute.
        """
        local_batch_size = batch_size // replicas
        first = tf.cast(replica, tf.int32) * local_batch_size
        if partner == "roll":
            return cls(tf.math.floormod(first - 1 + tf.range(local_batch_size + 1), batch_size), partner)
        own_rows = first + tf.range(local_batch_size)
        return cls(tf.concat([own_rows, batch_size - 1 - own_rows], 0) if partner == "reverse" else own_rows, partner)

    def split_partners(self, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Values [m, ...] of `rows` -> those of own rows and of their partners, each [n, ...]."""
        if self.partner == "roll":
            return values[1:], values[:-1]
        if self.partner == "reverse":
            n = values.shape[0] // 2 if values.shape[0] else tf.shape(values)[0] // 2
            return values[:n], values[n:]
        return values, values

    def own_rows(self) -> tf.Tensor:
        """The rows without their partners: int32 [n]."""
        return self.split_partners(self.rows)[0]


def mode(config: Config) -> Mode:
    """The mode of a configuration."""
    return VIEWS[config.views]


def mixup_partner(config: Config) -> str:
    """Which partner `BatchRows` needs."""
    if not mode(config).mixup:
        return ""
    return replacements(config).mixup_partner or "roll"


def find_crop(config: Config, kind: str) -> Crop:
    """The crop of a kind in `CROPS`, or what `--resize_size` or `--compat` puts in its place."""
    crop = CROPS[kind]
    if crop.random:
        return CROPS["squashed"] if config.resize_size else replacements(config).random_crop or crop
    if kind == "central":
        return replacements(config).central_crop or (CROPS["whole"] if config.resize_size else crop)
    return crop


def mixup_ratios(config: Config, batch_rows: BatchRows, step: tf.Tensor) -> tf.Tensor:
    """Share of each image itself in its mixture.

    Args:
        config: views, mixup, mixup_alpha, seed.
        batch_rows: the replica's rows.
        step: int scalar, updates made so far.

    Returns:
        float32 [n, 1] in [0, 1]; 1 without mixup.
    """
    own_rows = batch_rows.own_rows()
    n = tf.shape(own_rows)[0]
    if not mode(config).mixup:
        return tf.ones([n, 1])
    by_example = config.mixup == "example"
    rows = own_rows if by_example else tf.constant([_STEP_ROW])  # the step's row has no crop: its ratio comes first
    if config.mixup_alpha < 1:
        draws = uniform(config.seed, step, rows, 2 * _BETA_ATTEMPTS, Stream.BETA_MIXUP_RATIO)
        ratios = beta(draws, config.mixup_alpha)
    else:
        ratios = uniform(config.seed, step, rows, 1, Stream.MIXUP_RATIO if by_example else 0)
    return ratios if by_example else tf.tile(ratios, [n, 1])


@dataclasses.dataclass(frozen=True)
class Views:
    """What the models see in one step.

    Attributes:
        student: float32 [n, size, size, 3] in [-1, 1].
        teachers: the same for teachers, by size in pixels; only the sizes that were requested.
        mixup_ratios: float32 [n, 1], the share of an image itself in its mixture, in [0, 1]; 1
            without mixup.
    """

    student: tf.Tensor
    teachers: dict[int, tf.Tensor]
    mixup_ratios: tf.Tensor


def training_views(
    config: Config,
    images: tf.Tensor,
    sizes: tf.Tensor,
    batch_rows: BatchRows,
    step: tf.Tensor,
    teacher_sizes: tuple[int, ...],
) -> Views:
    """Crops each image as `--views` says, resizes the crop for each model, and mixes.

    Paper, sections 2 and 3.1.1.

    Args:
        config: image_size, views, mixup, seed and what describes the crops.
        images: uint8 [m, side, side, 3], the images of `batch_rows.rows`.
        sizes: float32 [m, 2], height and width of the originals in pixels.
        batch_rows: which rows of the global batch these are.
        step: int scalar, updates made so far.
        teacher_sizes: sides in pixels of the teachers' views; none where the teachers' outputs are
            fixed.
    """
    crop = find_crop(config, mode(config).student)
    ratios = mixup_ratios(config, batch_rows, step)

    def crop_resize_mix(stream: Stream, pixel_sizes: tuple[int, ...]) -> dict[int, tf.Tensor]:
        draws = uniform(config.seed, step, batch_rows.rows, DRAWS_PER_CROP, stream) if crop.random else None
        return {size: mix(view) for size, view in crop_views(config, crop, images, sizes, draws, pixel_sizes).items()}

    def mix(view: tf.Tensor) -> tf.Tensor:
        own, partners = batch_rows.split_partners(view)
        if not mode(config).mixup:
            return own
        return ratios[:, :, None, None] * own + (1.0 - ratios[:, :, None, None]) * partners

    if mode(config).teacher == "same":
        by_size = crop_resize_mix(Stream.STUDENT_CROP, (config.image_size, *teacher_sizes))
        return Views(by_size[config.image_size], {size: by_size[size] for size in teacher_sizes}, ratios)
    student = crop_resize_mix(Stream.STUDENT_CROP, (config.image_size,))[config.image_size]
    teachers = crop_resize_mix(Stream.TEACHER_CROP, teacher_sizes) if teacher_sizes else {}
    return Views(student, teachers, ratios)


def crop_views(
    config: Config,
    crop: Crop,
    images: tf.Tensor,
    sizes: tf.Tensor,
    draws: tf.Tensor | None,
    pixel_sizes: tuple[int, ...],
) -> dict[int, tf.Tensor]:
    """One crop of each image, resized to several sizes.

    Args:
        config: what describes the crops.
        crop: the kind.
        images: uint8 [n, side, side, 3].
        sizes: float32 [n, 2], height and width of the originals in pixels.
        draws: float32 [n, DRAWS_PER_CROP] uniform in [0, 1) for a random crop, else None.
        pixel_sizes: sides of the views in pixels.

    Returns:
        float32 [n, size, size, 3] in [-1, 1], by size.
    """
    box = crop.box(config, sizes, draws)
    flip = None if draws is None else draws[:, -1] < 0.5
    return {
        size: render(images, box, flip, size, area=crop.area, crop_first=crop.crop_first)
        for size in dict.fromkeys(pixel_sizes)
    }


def fixed_view(
    config: Config, images: tf.Tensor, sizes: tf.Tensor, ids: tf.Tensor, crop_number: tf.Tensor | int, size: int
) -> tf.Tensor:
    """The view that a teacher with fixed outputs gets.

    Args:
        config: its mode is a fixed one.
        images: uint8 [n, side, side, 3].
        sizes: float32 [n, 2], height and width of the originals in pixels.
        ids: int32 [n], examples of the split.
        crop_number: int scalar, which of the crops whose outputs are averaged; only fix/ic_ens has
            more than one.
        size: side of the view in pixels.

    Returns:
        float32 [n, size, size, 3] in [-1, 1].
    """
    teacher = mode(config).teacher
    crop = find_crop(config, "inception" if teacher == "crops" else teacher)
    draws = None
    if crop.random:
        draws = uniform(config.seed, crop_number, ids, DRAWS_PER_CROP, Stream.FIXED_CROP)
    return crop_views(config, crop, images, sizes, draws, (size,))[size]


def evaluation_view(config: Config, images: tf.Tensor, sizes: tf.Tensor, size: int, kind: str = "central") -> tf.Tensor:
    """The view of an image in evaluation.

    Args:
        config: central_fraction, resize_size, compat; they apply to the central crop.
        images: uint8 [n, side, side, 3].
        sizes: float32 [n, 2], height and width of the originals in pixels.
        size: side of the view in pixels.
        kind: "central" crop; "squash": the whole image whatever its proportions, as
            `keras.utils.image_dataset_from_directory(image_size=...)` resizes; "pad": the whole
            image in its proportions between black bars, as with `pad_to_aspect_ratio=True`.

    Returns:
        float32 [n, size, size, 3] in [-1, 1].
    """
    crop = find_crop(config, "central") if kind == "central" else CROPS["whole" if kind == "squash" else "padded"]
    view = crop_views(config, crop, images, sizes, None, (size,))[size]
    return blacken_outside(view, crop.box(config, sizes, None)) if kind == "pad" else view
