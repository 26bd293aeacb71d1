"""Classifiers saved as TensorFlow SavedModels by any version of Keras, or without Keras.

A SavedModel is a program: use only ones from sources you trust. One with operations on files or
processes is refused: all operations are checked before loading, and those of the signature again
before it is called. This catches mistakes and simple attacks, not every attack.
"""

from __future__ import annotations

import hashlib

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import saved_model_pb2

from trainer.core.errors import DataError
from trainer.io import files

# Operations that no classifier needs. The functions that save and restore a SavedModel have some.
_REFUSED = (
    "ReadFile",
    "WriteFile",
    "MatchingFiles",
    "PyFunc",
    "PyFuncStateless",
    "EagerPyFunc",
    "PrintV2",
    "Save",
    "SaveV2",
    "SaveSlices",
    "MergeV2Checkpoints",
    "RpcCall",
    "RpcClient",
    "RpcServer",
    "DebugIdentityV2",
    "WriteSummary",
    "CreateSummaryFileWriter",
    "CreateSummaryDbWriter",
    "TFRecordDataset",
    "TFRecordDatasetV2",
    "TextLineDataset",
    "FixedLengthRecordDataset",
    "SaveDataset",
    "SaveDatasetV2",
    "LoadDataset",
    "SnapshotDataset",
    "GeneratorDataset",
    "DatasetToTFRecord",
    "InitializeTableFromTextFile",
    "InitializeTableFromTextFileV2",
    "DebugIdentity",
    "SnapshotDatasetV2",
    "TextLineReaderV2",
    "WholeFileReaderV2",
    "DeleteFile",
)
_SAVERS = ("traced_save", "traced_restore", "__saver")


class SavedClassifier:
    """A loaded SavedModel as a function of images.

    Attributes:
        input_shape: (None, height, width, 3); None where it is open.
        output_shape: (None, classes).
    """

    def __init__(self, path: str, role: str, output: str = "") -> None:
        """Loads under the current strategy.

        Args:
            path: folder with saved_model.pb, on a disk or gs://.
            role: the flag whose model it is, for errors.
            output: name or number of the output to take; empty: the one called logits, or the only
                one.

        Raises:
            DataError: it is not a SavedModel, has refused operations, is not a classifier of float
                images, or has several outputs and none is chosen.
        """
        where = f"--{role}=saved_model:{path}"
        _inspect(path, where)
        try:
            self._loaded = tf.saved_model.load(path)
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise DataError(f"{where} does not load: {files.reason(error)}") from error
        signatures = {name: f for name, f in self._loaded.signatures.items() if _image_input(f)}
        if not signatures:
            listed = "; ".join(f"{name}: {_describe(f)}" for name, f in self._loaded.signatures.items())
            raise DataError(
                f"{where} has no signature that takes one batch of float32 RGB images and returns (batch, classes); "
                f"it has: {listed or 'none'}. Save a function with that signature (tf.saved_model.save(model, 'x', signatures=f)), "
                "or give the Keras file"
            )
        self._call = signatures.get("serving_default") or next(iter(signatures.values()))
        self._input, spec = _image_input(self._call)  # type: ignore[misc]
        self.input_shape = tuple(spec.shape)
        # Before loading, savers were exempt by name; now all that the signature reaches is checked.
        _refuse(self._call.graph.as_graph_def(), where, savers=False)
        self._output = _class_output(self._call.structured_outputs, where, role, output)
        self.output_shape = tuple(self._call.structured_outputs[self._output].shape)
        if self.output_shape[-1] is None:
            raise DataError(f"{where} has outputs of shape (batch, unknown): the number of classes must be fixed")

    def __call__(self, images: tf.Tensor, *, training: bool = False) -> tf.Tensor:
        """Float32 [n, height, width, 3] -> float [n, classes]; `training` has no effect."""
        del training
        return self._call(**{self._input: images})[self._output]

    @property
    def variables(self) -> list[list[tf.Variable]]:
        """The variables used, in the order of use, and in that of creation if it is known."""
        used = list(self._call.variables)
        created = getattr(self._loaded, "variables", None)  # a list that Keras 2 keeps
        listed = [v for v in created if any(v is u for u in used)] if isinstance(created, (list, tuple)) else []
        return [used, listed] if len(listed) == len(used) else [used]

    def count_params(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(v.shape)) for v in self._call.variables)


