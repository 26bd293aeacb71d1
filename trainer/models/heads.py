"""The end of a Keras classifier: its outputs, and the softmax or sigmoid that makes its logits.

A distance needs logits. The last activation is found by walking back from the output, through
nested models, and taken off at that call alone: layers that are used elsewhere too stay as they
are. No layer of the given model is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

_KINDS: dict[Callable[..., Any], str] = {
    keras.activations.softmax: "softmax",
    keras.ops.softmax: "softmax",
    keras.activations.log_softmax: "log_softmax",
    keras.ops.log_softmax: "log_softmax",
    keras.activations.sigmoid: "sigmoid",
    keras.ops.sigmoid: "sigmoid",
}
_OPERATIONS = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid"}  # classes of keras.ops
# Layers that end in their `activation`. In others, such as LSTM, it is applied inside.
_HEADS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
    keras.layers.Conv2DTranspose,
)
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "GlobalAveragePooling2D", "GlobalMaxPooling2D")


def outputs(model: keras.Model) -> list[tuple[str, Any]]:
    """Name and symbolic tensor of each output of a Functional or Sequential model.

    The name is the key of a dictionary, else that of the layer.
    """
    tensors = getattr(model, "outputs", None) or []
    names = [tensor._keras_history.operation.name for tensor in tensors]
    structure = getattr(model, "output", None)
    if isinstance(structure, dict) and len(structure) == len(tensors):
        keys = {id(tensor): key for key, tensor in structure.items()}
        names = [keys.get(id(tensor), name) for tensor, name in zip(tensors, names, strict=True)]
    return list(zip(names, tensors, strict=True))


def select(model: keras.Model, tensor: Any) -> keras.Model:
    """The model from its one input, given as a tensor, to one of its tensors; layers are shared.

    Args:
        model: Functional or Sequential, with one input.
        tensor: symbolic; one of `outputs`, or computed from its layers.
    """
    return keras.Model(model.inputs[0], tensor, name=model.name)


def open_batch(model: keras.Model) -> keras.Model:
    """The model for batches of any size, if it was saved for a fixed one."""
    inputs = keras.Input(model.inputs[0].shape[1:], dtype=model.inputs[0].dtype)
    return keras.Model(inputs, model(inputs), name=f"{model.name}_any_batch")


def ending(model: keras.Model) -> str:
    """What the outputs are: "softmax", "log_softmax", "sigmoid", or "" if that is not known.

    A mean of probabilities is "softmax" too, although `logits` cannot take it off.
    """
    return _cut(model)[0]


def logits(model: keras.Model) -> keras.Model | None:
    """The model without its last activation; None if it has none, or it cannot be taken off.

    The layers are shared with `model`, except a last layer with an activation of its own, which is
    a copy.
    """
    _, tensor = _cut(model)
    return None if tensor is None else select(model, tensor)


def two_logits(model: keras.Model) -> keras.Model:
    """A model with logits of two classes, (0, z), from one with the logit z [n, 1] of the second.

    The softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
    """
    pair = keras.layers.Dense(2, use_bias=False, trainable=False, name="two_logits", dtype="float32")
    result = select(model, pair(model.outputs[0]))
    pair.set_weights([np.array([[0.0, 1.0]], np.float32)])
    return result


def two_probabilities(model: keras.Model) -> keras.Model:
    """A model with (1 - p, p) from one with the probability p [n, 1] of the second class."""
    pair = keras.layers.Dense(2, trainable=False, name="two_probabilities", dtype="float32")
    result = select(model, pair(model.outputs[0]))
    pair.set_weights([np.array([[-1.0, 1.0]], np.float32), np.array([1.0, 0.0], np.float32)])
    return result


def _cut(model: keras.Model) -> tuple[str, Any]:
    tensors = getattr(model, "outputs", None) or []
    return _before(tensors[0]) if len(tensors) == 1 else ("", None)


def _before(tensor: Any) -> tuple[str, Any]:
    """The kind of the activation that made a symbolic tensor, and the tensor without it.

    The kind is "" if there is none; the tensor is None if there is none or it cannot be taken off.
    """
    operation, node_index, tensor_index = tensor._keras_history
    node = operation._inbound_nodes[node_index]
    inputs = node.input_tensors
    if not inputs:
        return "", None
    if isinstance(operation, keras.layers.Average):
        return ("softmax", None) if {_before(x)[0] for x in inputs} == {"softmax"} else ("", None)
    if isinstance(operation, keras.Model) and getattr(operation, "outputs", None):
        kind, inner = _before(operation.outputs[tensor_index])
        if inner is None:
            return kind, None
        single = len(operation.inputs) == 1
        rebuilt = keras.Model(operation.inputs[0] if single else operation.input, inner, name=_free_name(operation))
        return kind, _call(rebuilt, node, {})
    if len(inputs) != 1:
        return "", None
    source = inputs[0]
    if kind := _activation(operation):
        # A softmax over another axis than that of the classes does not end a classifier.
        last = kind == "sigmoid" or getattr(operation, "axis", -1) in (-1, len(source.shape) - 1)
        return (kind, source) if last else ("", None)
    if isinstance(operation, _HEADS) and (kind := _KINDS.get(operation.activation, "")):
        linear = type(operation).from_config(
            operation.get_config() | {"activation": "linear", "name": _free_name(operation)}
        )
        without = _call(linear, node, {})
        linear.set_weights(operation.get_weights())
        return kind, without
    if _is_operation(operation, "Log"):
        kind, inner = _before(source)
        return ("log_softmax", inner) if kind == "softmax" else ("", None)
    if _keeps_classes(operation, source.shape, tensor.shape):
        kind, inner = _before(source)
        return kind, None if inner is None else _call(operation, node, {id(source): inner})
    return "", None


def _call(operation: keras.Operation, node: Any, replaced: dict[int, Any]) -> Any:
    """Calls an operation with the arguments of a recorded call, except for replaced tensors."""
    arguments, options = node.arguments.fill_in({id(x): x for x in node.input_tensors} | replaced)
    return operation(*arguments, **options)


def _free_name(operation: keras.Operation) -> str:
    """A name for what replaces one call of an operation, which may have other calls that stay."""
    return operation.name if len(operation._inbound_nodes) == 1 else f"{operation.name}_logits"


def _is_operation(operation: keras.Operation, *names: str) -> bool:
    return type(operation).__name__ in names and type(operation).__module__.startswith("keras.src.")


def _activation(operation: keras.Operation) -> str:
    """The kind of an operation that is an activation and nothing else."""
    if isinstance(operation, keras.layers.Activation):
        return _KINDS.get(operation.activation, "")
    return _OPERATIONS[type(operation).__name__] if _is_operation(operation, *_OPERATIONS) else ""


def _keeps_classes(operation: keras.Operation, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether an operation gives the same numbers, one for each class, in another shape or
    dtype."""
    if isinstance(operation, keras.layers.Activation):
        return operation.activation is keras.activations.linear
    if _is_operation(operation, *_RESHAPING):
        return before[-1] == after[-1] and all(side == 1 for side in (*before[1:-1], *after[1:-1]))
    return _is_operation(operation, "Identity", "Cast")
