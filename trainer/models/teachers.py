"""Teachers: frozen functions from views to float32 logits, loaded from files of several kinds.

A teacher is loaded before training and checked against the data set's classes. Its weight
standardisation is applied once (`bit.fold`). It is never trained and not part of a checkpoint.
A new kind of teacher is a row of `KINDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError
from trainer.io import download, kaggle
from trainer.models import (
    bit,
    bit_weights,
    heads,
    keras_files,
    saved_model_to_bit,
    saved_models,
    students,
    value_range,
)
from trainer.models.saved_models import SavedClassifier
from trainer.models.value_range import NONE, Evidence, to_range

_T = TypeVar("_T")
SUM_TOLERANCE = 1e-2  # of a softmax; one in bfloat16 sums to 1 within 4e-3


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen classifier.

    Attributes:
        name: value of `--teacher`.
        model: images in `value_range` [n, size, size, 3] -> logits or probabilities [n, classes].
        size: side of the images in pixels.
        value_range: "-1,1", "0,1" or "0,255".
        probabilities: `model` returns probabilities, because its softmax could not be removed.
        sigmoid: `model` returns independent probabilities, because its sigmoid could not be
            removed.
        evidence: what `value_range` is based on. With the strength "none" nothing is known, and
            `run.teacher_check` finds the range.
        outputs: what is known about the outputs, a clause; empty: they were judged by their values
            on noise, and `run.teacher_check` judges them on images.
        view: how the teacher's own accuracy is measured, of `views.TEACHER_VIEWS`.
        precision: of `model`: "float32", "bfloat16" or "int8", see `trainer.models.quantize`.
        notes: messages for the user about how it was loaded, a line each.
        warnings: the same, where the user may not want what was done.
    """

    name: str
    model: keras.Model | SavedClassifier
    size: int
    value_range: str
    probabilities: bool
    sigmoid: bool = False
    evidence: Evidence = NONE
    outputs: str = ""
    view: str = "central"
    precision: str = "float32"
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Width of the output."""
        return int(self.model.output_shape[-1])

    def logits(self, views: tf.Tensor) -> tf.Tensor:
        """Float32 [n, size, size, 3] in [-1, 1] -> float32 logits [n, classes]."""
        outputs = tf.cast(self.model(to_range(views, self.value_range), training=False), tf.float32)
        if self.probabilities:
            # softmax(log p / T) = softmax(z / T): the logarithm is the logits up to a constant.
            outputs = tf.math.log(tf.maximum(outputs, 1e-30))
        elif self.sigmoid:
            # The inverse of the sigmoid. A float32 sigmoid is exactly 1 from logits of 17 on.
            outputs = tf.clip_by_value(outputs, 1e-30, 1.0 - 6e-8)
            outputs = tf.math.log(outputs) - tf.math.log1p(-outputs)
        return tf.stop_gradient(outputs)


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """What a teacher is loaded from.

    Attributes:
        name: value of `--teacher`.
        argument: what follows the kind's colon; a path on this machine if `name` is of Kaggle.
        classes: of the data; 0: it names none, so any number will do.
        size: `--teacher_image_size` in pixels; 0: not given.
        value_range: `--teacher_range`, "auto" included.
        output: `--teacher_output`: the name or number of the output; "": the only one.
        config: of the job.
        as_version_0_1: read its outputs as that version did, for a run that it began.
    """

    name: str
    argument: str
    classes: int
    size: int
    value_range: str
    output: str
    config: Config
    as_version_0_1: bool = False


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A teacher's model as its file gives it.

    Attributes:
        model: images -> logits or probabilities.
        size: side of its images in pixels; 0: that of `model`'s input.
        value_range: of its images; "auto": not known, see `evidence`.
        ends_in: "softmax", "log_softmax", "sigmoid" or "" (unknown), see `heads.ending`; or
            "probabilities", if they are known to be that.
        returns_logits: it is known to return logits, whatever `--teacher_outputs` says.
        evidence: of the value range, where the kind of teacher decides it.
        notes: see `Teacher`.
        warnings: see `Teacher`.
    """

    model: keras.Model | SavedClassifier
    size: int
    value_range: str
    ends_in: str = ""
    returns_logits: bool = False
    evidence: Evidence = NONE
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _load_keras(spec: TeacherSpec) -> LoadedModel:
    model, ends_in = keras_files.load_keras(spec.argument, "teacher", spec.output)
    one = heads.logits(model) if ends_in == "sigmoid" else model
    if model.output_shape[-1] != 1 or one is None:
        return LoadedModel(model, spec.size, spec.value_range, ends_in)
    if spec.classes not in (0, 2):
        raise DataError(
            f"--teacher={spec.name} has one output, which is for two classes; --data={spec.config.held_out} has {spec.classes}"
        )
    if not ends_in and spec.config.teacher_outputs in ("probabilities", "sigmoid"):
        notes = (f"{spec.name}: its one output p is the probability of the second class; that of the first is 1 - p",)
        return LoadedModel(heads.two_probabilities(model), spec.size, spec.value_range, "probabilities", notes=notes)
    what = "is the sigmoid of a logit" if ends_in else "is taken as a logit"
    notes = (f"{spec.name}: its one output {what}, of the second class against the first: two logits, 0 and z",)
    # Without an ending that is known, `run.teacher_check` looks whether z may be a probability.
    known = bool(ends_in) or spec.as_version_0_1
    return LoadedModel(heads.two_logits(one), spec.size, spec.value_range, returns_logits=known, notes=notes)