class SavedServable:
    """A loaded SavedModel as a function of encoded images, which it decodes and preprocesses.

    Attributes:
        classes: number of classes.
    """

    def __init__(self, path: str, role: str) -> None:
        """Arguments and errors of `SavedClassifier`."""
        where = f"--{role}=saved_model:{path}"
        signature = _bytes_signature(_inspect(path, where))
        if signature is None:
            raise DataError(f"{where} has no signature that takes encoded images and returns (batch, classes)")
        name, self._input, self._output = signature
        try:
            self._loaded = tf.saved_model.load(path)
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise DataError(f"{where} does not load: {files.reason(error)}") from error
        self._call = self._loaded.signatures[name]
        _refuse(self._call.graph.as_graph_def(), where, savers=False)
        self.classes = self._call.structured_outputs[self._output].shape[-1]

    def __call__(self, encoded: list[bytes]) -> np.ndarray:
        """Encoded images [n] -> float32 [n, classes]: logits, or else probabilities."""
        return self._call(**{self._input: tf.constant(encoded)})[self._output].numpy().astype(np.float32)


def is_servable(path: str, role: str) -> bool:
    """Whether a SavedModel has a signature that takes encoded images, as an exported student has.

    Raises:
        DataError: it is not a SavedModel, or has refused operations.
    """
    return _bytes_signature(_inspect(path, f"--{role}=saved_model:{path}")) is not None


def _bytes_signature(parsed: saved_model_pb2.SavedModel) -> tuple[str, str, str] | None:
    """Names of a signature from strings to classes, of its input and of its output, or None."""
    for meta in parsed.meta_graphs:
        for name, signature in sorted(meta.signature_def.items(), key=lambda item: item[0] != "serving_default"):
            inputs = list(signature.inputs.items())
            matrices = [
                key
                for key, info in signature.outputs.items()
                if len(info.tensor_shape.dim) == 2 and info.dtype == tf.float32.as_datatype_enum
            ]
            outputs = [key for key in ("logits", "probabilities") if key in matrices] or matrices
            if len(inputs) == 1 and inputs[0][1].dtype == tf.string.as_datatype_enum and outputs:
                return name, inputs[0][0], outputs[0]
    return None


def _image_input(function: tf.types.experimental.ConcreteFunction) -> tuple[str, tf.TensorSpec] | None:
    """Name and shape of a signature's input if it takes one batch of images and returns
    classes."""
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1 or not _matrices(function.structured_outputs):
        return None
    ((name, spec),) = inputs.items()
    shape = spec.shape
    fits = spec.dtype == tf.float32 and shape.rank == 4 and shape[-1] in (3, None) and shape[0] is None
    return (name, spec) if fits else None


def _matrices(outputs: dict[str, tf.TensorSpec]) -> list[str]:
    """Names of the outputs [n, classes]."""
    return sorted(name for name, spec in outputs.items() if spec.shape.rank == 2 and spec.dtype.is_floating)


def _class_output(outputs: dict[str, tf.TensorSpec], where: str, role: str, wanted: str) -> str:
    """Name of the output to take.

    Raises:
        DataError: it is not there, or there are several and none is called logits or wanted.
    """
    names = _matrices(outputs)
    listed = ", ".join(f"{i}: {name} (batch, {outputs[name].shape[-1]})" for i, name in enumerate(names))
    if wanted in names:
        return wanted
    if wanted:
        if wanted.isdecimal() and int(wanted) < len(names):
            return names[int(wanted)]
        raise DataError(f"--{role}_output={wanted}: {where} has no output of that name; it has {listed}")
    if "logits" in names:
        return "logits"
    if len(names) == 1:
        return names[0]
    raise DataError(f"{where} has {len(names)} outputs ({listed}): choose one by name or number with --{role}_output")


