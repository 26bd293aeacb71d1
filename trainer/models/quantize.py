"""A frozen network made cheap: in bfloat16, or with int8 convolutions between bfloat16 activations. And what a pass costs.

int8: a kernel is rounded to whole numbers from -127 to 127 with a scale for each output channel; what it is applied to is rounded
to 256 whole numbers with one scale for the layer, found once on a few batches. Products are summed in int32, without any error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.python.ops import control_flow_util

from trainer.core.errors import ConfigError
from trainer.models.bit import flat_layers

FORMS = ("float32", "bfloat16", "int8")
LEVELS = 127  # of kernels, on both sides of zero: -128 is not used
# A sum of so many products of two int8 numbers is below 2^24, so float32 holds it and every part of it exactly.
_EXACT_TERMS = 2**24 // (128 * LEVELS)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The 256 values that a layer's input is rounded to: scale * (q - zero), q from -128 to 127.

    Attributes:
        scale: distance of two neighbours.
        zero: the q of 0: 0, or -128 for inputs that are never negative, such as those after a ReLU.
    """

    scale: float
    zero: int

    @classmethod
    def of(cls, least: float, most: float) -> Grid:
        """The grid for inputs within [least, most].

        Its scale is rounded up to 8 bits of mantissa: the last bits of what was seen differ between devices; the scale, and so
        what the teacher says, should not.
        """
        zero = -128 if least >= 0 else 0
        largest = max(abs(least), abs(most)) / (LEVELS - zero)
        if not largest > 0:
            return cls(1.0, zero)
        mantissa, exponent = np.frexp(largest)
        return cls(float(np.ldexp(np.ceil(mantissa * 256.0 - 1e-3) / 256.0, exponent)), zero)

    def round(self, values: Any) -> tf.Tensor:
        """int8 q of values, half to even, clipped; computed in float32."""
        q = tf.round(tf.cast(values, tf.float32) / self.scale) + float(self.zero)
        return tf.cast(tf.clip_by_value(q, -128.0, float(LEVELS)), tf.int8)


def weight_scales(kernel: np.ndarray) -> np.ndarray:
    """float32 [out]: for each output channel (the last axis) its largest magnitude over 127; 1 where all is zero."""
    largest = np.abs(kernel.astype(np.float32)).max(axis=tuple(range(kernel.ndim - 1)))
    return np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1)).astype(np.float32)


