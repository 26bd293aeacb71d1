"""Classifiers saved as TensorFlow SavedModels, by any version of Keras or without it, called without their code.

A SavedModel is a program: take it from people you trust. Its operations are read before it is loaded and what it computes once more
before it is called, and one with operations on files or processes is refused; that is a net, not a wall.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from trainer.core.errors import DataError
from trainer.io import files

# What a classifier needs none of. Saving and restoring is in every SavedModel, in functions of its own.
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

    def __init__(self, path: str, role: str) -> None:
        """Loads under the current strategy.

        Args:
            path: folder with saved_model.pb, on a disk or gs://.
            role: the flag whose model it is, for errors.

        Raises:
            DataError: not a SavedModel, one with operations that a classifier needs none of, or not a classifier of float images.
        """
        where = f"--{role}=saved_model:{path}"
        _inspect(path, where)
        try:
            self._loaded = tf.saved_model.load(path)
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise DataError(f"{where} does not load: {files.reason(error)}") from error
        signatures = {name: f for name, f in self._loaded.signatures.items() if _images(f)}
        if not signatures:
            found = ", ".join(self._loaded.signatures) or "none"
            raise DataError(
                f"{where} has no signature that takes one batch of float32 RGB images and returns (batch, classes); it has: {found}"
            )
        self._call = signatures.get("serving_default") or next(iter(signatures.values()))
        self._input, spec = _images(self._call)  # type: ignore[misc]
        self.input_shape = tuple(spec.shape)
        # Names were enough before loading; now what can really be reached.
        _refuse(self._call.graph.as_graph_def(), where, savers=False)
        self._output = _logits(self._call.structured_outputs)
        self.output_shape = tuple(self._call.structured_outputs[self._output].shape)
        if self.output_shape[-1] is None:
            raise DataError(f"{where} does not say how many classes it knows")

    def __call__(self, images: tf.Tensor, *, training: bool = False) -> tf.Tensor:
        """Float32 [n, height, width, 3] -> float [n, classes]; always as saved for inference."""
        del training
        return self._call(**{self._input: images})[self._output]

    @property
    def variables(self) -> list[list[Any]]:
        """The variables that it computes with, in the order of their use and, where the model says it, of their creation."""
        used = list(self._call.variables)
        made = getattr(self._loaded, "variables", None)
        listed = [v for v in made if any(v is u for u in used)] if isinstance(made, (list, tuple)) else []
        return [used, listed] if len(listed) == len(used) else [used]

    def count_params(self) -> int:
        """Numbers in its variables."""
        return sum(int(np.prod(v.shape)) for v in self._call.variables)


class SavedServable:
    """A loaded SavedModel as a function of encoded images: it does its own decoding and preprocessing.

    Attributes:
        classes: that it knows.
    """

    def __init__(self, path: str, role: str) -> None:
        """
        Args, Raises: as `SavedClassifier`.
        """
        where = f"--{role}=saved_model:{path}"
        name, self._input, self._output = _servable(_inspect(path, where))
        try:
            self._loaded = tf.saved_model.load(path)
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise DataError(f"{where} does not load: {files.reason(error)}") from error
        self._call = self._loaded.signatures[name]
        _refuse(self._call.graph.as_graph_def(), where, savers=False)
        self.classes = self._call.structured_outputs[self._output].shape[-1]

    def __call__(self, encoded: list[bytes]) -> np.ndarray:
        """Files' bytes [n] -> float32 [n, classes]: logits, or probabilities if it gives nothing else."""
        return self._call(**{self._input: tf.constant(encoded)})[self._output].numpy().astype(np.float32)


def is_servable(path: str, role: str) -> bool:
    """Whether a SavedModel has a signature that takes encoded images, as our exported students have."""
    return bool(_servable(_inspect(path, f"--{role}=saved_model:{path}"))[0])


