"""Models and weights from Keras files. `.keras` files are checked first and load in safe mode."""

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
from trainer.io import files
from trainer.io.download import local_copy
from trainer.models import bit  # noqa: F401  registers StdConv2D

_EXPANSION = 20  # uncompressed bytes of a `.keras` file, as a multiple of its size


def load_keras(path: str, role: str) -> tuple[keras.Model, bool]:
    """Loads a `.keras` file without its training state, and refuses code inside it (Lambda).

    Args:
        path: on a disk, gs:// or https://.
        role: the flag whose file it is, for errors.

    Returns:
        The model, and whether its last layer is a softmax.

    Raises:
        DataError: the file does not exist, is not of Keras 3, is unsafe, or is not an image
            classifier.
    """
    local = os.path.abspath(local_copy(path, role))
    if reason := _refusal(local):
        raise DataError(f"--{role}=keras:{path} is refused: {reason}; nothing in it was run")
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "model.keras")  # Keras chooses the format by the file's name
        os.symlink(local, link)
        try:
            model = keras.saving.load_model(link, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises nearly every type for a damaged or foreign file
            raise DataError(f"--{role}=keras:{path} does not load as a Keras 3 model: {files.reason(error)}") from error
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not isinstance(shapes[0], tuple) or len(shapes[0]) != 4 or shapes[0][-1] != 3 or len(shapes[1] or ()) != 2:
        raise DataError(
            f"--{role}=keras:{path} is not a classifier of RGB images: it takes {shapes[0]} and returns {shapes[1]}; "
            "it must take (batch, height, width, 3) and return (batch, classes)"
        )
    return model, _ends_in_softmax(model)


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
    local = os.path.abspath(local_copy(path, role))
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
        with h5py.File(local_copy(path, role), "r") as file:
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                if file[name].dtype.kind in "fiu":
                    yield file[name]
    except OSError:
        return


def _last(model: keras.Model) -> keras.Layer | None:
    return model.layers[-1] if getattr(model, "layers", None) else None


def _ends_in_softmax(model: keras.Model) -> bool:
    last = _last(model)
    if isinstance(last, keras.Model):
        return _ends_in_softmax(last)
    return isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax


def strip_softmax(model: keras.Model) -> keras.Model:
    """The model without its last softmax, if it has one that can be removed."""
    last = _last(model)
    if isinstance(last, keras.Model):
        inner = strip_softmax(last)
        return model if inner is last else keras.Sequential([*model.layers[:-1], inner])
    if last is not None and getattr(last, "activation", None) is keras.activations.softmax:
        last.activation = keras.activations.linear
        return model
    if isinstance(last, keras.layers.Softmax):
        return keras.Model(model.inputs, last.input)
    return model