def _load_saved_model(spec: TeacherSpec) -> LoadedModel:
    converted = saved_model_to_bit.convert(spec.argument, "teacher", spec.value_range, spec.output)
    if isinstance(converted, saved_model_to_bit.ConvertedBit):
        notes = (f"{spec.name}: {converted.note}",)
        known = Evidence("-1,1", "certain", "it is a converted BiT")
        return LoadedModel(converted.model, spec.size, "-1,1", returns_logits=True, evidence=known, notes=notes)
    warnings = (f"{spec.name} runs as it was saved, not as a Keras BiT: {converted}",) if converted else ()
    model = SavedClassifier(spec.argument, "teacher", spec.output)
    if model.output_shape[-1] == 1 and spec.classes != 1:
        raise DataError(
            f"--teacher={spec.name} has one output, and does not say whether it is a logit or its sigmoid: give the "
            "Keras file, or export the model with an output for each class"
        )
    return LoadedModel(model, spec.size, spec.value_range, warnings=warnings)


def _load_bit(spec: TeacherSpec) -> LoadedModel:
    name, text = spec.name, spec.argument
    if spec.value_range not in ("auto", "-1,1"):
        raise ConfigError(f"--teacher_range={spec.value_range}: {name} takes -1,1, as every BiT npz does")
    if (published := bit_weights.PUBLISHED.get(text)) and spec.classes not in (0, published.classes):
        raise DataError(
            f"--teacher={name} has {published.classes:,} classes; --data={spec.config.held_out} has {spec.classes:,}"
        )
    size = spec.size or bit_weights.parse_source(text, "teacher").size or spec.config.image_size
    known = Evidence("-1,1", "certain", "it is a BiT")
    model = bit_weights.load(text, "teacher", size, spec.config.root_pool)
    return LoadedModel(model, size, "-1,1", returns_logits=True, evidence=known)


def _load_application(spec: TeacherSpec) -> LoadedModel:
    application, _, path = spec.argument.partition("@")
    if not path:
        raise ConfigError(_unknown(spec.name))
    if spec.value_range not in ("auto", "0,255"):
        raise ConfigError(
            f"--teacher_range={spec.value_range}: {spec.name} takes pixels from 0 to 255 and turns them into its network's range "
            "itself; give 0,255 or auto"
        )
    size = spec.size or spec.config.image_size
    # The number of classes is the file's in any case.
    model = students.application_teacher(application, path, spec.classes or 1000, size, f"teacher={spec.name}")
    known = Evidence("0,255", "certain", "its preprocessing is inside")
    return LoadedModel(model, size, "0,255", evidence=known)