def convolve(
    values: tf.Tensor, kernel: tf.Tensor, strides: tuple[int, int], dilation: tuple[int, int], native: bool
) -> tf.Tensor:
    """int8 [n, h, w, in] with int8 [kh, kw, in, out], without padding -> int32 [n, h', w', out], exact.

    Args:
        native: where XLA compiles this, ask it for a convolution of int8 numbers with int32 sums. Elsewhere, and where it has
            none worth the name (a CPU), float32 convolutions of few enough channels to be exact do the same.
    """
    if native and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        numbers = xla_data_pb2.ConvolutionDimensionNumbers(
            input_batch_dimension=0,
            input_feature_dimension=3,
            input_spatial_dimensions=[1, 2],
            kernel_input_feature_dimension=2,
            kernel_output_feature_dimension=3,
            kernel_spatial_dimensions=[0, 1],
            output_batch_dimension=0,
            output_feature_dimension=3,
            output_spatial_dimensions=[1, 2],
        )
        return xla.conv(
            values, kernel, strides, ((0, 0), (0, 0)), (1, 1), dilation, numbers, preferred_element_type=tf.int32
        )
    height, width, channels, _ = kernel.shape
    few = max(1, _EXACT_TERMS // (height * width))
    parts = []
    for first in range(0, channels, few):
        part = tf.nn.conv2d(
            tf.cast(values[..., first : first + few], tf.float32),
            tf.cast(kernel[:, :, first : first + few], tf.float32),
            strides,
            "VALID",
            dilations=dilation,
        )
        parts.append(tf.cast(tf.round(part), tf.int32))
    return tf.add_n(parts)


class Int8Conv2D(keras.layers.Layer):
    """A frozen convolution, or a dense layer as one, of int8 numbers: compute dtype in, compute dtype out."""

    def __init__(self, layer: keras.layers.Layer, grid: Grid, *, native: bool, dtype: str) -> None:
        """
        Args:
            layer: a Conv2D without groups, or a Dense layer of [n, in].
            grid: for its inputs.
            native: see `convolve`.
            dtype: of what comes out.
        """
        super().__init__(name=layer.name, dtype=dtype, trainable=False)
        self._dense = isinstance(layer, keras.layers.Dense)
        kernel = keras.ops.convert_to_numpy(layer.kernel).astype(np.float32)
        kernel = kernel[None, None] if self._dense else kernel
        self._strides = (1, 1) if self._dense else layer.strides
        self._dilation = (1, 1) if self._dense else layer.dilation_rate
        self._same = not self._dense and layer.padding == "same"
        self._native, self._activation = native, layer.activation
        self._grid = grid
        scales = weight_scales(kernel)
        whole = np.clip(np.rint(kernel / scales), -LEVELS, LEVELS).astype(np.int8)
        bias = keras.ops.convert_to_numpy(layer.bias) if layer.use_bias else np.zeros(kernel.shape[-1])

        def keep(name: str, value: np.ndarray) -> Any:
            initial = keras.initializers.Constant(0)
            made = self.add_weight(
                name=name,
                shape=value.shape,
                dtype=value.dtype.name,
                initializer=initial,
                trainable=False,
                autocast=False,
            )
            made.assign(value)
            return made

        self.kernel = keep("kernel", whole)
        self.scales = keep("scales", scales * np.float32(grid.scale))
        # The sum of (q - zero) * w is the sum of q * w and this.
        self.offset = keep("offset", (-grid.zero * whole.sum(axis=(0, 1, 2), dtype=np.int64)).astype(np.int32))
        self.bias = keep("bias", bias.astype(np.float32))

    def call(self, inputs: Any) -> Any:
        """[n, h, w, in] or, of a dense layer, [n, in]."""
        values = self._grid.round(inputs[:, None, None] if self._dense else inputs)
        if self._same:
            values = tf.pad(values, [[0, 0], *self._pads(values.shape), [0, 0]], constant_values=self._grid.zero)
        total = convolve(values, self.kernel.value, self._strides, self._dilation, self._native) + self.offset.value
        outputs = tf.cast(total, tf.float32) * self.scales.value + self.bias.value
        outputs = outputs[:, 0, 0] if self._dense else outputs
        return ops.cast(self._activation(outputs), self.compute_dtype)

    def _pads(self, shape: Any) -> list[list[int]]:
        """TensorFlow's SAME: all that is missing at the end, and of an odd number one more there."""
        found = []
        sides, sizes = shape[1:3], self.kernel.shape[:2]
        for side, size, stride, dilation in zip(sides, sizes, self._strides, self._dilation, strict=True):
            reach = (size - 1) * dilation + 1
            missing = max(0, (-(-side // stride) - 1) * stride + reach - side)
            found.append([missing // 2, missing - missing // 2])
        return found


def _parts(model: keras.Model) -> tuple[list[keras.layers.Layer], frozenset[int]]:
    """Kernels to make cheap, and the ids of the layers that stay in float32: before the first, and from the last one on."""
    every = list(flat_layers(model))
    kernels = [i for i, layer in enumerate(every) if getattr(layer, "kernel", None) is not None]
    if len(kernels) < 2:
        raise ConfigError("it has fewer than two layers with kernels")
    kept = [*every[: kernels[0]], *every[kernels[-1] :]]
    return [every[i] for i in kernels[:-1]], frozenset(id(layer) for layer in kept)


def _clone(model: keras.Model, exchange: Callable[[keras.layers.Layer], keras.layers.Layer | None]) -> keras.Model:
    """A copy with the weights, in which `exchange` gives a layer's replacement; None leaves the layer as it is, in bfloat16."""
    made: list[tuple[Any, Any]] = []
    _, kept = _parts(model)

    def one(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.Layer):
            return type(layer).from_config(layer.get_config())
        if (other := exchange(layer)) is not None:
            return other
        settings = layer.get_config()
        if id(layer) not in kept and not isinstance(layer, keras.layers.InputLayer):
            settings["dtype"] = "bfloat16"
        copy = type(layer).from_config(settings)
        made.append((layer, copy))
        return copy

    clone = keras.models.clone_model(model, clone_function=one, recursive=True)
    for layer, copy in made:
        copy.set_weights(layer.get_weights())
    clone.trainable = False
    return clone


def bfloat16(model: keras.Model) -> keras.Model:
    """A copy with weights and activations in bfloat16, but for what comes before the first kernel and the classifier."""
    return _clone(model, lambda _: None)


def int8(model: keras.Model, batches: list[tf.Tensor], *, native: bool) -> keras.Model:
    """A copy whose convolutions and hidden dense layers take and hold int8 numbers, with bfloat16 between them.

    Depthwise and grouped convolutions stay in bfloat16, and the classifier in float32.

    Args:
        model: float32.
        batches: float32 [n, height, width, 3] in the model's own range, on which the scales of inputs are found.
        native: see `convolve`.
    """
    chosen = [layer for layer in _parts(model)[0] if _is_convertible(layer)]
    grids = dict(zip((id(layer) for layer in chosen), _grids(model, chosen, batches), strict=True))

    def exchange(layer: keras.layers.Layer) -> keras.layers.Layer | None:
        if id(layer) not in grids:
            return None
        return Int8Conv2D(layer, grids[id(layer)], native=native, dtype="bfloat16")

    return _clone(model, exchange)


def _is_convertible(layer: keras.layers.Layer) -> bool:
    if type(layer) is keras.layers.Dense:
        return len(layer.input.shape) == 2
    return type(layer) is keras.layers.Conv2D and layer.groups == 1 and layer.data_format == "channels_last"


def _grids(model: keras.Model, layers: list[keras.layers.Layer], batches: list[tf.Tensor]) -> list[Grid]:
    """The grid of each layer's input, from its least and its greatest value over all batches."""
    seen: dict[int, list[tf.Tensor]] = {}

    def watched(layer: keras.layers.Layer) -> Callable:
        call = layer.call

        def watching(inputs: Any, *rest: Any, **more: Any) -> Any:
            values = tf.cast(inputs, tf.float32)
            # Of a layer that is used more than once, over all its uses.
            extremes = [tf.reduce_min(values), tf.reduce_max(values), *seen.get(id(layer), [])]
            seen[id(layer)] = [tf.reduce_min(extremes), tf.reduce_max(extremes)]
            return call(inputs, *rest, **more)

        return watching

    def forward(images: tf.Tensor) -> tf.Tensor:
        seen.clear()
        model(images, training=False)
        return tf.convert_to_tensor([seen[id(layer)] for layer in layers])

    if not layers:
        return []
    calls = [layer.call for layer in layers]
    try:
        for layer in layers:
            layer.call = watched(layer)
        run = everywhere(forward)
        found = np.stack([run(batch) for batch in batches])
    finally:
        for layer, call in zip(layers, calls, strict=True):
            layer.call = call
    return [Grid.of(float(one[:, 0].min()), float(one[:, 1].max())) for one in found.swapaxes(0, 1)]


def everywhere(function: Callable[[tf.Tensor], tf.Tensor], *, jit_compile: bool = False) -> Callable[[Any], np.ndarray]:
    """A function of one batch, compiled, run by every replica of the current strategy; the first one's answer."""
    strategy = tf.distribute.get_strategy()
    compiled = tf.function(function, jit_compile=jit_compile)
    run = tf.function(lambda batch: strategy.run(compiled, (batch,)))
    return lambda batch: strategy.experimental_local_results(run(tf.constant(batch)))[0].numpy()


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        parameters: numbers in the variables.
        bytes: of the variables.
        macs: multiply-adds of convolutions, dense layers and other matrix products; None where a shape is not known.
    """

    parameters: int
    bytes: int
    macs: int | None

    @property
    def gflops(self) -> float | None:
        """Billions of operations, a multiply-add being two."""
        return None if self.macs is None else 2e-9 * self.macs


def cost(model: Any, size: int) -> Cost:
    """Counts a model's numbers, and the multiply-adds of a pass of one image of `size` x `size` pixels in its graph."""
    spec = tf.TensorSpec([1, size, size, 3], tf.float32)
    graph = tf.function(lambda images: model(images, training=False)).get_concrete_function(spec).graph
    # A program gives its variables in several orders.
    every = model.variables if isinstance(model, keras.Model) else [v for group in model.variables for v in group]
    variables = list({id(v): v for v in every}.values())
    total = sum(int(np.prod(v.shape)) for v in variables)
    size_of = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables)
    try:
        macs: int | None = sum(_macs(operation) for operation in _operations(graph))
    except ValueError:  # a shape that is not known before it runs
        macs = None
    return Cost(total, size_of, macs)


def _operations(graph: Any) -> Iterator[Any]:
    """A graph's operations and those of the functions it calls, once for each call."""
    for operation in graph.get_operations():
        yield operation
        if "PartitionedCall" in operation.type:
            name = operation.get_attr("f").name
            inner = graph._get_function(name)
            if inner is None or getattr(inner, "graph", None) is None:
                raise ValueError(f"the function {name} cannot be looked into")
            yield from _operations(inner.graph)


def _macs(operation: Any) -> int:
    def count(shape: Any) -> int:
        return int(np.prod(shape.as_list()))  # as_list raises ValueError where the rank is unknown

    def known(shape: Any) -> Any:
        if not shape.is_fully_defined():
            raise ValueError(f"{operation.name} has an unknown shape")
        return shape

    kind, ins = operation.type, operation.inputs
    if kind in ("Conv2D", "Conv3D"):
        return count(known(operation.outputs[0].shape)) * count(known(ins[1].shape)[:-1])
    if kind == "DepthwiseConv2dNative":
        return count(known(operation.outputs[0].shape)) * count(known(ins[1].shape)[:2])
    if kind in ("MatMul", "BatchMatMulV2", "BatchMatMulV3", "BatchMatMul"):
        turned = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        inner = known(ins[0].shape)[-2 if turned else -1]
        return count(known(operation.outputs[0].shape)) * int(inner)
    if kind == "Einsum":
        raise ValueError("an Einsum's cost is not counted")
    return 0
