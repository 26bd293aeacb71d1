"""BiT against published parameter counts and a NumPy forward pass; students, teachers by name."""

from __future__ import annotations

import os
import pathlib

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from conftest import CLASSES, IMAGE, opinionated

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError
from trainer.models import bit, students, teachers


@pytest.mark.parametrize(
    ("arch", "classes", "count"),
    [
        ("R50x1", 102, 23_709_350),
        ("R50x1", 37, 23_576_165),
        ("R50x1", 1000, 25_549_352),
        ("R101x3", 102, 382_416_678),
        ("R152x2", 102, 232_656_102),
        ("R152x2", 1000, 236_335_208),
    ],
)
def test_parameter_counts_match_the_published_ones(arch: str, classes: int, count: int) -> None:
    """Of the Keras example's models and of the paper's teacher."""
    assert bit.bit(arch, classes, None).count_params() == count


# A forward pass in NumPy, from the description of the architecture (arXiv 1912.11370).
def np_standardize(w: np.ndarray) -> np.ndarray:
    flat = w.reshape(-1, w.shape[-1]).astype(np.float64)
    return ((flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-10)).reshape(w.shape)


def np_norm_relu(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, groups: int) -> np.ndarray:
    n, h, w, c = x.shape
    g = x.reshape(n, h * w, groups, c // groups)
    g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-5)
    return np.maximum(g.reshape(x.shape) * gamma + beta, 0)


def np_bit(model: keras.Model, arch: bit.Arch, x: np.ndarray, root_pool: str) -> np.ndarray:
    def weights(name: str) -> list[np.ndarray]:
        return [w.astype(np.float64) for w in model.get_layer(name).get_weights()]

    def conv(x: np.ndarray, name: str, stride: int, pad: int) -> np.ndarray:
        return reference.convolution(x, np_standardize(weights(name)[0]), stride, pad)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return np_norm_relu(x, *weights(name), arch.groups)

    x = conv(x, "root_conv", 2, 3)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.0 if root_pool == "zero" else -np.inf)
    h, w = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    x = np.max([x[:, i : i + 2 * h : 2, j : j + 2 * w : 2] for i in range(3) for j in range(3)], axis=0)
    for b, units in enumerate(arch.units, 1):
        for u in range(1, units + 1):
            p, stride = f"block{b}_unit{u:02d}", 2 if u == 1 and b > 1 else 1
            y = norm(x, f"{p}_a_norm")
            shortcut = conv(y, f"{p}_proj", stride, 0) if u == 1 else x
            y = norm(conv(y, f"{p}_a", 1, 0), f"{p}_b_norm")
            y = norm(conv(y, f"{p}_b", stride, 1), f"{p}_c_norm")
            x = shortcut + conv(y, f"{p}_c", 1, 0)
    x = norm(x, "final_norm").mean((1, 2))
    kernel, bias = weights("head")
    return x @ kernel + bias


