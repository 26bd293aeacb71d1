"""Value ranges of a model's input: conversion, and what a model itself tells about its range."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.core.options import RANGES
from trainer.models import bit

_SIDE = 64  # pixels of the probe, if the model takes any size
# Layers and operations that may prepare an image before the first kernel.
_PREPARING = (
    *("Activation", "ActivityRegularization", "ApplicationPreprocessing", "Identity"),
    *("Normalization", "RandAugment", "Rescaling", "Resizing", "CenterCrop", "Cropping2D", "ZeroPadding2D"),
    *("Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise"),
    *("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Negative", "Flip", "GetItem", "Pad", "Stack"),
)
# What the first kernel usually gets: (least, largest value), and how far each may be off as a share
# of the width.
_TARGETS = ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5), (0.0, 255.0), (-127.5, 127.5))
_NEAR = 0.03
# Standardised pixels: the width, and the distance of the middle from 0 as a share of it. For values
# divided by a standard deviation, and for those that only had a mean subtracted.
_STANDARDISED = ((1.5, 6.0, 0.2), (200.0, 300.0, 0.2))

# Networks of keras.applications without preprocessing inside, by a layer that only they have; the
# range that their `preprocess_input` gives, empty if it is none of RANGES.
_APPLICATIONS = (
    ("conv2_block1_preact_bn", "ResNetV2", "-1,1"),
    ("conv_dw_1_bn", "MobileNet", "-1,1"),
    ("bn_Conv1", "MobileNetV2", "-1,1"),
    ("block1_conv1_bn", "Xception", "-1,1"),
    ("mixed_7a", "InceptionResNetV2", "-1,1"),
    ("mixed10", "InceptionV3", "-1,1"),
    ("stem_bn1", "NASNet", "-1,1"),
    ("conv2_block1_0_relu", "DenseNet", ""),
    ("conv2_block1_1_bn", "ResNet", ""),
    ("block1_conv2", "VGG", ""),
)


def to_range(views: tf.Tensor, value_range: str) -> tf.Tensor:
    """Views in [-1, 1] -> the range that a model takes: "-1,1", "0,1" or "0,255"."""
    if value_range == "0,1":
        return (views + 1.0) / 2.0
    if value_range == "0,255":
        return (views + 1.0) * 127.5
    return views


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known about the range that a model takes.

    Attributes:
        value_range: of `RANGES`; empty if it is not known.
        strength: "flag" (the user says so), "certain" (how the model is made, so that nothing else
            need be tried), "layers" (its first layers convert it), "convention" (its network is
            usually trained with it) or "none".
        reason: for messages, a clause.
        contradicts: for a flag, the other range that the model tells, and why; else empty.
    """

    value_range: str
    strength: str
    reason: str
    contradicts: str = ""


NONE = Evidence("", "none", "")


def inspect(model: Any) -> Evidence:
    """What a model's first layers and its network tell about the range that it takes.

    Constant images of each range pass the layers before the first kernel: a `Rescaling`, a
    `Normalization`, arithmetic, resizing and augmentation. The range is the only one for which the
    kernel then gets usual values: from 0 to 1, from -1 to 1, or standardised pixels.

    Args:
        model: as loaded; only Functional and Sequential models tell anything.
    """
    if not isinstance(model, keras.Model) or not bit.is_functional(model):
        return NONE
    height, width = (side or _SIDE for side in model.input_shape[1:3])
    levels = sorted({float(bound) for name in RANGES for bound in name.split(",")})
    images = np.ones((1, height, width, 3), np.float32) * np.array(levels, np.float32)[:, None, None, None]
    outputs, names, stop, inner = _prepare(model, images)
    # The middle of the image, whatever was padded; per channel.
    after = outputs[:, outputs.shape[1] // 2, outputs.shape[2] // 2] if outputs.ndim == 4 else None
    if names and after is not None and np.isfinite(after).all() and not np.allclose(after, images[:, 0, 0]):
        fits = [name for name in RANGES if _is_usual(*(after[levels.index(float(b))] for b in name.split(",")))]
        if len(fits) == 1:
            low, high = (after[levels.index(float(bound))].mean() for bound in fits[0].split(","))
            what = " and ".join(dict.fromkeys(names))
            return Evidence(fits[0], "layers", f"it begins with {what}, which gives {low:.3g} to {high:.3g}")
        return NONE
    if isinstance(stop, bit.StdConv2D):
        return Evidence("-1,1", "certain", "it is a BiT")
    layers = {layer.name for layer in bit.flat_layers(inner)}
    if {"root_conv", "final_norm"} <= layers:
        return Evidence("-1,1", "convention", "it is a BiT")
    for layer, network, value_range in _APPLICATIONS:
        if layer in layers:
            if value_range:
                return Evidence(value_range, "convention", f"it is a {network} without preprocessing inside")
            what = (
                f"it is a {network} without preprocessing inside, usually trained on keras.applications' "
                "preprocess_input, which no range gives: save it with that inside"
            )
            return Evidence("", "none", what)
    return NONE


def _is_usual(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether values [channels] of black and of white are what a first kernel usually gets."""
    width = high - low
    if (width <= 0).any():
        return False
    for target_low, target_high in _TARGETS:
        allowed = _NEAR * (target_high - target_low)
        if (np.abs(low - target_low) <= allowed).all() and (np.abs(high - target_high) <= allowed).all():
            return True
    middle = np.abs(high + low) / 2
    return any(
        (width >= least).all() and (width <= most).all() and (middle <= off * width).all()
        for least, most, off in _STANDARDISED
    )


def _prepare(
    model: keras.Model, images: np.ndarray
) -> tuple[np.ndarray, list[str], keras.Operation | None, keras.Model]:
    """Runs images through the layers before the first kernel.

    Args:
        model: Functional or Sequential.
        images: float32 [n, height, width, 3].

    Returns:
        The images after these layers; the kinds of those that change values; the first operation
        that does not prepare (None: there is none); the innermost model that holds it.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    source = graph.inputs[0]
    prepared, last = {id(source)}, source
    names: list[str] = []

    def values() -> np.ndarray:
        if last is source:
            return images
        return keras.ops.convert_to_numpy(keras.Model(source, last)(images, training=False)).astype(np.float32)

    for node in _nodes(graph):
        inputs = node.input_tensors
        if not inputs or not all(id(tensor) in prepared for tensor in inputs):
            continue
        operation = node.operation
        if isinstance(operation, keras.Model):
            outputs, inner_names, stop, inner = _prepare(operation, values())
            if stop is not None:
                return outputs, names + inner_names, stop, inner
            names += inner_names
        elif not _is_preparing(operation):
            last = inputs[0]
            return values(), names, operation, model
        elif type(operation).__name__ in ("Rescaling", "Normalization", "ApplicationPreprocessing"):
            names.append(type(operation).__name__)
        elif not isinstance(operation, keras.Layer) and type(operation).__name__ not in ("GetItem", "Stack", "Pad"):
            names.append("arithmetic")
        last = node.outputs[0]
        prepared.add(id(last))
    return values(), names, None, model


def _nodes(graph: keras.Model) -> Iterator[Any]:
    """The nodes of a Functional model in the order of the data."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        yield from graph._nodes_by_depth[depth]


def _is_preparing(operation: keras.Operation) -> bool:
    name = type(operation).__name__
    if name == "Activation":
        return operation.activation is keras.activations.linear
    return name in _PREPARING or (name.startswith("Random") and isinstance(operation, keras.Layer))
