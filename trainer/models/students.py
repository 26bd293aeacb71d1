"""Students by name: BiT, ResNet50V2, MobileNetV3, any keras.applications model, any `.keras` file.

Each is a Keras model from float images [batch, size, size, 3] to float32 logits [batch, classes].
Batch normalisation uses the statistics of the whole global batch, for any number of replicas. With
`-gn` after its name, a keras.applications model has group normalisation with 8 groups instead
(paper, section 4.3). Dropout is removed, so that a step depends on configuration, seed and step
alone.

A new student is a row of `STUDENTS`. It must be built of plain Keras layers: the exported `.keras`
file promises to load without this package.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.core.errors import ConfigError, DataError
from trainer.io import download, files
from trainer.models import bit, bit_weights, heads, keras_files

GROUPS = 8
GROUP_NORM = "-gn"


@dataclasses.dataclass(frozen=True)
class StudentSpec:
    """What a student is built from.

    Attributes:
        name: value of `--student`.
        classes: width of the output.
        image_size: side of the images in pixels.
        seed: of the initial weights.
        root_pool: of BiT models, see `bit.bit`.
    """

    name: str
    classes: int
    image_size: int
    seed: int = 0
    root_pool: str = "zero"

    @property
    def argument(self) -> str:
        """What follows the colon of the name."""
        return self.name.partition(":")[2]


def build(
    name: str,
    classes: int,
    image_size: int,
    *,
    precision: str = "float32",
    seed: int = 0,
    initial_weights: str = "",
    root_pool: str = "zero",
) -> keras.Model:
    """Builds the student `name` with weights drawn from `seed`, or loaded.

    Args:
        name: a key of `STUDENTS`; in "app:NAME", NAME is a function of keras.applications,
            optionally followed by `-gn`; in "keras:PATH", PATH is a file, whose weights are kept.
        classes: width of the output.
        image_size: side of the images in pixels.
        precision: a Keras dtype policy; the logits are float32 under each.
        seed: of the initial weights.
        initial_weights: file of the initial weights (paper, Fig. 5): `keras:PATH` (the same
            network in a `.keras` file) or `h5:PATH` (its weights); for a `bit-ARCH` student also
            `bit:ARCH@FILE.npz` or `bit:NAME`. The file's classifier is used if it has `classes`
            outputs; otherwise the classifier is new. Empty: drawn from `seed`.
        root_pool: of BiT models, see `bit.bit`.

    Returns:
        The model. Its batch normalisations are synchronized if there are several replicas.

    Raises:
        ConfigError: unknown name (the nearest is given), a model that cannot be built at this
            size, or one that Keras cannot load without this package.
        DataError: a file that does not load, or does not fit the network or `classes`.
    """
    spec = StudentSpec(name, classes, image_size, seed, root_pool)
    keras.utils.set_random_seed(seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = _build(spec)
        if initial_weights:
            _load_initial_weights(model, spec, initial_weights)
    finally:
        keras.config.set_dtype_policy(policy)
    for layer in batch_norms(model):
        layer.synchronized = tf.distribute.get_strategy().num_replicas_in_sync > 1
    outputs = model.output_shape
    if outputs[-1] != classes or len(outputs) != 2:
        raise DataError(f"--student={name} gives outputs of shape {outputs}; the data has {classes} classes")
    # `bit.fold` replaces StdConv2D on export.
    standardized = keras.saving.get_registered_name(bit.StdConv2D)
    if custom := [item for item in keras_files.custom_classes(model) if item != standardized]:
        raise ConfigError(
            f"--student={name} uses {', '.join(custom)}, not part of Keras: its export would load only with "
            "this package; build it of plain Keras layers"
        )
    return model


def checksums(name: str, initial_weights: str) -> list[str]:
    """SHA-256 (hex) of the files that decide a student's initial weights.

    Args:
        name: value of `--student`; the file of `keras:PATH` counts.
        initial_weights: value of `--student_weights`, see `build`.

    Raises:
        ConfigError: `initial_weights` does not fit the student.
        DataError: a file cannot be read.
    """
    kind, _, path = name.partition(":")
    digests = [download.checksum(path, "student")] if kind == "keras" and path else []
    if initial_weights:
        digests.append(download.checksum(_weights_path(name, initial_weights), "student_weights"))
    return digests


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The batch normalisations of a model; `synchronized` ones use all replicas' statistics."""
    return [layer for layer in bit.flat_layers(model) if isinstance(layer, keras.layers.BatchNormalization)]