def shaken(model: keras.Model) -> keras.Model:
    """Adds noise to every weight, so that no default hides an error."""
    rng = np.random.default_rng(3)
    model.set_weights([w + rng.normal(0, 0.2, w.shape).astype(np.float32) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("root_pool", ["zero", "inf"])
@pytest.mark.parametrize("size", [24, 37])
def test_bit_matches_an_independent_forward_pass(root_pool: str, size: int) -> None:
    arch = bit.Arch((2, 1, 2), 8, groups=4)
    model = shaken(bit.bit(arch, 5, None, root_pool=root_pool))
    x = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    assert np.allclose(
        np.asarray(model(x)),
        np_bit(model, arch, x.astype(np.float64), root_pool),
        rtol=1e-4,
        atol=1e-4,
    )


def test_epsilons_match_where_they_matter() -> None:
    """Variances as small as the epsilons: 1e-10 for kernels, 1e-5 for groups."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 1e-5, (3, 3, 4, 6)).astype(np.float32)
    assert np.allclose(np.asarray(bit.standardize(kernel)), np_standardize(kernel), rtol=1e-3, atol=1e-4)
    model = bit.bit("tiny", 3, 32)
    x = rng.normal(0, 3e-3, (2, 4, 4, 256)).astype(np.float32)
    for layer in model.layers:
        if isinstance(layer, keras.layers.GroupNormalization):
            part = x[..., : layer.gamma.shape[-1]]
            expected = np_norm_relu(part, *layer.get_weights(), 8)
            assert np.allclose(np.maximum(np.asarray(layer(part)), 0), expected, atol=1e-3), layer.name


def test_unknown_root_pool_and_architecture() -> None:
    with pytest.raises(ValueError, match="'zero' or 'inf'"):
        bit.bit("tiny", 3, root_pool="same")
    with pytest.raises(ValueError, match="R50x1"):
        bit.bit("R50x2", 3)


def test_fold_keeps_the_function_and_drops_custom_layers(tmp_path: pathlib.Path) -> None:
    model = shaken(bit.bit("tiny", 4, 32))
    folded = bit.fold(model)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    assert np.allclose(np.asarray(folded(x)), np.asarray(model(x)), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(layer, bit.StdConv2D) for layer in folded.layers)
    folded.save(tmp_path / "f.keras")
    assert b"funmatch" not in (tmp_path / "f.keras").read_bytes()


def test_same_seed_same_student() -> None:
    for name in ("bit-tiny", "mobilenetv3-small"):
        a, b, c = (students.build(name, 4, 32, seed=s) for s in (1, 1, 2))
        assert all((x == y).all() for x, y in zip(a.get_weights(), b.get_weights(), strict=True))
        assert any((x != y).any() for x, y in zip(a.get_weights(), c.get_weights(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "bit-tiny",
        "bit-small",
        "resnet50v2",
        "mobilenetv3-large",
        "mobilenetv3-small",
        "app:MobileNetV2",
        "app:EfficientNetV2B0",
    ],
)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_students_give_logits(name: str, precision: str) -> None:
    model = students.build(name, 7, 32, precision=precision)
    out = np.asarray(tf.cast(model(np.zeros((2, 32, 32, 3), np.float32)), tf.float32))
    assert out.shape == (2, 7)
    # Logits and not probabilities: a softmax would make these rows sum to one.
    assert not np.allclose(out.sum(1), 1.0)
    assert keras.config.dtype_policy().name == "float32"


def test_unknown_application_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="app:MobileNetV2"):
        students.build("app:MobileNetV22", 3, 32)


def classifier(path: pathlib.Path, ending: str, size: int | None = 16, scale: float = 1.0) -> str:
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu")(keras.layers.Rescaling(scale)(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    if ending == "layer":
        x = keras.layers.Softmax()(keras.layers.Dense(CLASSES)(x))
    elif ending == "activation":
        x = keras.layers.Dense(CLASSES, activation="softmax")(x)
    elif ending == "hidden":  # the last layer is not the softmax
        x = keras.layers.Dense(CLASSES)(x)
        x = x * 1.0
        x = keras.layers.Activation("softmax")(x)
        x = keras.layers.Reshape((CLASSES,))(x)
    else:
        x = keras.layers.Dense(CLASSES)(x)
    keras.Model(inputs, x).save(path)
    return f"keras:{path}"


def load(name: str, **changes: object) -> teachers.Teacher:
    return teachers.load(Config(teacher=(name,), steps=1, **changes), CLASSES)[0]


@pytest.mark.parametrize("ending", ["layer", "activation", "hidden", "logits"])
@pytest.mark.parametrize("value_range", ["-1,1", "0,1", "0,255"])
def test_any_ending_and_range_gives_logits(tmp_path: pathlib.Path, ending: str, value_range: str) -> None:
    keras.utils.set_random_seed(0)
    name = classifier(tmp_path / "t.keras", ending, scale=1 / 255 if value_range == "0,255" else 1.0)
    original = keras.saving.load_model(tmp_path / "t.keras")
    teacher = load(name, teacher_range=(value_range,))
    view = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    native = {"-1,1": view, "0,1": (view + 1) / 2, "0,255": (view + 1) * 127.5}[value_range]
    outputs = np.asarray(original(native))
    expected = outputs if ending == "logits" else np.log(outputs)
    logits = teacher.logits(tf.constant(view)).numpy()
    assert np.allclose(logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=2e-5)


def test_image_size_comes_from_file_or_flag(tmp_path: pathlib.Path) -> None:
    fixed, free = (
        classifier(tmp_path / "a.keras", "logits"),
        classifier(tmp_path / "b.keras", "logits", None),
    )
    assert load(fixed).size == 16
    assert load(free, image_size=48).size == 48
    assert load(free, teacher_image_size=(20,)).size == 20
    with pytest.raises(ConfigError, match="takes 16 x 16"):
        load(fixed, teacher_image_size=(20,))


def test_teacher_is_frozen_and_folded(teacher_file: str) -> None:
    teacher = load(f"keras:{teacher_file}")
    assert not teacher.model.trainable_variables
    assert not any(isinstance(layer, bit.StdConv2D) for layer in teacher.model.layers)


def test_ensemble_is_the_mean_of_logits(teacher_file: str) -> None:
    first, second = load(f"keras:{teacher_file}"), load("random:bit-tiny", image_size=IMAGE, seed=4)
    second = teachers.Teacher("x", opinionated(second.model, 9), IMAGE, "-1,1", False)
    view = tf.random.stateless_uniform([2, IMAGE, IMAGE, 3], [1, 2], -1, 1)
    logits = teachers.ensemble(teachers.teacher_logits((first, second), {IMAGE: view}), "mean_logits").numpy()
    assert np.allclose(logits, (first.logits(view) + second.logits(view)).numpy() / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keras:/no/such.keras", "no such file"),
        ("keras:", "must be keras:PATH"),
        ("pickle:x", "must be keras:PATH"),
    ],
)
def test_unknown_teachers(name: str, words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        load(name)


def test_files_without_a_classifier(tmp_path: pathlib.Path) -> None:
    (tmp_path / "junk.keras").write_bytes(b"junk")
    with pytest.raises(DataError, match="is not a model that Keras 3 loads"):
        load(f"keras:{tmp_path}/junk.keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(CLASSES)]).save(tmp_path / "d.keras")
    with pytest.raises(DataError, match="not images: it must take"):
        load(f"keras:{tmp_path}/d.keras")


def test_code_inside_a_file_does_not_run(tmp_path: pathlib.Path) -> None:
    mark = str(tmp_path / "mark")
    keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Lambda(lambda x: (open(mark, "w").close(), x)[1]),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES),
        ]
    ).save(tmp_path / "evil.keras")
    assert os.path.exists(mark)  # building the model ran the code, so the file has it
    os.unlink(mark)
    with pytest.raises(DataError, match="does not load"):
        load(f"keras:{tmp_path}/evil.keras")
    assert not os.path.exists(mark)
