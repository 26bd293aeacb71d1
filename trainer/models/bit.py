"""Big Transfer (BiT) ResNets in Keras 3: ResNet-V2 with group normalisation and weight standardisation.

Source of the architecture: Kolesnikov et al. 2020 (arXiv 1912.11370) and its released weights; the details that
decide whether those weights work (padding of the root pool, epsilons, what the projection sees) are kept as arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

WEIGHT_EPSILON = 1e-10
GROUP_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Arch:
    """A member of the family.

    Attributes:
        units: bottleneck units in each of the blocks.
        filters: channels of the root convolution; block b has `filters * 2**b` inside, four times that outside.
        groups: groups of every group normalisation; divides `filters`.
        released: one of the published sizes, as opposed to a miniature of ours.
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
    # Ours, for smoke runs and tests on a CPU.
    "tiny": Arch((1, 1, 1), 16, groups=8, released=False),
    "small": Arch((1, 1, 1), 24, groups=8, released=False),
}


@keras.saving.register_keras_serializable(package="funmatch")
class StdConv2D(keras.layers.Conv2D):
    """Convolution whose kernel is standardised over height, width and input channels, per output channel.

    kernel' = (kernel - mean) / sqrt(variance + 1e-10), with the biased variance. The stored kernel stays as it is.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Convolves with the standardised kernel."""
        return super().convolution_op(inputs, standardize(kernel))


@keras.saving.register_keras_serializable(package="funmatch")
class PadLowest2D(keras.layers.Layer):
    """Pads height and width by one on each side with a value that no maximum takes."""

    def call(self, inputs: Any) -> Any:
        """Pads [n, height, width, channels] to [n, height + 2, width + 2, channels]."""
        lowest = -3e38 if keras.backend.standardize_dtype(inputs.dtype) != "float16" else -6e4
        return ops.pad(inputs, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=lowest)

    def compute_output_shape(self, shape: Any) -> Any:
        """Two more rows and columns where their number is known."""
        return (shape[0], *(None if side is None else side + 2 for side in shape[1:3]), shape[3])


def standardize(kernel: Any) -> Any:
    """Weight standardisation of an HWIO kernel [kh, kw, in, out], computed in float32, returned in its own dtype."""
    value = ops.cast(kernel, "float32")
    mean, variance = ops.moments(value, axes=(0, 1, 2), keepdims=True)
    return ops.cast((value - mean) / ops.sqrt(variance + WEIGHT_EPSILON), kernel.dtype)


def bit(
    arch: str | Arch,
    classes: int,
    image_size: int | None = None,
    *,
    root_pool: str = "zero",
    folded: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> keras.Model:
    """Builds a BiT: images float [batch, height, width, 3] in [-1, 1] -> logits float32 [batch, classes].

    Args:
        arch: a name in `ARCHS`, or an `Arch`.
        classes: width of the head, at least 1. The head starts at zero, as in the paper's runs.
        image_size: height and width in pixels; None leaves them open.
        root_pool: "zero" pads the max pool with zeros (the released BiT models); "inf" ignores the border (big_vision's
            own implementation, in which the distilled models may have been trained).
        folded: build plain convolutions, for kernels that were standardised once (`fold`).
        seed: of the kernels' initial values; each layer gets its own from it.

    Raises:
        ValueError: unknown `arch` or `root_pool`.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f"unknown BiT architecture {arch!r}; known: {', '.join(ARCHS)}")
        name, arch = name or f"bit_{arch.lower()}", ARCHS[arch]
    if root_pool not in ("zero", "inf"):
        raise ValueError(f"root_pool is {root_pool!r}; it must be 'zero' or 'inf'")
    conv_class = keras.layers.Conv2D if folded else StdConv2D
    seeds = iter(range(seed * 1_000_003, seed * 1_000_003 + 1_000_003))

    def conv(x: Any, filters: int, size: int, stride: int, name: str) -> Any:
        if size > 1:
            x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        init = keras.initializers.GlorotUniform(seed=next(seeds))
        return conv_class(filters, size, strides=stride, use_bias=False, kernel_initializer=init, name=name)(x)

    def norm_relu(x: Any, name: str) -> Any:
        x = keras.layers.GroupNormalization(arch.groups, epsilon=GROUP_EPSILON, name=name)(x)
        return keras.layers.ReLU(name=f"{name}_relu")(x)

    inputs = keras.Input((image_size, image_size, 3), name="images")
    x = conv(inputs, arch.filters, 7, 2, "root_conv")
    if root_pool == "zero":
        x = keras.layers.ZeroPadding2D(1, name="root_pool_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, name="root_pool")(x)
    else:
        x = PadLowest2D(name="root_pool_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, name="root_pool")(x)
    for block, units in enumerate(arch.units):
        filters = arch.filters * 2**block
        for unit in range(units):
            prefix = f"block{block + 1}_unit{unit + 1:02d}"
            stride = 2 if unit == 0 and block > 0 else 1
            y = norm_relu(x, f"{prefix}_a_norm")
            # The projection takes the pre-activated input and has no normalisation of its own.
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
    """The same function with weight standardisation done once: a copy whose convolutions are plain `Conv2D`s.

    The copy loads without this package, and saves a pass over all weights in each forward pass. A model without
    standardised convolutions is copied as it is.
    """

    def plain(layer: Any) -> Any:
        kind = keras.layers.Conv2D if type(layer) is StdConv2D else type(layer)
        return kind.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=plain, recursive=True)
    for old, new in zip(leaves(model), leaves(copy), strict=True):
        weights = old.get_weights()
        if type(old) is StdConv2D:
            weights[0] = ops.convert_to_numpy(standardize(weights[0]))
        new.set_weights(weights)
    return copy


def leaves(model: keras.Model) -> list[keras.layers.Layer]:
    """Layers of a model and of the models in it, in the data's order."""
    found = []
    for layer in model.layers:
        found += leaves(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def is_plain(model: Any) -> bool:
    """Whether a model is made of layers that can be exchanged one by one (Functional or Sequential, all the way down)."""
    kinds = (keras.Sequential, keras.src.models.Functional)
    return isinstance(model, kinds) and all(is_plain(x) for x in model.layers if isinstance(x, keras.Model))