def _weights_path(name: str, initial_weights: str) -> str:
    """Path of the file in `--student_weights`."""
    kind, _, path = initial_weights.partition(":")
    if kind in ("keras", "h5") and path:
        return path
    weights = bit_weights.parse_source(path, "student_weights") if kind == "bit" else None
    if weights is None or name != f"bit-{weights.arch.lower()}":
        raise ConfigError(
            f"--student_weights={initial_weights} does not fit --student={name}: it must be keras:PATH or h5:PATH of the same "
            "network, or for a BiT bit:ARCH@FILE.npz or a published bit:NAME of the student's architecture"
        )
    return weights.path


def _load_initial_weights(model: keras.Model, spec: StudentSpec, initial_weights: str) -> None:
    path, where = _weights_path(spec.name, initial_weights), f"--student_weights={initial_weights}"
    if initial_weights.startswith("bit:"):
        arrays = bit_weights.read(path, "student_weights")
        same_classes = "head/kernel" in arrays and arrays["head/kernel"].shape[-1] == spec.classes
        bit_weights.assign(model, arrays, where, with_head=same_classes)
        return
    if initial_weights.startswith("keras:"):
        source, _ = keras_files.load_keras(path, "student_weights")
    else:
        source = _load_h5(
            model, path, "student_weights", where, lambda classes: _build(dataclasses.replace(spec, classes=classes))
        )
    _copy_weights(source, model, where)


def _head(model: keras.Model) -> keras.Layer:
    return [layer for layer in bit.flat_layers(model) if getattr(layer, "kernel", None) is not None][-1]


def _load_h5(
    model: keras.Model, path: str, role: str, where: str, rebuild: Callable[[int], keras.Model]
) -> keras.Model:
    """`model` with the weights of a file, or `rebuild(classes)` with them if the classes differ.

    Raises:
        DataError: the file is of another network.
    """
    mismatch = keras_files.load_weights(model, path, role)
    if not mismatch:
        return model
    kernel = tuple(_head(model).kernel.shape)
    shapes = keras_files.array_shapes(path, role)
    # Each kernel with the head's inputs, and a bias to go with it, may be the file's classifier.
    for classes in sorted({s[-1] for s in shapes if s[:-1] == kernel[:-1] and (s[-1],) in shapes} - {kernel[-1]}):
        rebuilt = rebuild(classes)
        if not keras_files.load_weights(rebuilt, path, role):
            return rebuilt
    raise DataError(f"{where} does not fit {model.name}: {mismatch}. Is it another network's file?")


def _copy_weights(source: keras.Model, target: keras.Model, where: str) -> None:
    """Copies all weights; those of the classifier only if both have as many classes.

    Raises:
        DataError: `source` is another network.
    """
    if source is target:
        return
    head = {id(w) for w in _head(target).weights}
    pairs = list(zip(target.weights, source.weights, strict=False))
    unequal = [(new, old) for new, old in pairs if new.shape != old.shape and id(new) not in head]
    if len(target.weights) != len(source.weights) or unequal:
        detail = ""
        if unequal:
            new, old = unequal[0]
            detail = f"; {new.path} has shape {tuple(old.shape)}, not {tuple(new.shape)}"
        raise DataError(
            f"{where} does not fit {target.name}: it has {len(source.weights)} arrays, not {len(target.weights)}{detail}. "
            "Is it another network's file?"
        )
    with_head = all(new.shape == old.shape for new, old in pairs)
    for new, old in pairs:
        if with_head or id(new) not in head:
            new.assign(keras.ops.convert_to_numpy(old))


def _bit(arch: str, spec: StudentSpec) -> keras.Model:
    return bit.bit(arch, spec.classes, spec.image_size, seed=spec.seed, root_pool=spec.root_pool, name="student")


def _keras_file(spec: StudentSpec) -> keras.Model:
    model, ends_in = keras_files.load_keras(spec.argument, "student")
    height, width = model.input_shape[1:3]
    if {height, width} - {None, spec.image_size}:
        advice = f"give --image_size={height}" if height == width else "they must be square"
        raise DataError(
            f"--student={spec.name} takes images of {height} x {width} pixels, but --image_size is {spec.image_size}: {advice}"
        )
    if not ends_in:
        return model
    if (bare := heads.logits(model)) is None:
        raise DataError(
            f"--student={spec.name} returns a mean of probabilities; a student must return logits, or end in one {ends_in}"
        )
    return bare


def application_names() -> list[str]:
    """The models of keras.applications."""
    members = inspect.getmembers(keras.applications, inspect.isfunction)
    return sorted(name for name, function in members if "classes" in inspect.signature(function).parameters)


def _application_function(name: str, flag: str) -> Callable[..., keras.Model]:
    names = application_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean app:{near[0]}? " if near else ""
        raise ConfigError(f"--{flag}: keras.applications has no {name}; {hint}It has {', '.join(names)}")
    return getattr(keras.applications, name)