def _load_random(spec: TeacherSpec) -> LoadedModel:
    if not spec.classes:
        raise DataError(
            f"--teacher={spec.name} has no classes of its own, and neither has --data={spec.config.held_out}: "
            "give a teacher from a file, or prepare the data with --classes=FILE"
        )
    size = spec.size or spec.config.image_size
    model = students.build(spec.argument, spec.classes, size, seed=spec.config.seed)
    known = Evidence("-1,1", "certain", "it is untrained")
    return LoadedModel(model, spec.size, spec.value_range, evidence=known)


def _load_kaggle(spec: TeacherSpec) -> LoadedModel:
    kind, argument = kaggle.fetch(spec.argument, "teacher", Console())
    return KINDS[kind].load(dataclasses.replace(spec, argument=argument))


def _bit_checksum(text: str, _: Config) -> str:
    source = bit_weights.parse_source(text, "teacher")
    # The size of a published name decides the teacher's logits, as the file's bytes do.
    return download.checksum(source.path, "teacher") + (f", {source.size} px" if source.size else "")


def _application_checksum(text: str, _: Config) -> str:
    application, _at, path = text.partition("@")
    if not path:
        raise ConfigError(_unknown(f"app:{text}"))
    return f"{download.checksum(path, 'teacher')}, {application}"


