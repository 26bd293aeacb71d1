"""Every kind of teacher as one frozen function from our views to float32 logits.

A teacher is data: loaded before anything else, checked against the data set's classes, made cheap once (weight
standardisation folded in), never trained and never part of a checkpoint.
"""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError
from trainer.io import download, kaggle
from trainer.models import bit, bit_weights, keras_files, saved_model_to_bit, saved_models, students
from trainer.models.saved_models import SavedClassifier
from trainer.models.value_range import to_range

_UNKNOWN = (
    "--teacher={}: it must be keras:PATH, saved_model:PATH, app:NAME@WEIGHTS.h5, bit:ARCH@FILE.npz, bit:NAME (published), "
    "kaggle:OWNER/DATASET or random:NAME"
)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen classifier.

    Attributes:
        name: the flag's value.
        model: from images to classes; its own value range and outputs.
        size: side of the images that it takes, in pixels.
        value_range: "-1,1", "0,1" or "0,255".
        probabilities: it returns probabilities that could not be turned back into logits inside.
        precision: the form that `model` is in, see `trainer.models.quantize`.
        notes: what loading found that its user should know, a line each.
    """

    name: str
    model: keras.Model | SavedClassifier
    size: int
    value_range: str
    probabilities: bool
    precision: str = "float32"
    notes: tuple[str, ...] = ()

    def logits(self, views: tf.Tensor) -> tf.Tensor:
        """Float32 [n, size, size, 3] in [-1, 1] -> float32 logits [n, classes]."""
        outputs = tf.cast(self.model(to_range(views, self.value_range), training=False), tf.float32)
        if self.probabilities:
            # softmax(log p / T) = softmax(z / T): a logarithm gives logits back up to a constant.
            outputs = tf.math.log(tf.maximum(outputs, 1e-30))
        return tf.stop_gradient(outputs)


def load(config: Config, classes: int) -> tuple[Teacher, ...]:
    """Loads every `--teacher`.

    Raises:
        ConfigError: unknown kind, or sizes that contradict the model.
        DataError: a file that does not load, or whose head does not fit the data set.
    """
    teachers = []
    for position, name in enumerate(config.teacher):
        pinned = config.teacher_sha256[min(position, len(config.teacher_sha256) - 1)] if config.teacher_sha256 else ""
        if pinned and (found := checksum(config, name).split(",")[0]) != pinned.lower():
            raise DataError(f"--teacher={name} has SHA-256 {found}, not the pinned {pinned} (--teacher_sha256)")
        sizes, ranges = config.teacher_image_size, config.teacher_range
        size = sizes[min(position, len(sizes) - 1)] if sizes else 0
        value_range = ranges[min(position, len(ranges) - 1)]
        teachers.append(_load(config, name, size, value_range, classes))
    return tuple(teachers)


def checksum(config: Config, name: str) -> str:
    """What identifies the teacher `name` in a run's fingerprint: the SHA-256 of its file, or how it was drawn.

    Raises:
        ConfigError: unknown kind.
        DataError: the file is not there.
    """
    kind, rest = _resolve(name)
    if kind == "random" and rest:
        return f"{name}, seed {config.seed}"
    if kind == "keras" and rest:
        return download.checksum(rest, "teacher")
    if kind == "saved_model" and rest:
        return saved_models.checksum(rest, "teacher")
    if kind == "app" and "@" in rest:
        return f"{download.checksum(rest.partition('@')[2], 'teacher')}, {rest.partition('@')[0]}"
    if kind == "bit" and rest:
        chosen = bit_weights.source(rest, "teacher")
        # The size that a published name brings along decides what the teacher says, as its bytes do.
        return download.checksum(chosen.path, "teacher") + (f", {chosen.size} px" if chosen.size else "")
    raise ConfigError(_UNKNOWN.format(name))


def _resolve(name: str) -> tuple[str, str]:
    """Kind and place of a teacher, on this machine if it comes from Kaggle."""
    kind, _, rest = name.partition(":")
    return kaggle.fetch(rest, "teacher", Console()) if kind == "kaggle" and rest else (kind, rest)


def _load(config: Config, name: str, size: int, value_range: str, classes: int) -> Teacher:
    kind, rest = _resolve(name)
    softmax = native = False
    notes: list[str] = []
    model: keras.Model | SavedClassifier
    if kind == "keras" and rest:
        model, softmax = keras_files.load_keras(rest, "teacher")
    elif kind == "saved_model" and rest:
        converted = saved_model_to_bit.convert(rest, "teacher", value_range)
        if isinstance(converted, saved_model_to_bit.Native):
            model, native, value_range = converted.model, True, "-1,1"
            notes.append(f"{name}: {converted.note}")
        else:
            model = SavedClassifier(rest, "teacher")
            if converted:
                notes.append(f"warning: {name} is called as it was saved, and not made our own BiT: {converted}")
    elif kind == "bit" and rest:
        if value_range not in ("auto", "-1,1"):
            raise ConfigError(f"--teacher_range={value_range}: {name} takes -1,1, as every BiT npz does")
        if (known := bit_weights.PUBLISHED.get(rest)) and known.classes != classes:
            raise DataError(
                f"--teacher={name} knows {known.classes:,} classes; --data={config.held_out} has {classes:,}"
            )
        size = size or bit_weights.source(rest, "teacher").size or config.image_size
        model = bit_weights.load(rest, "teacher", size, config.root_pool)
    elif kind == "app" and "@" in rest:
        if value_range not in ("auto", "0,255"):
            raise ConfigError(
                f"--teacher_range={value_range}: {name} takes pixels from 0 to 255 and turns them into its network's range "
                "itself; give 0,255 or auto"
            )
        value_range, size = "0,255", size or config.image_size
        application, _, path = rest.partition("@")
        model = students.application_teacher(application, path, classes, size, f"teacher={name}")
    elif kind == "random" and rest:
        model = students.build(rest, classes, size or config.image_size, seed=config.seed)
    else:
        raise ConfigError(_UNKNOWN.format(name))
    value_range = "-1,1" if value_range == "auto" else value_range
    if model.output_shape[-1] != classes:
        raise DataError(
            f"--teacher={name} knows {model.output_shape[-1]} classes; --data={config.held_out} has {classes}: "
            "the head of the teacher must be the data set's"
        )
    height, width = model.input_shape[1:3]
    if height != width:
        raise DataError(f"--teacher={name} takes images of {height} x {width} pixels; only squares are made")
    if size and height and size != height:
        raise ConfigError(f"--teacher_image_size={size}, but {name} takes {height} x {height} pixels")
    size = size or height or config.image_size
    if native:
        softmax = False  # ours ends in logits, whatever the SavedModel does
    elif config.teacher_outputs != "probabilities" and softmax:
        model, softmax = keras_files.strip_softmax(model), False
    elif config.teacher_outputs == "auto":
        softmax = _look_like_probabilities(model, size, value_range)
    else:
        softmax = config.teacher_outputs == "probabilities"
    if isinstance(model, keras.Model):
        if bit.is_plain(model) and any(isinstance(layer, bit.StdConv2D) for layer in bit.leaves(model)):
            model = bit.fold(model)
        model.trainable = False
    return Teacher(name, model, size, value_range, softmax, notes=tuple(notes))


def _look_like_probabilities(model: keras.Model | SavedClassifier, size: int, value_range: str) -> bool:
    """Whether outputs on noise are non-negative and sum to one."""
    low, high = (float(bound) for bound in value_range.split(","))
    noise = np.random.Generator(np.random.Philox(0)).uniform(low, high, (4, size, size, 3)).astype(np.float32)
    # In a replica: a SavedModel loaded under a strategy can be called nowhere else.
    strategy = tf.distribute.get_strategy()
    run = tf.function(lambda images: strategy.run(lambda part: model(part, training=False), (images,)), autograph=False)
    outputs = strategy.experimental_local_results(run(tf.constant(noise)))[0].numpy().astype(np.float32)
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3))


def teacher_logits(teachers: tuple[Teacher, ...], views: dict[int, tf.Tensor]) -> list[tf.Tensor]:
    """Each teacher's float32 logits [n, classes] for views keyed by their size."""
    return [teacher.logits(views[teacher.size]) for teacher in teachers]


def ensemble(logits: list[tf.Tensor], how: str, temperature: float = 1.0) -> tf.Tensor:
    """Several teachers as one: float32 logits [n, classes] to be divided by `temperature` before their softmax.

    Args:
        logits: one [n, classes] a teacher.
        how: "mean_logits" (paper, section 3.6), or "mean_probabilities" at this temperature. For "sum_losses", which has no
            teacher of its own, the latter: the sum of the KLs differs from KL to it by a factor and a constant.
        temperature: > 0.
    """
    if len(logits) == 1:
        return logits[0]
    if how == "mean_logits":
        return tf.add_n(logits) / float(len(logits))
    parts = tf.stack([tf.nn.log_softmax(z / temperature) for z in logits])
    return temperature * (tf.reduce_logsumexp(parts, axis=0) - tf.math.log(float(len(logits))))
