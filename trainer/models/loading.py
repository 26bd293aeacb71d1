"""Models from files: brought to this machine, checked, and `.keras` ones loaded in safe mode."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

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
    found = os.path.abspath(local(path, role))
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
    found = os.path.abspath(local(path, role))
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
        with h5py.File(local(path, role), "r") as file:
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


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) of a file, wherever it lies.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(local(path, role), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"--{role}: cannot read {path}: {files.reason(error)}") from error


def local(path: str, role: str) -> str:
    """A path on this machine's disk with the content of `path`: itself, or a copy in the cache, which is made once.

    Args:
        path: on a disk, gs:// or https://. A copy is known by its address and by what the server says of its version.
        role: the flag whose file it is, for errors.

    Raises:
        DataError: it is not there or cannot be brought here whole.
    """
    if path.startswith("http://"):
        raise DataError(f"--{role}: {path} comes over an open line that anybody can change; use https:// or gs://")
    if not path.startswith("https://") and not files.exists(path):
        raise DataError(f"--{role}={path}: there is no such file")
    if not files.is_remote(path):
        return path
    part = ""
    try:
        key = hashlib.sha256(f"{path} {_version(path)}".encode()).hexdigest()[:16]
        kept = os.path.join(files.cache_folder(), f"{key}-{urllib.parse.urlparse(path).path.rsplit('/', 1)[-1][-80:]}")
        if os.path.exists(kept):
            return kept
        part = f"{kept}.{uuid.uuid4().hex[:8]}.part"
        with open(part, "wb") as target:
            _copy(path, role, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, kept)
    except (OSError, tf.errors.OpError) as error:  # URLError is an OSError
        raise DataError(f"--{role}: cannot fetch {path}: {getattr(error, 'reason', None) or error}") from error
    finally:
        if part and os.path.exists(part):
            os.unlink(part)
    return kept


def _version(path: str) -> str:
    if not path.startswith("https://"):
        found = tf.io.gfile.stat(path)
        return f"{found.length} {found.mtime_nsec}"
    try:
        with _open(path, "HEAD") as answer:
            return " ".join(answer.headers.get(name) or "" for name in ("ETag", "Last-Modified", "Content-Length"))
    except urllib.error.HTTPError as error:
        if error.code in (403, 405, 501):  # an address signed for GET alone, or a server without HEAD
            return ""
        raise


def _open(address: str, method: str = "GET") -> Any:
    answer = urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60)
    if not answer.url.startswith("https://"):
        answer.close()
        raise OSError(f"it leads to {answer.url.split('?')[0]}, an open line that anybody can change")
    return answer


def _copy(path: str, role: str, target: Any) -> None:
    if not path.startswith("https://"):
        target.write(files.read(path, f"the {role}"))
        return
    with _open(path) as answer:
        shutil.copyfileobj(answer, target, 1 << 20)
        promised = answer.headers.get("Content-Length")
    if promised is not None and target.tell() != int(promised):
        raise OSError(f"{target.tell():,} of {int(promised):,} bytes came")
