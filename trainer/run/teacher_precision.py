"""How well a cheap form of a teacher agrees with the float32 original, on what the teacher will be asked; and who is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError
from trainer.data.order import ExampleSampler
from trainer.data.store import ImageStore
from trainer.method import distances, views
from trainer.models import bit, quantize, value_range
from trainer.models.teachers import Teacher

IMAGES = 512  # views compared: one batch of the paper's; two in a thousand are one image
CALIBRATION_IMAGES = 256  # views that the scales of int8 inputs come from; other steps' than those compared
_BATCH = 64  # views in one pass: bounds memory, and depends on nothing, so that it decides nothing


@dataclasses.dataclass(frozen=True)
class PrecisionCheck:
    """A form against the original.

    Attributes:
        form: "bfloat16" or "int8".
        top1: share of views with the same most likely class, in [0, 1].
        kl: mean of KL(original || form) in nats at T = 1.
        images: number of views.
    """

    form: str
    top1: float
    kl: float
    images: int

    def __str__(self) -> str:
        return f"{self.form} gives the float32 class on {self.top1:.2%} of {self.images} training views, KL {self.kl:.2e} nats"


def training_views(config: Config, store: ImageStore, size: int, images: int, first: int) -> list[np.ndarray]:
    """What a teacher is asked in training, in batches: float32 [_BATCH, size, size, 3] in [-1, 1], a function of the seed.

    Args:
        config: resolved.
        store: the training split.
        size: side of the teacher's views in pixels.
        images: number of views, rounded up to whole batches.
        first: number of the first batch in the order of examples.
    """
    config = dataclasses.replace(config, batch_size=_BATCH)
    order = ExampleSampler(config.seed, len(store), _BATCH)

    @tf.function
    def make(pictures: tf.Tensor, sizes: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        if views.mode(config).fixed:
            return views.fixed_view(config, pictures, sizes, ids, step, size)
        return views.training_views(config, pictures, sizes, rows, step, (size,)).teachers[size]

    partner = "" if views.mode(config).fixed else views.mixup_partner(config)
    rows = views.BatchRows.of(0, 1, _BATCH, partner)
    made = []
    for step in range(first, first + -(-images // _BATCH)):
        ids = order.batches(step, 1)[0][rows.numbers.numpy()]
        made.append(make(tf.constant(store.take(ids)), tf.constant(store.sizes[ids]), ids, tf.constant(step)).numpy())
    return made


def convert_and_compare(
    config: Config, teacher: Teacher, store: ImageStore, wanted: tuple[str, ...], *, native: bool, jit_compile: bool
) -> list[tuple[Teacher, PrecisionCheck]]:
    """The teacher in other forms, each compared with it. To be called under the strategy's scope.

    Args:
        config: resolved.
        teacher: in float32.
        store: the training split.
        wanted: of "bfloat16" and "int8".
        native: see `quantize.convolve`.
        jit_compile: let XLA compile.

    Raises:
        ConfigError: the teacher is a program and not a network, or too small a one.
    """
    if not wanted:
        return []
    if not bit.is_functional(teacher.model):
        raise ConfigError(
            f"--teacher_precision={wanted[0]}: {teacher.name} is a program whose layers cannot be exchanged; "
            "ask it in float32, or give the network as keras: or bit:"
        )
    calibration = CALIBRATION_IMAGES // _BATCH
    asked = training_views(config, store, teacher.size, IMAGES, calibration)

    def said(one: Teacher) -> np.ndarray:
        run = quantize.replicated(one.logits, jit_compile=jit_compile)
        return np.concatenate([run(batch) for batch in asked])

    original, found = said(teacher), []
    for form in wanted:
        try:
            if form == "int8":
                seen = training_views(config, store, teacher.size, CALIBRATION_IMAGES, 0)
                batches = [value_range.to_range(tf.constant(batch), teacher.value_range) for batch in seen]
                model = quantize.int8(teacher.model, batches, native=native)
            else:
                model = quantize.bfloat16(teacher.model)
        except (ConfigError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"--teacher_precision={form}: {teacher.name} cannot be made so: {error}") from error
        other = dataclasses.replace(teacher, model=model, precision=form)
        logits = said(other)
        if not np.isfinite(logits).all():
            raise DataError(f"--teacher_precision={form}: {teacher.name} gives values that are not finite in this form")
        top1 = float(distances.agreement(original, logits).numpy().mean(dtype=np.float64))
        kl = float(distances.kl(original, logits).numpy().mean(dtype=np.float64))
        found.append((other, PrecisionCheck(form, top1, kl, len(logits))))
    return found


def convert_teachers(
    config: Config,
    teachers: tuple[Teacher, ...],
    store: ImageStore,
    *,
    native: bool,
    jit_compile: bool,
    console: Console,
) -> tuple[Teacher, ...]:
    """Each teacher in the form that `--teacher_precision` asks for, once it has been seen to agree with the original.

    Raises:
        ConfigError: see `forms`.
        DataError: it agrees on less than `--min_teacher_agreement`; the figures are given.
    """
    chosen = []
    for position, teacher in enumerate(teachers):
        form = config.teacher_precision[min(position, len(config.teacher_precision) - 1)]
        if form == "float32":
            chosen.append(teacher)
            continue
        ((other, found),) = convert_and_compare(config, teacher, store, (form,), native=native, jit_compile=jit_compile)
        console.info(f"teacher {teacher.name}: {found}")
        if found.top1 < config.min_teacher_agreement:
            raise DataError(
                f"--teacher_precision={form}: for {teacher.name}, {found}, and --min_teacher_agreement="
                f"{config.min_teacher_agreement:g} asks for more: take a dearer form, or lower the bound if you know why"
            )
        chosen.append(other)
    return tuple(chosen)
