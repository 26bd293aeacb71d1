"""Students, by name: BiT of any size, ResNet50V2, MobileNetV3, any keras.applications model, any `.keras` file.

Every one is a Keras model from float images [batch, size, size, 3] in [-1, 1] to float32 logits [batch, classes].
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import keras

from trainer import files
from trainer.errors import ConfigError, DataError
from trainer.models import bit, loading, weights

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
            (a function of keras.applications) or `keras:PATH` (a file, with its weights).
        classes: width of the output.
        image_size: side of the images in pixels.
        precision: a Keras dtype policy; the logits are float32 under each.
        seed: of the initial weights.
        start: `bit:ARCH@FILE.npz` or `bit:NAME`, weights to start a `bit-ARCH` student from (paper, Fig. 5); the classifier is new,
            unless the file's has as many classes.
        root_pool: of BiT models, see `bit.bit`.

    Raises:
        ConfigError: unknown name (the nearest is given), or a model that cannot be built at this size.
        DataError: a `.keras` file that does not load or does not fit `classes`.
    """
    keras.utils.set_random_seed(seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = _build(name, classes, image_size, seed, root_pool)
    finally:
        keras.config.set_dtype_policy(policy)
    if start:
        _start_from(model, name, start, classes)
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
    found = [loading.checksum(rest, "student")] if kind == "keras" and rest else []
    if start:
        found.append(loading.checksum(_start(name, start).path, "student_weights"))
    return found


def _start(name: str, start: str) -> weights.Source:
    kind, _, rest = start.partition(":")
    chosen = weights.source(rest, "student_weights") if kind == "bit" else None
    if chosen is None or name != f"bit-{chosen.arch.lower()}":
        raise ConfigError(
            f"--student_weights={start} does not start --student={name}: it must be bit:ARCH@FILE.npz or a published bit:NAME "
            "of the student's architecture"
        )
    return chosen


def _start_from(model: keras.Model, name: str, start: str, classes: int) -> None:
    chosen = _start(name, start)
    arrays = weights.read(chosen.path, "student_weights")
    same = "head/kernel" in arrays and arrays["head/kernel"].shape[-1] == classes
    weights.fill(model, arrays, f"--student_weights={start}", keep_head=same)


def _build(name: str, classes: int, size: int, seed: int, root_pool: str) -> keras.Model:
    kind, _, rest = name.partition(":")
    if kind == "keras" and rest:
        model, probabilities = loading.load_keras(rest, "student")
        if probabilities:
            model = loading.strip_softmax(model)
        return model
    archs = {f"bit-{arch.lower()}": arch for arch in bit.ARCHS}
    if name in archs:
        return bit.bit(archs[name], classes, size, seed=seed, root_pool=root_pool, name="student")
    if name in _SHORT:
        return _application(_SHORT[name], classes, size, name)
    if kind == "app" and rest:
        return _application(rest, classes, size, name)
    known = [*archs, *_SHORT, "app:NAME", "keras:PATH"]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"--student={name} is unknown: {hint}It must be one of {', '.join(known)}")


def application_names() -> list[str]:
    """The models of keras.applications."""
    members = inspect.getmembers(keras.applications, inspect.isfunction)
    return sorted(name for name, function in members if "classes" in inspect.signature(function).parameters)


def _application(name: str, classes: int, size: int, flag: str) -> keras.Model:
    names = application_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean app:{near[0]}? " if near else ""
        raise ConfigError(f"--student={flag}: keras.applications has no {name}; {hint}It has {', '.join(names)}")
    function = getattr(keras.applications, name)
    arguments: dict[str, Any] = {
        "weights": None,
        "classes": classes,
        "classifier_activation": None,
        "input_shape": (size, size, 3),
    }
    offered = inspect.signature(function).parameters
    # Models that rescale their input inside expect 0..255; without that part they take what they were built on.
    if "include_preprocessing" in offered:
        arguments["include_preprocessing"] = False
    try:
        return function(**{k: v for k, v in arguments.items() if k in offered})
    except ValueError as error:
        raise ConfigError(
            f"--student={flag} cannot be built at {size} x {size} pixels: {files.reason(error)}"
        ) from error
