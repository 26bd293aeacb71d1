"""Quantization of frozen networks to bfloat16 or int8, and the cost of a forward pass.

int8: kernels are integers from -127 to 127 with a scale for each output channel. Inputs of a layer
are integers from -128 to 127 with one scale, calibrated on a few batches. Sums are exact, in
int32. Activations between layers are bfloat16.
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
from trainer.models.saved_models import SavedClassifier

LEVELS = 127  # of kernels, on each side of zero; -128 is not used
# float32 holds all sums of so many products of two int8 numbers exactly: they are below 2^24.
_EXACT_TERMS = 2**24 // (128 * LEVELS)


@dataclasses.dataclass(frozen=True)
class InputQuantization:
    """The values that a layer's input is rounded to: scale * (q - zero_point), q in [-128, 127].

    Attributes:
        scale: distance between neighbouring values.
        zero_point: the q of 0: 0; or -128 for inputs that are never negative, as after a ReLU.
    """

    scale: float
    zero_point: int

    @classmethod
    def from_range(cls, minimum: float, maximum: float) -> InputQuantization:
        """The quantization of inputs in [minimum, maximum].

        The scale is rounded up to 8 bits of mantissa: the last bits of calibrated ranges differ
        between devices, and the teacher's logits should not.
        """
        zero_point = -128 if minimum >= 0 else 0
        scale = max(abs(minimum), abs(maximum)) / (LEVELS - zero_point)
        if not scale > 0:
            return cls(1.0, zero_point)
        mantissa, exponent = np.frexp(scale)
        return cls(float(np.ldexp(np.ceil(mantissa * 256.0 - 1e-3) / 256.0, exponent)), zero_point)

    def quantize(self, values: tf.Tensor | np.ndarray) -> tf.Tensor:
        """The int8 q of values, rounded half to even and clipped; computed in float32."""
        q = tf.round(tf.cast(values, tf.float32) / self.scale) + float(self.zero_point)
        return tf.cast(tf.clip_by_value(q, -128.0, float(LEVELS)), tf.int8)


def weight_scales(kernel: np.ndarray) -> np.ndarray:
    """Scales of the output channels, float32 [out]: largest magnitude / 127, or 1 if it is 0."""
    largest = np.abs(kernel.astype(np.float32)).max(axis=tuple(range(kernel.ndim - 1)))
    return np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1)).astype(np.float32)


def convolve(
    values: tf.Tensor, kernel: tf.Tensor, strides: tuple[int, int], dilation: tuple[int, int], native: bool
) -> tf.Tensor:
    """Convolves int8 numbers, without padding and without rounding.

    Args:
        values: int8 [n, h, w, in].
        kernel: int8 [kh, kw, in, out].
        strides: along height and width.
        dilation: along height and width.
        native: under XLA, use a convolution of int8 numbers with int32 sums. Otherwise, and
            without XLA, use float32 convolutions of so few channels each that they are exact
            (faster on a CPU).

    Returns:
        int32 [n, h', w', out].
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
    group = max(1, _EXACT_TERMS // (height * width))
    sums = []
    for first in range(0, channels, group):
        part = tf.nn.conv2d(
            tf.cast(values[..., first : first + group], tf.float32),
            tf.cast(kernel[:, :, first : first + group], tf.float32),
            strides,
            "VALID",
            dilations=dilation,
        )
        sums.append(tf.cast(tf.round(part), tf.int32))
    return tf.add_n(sums)


class Int8Conv2D(keras.layers.Layer):
    """A frozen int8 convolution or dense layer; inputs and outputs have its compute dtype."""

    def __init__(self, layer: keras.Layer, quantization: InputQuantization, *, native: bool, dtype: str) -> None:
        """
        Args:
            layer: a Conv2D without groups, or a Dense layer of [n, in].
            quantization: of its inputs.
            native: see `convolve`.
            dtype: of the outputs.
        """
        super().__init__(name=layer.name, dtype=dtype, trainable=False)
        self._dense = isinstance(layer, keras.layers.Dense)
        kernel = keras.ops.convert_to_numpy(layer.kernel).astype(np.float32)
        kernel = kernel[None, None] if self._dense else kernel
        self._strides = (1, 1) if self._dense else layer.strides
        self._dilation = (1, 1) if self._dense else layer.dilation_rate
        self._same_padding = not self._dense and layer.padding == "same"
        self._native, self._activation = native, layer.activation
        self._quantization = quantization
        scales = weight_scales(kernel)
        quantized = np.clip(np.rint(kernel / scales), -LEVELS, LEVELS).astype(np.int8)
        bias = keras.ops.convert_to_numpy(layer.bias) if layer.use_bias else np.zeros(kernel.shape[-1])
        # The sum of (q - zero_point) * w is the sum of q * w plus this.
        offset = -quantization.zero_point * quantized.sum(axis=(0, 1, 2), dtype=np.int64)
        self.kernel = self._add_constant("kernel", quantized)
        self.scales = self._add_constant("scales", scales * np.float32(quantization.scale))
        self.offset = self._add_constant("offset", offset.astype(np.int32))
        self.bias = self._add_constant("bias", bias.astype(np.float32))

    def _add_constant(self, name: str, value: np.ndarray) -> keras.Variable:
        variable = self.add_weight(
            name=name,
            shape=value.shape,
            dtype=value.dtype.name,
            initializer=keras.initializers.Constant(0),
            trainable=False,
            autocast=False,
        )
        variable.assign(value)
        return variable

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[n, h, w, in] -> [n, h', w', out]; for a dense layer [n, in] -> [n, out]."""
        values = self._quantization.quantize(inputs[:, None, None] if self._dense else inputs)
        if self._same_padding:
            padding = [[0, 0], *self._padding(values.shape), [0, 0]]
            values = tf.pad(values, padding, constant_values=self._quantization.zero_point)
        total = convolve(values, self.kernel.value, self._strides, self._dilation, self._native) + self.offset.value
        outputs = tf.cast(total, tf.float32) * self.scales.value + self.bias.value
        outputs = outputs[:, 0, 0] if self._dense else outputs
        return ops.cast(self._activation(outputs), self.compute_dtype)

    def _padding(self, shape: tf.TensorShape) -> list[list[int]]:
        """TensorFlow's SAME padding: of an odd number, the larger half is at the end."""
        padding = []
        sides, sizes = shape[1:3], self.kernel.shape[:2]
        for side, size, stride, dilation in zip(sides, sizes, self._strides, self._dilation, strict=True):
            reach = (size - 1) * dilation + 1
            missing = max(0, (-(-side // stride) - 1) * stride + reach - side)
            padding.append([missing // 2, missing - missing // 2])
        return padding


def _split_layers(model: keras.Model) -> tuple[list[keras.Layer], frozenset[int]]:
    """Layers with a kernel but the last, and ids of the layers that stay in float32.

    These are the layers before the first kernel, and those from the last kernel on.
    """
    layers = list(flat_layers(model))
    with_kernel = [i for i, layer in enumerate(layers) if getattr(layer, "kernel", None) is not None]
    if len(with_kernel) < 2:
        raise ConfigError("it has fewer than two layers with kernels")
    float32_layers = [*layers[: with_kernel[0]], *layers[with_kernel[-1] :]]
    return [layers[i] for i in with_kernel[:-1]], frozenset(id(layer) for layer in float32_layers)


def _clone(model: keras.Model, replacement: Callable[[keras.Layer], keras.Layer | None]) -> keras.Model:
    """A copy with the weights, in bfloat16.

    Args:
        model: float32.
        replacement: the layer to use in place of a layer; None: the same one in bfloat16, or in
            float32 where `_split_layers` says so.
    """
    copied: list[tuple[keras.Layer, keras.Layer]] = []
    _, float32_ids = _split_layers(model)

    def clone_layer(layer: keras.Operation) -> keras.Operation:
        if not isinstance(layer, keras.Layer):
            return type(layer).from_config(layer.get_config())
        if (new := replacement(layer)) is not None:
            return new
        settings = layer.get_config()
        if id(layer) not in float32_ids and not isinstance(layer, keras.layers.InputLayer):
            settings["dtype"] = "bfloat16"
        copy = type(layer).from_config(settings)
        copied.append((layer, copy))
        return copy

    clone = keras.models.clone_model(model, clone_function=clone_layer, recursive=True)
    for layer, copy in copied:
        copy.set_weights(layer.get_weights())
    clone.trainable = False
    return clone


def bfloat16(model: keras.Model) -> keras.Model:
    """A copy in bfloat16, except the layers before the first kernel and the classifier."""
    return _clone(model, lambda _: None)


def int8(model: keras.Model, batches: list[tf.Tensor], *, native: bool) -> keras.Model:
    """A copy whose convolutions and hidden dense layers are int8.

    Activations, depthwise and grouped convolutions are bfloat16; the classifier is float32.

    Args:
        model: float32.
        batches: float32 [n, height, width, 3] in the model's value range, to calibrate the scales
            of inputs.
        native: see `convolve`.

    Returns:
        A frozen copy. `model` is unchanged.

    Raises:
        ConfigError: the model has fewer than two layers with kernels.
    """
    layers = [layer for layer in _split_layers(model)[0] if _is_quantizable(layer)]
    quantizations = dict(zip((id(layer) for layer in layers), _calibrate(model, layers, batches), strict=True))

    def replacement(layer: keras.Layer) -> keras.Layer | None:
        if id(layer) not in quantizations:
            return None
        return Int8Conv2D(layer, quantizations[id(layer)], native=native, dtype="bfloat16")

    return _clone(model, replacement)


def _is_quantizable(layer: keras.Layer) -> bool:
    if type(layer) is keras.layers.Dense:
        return len(layer.input.shape) == 2
    return type(layer) is keras.layers.Conv2D and layer.groups == 1 and layer.data_format == "channels_last"


def _calibrate(model: keras.Model, layers: list[keras.Layer], batches: list[tf.Tensor]) -> list[InputQuantization]:
    """The quantization of each layer's input, from its minimum and maximum over all batches."""
    ranges: dict[int, list[tf.Tensor]] = {}

    def recording(layer: keras.Layer) -> Callable:
        call = layer.call

        def record(inputs: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
            values = tf.cast(inputs, tf.float32)
            # A layer that is called more than once has one range over all calls.
            extremes = [tf.reduce_min(values), tf.reduce_max(values), *ranges.get(id(layer), [])]
            ranges[id(layer)] = [tf.reduce_min(extremes), tf.reduce_max(extremes)]
            return call(inputs, *args, **kwargs)

        return record

    def forward(images: tf.Tensor) -> tf.Tensor:
        ranges.clear()
        model(images, training=False)
        return tf.convert_to_tensor([ranges[id(layer)] for layer in layers])

    if not layers:
        return []
    calls = [layer.call for layer in layers]
    try:
        for layer in layers:
            layer.call = recording(layer)
        run = replicated(forward)
        observed = np.stack([run(batch) for batch in batches])  # [batches, layers, 2]
    finally:
        for layer, call in zip(layers, calls, strict=True):
            layer.call = call
    return [InputQuantization.from_range(float(x[:, 0].min()), float(x[:, 1].max())) for x in observed.swapaxes(0, 1)]


def replicated(
    function: Callable[[tf.Tensor], tf.Tensor], *, jit_compile: bool = False
) -> Callable[[tf.Tensor | np.ndarray], np.ndarray]:
    """Compiles a function to run on every replica of the current strategy with the same batch.

    Args:
        function: of a batch.
        jit_compile: compile it with XLA.

    Returns:
        A function that returns the first replica's result.
    """
    strategy = tf.distribute.get_strategy()
    compiled = tf.function(function, jit_compile=jit_compile)
    run = tf.function(lambda batch: strategy.run(compiled, (batch,)))
    return lambda batch: strategy.experimental_local_results(run(tf.constant(batch)))[0].numpy()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Size of a model, and operations of a forward pass of one image.

    Attributes:
        parameters: number of elements of all variables.
        bytes: of the variables.
        macs: multiply-adds of convolutions, dense layers and other matrix products; None if a
            shape is unknown.
    """

    parameters: int
    bytes: int
    macs: int | None

    @property
    def gflops(self) -> float | None:
        """Billions of operations; a multiply-add is two."""
        return None if self.macs is None else 2e-9 * self.macs


def cost(model: keras.Model | SavedClassifier, size: int) -> Cost:
    """The cost of one image of `size` x `size` pixels, counted in the model's graph."""
    spec = tf.TensorSpec([1, size, size, 3], tf.float32)
    graph = tf.function(lambda images: model(images, training=False)).get_concrete_function(spec).graph
    # A SavedModel lists its variables in several orders.
    listed = model.variables if isinstance(model, keras.Model) else [v for order in model.variables for v in order]
    variables = list({id(v): v for v in listed}.values())
    parameters = sum(int(np.prod(v.shape)) for v in variables)
    size_in_bytes = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables)
    try:
        macs: int | None = sum(_macs(operation) for operation in _operations(graph))
    except ValueError:  # a shape that is unknown before the graph runs
        macs = None
    return Cost(parameters, size_in_bytes, macs)


def _operations(graph: tf.Graph) -> Iterator[tf.Operation]:
    """Operations of a graph and of the functions that it calls, once for each call."""
    for operation in graph.get_operations():
        yield operation
        if "PartitionedCall" in operation.type:
            name = operation.get_attr("f").name
            function = graph._get_function(name)
            if function is None or getattr(function, "graph", None) is None:
                raise ValueError(f"the graph of function {name} is not available")
            yield from _operations(function.graph)


def _macs(operation: tf.Operation) -> int:
    def elements(shape: tf.TensorShape) -> int:
        return int(np.prod(shape.as_list()))  # as_list raises ValueError if the rank is unknown

    def checked(shape: tf.TensorShape) -> tf.TensorShape:
        if not shape.is_fully_defined():
            raise ValueError(f"{operation.name} has an unknown shape")
        return shape

    kind, inputs = operation.type, operation.inputs
    if kind in ("Conv2D", "Conv3D"):
        return elements(checked(operation.outputs[0].shape)) * elements(checked(inputs[1].shape)[:-1])
    if kind == "DepthwiseConv2dNative":
        return elements(checked(operation.outputs[0].shape)) * elements(checked(inputs[1].shape)[:2])
    if kind in ("MatMul", "BatchMatMulV2", "BatchMatMulV3", "BatchMatMul"):
        transposed = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        inner = checked(inputs[0].shape)[-2 if transposed else -1]
        return elements(checked(operation.outputs[0].shape)) * int(inner)
    if kind == "Einsum":
        raise ValueError("an Einsum's cost is not counted")
    return 0
