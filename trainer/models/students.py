"""Students, by name: BiT of any size, ResNet50V2, MobileNetV3, any keras.applications model, any `.keras` file.

Every one is a Keras model from float images [batch, size, size, 3] in [-1, 1] to float32 logits [batch, classes].
Batch normalisation sees the whole global batch, whatever the number of replicas; with `-gn` after the name of a
keras.applications model there is group normalisation with 8 groups in its place (paper, section 4.3). Dropout and dropped
paths are taken out: what a step does depends on nothing but configuration, seed and step.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.core.errors import ConfigError, DataError
from trainer.io import download, files
from trainer.models import bit, bit_weights, keras_files

GROUPS = 8
GROUP_NORM = "-gn"

_SHORT = {
    "resnet50v2": "ResNet50V2",
    "mobilenetv3-large": "MobileNetV3Large",
    "mobilenetv3-small": "MobileNetV3Small",
}


def build(
    name: str,
    classes: int,
    image_size: int,
    *,
    precision: str = "float32",
    seed: int = 0,
    start: str = "",
    root_pool: str = "zero",
) -> keras.Model:
    """Builds the student `name`, new, with weights drawn from `seed`.

    Args:
        name: `bit-ARCH` (bit-tiny, bit-small, bit-r50x1, ...), resnet50v2, mobilenetv3-large, mobilenetv3-small, `app:NAME`
            (a function of keras.applications), each of these but BiT also with `-gn`, or `keras:PATH` (a file, with its weights).
        classes: width of the output.
        image_size: side of the images in pixels.
        precision: a Keras dtype policy; the logits are float32 under each.
        seed: of the initial weights.
        start: weights to start from (paper, Fig. 5); the classifier is new, unless the file's has as many classes. For a `bit-ARCH`
            student `bit:ARCH@FILE.npz` or `bit:NAME`; for any other too `keras:PATH` (the same network in a `.keras` file) or
            `h5:PATH` (its weights).
        root_pool: of BiT models, see `bit.bit`.

    Raises:
        ConfigError: unknown name (the nearest is given), or a model that cannot be built at this size.
        DataError: a file that does not load, or does not fit the network or `classes`.
    """
    keras.utils.set_random_seed(seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = _build(name, classes, image_size, seed, root_pool)
        if start:
            _start_from(model, name, start, classes, lambda other: _build(name, other, image_size, seed, root_pool))
    finally:
        keras.config.set_dtype_policy(policy)
    for layer in batch_norms(model):
        layer.synchronized = tf.distribute.get_strategy().num_replicas_in_sync > 1
    outputs = model.output_shape
    if outputs[-1] != classes or len(outputs) != 2:
        raise DataError(f"--student={name} gives outputs of shape {outputs}; the data has {classes} classes")
    return model


def checksums(name: str, start: str) -> list[str]:
    """SHA-256 of the files that decide a student's first weights: that of `keras:PATH`, and that of `start` (see `build`).

    Raises:
        ConfigError: `start` does not fit the student.
        DataError: a file cannot be read.
    """
    kind, _, rest = name.partition(":")
    found = [download.checksum(rest, "student")] if kind == "keras" and rest else []
    if start:
        found.append(download.checksum(_start(name, start), "student_weights"))
    return found


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The batch normalisations of a model; `synchronized` says whether they need all replicas to meet."""
    return [layer for layer in bit.leaves(model) if isinstance(layer, keras.layers.BatchNormalization)]


def _start(name: str, start: str) -> str:
    """The file that `start` names."""
    kind, _, rest = start.partition(":")
    if kind in ("keras", "h5") and rest:
        return rest
    chosen = bit_weights.source(rest, "student_weights") if kind == "bit" else None
    if chosen is None or name != f"bit-{chosen.arch.lower()}":
        raise ConfigError(
            f"--student_weights={start} does not start --student={name}: it must be keras:PATH or h5:PATH of the same network, or "
            "for a BiT bit:ARCH@FILE.npz or a published bit:NAME of the student's architecture"
        )
    return chosen.path


def _start_from(model: keras.Model, name: str, start: str, classes: int, rebuild: Callable[[int], keras.Model]) -> None:
    path, where = _start(name, start), f"--student_weights={start}"
    if start.startswith("bit:"):
        arrays = bit_weights.read(path, "student_weights")
        same = "head/kernel" in arrays and arrays["head/kernel"].shape[-1] == classes
        bit_weights.fill(model, arrays, where, keep_head=same)
        return
    if start.startswith("keras:"):
        other, _ = keras_files.load_keras(path, "student_weights")
    else:
        other = _from_h5(model, path, "student_weights", where, rebuild)
    _take_over(model, other, where)


def _head(model: keras.Model) -> keras.layers.Layer:
    return [layer for layer in bit.leaves(model) if getattr(layer, "kernel", None) is not None][-1]


def _from_h5(
    model: keras.Model, path: str, role: str, where: str, rebuild: Callable[[int], keras.Model]
) -> keras.Model:
    """`model` filled from a file of weights; or, if that was made for other classes, the network with as many, filled.

    Raises:
        DataError: the file is of another network.
    """
    why = keras_files.load_weights(model, path, role)
    if not why:
        return model
    kernel = tuple(_head(model).kernel.shape)
    shapes = keras_files.array_shapes(path, role)
    for count in sorted({s[-1] for s in shapes if s[:-1] == kernel[:-1] and (s[-1],) in shapes} - {kernel[-1]}):
        other = rebuild(count)
        if not keras_files.load_weights(other, path, role):
            return other
    raise DataError(f"{where} does not fit {model.name}: {why}. Is it another network's file?")


