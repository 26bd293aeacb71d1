"""Teachers in lower precision, and their agreement with float32 on training views."""

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
from trainer.models import bit, quantize
from trainer.models.teachers import Teacher
from trainer.models.value_range import to_range

IMAGES = 512  # views compared: one batch of the paper's, so that one image is 0.2 %
CALIBRATION_IMAGES = 256  # views for the int8 scales; not among those compared
_BATCH = 64  # views in one pass: bounds memory, and is fixed so that it does not affect results


@dataclasses.dataclass(frozen=True)
class PrecisionCheck:
    """A teacher in lower precision against the float32 original.

    Attributes:
        precision: "bfloat16" or "int8".
        top1: share of views with the same most likely class, in [0, 1].
        kl: mean of KL(original || lower precision) in nats at T = 1.
        images: number of views.
    """

    precision: str
    top1: float
    kl: float
    images: int

    def __str__(self) -> str:
        return (
            f"{self.precision} gives the float32 class on {self.top1:.2%} of {self.images} training views, "
            f"KL {self.kl:.2e} nats"
        )


def training_views(config: Config, store: ImageStore, size: int, images: int, first: int) -> list[np.ndarray]:
    """A teacher's inputs in training, a function of the seed.

    Args:
        config: resolved.
        store: the training split.
        size: side of the teacher's views in pixels.
        images: number of views, rounded up to whole batches.
        first: number of the first batch in the order of examples.

    Returns:
        Batches float32 [_BATCH, size, size, 3] in [-1, 1].
    """
    config = dataclasses.replace(config, batch_size=_BATCH)
    sampler = ExampleSampler(config.seed, len(store), _BATCH)
    fixed = views.mode(config).fixed
    batch_rows = views.BatchRows.of(0, 1, _BATCH, "" if fixed else views.mixup_partner(config))

    @tf.function
    def make(images: tf.Tensor, sizes: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        if fixed:
            return views.fixed_view(config, images, sizes, ids, step, size)
        return views.training_views(config, images, sizes, batch_rows, step, (size,)).teachers[size]

    batches = []
    for step in range(first, first + -(-images // _BATCH)):
        ids = sampler.batches(step, 1)[0][batch_rows.rows.numpy()]
        batch = make(tf.constant(store.take(ids)), tf.constant(store.sizes[ids]), ids, tf.constant(step))
        batches.append(batch.numpy())
    return batches


def convert_and_compare(
    config: Config,
    teacher: Teacher,
    store: ImageStore,
    precisions: tuple[str, ...],
    *,
    native: bool,
    jit_compile: bool,
) -> list[tuple[Teacher, PrecisionCheck]]:
    """Converts a teacher and compares each result with it. To be called under the strategy's scope.

    Args:
        config: resolved.
        teacher: in float32.
        store: the training split.
        precisions: of "bfloat16" and "int8".
        native: use the accelerator's int8 convolutions (`quantize.convolve`).
        jit_compile: let XLA compile.

    Returns:
        For each precision the converted teacher and its comparison.

    Raises:
        ConfigError: the teacher is a program and not a graph of layers, or too small to convert.
        DataError: the converted teacher gives values that are not finite.
    """
    if not precisions:
        return []
    if not bit.is_functional(teacher.model):
        raise ConfigError(
            f"--teacher_precision={precisions[0]}: {teacher.name} is a program whose layers cannot be exchanged; "
            "use float32, or give the network as keras: or bit:"
        )
    calibration = CALIBRATION_IMAGES // _BATCH
    batches = training_views(config, store, teacher.size, IMAGES, calibration)

    def logits_of(model: Teacher) -> np.ndarray:
        forward = quantize.replicated(model.logits, jit_compile=jit_compile)
        return np.concatenate([forward(batch) for batch in batches])

    original, results = logits_of(teacher), []
    for precision in precisions:
        try:
            if precision == "int8":
                seen = training_views(config, store, teacher.size, CALIBRATION_IMAGES, 0)
                inputs = [to_range(tf.constant(batch), teacher.value_range) for batch in seen]
                model = quantize.int8(teacher.model, inputs, native=native)
            else:
                model = quantize.bfloat16(teacher.model)
        except (ConfigError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"--teacher_precision={precision}: {teacher.name} cannot be converted: {error}"
            ) from error
        converted = dataclasses.replace(teacher, model=model, precision=precision)
        logits = logits_of(converted)
        if not np.isfinite(logits).all():
            raise DataError(
                f"--teacher_precision={precision}: {teacher.name} gives values that are not finite in this precision"
            )
        top1 = float(distances.agreement(original, logits).numpy().mean(dtype=np.float64))
        kl = float(distances.kl(original, logits).numpy().mean(dtype=np.float64))
        results.append((converted, PrecisionCheck(precision, top1, kl, len(logits))))
    return results


def convert_teachers(
    config: Config,
    teachers: tuple[Teacher, ...],
    store: ImageStore,
    *,
    native: bool,
    jit_compile: bool,
    console: Console,
) -> tuple[Teacher, ...]:
    """Each teacher in the precision of `--teacher_precision`, once it agrees with the original.

    Args:
        config: resolved.
        teachers: in float32.
        store: the training split.
        native: use the accelerator's int8 convolutions (`quantize.convolve`).
        jit_compile: let XLA compile.
        console: gets a line for each converted teacher.

    Raises:
        ConfigError: see `convert_and_compare`.
        DataError: the agreement of a teacher is below `--min_teacher_agreement`.
    """
    result = []
    for position, teacher in enumerate(teachers):
        precision = config.teacher_precision[min(position, len(config.teacher_precision) - 1)]
        if precision == "float32":
            result.append(teacher)
            continue
        ((converted, check),) = convert_and_compare(
            config, teacher, store, (precision,), native=native, jit_compile=jit_compile
        )
        console.info(f"teacher {teacher.name}: {check}")
        if check.top1 < config.min_teacher_agreement:
            raise DataError(
                f"--teacher_precision={precision}: for {teacher.name}, {check}, and --min_teacher_agreement="
                f"{config.min_teacher_agreement:g} is not reached: use a higher precision, or lower the bound"
            )
        result.append(converted)
    return tuple(result)
