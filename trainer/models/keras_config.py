"""The architecture in a Keras file: classes that Keras lacks, code, and how its models were
compiled."""

from __future__ import annotations

import inspect
import json
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras


class _DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Reads the layer from files of Keras 2, whose setting `groups` Keras 3 does not know."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.DepthwiseConv2D:
        """The plain layer."""
        return keras.layers.DepthwiseConv2D.from_config({k: v for k, v in config.items() if k != "groups"})


class _Keras2Functional:
    """Reads Functional models from `.h5` files of Keras 2.

    It counted the calls of a model inside another from 1, Keras 3 from 0; in the list of outputs
    Keras 3 corrects that itself for Functional models.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> keras.Model:
        """The model."""
        kinds = {layer.get("name"): layer["class_name"] for layer in config["layers"]}
        sequential = {name for name, kind in kinds.items() if kind == "Sequential"}
        models = sequential | {name for name, kind in kinds.items() if kind in ("Functional", "Model")}
        changed = {key: _counted_from_0(config[key], sequential) for key in ("input_layers", "output_layers")}
        layers = [
            layer | {"inbound_nodes": _counted_from_0(layer["inbound_nodes"], models)} for layer in config["layers"]
        ]
        return keras.Model.from_config(config | changed | {"layers": layers}, custom_objects)


def _counted_from_0(references: Any, models: set[Any]) -> Any:
    """References [layer, call, tensor, ...] to calls of some layers, in nested lists, with one
    less."""
    if not isinstance(references, list):
        return references
    match references:
        case [str(name), int(call), int(_), *_] if name in models:
            return [name, max(call - 1, 0), *references[2:]]
    return [_counted_from_0(item, models) for item in references]


def known(version: str) -> dict[str, Any]:
    """Names in files of a version of Keras that Keras 3 does not know, and what they are."""
    functional = {"Functional": _Keras2Functional, "Model": _Keras2Functional} if version[:2] in ("1.", "2.") else {}
    return KNOWN | functional


# tf.nn.softmax is called softmax_v2.
KNOWN = {"DepthwiseConv2D": _DepthwiseConv2D, "softmax_v2": keras.activations.softmax}
# Layers that are programs, or read other files. Keras's safe mode refuses them too.
_PROGRAMS = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "__lambda__")
_OPERATIONS = (
    "TFOpLambda",
    "SlicingOpLambda",
    "TensorFlowOpLayer",
    "ClassMethod",
    "InstanceProperty",
    "InstanceMethod",
)
_EXPORT = (
    "where it is defined, save the model as a SavedModel with model.export('teacher') and give saved_model:teacher"
)


def config(local: str) -> Any:
    """The architecture in a `.keras` or `.h5` file, as JSON values; None if there is none."""
    try:
        if zipfile.is_zipfile(local):
            with zipfile.ZipFile(local) as archive:
                return json.loads(archive.read("config.json"))
        with h5py.File(local, "r") as file:
            text = file.attrs["model_config"]
            return json.loads(text)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, RecursionError):
        return None


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """Every class or function in an architecture, nested ones after those that hold them."""
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if isinstance(value.get("class_name"), str):
                yield value
            stack.extend(reversed(value.values()))
        elif isinstance(value, list):
            stack.extend(reversed(value))


def programs(config: Any) -> str:
    """Why an architecture is refused that holds code; empty if it holds none."""
    for item in _objects(config):
        name = item["class_name"]
        function = isinstance(item.get("config"), dict) and inspect.isroutine(getattr(keras.layers, name, None))
        if name in _PROGRAMS or function:
            layer = item["config"].get("name") if isinstance(item.get("config"), dict) else None
            called = f" ('{layer}')" if isinstance(layer, str) else ""
            return (
                f"it has a {'Lambda' if name == '__lambda__' else name} layer{called}, whose code is not run: {_EXPORT}"
            )
    return ""


def unknown(config: Any) -> str:
    """Names the classes and functions of an architecture that are not part of Keras; empty if
    none."""
    operations: list[str] = []
    packages: dict[str, list[str]] = {}
    for item in _objects(config):
        name, module = item["class_name"], item.get("module")
        registered = str((item.get("config") if name == "function" else item.get("registered_name")) or name)
        package, _, short = registered.rpartition(">")
        if name in _OPERATIONS:
            operations.append(str(item.get("name")))
        elif not name.startswith("__") and not _is_known(registered, name, module):
            root = module.split(".")[0] if isinstance(module, str) and module not in ("builtins", "__main__") else ""
            # "Custom" is the package of a class that was registered without one.
            source = root if root and package in ("", "Custom") else package
            listed = packages.setdefault(source, [])
            if short not in listed:
                listed.append(short)
    if packages:
        parts = [
            f"{', '.join(names)}" + (f" (package {source})" if source else "") for source, names in packages.items()
        ]
        install = [p.replace("_", "-") for p in packages if p in ("keras_hub", "keras_cv", "keras_nlp")]
        hint = f"install {' and '.join(install)}, or " if install else ""
        return f"it uses {'; '.join(parts)}, not part of Keras: {hint}{_EXPORT}"
    if operations:
        return (
            f"it has TensorFlow operations between its layers ({', '.join(operations[:3])}), which only Keras 2 runs: save it "
            "there as a SavedModel with tf.saved_model.save(model, 'teacher') and give saved_model:teacher"
        )
    return ""


_MODULES = (
    "layers",
    "initializers",
    "regularizers",
    "constraints",
    "activations",
    "dtype_policies",
    "quantizers",
    "ops",
)


def _is_known(registered: str, name: str, module: Any) -> bool:
    """Whether Keras finds a class or function of a file by its names."""
    if registered in KNOWN or keras.saving.get_registered_object(registered) is not None:
        return True
    if isinstance(module, str) and module.split(".")[0] == "keras":
        return True
    if ">" in registered or module not in (None, "builtins"):
        return False
    found = registered if name == "function" else name
    return found in ("Functional", "Policy") or any(
        hasattr(space, found) for space in (keras, *(getattr(keras, part) for part in _MODULES))
    )


def compiled_inside(config: Any) -> bool:
    """Whether a model inside a model was compiled with losses or metrics that Keras does not
    know."""
    return any(item is not config and unknown(item.get("compile_config")) for item in _objects(config))


def copy_without_losses(source: str, target: str) -> None:
    """Copies a `.keras` file without how its models were compiled; `compile=False` keeps that of
    nested ones."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as file:
                if name == "config.json":
                    config = json.loads(old.read(name))
                    for item in _objects(config):
                        item.pop("compile_config", None)
                    file.write(json.dumps(config).encode())
                    continue
                with old.open(name) as member:
                    shutil.copyfileobj(member, file, 1 << 20)