def _take_over(model: keras.Model, other: keras.Model, where: str) -> None:
    """Copies all weights; those of the classifier only if it has as many classes.

    Raises:
        DataError: it is another network.
    """
    if other is model:
        return
    head = {id(w) for w in _head(model).weights}
    pairs = list(zip(model.weights, other.weights, strict=False))
    odd = [(mine, theirs) for mine, theirs in pairs if mine.shape != theirs.shape and id(mine) not in head]
    if len(model.weights) != len(other.weights) or odd:
        first = f"{odd[0][0].path} has shape {tuple(odd[0][1].shape)}, not {tuple(odd[0][0].shape)}" if odd else ""
        raise DataError(
            f"{where} does not fit {model.name}: it has {len(other.weights)} arrays for {len(model.weights)}"
            f"{'; ' + first if first else ''}. Is it another network's file?"
        )
    same = all(mine.shape == theirs.shape for mine, theirs in pairs)
    for mine, theirs in pairs:
        if same or id(mine) not in head:
            mine.assign(keras.ops.convert_to_numpy(theirs))


def _build(name: str, classes: int, size: int, seed: int, root_pool: str) -> keras.Model:
    kind, _, rest = name.partition(":")
    if kind == "keras" and rest:
        model, probabilities = keras_files.load_keras(rest, "student")
        if probabilities:
            model = keras_files.strip_softmax(model)
        return model
    archs = {f"bit-{arch.lower()}": arch for arch in bit.ARCHS}
    if name in archs:
        return bit.bit(archs[name], classes, size, seed=seed, root_pool=root_pool, name="student")
    plain = name.removesuffix(GROUP_NORM)
    if plain in _SHORT:
        return _application(_SHORT[plain], classes, size, name)
    if kind == "app" and rest:
        return _application(rest.removesuffix(GROUP_NORM), classes, size, name)
    known = [*archs, *_SHORT, *(f"{short}{GROUP_NORM}" for short in _SHORT), "app:NAME", "keras:PATH"]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"--student={name} is unknown: {hint}It must be one of {', '.join(known)}")


def application_names() -> list[str]:
    """The models of keras.applications."""
    members = inspect.getmembers(keras.applications, inspect.isfunction)
    return sorted(name for name, function in members if "classes" in inspect.signature(function).parameters)


def _function(name: str, flag: str) -> Callable[..., keras.Model]:
    names = application_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean app:{near[0]}? " if near else ""
        raise ConfigError(f"--{flag}: keras.applications has no {name}; {hint}It has {', '.join(names)}")
    return getattr(keras.applications, name)


def _call(function: Callable[..., keras.Model], classes: int, size: int, flag: str, **more: Any) -> keras.Model:
    arguments = {
        "weights": None,
        "classes": classes,
        "classifier_activation": None,
        "input_shape": (size, size, 3),
    } | more
    offered = inspect.signature(function).parameters
    try:
        return function(**{k: v for k, v in arguments.items() if k in offered})
    except ValueError as error:
        raise ConfigError(f"--{flag} cannot be built at {size} x {size} pixels: {files.reason(error)}") from error


def _application(name: str, classes: int, size: int, flag: str) -> keras.Model:
    # Models that rescale their input inside expect 0..255; without that part they take what they were built on.
    where = f"student={flag}"
    model = _call(_function(name, where), classes, size, where, include_preprocessing=False)

    def exchanged(layer: Any) -> Any:
        settings = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization) and flag.endswith(GROUP_NORM):
            return _group_norm(layer, flag)
        if "rate" in settings and isinstance(layer, (keras.layers.Dropout, keras.layers.SpatialDropout2D)):
            settings["rate"] = 0.0
        return type(layer).from_config(settings)

    def called(layer: Any, *inputs: Any, **options: Any) -> Any:
        if isinstance(layer, keras.layers.GroupNormalization):
            options.pop("mask", None)  # which batch normalisation takes and it does not
        return layer(*inputs, **options)

    return keras.models.clone_model(model, clone_function=exchanged, call_function=called, recursive=True)


def _group_norm(layer: keras.layers.BatchNormalization, flag: str) -> keras.layers.GroupNormalization:
    channels = layer.gamma.shape[0] if layer.scale else layer.moving_mean.shape[0]
    if channels % GROUPS:
        raise ConfigError(
            f"--student={flag}: {layer.name} has {channels} channels, which {GROUPS} groups do not divide"
        )
    return keras.layers.GroupNormalization(
        GROUPS,
        epsilon=bit.GROUP_EPSILON,
        center=layer.center,
        scale=layer.scale,
        name=layer.name,
        dtype=layer.dtype_policy,
    )


class _Preprocess(keras.layers.Layer):
    """What a keras.applications model's own module does to pixels from 0 to 255."""

    def __init__(self, application: str, **options: Any) -> None:
        super().__init__(**options)
        self.application = application

    def call(self, inputs: Any) -> Any:
        return sys.modules[getattr(keras.applications, self.application).__module__].preprocess_input(inputs)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"application": self.application}


def application_teacher(name: str, path: str, classes: int, size: int, flag: str) -> keras.Model:
    """A model of keras.applications with the weights of a file: images in [0, 255] -> logits.

    Args:
        name: of the function.
        path: `.weights.h5` or `.h5`, with the classifier; on a disk, gs:// or https://.
        classes: of the data.
        size: side of the images in pixels.
        flag: the flag and its value, for errors.

    Raises:
        ConfigError: there is no such model, or none of this size.
        DataError: the file is not there, of another network or of other classes.
    """
    function = _function(name, flag)
    model = _call(function, classes, size, flag)
    other = _from_h5(model, path, "teacher", f"--{flag}", lambda count: _call(function, count, size, flag))
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, other(_Preprocess(name)(inputs)), name=name)