def _kaggle_checksum(text: str, config: Config) -> str:
    kind, argument = kaggle.fetch(text, "teacher", Console())
    return KINDS[kind].checksum(argument, config)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of teacher.

    Attributes:
        usage: of `--teacher`, for errors.
        load: loads the model.
        checksum: identifies the model in a run's identity, from what follows the kind's colon: the
            SHA-256 (hex) of its file, and what else decides its logits.
        has_outputs: the model may have several outputs.
    """

    usage: str
    load: Callable[[TeacherSpec], LoadedModel]
    checksum: Callable[[str, Config], str]
    has_outputs: bool = False


KINDS: dict[str, Kind] = {
    "keras": Kind("keras:PATH", _load_keras, lambda path, _: keras_files.checksum(path, "teacher"), True),
    "saved_model": Kind(
        "saved_model:PATH", _load_saved_model, lambda path, _: saved_models.checksum(path, "teacher"), True
    ),
    "app": Kind("app:NAME@WEIGHTS.h5", _load_application, _application_checksum),
    "bit": Kind("bit:ARCH@FILE.npz, bit:NAME (published)", _load_bit, _bit_checksum),
    "kaggle": Kind("kaggle:OWNER/DATASET", _load_kaggle, _kaggle_checksum, True),
    "random": Kind("random:NAME", _load_random, lambda name, config: f"random:{name}, seed {config.seed}"),
}


def _unknown(name: str) -> str:
    *usages, last = (kind.usage for kind in KINDS.values())
    return f"--teacher={name}: it must be {', '.join(usages)} or {last}"


def _parse(name: str) -> tuple[Kind, str]:
    kind, _, argument = name.partition(":")
    if kind not in KINDS or not argument:
        raise ConfigError(_unknown(name))
    return KINDS[kind], argument


def load(config: Config, classes: int, *, as_version_0_1: bool = False) -> tuple[Teacher, ...]:
    """Loads every `--teacher`.

    Args:
        config: of the job.
        classes: of the data; 0: it names none, and the teachers decide.
        as_version_0_1: see `TeacherSpec`.

    Raises:
        ConfigError: unknown kind, or sizes that contradict the model.
        DataError: a file does not load, or its classes are not `classes` or those of the first.
    """
    teachers = []
    for position, name in enumerate(config.teacher):
        pinned = of_teacher(config.teacher_sha256, position, "")
        if pinned and (digest := checksum(config, name).split(",")[0]) != pinned.lower():
            raise DataError(f"--teacher={name} has SHA-256 {digest}, not the pinned {pinned} (--teacher_sha256)")
        kind, argument = _parse(name)
        size = of_teacher(config.teacher_image_size, position, 0)
        value_range = of_teacher(config.teacher_range, position, "auto")
        output = of_teacher(config.teacher_output, position, "")
        if output and not kind.has_outputs:
            raise ConfigError(f"--teacher_output={output}: {name} has one output")
        spec = TeacherSpec(name, argument, classes, size, value_range, output, config, as_version_0_1)
        teachers.append(_teacher(spec, kind.load(spec)))
        if teachers[-1].classes != teachers[0].classes:
            raise DataError(
                f"--teacher={name} has {teachers[-1].classes} classes and --teacher={config.teacher[0]} has "
                f"{teachers[0].classes}: teachers of one student must have the same classes in the same order"
            )
    return tuple(teachers)


def of_teacher(values: tuple[_T, ...], position: int, default: _T) -> _T:
    """The value of a flag for one teacher: a single value is for all of them.

    Args:
        values: of the flag, which may be given once, or once for each teacher.
        position: of the teacher in `--teacher`.
        default: if the flag has no value.
    """
    return values[min(position, len(values) - 1)] if values else default


def checksum(config: Config, name: str) -> str:
    """Identifies the teacher `name`: the SHA-256 of its file, or how its weights are drawn.

    Raises:
        ConfigError: unknown kind.
        DataError: the file does not exist.
    """
    kind, argument = _parse(name)
    return kind.checksum(argument, config)


def _teacher(spec: TeacherSpec, loaded: LoadedModel) -> Teacher:
    """Checks a loaded model against the flags and the data, and freezes it."""
    name, config, model = spec.name, spec.config, loaded.model
    evidence = loaded.evidence if loaded.evidence.strength == "certain" else value_range.inspect(model)
    if spec.value_range != "auto" and evidence.strength != "certain":
        differs = evidence.value_range not in ("", spec.value_range)
        other = f"{evidence.value_range} ({evidence.reason})" if differs else ""
        reason = f"--teacher_range; {evidence.reason}".removesuffix("; ")
        evidence = Evidence(spec.value_range, "flag", reason, other)
    range_ = loaded.value_range if loaded.value_range != "auto" else evidence.value_range or "-1,1"
    if spec.classes and model.output_shape[-1] != spec.classes:
        raise DataError(
            f"--teacher={name} has {model.output_shape[-1]} classes; --data={config.held_out} has {spec.classes}: "
            "the teacher's head must have the classes of the data"
        )
    if not spec.classes and model.output_shape[-1] < 2:
        raise DataError(
            f"--teacher={name} has one output, and a classifier needs two: give the network with its classes"
        )
    height, width = model.input_shape[1:3]
    if height != width:
        raise DataError(f"--teacher={name} takes images of {height} x {width} pixels; they must be square")
    if loaded.size and height and loaded.size != height:
        raise ConfigError(f"--teacher_image_size={loaded.size}, but {name} takes {height} x {height} pixels")
    size = loaded.size or height or config.image_size
    model, outputs = _find_outputs(spec, loaded, size, range_)
    warnings = loaded.warnings
    if loaded.ends_in == "sigmoid" and not spec.as_version_0_1:
        warnings += (
            f"{name} ends in a sigmoid, a probability of each class on its own; the student learns the softmax of the "
            "same logits, in which the classes exclude each other",
        )
    if isinstance(model, keras.Model):
        if bit.is_functional(model) and any(isinstance(layer, bit.StdConv2D) for layer in bit.flat_layers(model)):
            model = bit.fold(model)
        model.trainable = False
    return Teacher(name, model, size, range_, **outputs, evidence=evidence, notes=loaded.notes, warnings=warnings)


def _find_outputs(
    spec: TeacherSpec, loaded: LoadedModel, size: int, range_: str
) -> tuple[keras.Model | SavedClassifier, dict[str, Any]]:
    """The model without its softmax if that can be removed, and fields of its `Teacher`."""
    flag, model, ending = spec.config.teacher_outputs, loaded.model, loaded.ends_in
    if loaded.returns_logits:
        return model, {"probabilities": False, "outputs": "logits"}
    if ending == "probabilities":
        return model, {"probabilities": True, "outputs": "probabilities (--teacher_outputs)"}
    kinds = {"softmax": "probabilities", "log_softmax": "logarithms of probabilities", "sigmoid": "sigmoids"}
    read = ending == "softmax" if spec.as_version_0_1 else ending and (ending, flag) != ("sigmoid", "logits")
    if read and flag not in ("probabilities", "sigmoid"):
        bare = heads.logits(model) if isinstance(model, keras.Model) else None
        if bare is not None:
            return bare, {"probabilities": False, "outputs": f"{kinds[ending]} ({ending} removed)"}
        return model, {
            "probabilities": ending == "softmax",
            "sigmoid": ending == "sigmoid",
            "outputs": f"{kinds[ending]} (its {ending} cannot be removed)",
        }
    if flag != "auto":
        return model, {
            "probabilities": flag == "probabilities",
            "sigmoid": flag == "sigmoid",
            "outputs": f"{flag} (--teacher_outputs)",
        }
    return model, {"probabilities": _look_like_probabilities(model, size, range_)}


def outputs_of_values(outputs: np.ndarray) -> str:
    """What a model seems to return, by its outputs float32 [n, classes].

    Returns:
        "probabilities": none is negative, and each row sums to 1 within 1 %, as a softmax in
        bfloat16 or float16 does, or to 100 or 255, as one in percent or 8 bits; "sigmoid": all are
        from 0 to 1, and sums differ from 1; else "logits".
    """
    if not np.isfinite(outputs).all() or (outputs < 0).any():
        return "logits"
    for total in (100.0, 255.0):  # a factor only adds a constant to the logarithms
        if np.allclose(outputs.sum(axis=1, dtype=np.float64), total, rtol=SUM_TOLERANCE):
            return "probabilities"
    if (outputs > 1 + SUM_TOLERANCE).any():
        return "logits"
    if np.allclose(outputs.sum(axis=1, dtype=np.float64), 1.0, rtol=0, atol=SUM_TOLERANCE):
        return "probabilities"
    # Logits that all lie between 0 and 1 say little about an image.
    return "sigmoid" if (outputs <= 1).all() and np.ptp(outputs) > 0 else "logits"


def _look_like_probabilities(model: keras.Model | SavedClassifier, size: int, range_: str) -> bool:
    """Whether outputs on noise are non-negative and sum to one."""
    low, high = (float(bound) for bound in range_.split(","))
    noise = np.random.Generator(np.random.Philox(0)).uniform(low, high, (4, size, size, 3)).astype(np.float32)
    # In a replica: a SavedModel that was loaded under a strategy can be called nowhere else.
    strategy = tf.distribute.get_strategy()
    run = tf.function(lambda images: strategy.run(lambda part: model(part, training=False), (images,)), autograph=False)
    outputs = strategy.experimental_local_results(run(tf.constant(noise)))[0].numpy().astype(np.float32)
    return outputs_of_values(outputs) == "probabilities"


def print_notes(teachers: Iterable[Teacher], console: Console) -> None:
    """Prints the notes and warnings of loaded teachers."""
    for teacher in teachers:
        for note in teacher.notes:
            console.info(note)
        for warning in teacher.warnings:
            console.warning(warning)


def teacher_logits(teachers: tuple[Teacher, ...], views: dict[int, tf.Tensor]) -> list[tf.Tensor]:
    """Each teacher's float32 logits [n, classes].

    Args:
        teachers: at least one.
        views: float32 [n, size, size, 3] in [-1, 1], by size.
    """
    return [teacher.logits(views[teacher.size]) for teacher in teachers]


def ensemble(logits: list[tf.Tensor], mode: str, temperature: float = 1.0) -> tf.Tensor:
    """Combines the logits of several teachers.

    Args:
        logits: float32 [n, classes] of each teacher.
        mode: "mean_logits" (paper, section 3.6) or "mean_probabilities" at `temperature`. The
            latter too for "sum_losses", which has no single teacher: the sum of the KLs is the KL
            to this one, up to a factor and a constant.
        temperature: > 0.

    Returns:
        Float32 logits [n, classes], to be divided by `temperature` before the softmax.
    """
    if len(logits) == 1:
        return logits[0]
    if mode == "mean_logits":
        return tf.add_n(logits) / float(len(logits))
    parts = tf.stack([tf.nn.log_softmax(z / temperature) for z in logits])
    return temperature * (tf.reduce_logsumexp(parts, axis=0) - tf.math.log(float(len(logits))))