def _describe(function: tf.types.experimental.ConcreteFunction) -> str:
    """A signature's inputs and outputs, such as "x float32 (None, 3, 8, 8) -> y float32 (None,
    5)"."""
    parts = (function.structured_input_signature[1], function.structured_outputs)
    return " -> ".join(", ".join(f"{k} {v.dtype.name} {v.shape}" for k, v in sorted(part.items())) for part in parts)


def variable_shapes(path: str, role: str) -> list[tuple[int, ...]]:
    """Shapes of all variables of a SavedModel, without loading it; -1 for an unknown side.

    Raises:
        DataError: it is not a SavedModel, or has refused operations.
    """
    parsed = _inspect(path, f"--{role}=saved_model:{path}")
    nodes = [node for meta in parsed.meta_graphs for node in meta.object_graph_def.nodes]
    return [tuple(d.size for d in n.variable.shape.dim) for n in nodes if n.WhichOneof("kind") == "variable"]


def _inspect(path: str, where: str) -> saved_model_pb2.SavedModel:
    """Reads saved_model.pb and refuses it if it has operations on files or processes."""
    name = files.join(path, "saved_model.pb")
    if not files.exists(name):
        raise DataError(f"{where}: {_missing(path)}")
    parsed = saved_model_pb2.SavedModel()
    try:
        parsed.ParseFromString(files.read(name, "the SavedModel"))
    except DecodeError as error:
        raise DataError(f"{where}: saved_model.pb is damaged: {error}") from error
    for meta in parsed.meta_graphs:
        if not meta.object_graph_def.nodes:
            raise DataError(
                f"{where} is of TensorFlow 1, whose start-up operations cannot be checked: save it again with TensorFlow 2"
            )
        _refuse(meta.graph_def, where, savers=True)
    return parsed


def _missing(path: str) -> str:
    """What a path without saved_model.pb is, and what to do."""
    if path.endswith("saved_model.pb"):
        return "give the folder that it is in"
    if path.endswith((".keras", ".h5", ".hdf5")):
        return f"it is not a SavedModel, which is a folder; give keras:{path}"
    return "there is no saved_model.pb in it" if files.exists(path) else "there is no such folder"


def _refuse(graph: graph_pb2.GraphDef, where: str, *, savers: bool) -> None:
    """Refuses operations on files or processes in a graph and its functions.

    Args:
        graph: with its functions.
        where: flag and path, for errors.
        savers: functions whose names contain one of `_SAVERS` are exempt.
    """
    parts = [(f.signature.name, f.node_def) for f in graph.library.function]
    if savers:
        parts = [(name, nodes) for name, nodes in parts if not any(saver in name for saver in _SAVERS)]
    for name, nodes in [*parts, ("the graph itself", graph.node)]:
        if refused := sorted({node.op for node in nodes} & set(_REFUSED)):
            raise DataError(
                f"{where} contains {', '.join(refused)} (in {name}), which could touch files or processes: refused"
            )


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) over the names and contents of a SavedModel's graph, variables and assets.

    Raises:
        DataError: it does not exist or cannot be read.
    """
    digest = hashlib.sha256()
    if not files.exists(files.join(path, "saved_model.pb")):
        raise DataError(f"--{role}=saved_model:{path}: {_missing(path)}")
    for folder in ("", "variables", "assets"):
        for name in files.names(files.join(path, folder)):
            full = files.join(path, folder, name)
            if tf.io.gfile.isdir(full) or (not folder and name != "saved_model.pb"):
                continue
            digest.update(f"{folder}/{name}\0".encode())
            digest.update(hashlib.sha256(files.read(full, f"the {role}")).digest())
    return digest.hexdigest()