def _servable(parsed: Any) -> tuple[str, str, str]:
    """Names of a signature from strings to classes, of its input and of its output; empty where there is none."""
    for meta in parsed.meta_graphs:
        for name, signature in sorted(meta.signature_def.items(), key=lambda item: item[0] != "serving_default"):
            ins = list(signature.inputs.items())
            outs = [
                k
                for k, v in signature.outputs.items()
                if len(v.tensor_shape.dim) == 2 and v.dtype == tf.float32.as_datatype_enum
            ]
            wanted = [k for k in ("logits", "probabilities") if k in outs] or outs
            if len(ins) == 1 and ins[0][1].dtype == tf.string.as_datatype_enum and wanted:
                return name, ins[0][0], wanted[0]
    return "", "", ""


def _images(function: Any) -> tuple[str, tf.TensorSpec] | None:
    """Name and specification of a signature's one input, if it takes images and returns classes."""
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1 or _logits(function.structured_outputs) is None:
        return None
    ((name, spec),) = inputs.items()
    shape = spec.shape
    fits = spec.dtype == tf.float32 and shape.rank == 4 and shape[-1] in (3, None) and shape[0] is None
    return (name, spec) if fits else None


def _logits(outputs: dict[str, tf.TensorSpec]) -> str | None:
    """Name of the output with the classes: the only matrix, or the one called logits."""
    matrices = [name for name, spec in outputs.items() if spec.shape.rank == 2 and spec.dtype.is_floating]
    return "logits" if "logits" in matrices else matrices[0] if len(matrices) == 1 else None


def variable_shapes(path: str, role: str) -> list[tuple[int, ...]]:
    """Shapes of all variables of a SavedModel, without loading it; -1 where a side is open.

    Raises:
        DataError: it is none, or one with operations that a classifier needs none of.
    """
    parsed = _inspect(path, f"--{role}=saved_model:{path}")
    nodes = [node for meta in parsed.meta_graphs for node in meta.object_graph_def.nodes]
    return [tuple(d.size for d in n.variable.shape.dim) for n in nodes if n.WhichOneof("kind") == "variable"]


def _inspect(path: str, where: str) -> Any:
    name = files.join(path, "saved_model.pb")
    if not files.exists(name):
        raise DataError(f"{where}: there is no saved_model.pb in it")
    parsed = saved_model_pb2.SavedModel()
    try:
        parsed.ParseFromString(files.read(name, "the SavedModel"))
    except DecodeError as error:
        raise DataError(f"{where}: saved_model.pb is damaged: {error}") from error
    for meta in parsed.meta_graphs:
        if not meta.object_graph_def.nodes:
            raise DataError(
                f"{where} is of TensorFlow 1, whose start-up operations run unseen: save it again with TensorFlow 2"
            )
        _refuse(meta.graph_def, where, savers=True)
    return parsed


def _refuse(graph: Any, where: str, *, savers: bool) -> None:
    """Refuses operations on files or processes in a GraphDef and its functions; `savers`: but in those that save and restore."""
    parts = [(f.signature.name, f.node_def) for f in graph.library.function]
    if savers:
        parts = [(name, nodes) for name, nodes in parts if not any(saver in name for saver in _SAVERS)]
    for name, nodes in [*parts, ("the graph itself", graph.node)]:
        if bad := sorted({node.op for node in nodes} & set(_REFUSED)):
            raise DataError(
                f"{where} contains {', '.join(bad)} (in {name}), which could touch files or processes: refused"
            )


def checksum(path: str, role: str) -> str:
    """SHA-256 (hex) over the names and contents of what a SavedModel computes with.

    Raises:
        DataError: it is not there or cannot be read.
    """
    digest = hashlib.sha256()
    if not files.exists(files.join(path, "saved_model.pb")):
        raise DataError(f"--{role}=saved_model:{path}: there is no saved_model.pb in it")
    for folder in ("", "variables", "assets"):
        for name in files.names(files.join(path, folder)):
            full = files.join(path, folder, name)
            if tf.io.gfile.isdir(full) or (not folder and name != "saved_model.pb"):
                continue
            digest.update(f"{folder}/{name}\0".encode())
            digest.update(hashlib.sha256(files.read(full, f"the {role}")).digest())
    return digest.hexdigest()
