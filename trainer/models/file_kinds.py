"""What a file given as a Keras model is, by its content; for messages when it is something else."""

from __future__ import annotations

import json
import os
import re
import zipfile

import h5py

from trainer.core.wording import first_few

_PYTORCH = "PyTorch is not supported: export it to a TensorFlow SavedModel and give saved_model:FOLDER"
_SHOWN = 3  # names in a message


def foreign(path: str) -> str:
    """What a file or folder on this machine is, and what to do with it.

    Returns:
        Empty if it is a `.keras` file of Keras 3 or an `.h5` file with a whole model.
    """
    if os.path.isdir(path):
        return _folder(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    text = head.lstrip().lower()
    if not head:
        return "it is empty (0 bytes)"
    if head.startswith(b"version https://git-lfs.github.com"):
        return "it is a Git LFS pointer, not the file itself: run `git lfs pull` where it comes from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, not a model: download the file itself (on GitHub and Hugging Face: the raw file)"
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _hdf5(path)
    if head[4:8] == b"TFL3":
        return "it is a TensorFlow Lite model, which cannot be turned back: give the model that it was converted from"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return f"it is a pickle (PyTorch or another Python library), which could run code and is not read. {_PYTORCH}"
    if path.endswith(".onnx") or (head[:1] == b"\x08" and re.search(rb"onnx|pytorch", head[:64])):
        return "it is an ONNX model: convert it to a TensorFlow SavedModel (onnx2tf) and give saved_model:FOLDER"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 27:
        return "it is a safetensors file, which holds weights only: load them in their network and save that as .keras"
    if head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar" or head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\0":
        return "it is an archive: unpack it and give the model inside"
    if text.startswith(b"{"):
        return (
            "it is JSON, an architecture without weights: load both in Keras and save them with model.save('x.keras')"
        )
    name = os.path.basename(path)
    if name == "saved_model.pb":
        return "it is part of a SavedModel: give saved_model: with the folder that it is in"
    if name.endswith((".pb", ".pbtxt")):
        return "it is a TensorFlow graph: give a SavedModel (saved_model:FOLDER), or save the model as .keras"
    if name.endswith(".index") or ".data-0000" in name:
        return "it is part of a TensorFlow checkpoint, which holds weights only: load them in their network and save that as .keras"
    return f"it is neither a zip (.keras) nor HDF5 (.h5); it begins with {head[:8]!r}"


def keras_version(path: str) -> str:
    """The version of Keras in a `.keras` or `.h5` file, such as "2.15.0"; empty if it has none."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                version = json.loads(archive.read("metadata.json"))["keras_version"]
        else:
            with h5py.File(path, "r") as file:
                version = file.attrs["keras_version"]
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return ""
    return version.decode() if isinstance(version, bytes) else str(version)


def _folder(path: str) -> str:
    names = sorted(os.listdir(path))
    if "saved_model.pb" in names:
        return f"it is a SavedModel: give saved_model:{path}"
    if {"config.json", "model.weights.h5"} <= set(names):
        return "it is an unpacked .keras file: pack its members again with zip, without a folder around them"
    models = [name for name in names if name.endswith((".keras", ".h5", ".hdf5"))]
    holds = (
        f"a model in it: {_few(models)}" if models else f"no .keras or .h5 file in it, but {_few(names) or 'nothing'}"
    )
    return f"it is a folder: give a file; there is {holds}"


def _zip(path: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return f"it is a damaged or incomplete zip of {os.path.getsize(path):,} bytes: copy or download it again"
    if "config.json" in names:
        version = keras_version(path)
        return _keras2(path, version) if re.match(r"2\.\d", version) else ""
    ends = {name.rsplit("/", 1)[-1] for name in names}
    if {"data.pkl", "constants.pkl"} & ends:
        return f"it is a PyTorch file. {_PYTORCH}"
    if "saved_model.pb" in ends:
        return "it is a zip with a SavedModel: unpack it and give saved_model:FOLDER"
    if models := [name for name in names if name.endswith((".keras", ".h5", ".hdf5"))]:
        return f"it is a zip with {_few(models)}: unpack it and give the file"
    if names and all(name.endswith(".npy") for name in names):
        return "it is a NumPy archive of weights: bit:FILE takes those of a BiT"
    return f"it is a zip without config.json, so not of Keras; it holds {_few(names) or 'nothing'}"


def _keras2(path: str, version: str) -> str:
    # With TensorFlow from 2.16, Keras 2 is the package tf_keras.
    package = "tensorflow.keras" if int(version.split(".")[1]) < 16 else "tf_keras"
    old, new = os.path.basename(path), os.path.splitext(os.path.basename(path))[0] + ".h5"
    return (
        f"it is a file of Keras {version}, which Keras 3 cannot read. Where that version is installed, run `python -c "
        f"\"from {package}.models import load_model as l; l('{old}', compile=False).save('{new}')\"` and give keras:{new}"
    )


def _hdf5(path: str) -> str:
    try:
        with h5py.File(path, "r") as file:
            if "model_config" in file.attrs:
                return ""
            names, keys = list(file.attrs), list(file)
    except OSError:
        return f"it is a damaged or incomplete HDF5 file of {os.path.getsize(path):,} bytes: copy or download it again"
    weights = path.endswith(".weights.h5") or "layer_names" in names or "layers" in keys
    if weights or "_layer_checkpoint_dependencies" in keys:
        return (
            "it holds weights only: load them in their network and save that with model.save('x.keras'); "
            "of a network of keras.applications give app:NAME@FILE.h5"
        )
    return f"it is an HDF5 file without a Keras model; it holds {_few(keys) or 'nothing'}"


def _few(names: list[str]) -> str:
    return first_few(names, most=_SHOWN)
