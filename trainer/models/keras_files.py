"""Models from files: brought to this machine, checked, and `.keras` ones loaded in safe mode."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from trainer.core.errors import DataError
from trainer.io import files
from trainer.io.download import local_copy
from trainer.models import bit  # noqa: F401  registers the layers that our own .keras files hold


def load_keras(path: str, role: str) -> tuple[keras.Model, bool]:
    """Loads a `.keras` file from a disk or gs://, without its training state, refusing code inside it (Lambda).

    Returns:
        The model, and whether its last layer is a softmax.

    Raises:
        DataError: not there, not a Keras 3 file, unsafe, or not an image classifier; `role` says whose file it is.
    """
    found = os.path.abspath(local_copy(path, role))
    if trouble := _unsafe(found):
        raise DataError(f"--{role}=keras:{path} is refused: {trouble}; nothing in it was run")
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "model.keras")  # Keras goes by the name
        os.symlink(found, link)
        try:
            model = keras.saving.load_model(link, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises nearly every type for a damaged or foreign file
            raise DataError(f"--{role}=keras:{path} does not load as a Keras 3 model: {files.reason(error)}") from error
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not isinstance(shapes[0], tuple) or len(shapes[0]) != 4 or shapes[0][-1] != 3 or len(shapes[1] or ()) != 2:
        raise DataError(
            f"--{role}=keras:{path} is no classifier of RGB images: it takes {shapes[0]} and returns {shapes[1]}; "
            "it must take (batch, height, width, 3) and return (batch, classes)"
        )
    return model, _ends_in_softmax(model)


def _unsafe(path: str) -> str:
    """Why a `.keras` file (a zip) is not given to Keras; empty if it may be, or is no zip, which Keras says better."""
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
            return f"its member {name!r} would lie outside of it"
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"its member {name!r} is a link or a device"
        total += member.file_size
    if len({member.filename for member in members}) < len(members):
        return "it has two members of one name"
    size = os.path.getsize(path)
    # Weights hardly compress, and a model that is all zeros is no teacher. Small files may be mostly JSON, which does.
    if total > max(_EXPANSION * size, 1 << 26):
        return f"its {size:,} bytes claim to hold {total:,}"
    return ""


_EXPANSION = 20


def load_weights(model: keras.Model, path: str, role: str) -> str:
    """Fills a model from a file of weights (`.weights.h5` of Keras 3, `.h5` of older ones), on a disk, gs:// or https://.

    Returns:
        Why it does not fit; empty if it does.

    Raises:
        DataError: the file is not there.
    """
    found = os.path.abspath(local_copy(path, role))
    with tempfile.TemporaryDirectory() as folder:
        # Keras goes by the name.
        link = os.path.join(folder, "w.weights.h5" if path.split("?")[0].endswith(".weights.h5") else "w.h5")
        os.symlink(found, link)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of what it leaves out, where we refuse
                model.load_weights(link)
        except Exception as error:  # Keras and h5py raise nearly every type for a foreign file
            return files.reason(error)
    held = {_digest(item[()]) for item in _arrays(path, role)}
    if new := [w.path for w in model.weights if _digest(keras.ops.convert_to_numpy(w)) not in held]:
        return f"it has nothing for {len(new)} of {len(model.weights)} arrays, the first: {new[0]}"
    return ""


def array_shapes(path: str, role: str) -> list[tuple[int, ...]]:
    """Shapes of all arrays in an HDF5 file; none if it is not one."""
    return [item.shape for item in _arrays(path, role)]


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array, np.float32).tobytes()).digest()


def _arrays(path: str, role: str) -> Iterator[Any]:
    """The arrays of an HDF5 file, one open at a time."""
    import h5py

    try:
        with h5py.File(local_copy(path, role), "r") as file:
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                if file[name].dtype.kind in "fiu":
                    yield file[name]
    except OSError:
        return


def _last(model: keras.Model) -> Any:
    return model.layers[-1] if getattr(model, "layers", None) else None


def _ends_in_softmax(model: keras.Model) -> bool:
    last = _last(model)
    if isinstance(last, keras.Model):
        return _ends_in_softmax(last)
    return isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax


def strip_softmax(model: keras.Model) -> keras.Model:
    """The model without its last softmax: exact logits instead of logarithms of rounded probabilities."""
    last = _last(model)
    if isinstance(last, keras.Model):
        inner = strip_softmax(last)
        return model if inner is last else keras.Sequential([*model.layers[:-1], inner])
    if getattr(last, "activation", None) is keras.activations.softmax:
        last.activation = keras.activations.linear
        return model
    if isinstance(last, keras.layers.Softmax):
        return keras.Model(model.inputs, last.input)
    return model
