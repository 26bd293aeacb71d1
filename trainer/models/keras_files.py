"""Models and weights from Keras files. Whole models are checked first and load in safe mode."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras
import numpy as np

from trainer.core.errors import DataError
from trainer.io import download, files
from trainer.models import (
    bit,  # noqa: F401  registers StdConv2D
    file_kinds,
    heads,
    keras_config,
)

_EXPANSION = 20  # uncompressed bytes of a `.keras` file, as a multiple of its size


def load_keras(path: str, role: str, output: str = "") -> tuple[keras.Model, str]:
    """Loads a `.keras` or whole-model `.h5` file without its training state.

    Code inside it (Lambda) is refused.

    Args:
        path: on a disk, gs:// or https://.
        role: the flag whose file it is, for errors.
        output: name or number of the output to take; empty: the only one.

    Returns:
        The model [n, height, width, 3] -> [n, classes], and how it ends, see `heads.ending`.

    Raises:
        DataError: the file does not exist, is not a model that Keras 3 loads, is unsafe, or is not
            an image classifier.
    """
    where = f"--{role}=keras:{path}"
    local = os.path.abspath(_local(path, role))
    try:
        foreign = file_kinds.foreign(local)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {files.reason(error)}") from error
    if foreign:
        raise DataError(f"{where} is not a model that Keras 3 loads: {foreign}")
    model = _load(local, where)
    model = _classifier(model, where, role, output)
    return model, heads.ending(model)


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) of a file that `load_keras` may take.

    Raises:
        DataError: it cannot be read, or is a folder.
    """
    _local(path, role)
    return download.checksum(path, role)


def _local(path: str, role: str) -> str:
    """`download.local_copy` of a file.

    Raises:
        DataError: it cannot be read, or is a folder; the message names what is in that.
    """
    if not files.is_remote(path) and os.path.isdir(path):
        raise DataError(f"--{role}=keras:{path}: {file_kinds.foreign(path)}")
    return download.local_copy(path, role)


def _load(local: str, where: str) -> keras.Model:
    """The model in a file on this machine.

    Raises:
        DataError: it is unsafe, or does not load.
    """
    legacy = not zipfile.is_zipfile(local)
    if reason := "" if legacy else _refusal(local):
        raise DataError(f"{where} is refused: {reason}; nothing in it was run")
    config = keras_config.config(local)
    if legacy and (program := keras_config.programs(config)):
        raise DataError(f"{where} does not load: {program}")
    version = file_kinds.keras_version(local)
    with tempfile.TemporaryDirectory() as folder:
        # Keras chooses the format by the file's name.
        link = os.path.join(folder, "model.h5" if legacy else "model.keras")
        if keras_config.compiled_inside(config):
            keras_config.copy_without_losses(local, link)
        else:
            os.symlink(local, link)
        known = keras_config.known(version)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = keras.saving.load_model(link, custom_objects=known, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises nearly every type for a damaged or foreign file
            reason = keras_config.programs(config) or keras_config.unknown(config)
            if not reason:
                other = (
                    f" (saved by Keras {version}, read by {keras.__version__})" if version != keras.__version__ else ""
                )
                reason = files.reason(error).replace(link, "the file") + other
            raise DataError(f"{where} does not load as a Keras 3 model: {reason}") from error
    if not isinstance(model, keras.Model):
        raise DataError(f"{where} holds a {type(model).__name__}, which is not a model")
    return model


def _classifier(model: keras.Model, where: str, role: str, output: str) -> keras.Model:
    """The model from one batch of RGB images to one output [n, classes].

    Raises:
        DataError: it takes or returns something else, or has several outputs and none is chosen.
    """
    inputs = getattr(model, "inputs", None) or []
    outputs = heads.outputs(model)
    if not inputs or not outputs:
        what = "call the model on a batch of images before it is saved"
        if not isinstance(model, keras.Sequential):
            what = "its class computes them; save it with model.export('teacher') and give saved_model:teacher"
        raise DataError(f"{where} has no fixed inputs and outputs: {what}")
    if len(inputs) > 1:
        listed = ", ".join(f"{x.name} {_shape(x.shape)}" for x in inputs)
        raise DataError(f"{where} has {len(inputs)} inputs ({listed}); it must take images alone")
    shape = tuple(inputs[0].shape)
    if reason := _input_problem(shape):
        raise DataError(f"{where} takes {_shape(shape)}, {reason}")
    number = _choose(outputs, where, role, output)
    tensor = outputs[number][1]
    # A list or a dictionary of one tensor would be returned as such.
    plain = not isinstance(model, keras.src.models.Functional) or isinstance(model.output, keras.KerasTensor)
    if not plain or not isinstance(getattr(model, "input", inputs[0]), keras.KerasTensor):
        model = heads.select(model, tensor)
    if shape[0] is not None:
        model = heads.open_batch(model)
    if len(tensor.shape) != 2 or tensor.shape[-1] is None:
        raise DataError(
            f"{where} returns {_shape(tensor.shape)}; a classifier returns (batch, classes): {_remedy(tensor.shape)}"
        )
    return model


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('batch' if i == 0 else 'any' if side is None else str(side) for i, side in enumerate(shape))})"


def _remedy(shape: tuple[int | None, ...]) -> str:
    """What to do with outputs of this shape, which are not (batch, classes)."""
    if len(shape) == 1:
        return "save the model without its last argmax or reshape"
    layer = "Flatten" if None not in shape[1:] and sum(side != 1 for side in shape[1:]) <= 1 else "GlobalAveragePooling"
    layer = f"{layer}{len(shape) - 2}D" if layer != "Flatten" else layer
    return f"for one answer for each image, keras.Sequential([model, keras.layers.{layer}()]).save('x.keras')"


