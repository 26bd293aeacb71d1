"""Big Transfer (BiT): ResNet-V2 with group normalisation and weight standardisation.

Architecture: Kolesnikov et al. 2020 (arXiv 1912.11370) and the released weights. The epsilons, the
padding of the root pool and the input of the projection are theirs: with others, their weights
give other logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from keras import ops

WEIGHT_EPSILON = 1e-10
GROUP_EPSILON = 1e-5
LOWEST = -3e38  # below every activation; a finite number of float32 and of bfloat16


@dataclasses.dataclass(frozen=True)
class Arch:
    """An architecture of the family.

    Attributes:
        units: bottleneck units in each of the blocks.
        filters: channels of the root convolution. Block b has `filters * 2**b` channels inside its
            units and four times that at their outputs.
        groups: groups of every group normalisation; divides `filters`.
        released: weights of this size are published.
    """

    units: tuple[int, ...]
    filters: int
    groups: int = 32
    released: bool = True


ARCHS = {
    "R50x1": Arch((3, 4, 6, 3), 64),
    "R50x3": Arch((3, 4, 6, 3), 192),
    "R101x1": Arch((3, 4, 23, 3), 64),
    "R101x3": Arch((3, 4, 23, 3), 192),
    "R152x2": Arch((3, 8, 36, 3), 128),
    "R152x4": Arch((3, 8, 36, 3), 256),
    # Not published; for smoke runs and tests on a CPU.
    "tiny": Arch((1, 1, 1), 16, groups=8, released=False),
    "small": Arch((1, 1, 1), 24, groups=8, released=False),
}


@keras.saving.register_keras_serializable(package="funmatch")
class StdConv2D(keras.layers.Conv2D):
    """Convolution with a kernel standardised per output channel.

    kernel' = (kernel - mean) / sqrt(variance + 1e-10), over height, width and input channels, with
    the biased variance. The layer stores the kernel before standardisation.
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolves with the standardised kernel."""
        return super().convolution_op(inputs, standardize(kernel))


def standardize(kernel: tf.Tensor | np.ndarray) -> tf.Tensor:
    """Standardises a kernel [height, width, in, out] in float32; returns the kernel's dtype."""
    value = ops.cast(kernel, "float32")
    mean, variance = ops.moments(value, axes=(0, 1, 2), keepdims=True)
    return ops.cast((value - mean) / ops.sqrt(variance + WEIGHT_EPSILON), kernel.dtype)


def bit(
    arch: str | Arch,
    classes: int,
    image_size: int | None = None,
    *,
    root_pool: str = "zero",
    seed: int = 0,
    name: str | None = None,
) -> keras.Model:
    """Builds a BiT: float images [n, height, width, 3] in [-1, 1] -> float32 logits [n, classes].

    Args:
        arch: a name in `ARCHS`, or an `Arch`.
        classes: width of the head, at least 1. The head starts at zero, as in the paper's runs.
        image_size: height and width in pixels; None leaves them open.
        root_pool: "zero" pads the input of the max pool with zeros (released BiT models); "inf"
            pads it with a value below all others (big_vision, which may have trained the distilled
            ones).
        seed: of the initial kernels; each layer derives its own seed from it.
        name: of the model; None: from `arch`.

    Returns:
        A new model, whose convolutions are `StdConv2D`.

    Raises:
        ValueError: unknown `arch` or `root_pool`.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f"unknown BiT architecture {arch!r}; known: {', '.join(ARCHS)}")
        name, arch = name or f"bit_{arch.lower()}", ARCHS[arch]
    if root_pool not in ("zero", "inf"):
        raise ValueError(f"root_pool is {root_pool!r}; it must be 'zero' or 'inf'")
    seeds = iter(range(seed * 1_000_003, seed * 1_000_003 + 1_000_003))

    def conv(x: keras.KerasTensor, filters: int, size: int, stride: int, name: str) -> keras.KerasTensor:
        if size > 1:
            x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        init = keras.initializers.GlorotUniform(seed=next(seeds))
        return StdConv2D(filters, size, strides=stride, use_bias=False, kernel_initializer=init, name=name)(x)

    def norm_relu(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        x = keras.layers.GroupNormalization(arch.groups, epsilon=GROUP_EPSILON, name=name)(x)
        return keras.layers.ReLU(name=f"{name}_relu")(x)

    inputs = keras.Input((image_size, image_size, 3), name="images")
    x = conv(inputs, arch.filters, 7, 2, "root_conv")
    if root_pool == "zero":
        x = keras.layers.ZeroPadding2D(1, name="root_pool_pad")(x)
    else:
        # An operation of Keras, not a custom layer: the export must load without this package.
        x = ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=LOWEST)
    x = keras.layers.MaxPooling2D(3, 2, name="root_pool")(x)
    for block, units in enumerate(arch.units):
        filters = arch.filters * 2**block
        for unit in range(units):
            prefix = f"block{block + 1}_unit{unit + 1:02d}"
            stride = 2 if unit == 0 and block > 0 else 1
            y = norm_relu(x, f"{prefix}_a_norm")
            # The projection reads the normalised input; it has no normalisation of its own.
            shortcut = conv(y, 4 * filters, 1, stride, f"{prefix}_proj") if unit == 0 else x
            y = conv(y, filters, 1, 1, f"{prefix}_a")
            y = conv(norm_relu(y, f"{prefix}_b_norm"), filters, 3, stride, f"{prefix}_b")
            y = conv(norm_relu(y, f"{prefix}_c_norm"), 4 * filters, 1, 1, f"{prefix}_c")
            x = keras.layers.Add(name=f"{prefix}_add")([shortcut, y])
    x = norm_relu(x, "final_norm")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    head = keras.layers.Dense(classes, kernel_initializer="zeros", dtype="float32", name="head")
    return keras.Model(inputs, head(x), name=name or "bit")


def fold(model: keras.Model) -> keras.Model:
    """Copies a model; each `StdConv2D` becomes a `Conv2D` with the standardised kernel.

    The copy computes the same function, loads without this package, and does not standardise all
    kernels in each forward pass.
    """

    def without_standardization(operation: keras.Operation) -> keras.Operation:
        layer_class = keras.layers.Conv2D if type(operation) is StdConv2D else type(operation)
        return layer_class.from_config(operation.get_config())

    folded = keras.models.clone_model(model, clone_function=without_standardization, recursive=True)
    for source, target in zip(flat_layers(model), flat_layers(folded), strict=True):
        weights = source.get_weights()
        if type(source) is StdConv2D:
            weights[0] = ops.convert_to_numpy(standardize(weights[0]))
        target.set_weights(weights)
    return folded


def flat_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """Layers of a model and of the models nested in it, in the order of the data."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from flat_layers(layer)
        else:
            yield layer


def is_functional(model: object) -> bool:
    """Whether a model and all nested ones are Functional or Sequential: layers can be replaced."""
    graph_classes = (keras.Sequential, keras.src.models.Functional)
    return isinstance(model, graph_classes) and all(
        is_functional(x) for x in model.layers if isinstance(x, keras.Model)
    )