def _call_application(
    function: Callable[..., keras.Model], classes: int, size: int, flag: str, **options: Any
) -> keras.Model:
    arguments = {
        "weights": None,
        "classes": classes,
        "classifier_activation": None,
        "input_shape": (size, size, 3),
    } | options
    parameters = inspect.signature(function).parameters
    try:
        return function(**{key: value for key, value in arguments.items() if key in parameters})
    except ValueError as error:
        raise ConfigError(f"--{flag} cannot be built at {size} x {size} pixels: {files.reason(error)}") from error


def _application(application: str, group_norm: bool, spec: StudentSpec) -> keras.Model:
    # Without preprocessing, no model rescales its inputs from [0, 255].
    flag = f"student={spec.name}"
    function = _application_function(application, flag)
    model = _call_application(function, spec.classes, spec.image_size, flag, include_preprocessing=False)

    def replace(layer: keras.Operation) -> keras.Operation:
        settings = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization) and group_norm:
            return _group_norm(layer, spec.name)
        if "rate" in settings and isinstance(layer, (keras.layers.Dropout, keras.layers.SpatialDropout2D)):
            settings["rate"] = 0.0
        return type(layer).from_config(settings)

    def call(layer: keras.Operation, *inputs: Any, **options: Any) -> Any:
        if isinstance(layer, keras.layers.GroupNormalization):
            options.pop("mask", None)  # an argument of batch normalisation only
        return layer(*inputs, **options)

    return keras.models.clone_model(model, clone_function=replace, call_function=call, recursive=True)


def _named_application(spec: StudentSpec) -> keras.Model:
    return _application(spec.argument.removesuffix(GROUP_NORM), spec.argument.endswith(GROUP_NORM), spec)


def _group_norm(layer: keras.layers.BatchNormalization, name: str) -> keras.layers.GroupNormalization:
    channels = layer.gamma.shape[0] if layer.scale else layer.moving_mean.shape[0]
    if channels % GROUPS:
        raise ConfigError(
            f"--student={name}: {layer.name} has {channels} channels, which {GROUPS} groups do not divide"
        )
    return keras.layers.GroupNormalization(
        GROUPS,
        epsilon=bit.GROUP_EPSILON,
        center=layer.center,
        scale=layer.scale,
        name=layer.name,
        dtype=layer.dtype_policy,
    )


_APPLICATIONS = {
    "resnet50v2": "ResNet50V2",
    "mobilenetv3-large": "MobileNetV3Large",
    "mobilenetv3-small": "MobileNetV3Small",
}

# Builders by the value of --student; a key with a colon stands for all names with its beginning.
STUDENTS: dict[str, Callable[[StudentSpec], keras.Model]] = {
    **{f"bit-{arch.lower()}": functools.partial(_bit, arch) for arch in bit.ARCHS},
    **{name: functools.partial(_application, function, False) for name, function in _APPLICATIONS.items()},
    **{
        f"{name}{GROUP_NORM}": functools.partial(_application, function, True)
        for name, function in _APPLICATIONS.items()
    },
    "app:NAME": _named_application,
    "keras:PATH": _keras_file,
}


def _build(spec: StudentSpec) -> keras.Model:
    kind, colon, argument = spec.name.partition(":")
    key = spec.name if not colon else next((key for key in STUDENTS if argument and key.startswith(f"{kind}:")), "")
    if key not in STUDENTS:
        near = difflib.get_close_matches(spec.name, STUDENTS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--student={spec.name} is unknown: {hint}It must be one of {', '.join(STUDENTS)}")
    return STUDENTS[key](spec)


class ApplicationPreprocessing(keras.layers.Layer):
    """The preprocessing of a keras.applications model for pixels from 0 to 255, as a layer."""

    def __init__(self, application: str, **options: Any) -> None:
        super().__init__(**options)
        self.application = application

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Float [n, height, width, 3] in [0, 255] -> the range that the model was trained on."""
        return sys.modules[getattr(keras.applications, self.application).__module__].preprocess_input(inputs)

    def get_config(self) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return super().get_config() | {"application": self.application}


def application_teacher(name: str, path: str, classes: int, size: int, flag: str) -> keras.Model:
    """A model of keras.applications with the weights of a file: images in [0, 255] -> logits.

    Args:
        name: of the function.
        path: `.weights.h5` or `.h5`, with the classifier; on a disk, gs:// or https://.
        classes: of the data.
        size: side of the images in pixels.
        flag: the flag and its value, for errors.

    Returns:
        A model with the classes of the file, which may not be those of the data.

    Raises:
        ConfigError: there is no such model, or none of this size.
        DataError: the file does not exist, or is of another network.
    """
    function = _application_function(name, flag)
    model = _call_application(function, classes, size, flag)
    loaded = _load_h5(model, path, "teacher", f"--{flag}", lambda count: _call_application(function, count, size, flag))
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, loaded(ApplicationPreprocessing(name)(inputs)), name=name)