def _input_problem(shape: tuple[int | None, ...]) -> str:
    """Why a model with this input shape takes no RGB images, and what to do; empty if it does."""
    if len(shape) != 4:
        return "not images: it must take (batch, height, width, 3)"
    if shape[-1] == 3:
        return ""
    if shape[1] == 3:
        height, width = shape[2:]
        return (
            "channels before height and width; put them last: keras.Sequential([keras.Input("
            f"({height}, {width}, 3)), keras.layers.Permute((3, 1, 2)), model]).save('x.keras')"
        )
    if shape[-1] == 1:
        height, width = shape[1:3]
        return (
            "images of 1 channel (grey); here they have 3 (RGB). Put the mean in front: keras.Sequential([keras.Input("
            f"({height}, {width}, 3)), keras.layers.Conv2D(1, 1, kernel_initializer=keras.initializers.Constant(1 / 3)), "
            "model]).save('x.keras')"
        )
    return f"images of {shape[-1]} channels; here they have 3 (RGB): put layers in front that make the others of them"


def _choose(outputs: list[tuple[str, Any]], where: str, role: str, output: str) -> int:
    """Index of the output with this name or number, or of the only one.

    Raises:
        DataError: there is no such output, or there are several and none is named.
    """
    names = [name for name, _ in outputs]
    listed = ", ".join(f"{i}: {name} {_shape(tensor.shape)}" for i, (name, tensor) in enumerate(outputs))
    if not output:
        if len(outputs) == 1:
            return 0
        choice = f"choose one by name or number with --{role}_output" if role == "teacher" else "it must have one"
        raise DataError(f"{where} has {len(outputs)} outputs ({listed}): {choice}")
    if names.count(output) == 1:
        return names.index(output)
    if output.isdecimal() and int(output) < len(outputs):
        return int(output)
    how_many = "several outputs" if output in names else "no output"
    raise DataError(f"--{role}_output={output}: {where} has {how_many} of that name; it has {listed}")


def _refusal(path: str) -> str:
    """Why a `.keras` file (a zip) must not be given to Keras; empty if it may be.

    Also empty for a file that is not a zip: Keras reports that itself.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile):
        return ""
    total = 0
    for member in members:
        name = member.orig_filename
        if (
            name.startswith(("/", "\\"))
            or "\0" in name
            or ".." in name.replace("\\", "/").split("/")
            or name[1:2] == ":"
        ):
            return f"its member {name!r} would be written outside of its folder"
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"its member {name!r} is a link or a device"
        total += member.file_size
    if len({member.filename for member in members}) < len(members):
        return "two of its members have the same name"
    size = os.path.getsize(path)
    # Weights hardly compress. Small files may be mostly JSON, which does.
    if total > max(_EXPANSION * size, 1 << 26):
        return f"its {size:,} bytes claim to hold {total:,}"
    return ""


def custom_classes(model: keras.Model) -> list[str]:
    """Registered names of a model's classes and functions that are not part of Keras.

    The model's `.keras` file loads only where they can be imported.
    """
    names: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            name, module = value.get("class_name"), value.get("module") or "keras"
            # Custom ones are registered as "package>name"; if not registered, their module differs.
            registered = str(value.get("config" if name == "function" else "registered_name") or name)
            if ">" in registered or module.split(".")[0] not in ("keras", "builtins") or name == "__lambda__":
                names.add(registered)
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(keras.saving.serialize_keras_object(model))
    return sorted(names)


def load_weights(model: keras.Model, path: str, role: str) -> str:
    """Loads a file of weights into a model.

    Args:
        model: as many of its arrays as fit are overwritten, even if the file does not fit.
        path: `.weights.h5` of Keras 3 or `.h5` of older versions; on a disk, gs:// or https://.
        role: the flag whose file it is, for errors.

    Returns:
        Why the file does not fit the model; empty if it does.

    Raises:
        DataError: the file does not exist.
    """
    local = os.path.abspath(download.local_copy(path, role))
    with tempfile.TemporaryDirectory() as folder:
        # Keras chooses the format by the file's name.
        link = os.path.join(folder, "w.weights.h5" if path.split("?")[0].endswith(".weights.h5") else "w.h5")
        os.symlink(local, link)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # arrays that Keras skips are found below
                model.load_weights(link)
        except Exception as error:  # Keras and h5py raise nearly every type for a foreign file
            return files.reason(error)
    digests = {_digest(item[()]) for item in _arrays(path, role)}
    if missing := [w.path for w in model.weights if _digest(keras.ops.convert_to_numpy(w)) not in digests]:
        return f"it has nothing for {len(missing)} of {len(model.weights)} arrays, the first: {missing[0]}"
    return ""


def array_shapes(path: str, role: str) -> list[tuple[int, ...]]:
    """Shapes of all arrays in an HDF5 file; none if the file is not HDF5."""
    return [item.shape for item in _arrays(path, role)]


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array, np.float32).tobytes()).digest()


def _arrays(path: str, role: str) -> Iterator[h5py.Dataset]:
    """The numeric arrays of an HDF5 file, one after the other."""
    try:
        with h5py.File(download.local_copy(path, role), "r") as file:
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                if file[name].dtype.kind in "fiu":
                    yield file[name]
    except OSError:
        return
