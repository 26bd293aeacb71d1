"""Models from files: `.keras`, in safe mode, with what their last layer returns."""

from __future__ import annotations

import hashlib
import os
import tempfile
from typing import Any

import keras

from trainer import files
from trainer.errors import DataError
from trainer.models import bit  # noqa: F401  registers the layers that our own .keras files hold


def load_keras(path: str, role: str) -> tuple[keras.Model, bool]:
    """Loads a `.keras` file from a disk or gs://, without its training state, refusing code inside it (Lambda).

    Returns:
        The model, and whether its last layer is a softmax.

    Raises:
        DataError: not there, not a Keras 3 file, unsafe, or not an image classifier; `role` says whose file it is.
    """
    local, remove = path, None
    if not files.exists(path):
        raise DataError(f"--{role}=keras:{path}: there is no such file")
    try:
        if files.is_remote(path) or not path.endswith(".keras"):
            handle, local = tempfile.mkstemp(suffix=".keras")
            remove = local
            with os.fdopen(handle, "wb") as file:
                file.write(files.read(path, f"the {role}"))
        try:
            model = keras.saving.load_model(local, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises nearly every type for a damaged or foreign file
            raise DataError(f"--{role}=keras:{path} does not load as a Keras 3 model: {files.reason(error)}") from error
    finally:
        if remove:
            os.unlink(remove)
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not isinstance(shapes[0], tuple) or len(shapes[0]) != 4 or shapes[0][-1] != 3 or len(shapes[1] or ()) != 2:
        raise DataError(
            f"--{role}=keras:{path} is no classifier of RGB images: it takes {shapes[0]} and returns {shapes[1]}; "
            "it must take (batch, height, width, 3) and return (batch, classes)"
        )
    return model, _ends_in_softmax(model)


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


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) of a file, on a disk or gs://.

    Raises:
        DataError: it cannot be read.
    """
    if not files.exists(path):
        raise DataError(f"--{role}=keras:{path}: there is no such file")
    return hashlib.sha256(files.read(path, f"the {role}")).hexdigest()
