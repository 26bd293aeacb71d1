"""Quantization against NumPy to the bit; agreement with float32; cost against hand counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from conftest import CLASSES, IMAGE, build_job, here, opinionated

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError
from trainer.data.order import ExampleSampler
from trainer.models import bit, quantize, students
from trainer.run import teacher_precision


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares fewer views than a job does."""
    monkeypatch.setattr(teacher_precision, "IMAGES", 128)
    monkeypatch.setattr(teacher_precision, "CALIBRATION_IMAGES", 64)


def np_int8(
    x: np.ndarray, layer: keras.layers.Conv2D, quantization: quantize.InputQuantization
) -> tuple[np.ndarray, np.ndarray]:
    """From the definition: the sums of (q - zero_point) * w in int64, and the layer's outputs."""
    kernel = layer.kernel.numpy()
    scales = (np.abs(kernel).max((0, 1, 2)) / np.float32(127)).astype(np.float32)
    w = np.rint(kernel / scales).astype(np.int64)
    # Division in float32, as on every device.
    q = (
        np.clip(np.rint(x / np.float32(quantization.scale)) + quantization.zero_point, -128, 127).astype(np.int64)
        - quantization.zero_point
    )
    stride, size = layer.strides[0], kernel.shape[0]
    if layer.padding == "same":
        missing = max(0, (-(-x.shape[1] // stride) - 1) * stride + size - x.shape[1])
        edge = (missing // 2, missing - missing // 2)
        q = np.pad(q, ((0, 0), edge, edge, (0, 0)))
    total = reference.convolution(q, w, stride, 0).astype(np.int64)
    assert np.abs(total).max() < 2**31
    scale = scales * np.float32(quantization.scale)
    return total, total.astype(np.float32) * scale + layer.bias.numpy()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("least", [0.0, -3.0])
def test_int8_convolution_equals_numpy_to_the_bit(native: bool, padding: str, stride: int, least: float) -> None:
    """350 channels times 9 taps: the sums exceed what float32 holds exactly."""
    channels = 8 if native else 350
    rng = np.random.default_rng(0)
    layer = keras.layers.Conv2D(6, 3, strides=stride, padding=padding)
    layer.build((None, 9, 9, channels))
    kernel = rng.choice([-1.0, 1.0], (3, 3, channels, 6)) * rng.uniform(0.9, 1.0, (3, 3, channels, 6))
    kernel[..., 0] = np.abs(kernel[..., 0])
    layer.set_weights([kernel.astype(np.float32), rng.normal(size=6).astype(np.float32)])
    x = rng.uniform(least, 3.0, (2, 9, 9, channels)).astype(np.float32)
    x[0] = np.maximum(x[0], 2.7)
    quantization = quantize.InputQuantization.from_range(float(x.min()), 3.0)
    assert quantization.zero_point == (-128 if least == 0.0 else 0)
    expected, outputs = np_int8(x, layer, quantization)
    if not native:
        assert np.abs(expected).max() > 2**24
    quantized = quantize.Int8Conv2D(layer, quantization, native=native, dtype="float32")
    assert quantized.kernel.value.dtype == tf.int8
    sums = []

    def run(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        result = quantized(images)
        return result, tf.round((result - quantized.bias.value) / quantized.scales.value)

    result, sums = tf.function(run, jit_compile=native)(tf.constant(x))
    assert np.allclose(sums.numpy(), expected, rtol=3e-7)
    assert np.allclose(result.numpy(), outputs, rtol=1e-6, atol=1e-6)
    values = quantized._quantization.quantize(x)
    if padding == "valid":
        direct = tf.function(
            lambda q: (
                quantize.convolve(q, quantized.kernel.value, quantized._strides, (1, 1), native)
                + quantized.offset.value
            ),
            jit_compile=native,
        )(values)
        assert direct.dtype == tf.int32
        assert (direct.numpy() == expected).all()


def test_xla_gets_int8_convolutions() -> None:
    """The XLA program has an s8 convolution with s32 sums for each kernel but the classifier's."""
    model = bit.fold(bit.bit("tiny", CLASSES, IMAGE, seed=1))
    kernels = sum(isinstance(layer, keras.layers.Conv2D) for layer in model.layers)
    quantized = quantize.int8(model, [tf.random.stateless_uniform([4, IMAGE, IMAGE, 3], [1, 2], -1, 1)], native=True)
    run = tf.function(lambda x: quantized(x, training=False), jit_compile=True)
    text = run.experimental_get_compiler_ir(tf.zeros([2, IMAGE, IMAGE, 3]))(stage="hlo")
    convolutions = re.findall(r"= (\w+)\[[^=]*convolution\(([^)]*)\)", text)
    assert [kind for kind, _ in convolutions] == ["s32"] * kernels
    assert len(re.findall(r"s8\[[\d,]*\]\S* parameter|s8\[", text)) >= 2 * kernels


def test_quantized_models_have_their_dtypes_and_agree() -> None:
    model = opinionated(bit.fold(bit.bit("tiny", CLASSES, IMAGE, seed=1)), 2)
    x = tf.random.stateless_uniform([64, IMAGE, IMAGE, 3], [1, 2], -1, 1)
    expected = model(x).numpy()
    bfloat16, int8 = quantize.bfloat16(model), quantize.int8(model, [x], native=False)
    for quantized, dtype, tolerance in ((bfloat16, "bfloat16", 0.05), (int8, "int8", 0.1)):
        logits = quantized(x)
        assert logits.dtype == tf.float32
        distance = np.abs(logits.numpy() - expected).max() / np.ptp(expected)
        assert 0 < distance < tolerance
        kernels = [v for v in quantized.variables if v.path.endswith("kernel")]
        assert [v.dtype for v in kernels] == [dtype] * (len(kernels) - 1) + ["float32"]
        assert not quantized.trainable_variables
    activations = keras.Model(
        bfloat16.inputs, [bfloat16.get_layer(n).output for n in ("root_conv", "final_norm", "head")]
    )(x)
    assert [a.dtype for a in activations] == [tf.bfloat16, tf.bfloat16, tf.float32]


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3-small",
        pytest.param("resnet50v2", marks=pytest.mark.slow),
        pytest.param("app:VGG16", marks=pytest.mark.slow),
    ],
)
def test_other_networks_are_quantized(name: str) -> None:
    model = students.build(name, CLASSES, 32)
    rng = np.random.default_rng(0)
    for v in model.variables:  # other batch statistics than a new model's
        if "moving" in v.path:
            v.assign(rng.uniform(0.5, 1.5, v.shape) if "variance" in v.path else rng.normal(0, 0.1, v.shape))
    x = rng.uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
    expected = model(x, training=False).numpy()
    scale = np.abs(expected).max()
    for quantized in (quantize.bfloat16(model), quantize.int8(model, [tf.constant(x)], native=False)):
        assert np.abs(quantized(x, training=False).numpy() - expected).max() < 0.3 * scale
    assert "int8" in {v.dtype for v in quantized.variables}


def test_nested_models_are_quantized() -> None:
    inner = opinionated(bit.fold(bit.bit("tiny", CLASSES, IMAGE, seed=1)), 2)
    outer = keras.Sequential([keras.Input((IMAGE, IMAGE, 3)), keras.layers.Rescaling(2.0, -1.0), inner])
    x = tf.random.stateless_uniform([8, IMAGE, IMAGE, 3], [1, 2])
    expected = outer(x).numpy()
    for quantized in (quantize.bfloat16(outer), quantize.int8(outer, [x], native=False)):
        assert 0 < np.abs(quantized(x).numpy() - expected).max() < 0.1 * np.ptp(expected)
        assert quantized.layers[0].compute_dtype == "float32"


@pytest.mark.parametrize(
    ("minimum", "maximum", "zero_point"), [(0.0, 2.0, -128), (-1.0, 2.0, 0), (-2.0, 1.0, 0), (0.0, 0.0, -128)]
)
def test_input_quantization_covers_the_range(minimum: float, maximum: float, zero_point: int) -> None:
    quantization = quantize.InputQuantization.from_range(minimum, maximum)
    assert quantization.zero_point == zero_point
    ends = quantization.scale * (np.array([-128, 127]) - zero_point)
    if maximum:
        largest = max(-minimum, maximum)
        reach = ends[1] if zero_point else quantization.scale * 127
        assert largest * (1 - 1e-4) <= reach <= largest * 1.01
    # The last bits, which differ between devices, do not change it.
    assert quantization == quantize.InputQuantization.from_range(minimum * (1 + 3e-7), maximum * (1 + 3e-7))


@pytest.mark.slow
def test_a_job_uses_the_quantized_teacher(make_config: Callable[..., Config]) -> None:
    config = make_config(teacher_precision=("int8",), min_teacher_agreement=0.5)
    job = build_job(config)
    assert job.teachers[0].precision == "int8"
    assert any(isinstance(layer, quantize.Int8Conv2D) for layer in job.teachers[0].model.layers)
    plain = build_job(dataclasses.replace(config, teacher_precision=("float32",), workdir=f"{config.workdir}p"))
    # The precision is part of a run's identity.
    assert plain.plan.identity["teacher_precision"] != job.plan.identity["teacher_precision"]
    losses = [each.run_steps(2, ExampleSampler(0, len(each.train_store), 8))["loss"] for each in (job, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


@pytest.mark.slow
def test_one_and_two_replicas_have_the_same_loss(make_config: Callable[..., Config]) -> None:
    config = make_config(teacher_precision=("int8",), min_teacher_agreement=0.5)
    losses = []
    for replicas in (1, 2):
        job = build_job(dataclasses.replace(config, workdir=f"{config.workdir}{replicas}"), replicas)
        losses.append(job.run_steps(2, ExampleSampler(0, len(job.train_store), 8))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_each_teacher_has_its_own_precision(make_config: Callable[..., Config], teacher_file: str) -> None:
    names = (f"keras:{teacher_file}", "random:bit-tiny")
    job = build_job(make_config(teacher=names, teacher_precision=("float32", "bfloat16"), min_teacher_agreement=0.5))
    assert [t.precision for t in job.teachers] == ["float32", "bfloat16"]
    with pytest.raises(ConfigError, match="2 times for 1 teachers"):
        make_config(teacher_precision=("float32", "bfloat16"))


def test_scales_depend_on_the_seed_only(make_config: Callable[..., Config]) -> None:
    job = build_job(make_config())

    def scales(seed: int) -> list[float]:
        config = dataclasses.replace(job.config, seed=seed)
        ((converted, _),) = teacher_precision.convert_and_compare(
            config, job.teachers[0], job.train_store, ("int8",), native=False, jit_compile=False
        )
        return [x._quantization.scale for x in converted.model.layers if isinstance(x, quantize.Int8Conv2D)]

    first = scales(0)
    assert first == scales(0)
    assert first != scales(1)


def test_too_little_agreement_is_refused(data: str, teacher_file: str, tmp_path: object) -> None:
    done = here(
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        "--teacher_precision=int8",
        "--min_teacher_agreement=1",
        "--student=bit-tiny",
        f"--image_size={IMAGE}",
        "--store_size=32",
        "--steps=2",
        "--batch_size=4",
    )
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"int8 gives the float32 class on \d\d\.\d\d% of 128 training views, KL \d\.\d\de", line)
    assert "--min_teacher_agreement=1" in line


def test_agreement_and_kl_match_numpy(make_config: Callable[..., Config]) -> None:
    """Against NumPy, on the views that a job compares."""
    config = make_config()
    job = build_job(config)
    (teacher,) = job.teachers
    ((converted, check),) = teacher_precision.convert_and_compare(
        job.config, teacher, job.train_store, ("bfloat16",), native=False, jit_compile=False
    )
    batches = teacher_precision.training_views(job.config, job.train_store, teacher.size, 128, 1)
    assert len(batches) == 2
    assert not (batches[0] == batches[1]).all()
    a, b = (np.concatenate([t.logits(tf.constant(v)).numpy() for v in batches]) for t in (teacher, converted))
    assert check.top1 == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    p, q = (z - np.log(np.exp(z.astype(np.float64)).sum(1, keepdims=True)) for z in (a, b))
    assert check.kl == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=0.02, abs=1e-6)
    assert check.images == 128


def test_a_saved_model_cannot_be_quantized(make_config: Callable[..., Config], tmp_path: object) -> None:
    keras.Sequential([keras.Input((IMAGE, IMAGE, 3)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]).export(
        f"{tmp_path}/saved", verbose=False
    )
    with pytest.raises(ConfigError, match="program whose layers cannot be exchanged"):
        build_job(
            make_config(
                teacher=(f"saved_model:{tmp_path}/saved",), teacher_range=("-1,1",), teacher_precision=("bfloat16",)
            )
        )


def test_quantized_logits_must_be_finite(make_config: Callable[..., Config], tmp_path: object) -> None:
    model = opinionated(bit.bit("tiny", CLASSES, IMAGE, seed=1), 2)
    model.get_layer("final_norm").set_weights(
        [np.full(w.shape, 1e38, np.float32) for w in model.get_layer("final_norm").get_weights()]
    )
    model.get_layer("head").set_weights(
        [np.full(w.shape, 1e38, np.float32) for w in model.get_layer("head").get_weights()]
    )
    model.save(f"{tmp_path}/huge.keras")
    with pytest.raises(DataError, match="not finite"):
        build_job(make_config(teacher=(f"keras:{tmp_path}/huge.keras",), teacher_precision=("bfloat16",)))


def hand_macs(arch: bit.Arch, size: int, classes: int) -> int:
    """Multiply-adds of a BiT, from its description."""
    side = size // 2
    total = side * side * 49 * 3 * arch.filters
    side //= 2
    channels = arch.filters
    for block, units in enumerate(arch.units):
        inner = arch.filters * 2**block
        for unit in range(units):
            stride = 2 if block and not unit else 1
            total += side * side * channels * inner  # a, before the stride
            side //= stride
            total += side * side * (9 * inner * inner + inner * 4 * inner)
            total += 0 if unit else side * side * channels * 4 * inner
            channels = 4 * inner
    return total + channels * classes


def test_cost_matches_hand_counts() -> None:
    model = bit.bit("R50x1", 1000, None)
    cost = quantize.cost(model, 224)
    assert cost.macs == hand_macs(bit.ARCHS["R50x1"], 224, 1000) == 4_089_184_256
    assert cost.gflops == pytest.approx(8.178, abs=1e-3)
    assert (cost.parameters, cost.bytes) == (25_549_352, 4 * 25_549_352)
    small = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.DepthwiseConv2D(3), keras.layers.Flatten(), keras.layers.Dense(5)]
    )
    assert quantize.cost(small, 8).macs == 36 * 3 * 9 + 108 * 5
