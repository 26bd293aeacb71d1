"""Keras files of teachers and students: the chosen output without its activation; other files."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, ROOT, here

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError
from trainer.models import heads, students, teachers

L, ops = keras.layers, keras.ops
SHAPE = (4, 4, 3)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Forgets classes that a test registers."""
    before = dict(keras.saving.get_custom_objects())
    yield
    keras.saving.get_custom_objects().clear()
    keras.saving.get_custom_objects().update(before)


def draw(model: keras.Model) -> keras.Model:
    """Draws all weights so that outputs differ clearly."""
    rng = np.random.default_rng(0)
    for w in model.weights:
        w.assign(rng.normal(0, 1, w.shape))
    return model


def features() -> tuple[Any, Any]:
    inputs = keras.Input(SHAPE)
    return inputs, L.GlobalAveragePooling2D()(inputs)


def dense(activation: Any = "softmax", **options: Any) -> keras.layers.Layer:
    return L.Dense(CLASSES, activation=activation, **options)


def small_head(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((3,)), dense(None), L.Softmax(), *layers])


def simple(end: Callable[[Any], Any]) -> keras.Model:
    inputs, x = features()
    return keras.Model(inputs, end(x))


def branches() -> keras.Model:
    inputs = keras.Input(SHAPE)
    both = L.Average()([L.AveragePooling2D(2)(inputs), L.MaxPooling2D(2)(inputs)])
    return keras.Model(inputs, small_head()(L.GlobalAveragePooling2D()(both)))


def skip() -> keras.Model:
    inputs = keras.Input(SHAPE)
    x = L.Add()([inputs, L.Conv2D(3, 1)(inputs)])
    return keras.Model(inputs, small_head()(L.GlobalAveragePooling2D()(x)))


def twice_nested() -> keras.Model:
    inner = simple(small_head())
    middle_in = keras.Input(SHAPE)
    middle = keras.Model(middle_in, inner(L.Rescaling(2.0)(middle_in), training=False))
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, middle(L.Resizing(4, 4)(inputs)))


def conv_head(end: Callable[[Any], Any], size: int = 4, activation: str | None = "softmax") -> keras.Model:
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, end(L.Conv2D(CLASSES, size, activation=activation)(inputs)))


def used_elsewhere_too() -> keras.Model:
    """The same softmax layer gates the features and ends the classifier."""
    inputs, x = features()
    head = L.Dense(3, activation="softmax")
    return keras.Model(inputs, head(L.Multiply()([x, head(x)])))


def model_used_elsewhere_too() -> keras.Model:
    inputs, x = features()
    gate = keras.Sequential([keras.Input((3,)), L.Dense(3, activation="softmax")])
    return keras.Model(inputs, gate(L.Multiply()([x, gate(x)])))


def second_of_two_outputs() -> keras.Model:
    """A nested model with several outputs, of which the outer one returns the last."""
    inputs, x = features()
    inner = keras.Model(inputs, [dense(None)(x), x, dense()(x)])
    outer = keras.Input(SHAPE)
    return keras.Model(outer, inner(outer)[2])


def two_arguments() -> keras.Model:
    """A nested classifier of two tensors, given by name."""
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    inner = keras.Model({"a": a, "b": b}, dense()(L.Concatenate()([a, b])))
    inputs, x = features()
    return keras.Model(inputs, inner({"a": x, "b": L.Rescaling(3.0)(x)}))


def with_policy(policy: str) -> keras.Model:
    inputs, x = features()
    x = dense(None, dtype=policy)(x)
    return keras.Model(inputs, L.Activation("softmax", dtype="float32")(x))


SOFTMAX: dict[str, Callable[[], keras.Model]] = {
    "Dense with softmax": lambda: simple(dense()),
    "Softmax layer": lambda: simple(lambda x: L.Softmax()(dense(None)(x))),
    "Softmax over axis 1": lambda: simple(lambda x: L.Softmax(axis=1)(dense(None)(x))),
    "Activation": lambda: simple(lambda x: L.Activation("softmax")(dense(None)(x))),
    "keras.ops.softmax": lambda: simple(lambda x: ops.softmax(dense(None)(x))),
    "Dense with keras.ops.softmax": lambda: simple(dense(ops.softmax)),
    "Activation, then linear": lambda: simple(lambda x: L.Activation("linear", dtype="float32")(dense()(x))),
    "cast, then Identity": lambda: simple(lambda x: L.Identity()(ops.cast(dense()(x), "float32"))),
    "EinsumDense": lambda: simple(L.EinsumDense("ab,bc->ac", CLASSES, activation="softmax", bias_axes="c")),
    "in a policy of its own": lambda: with_policy("mixed_bfloat16"),
    "Sequential": lambda: keras.Sequential([keras.Input(SHAPE), L.Flatten(), dense(None), L.Softmax()]),
    "Sequential in Sequential": lambda: keras.Sequential(
        [keras.Input(SHAPE), L.GlobalMaxPooling2D(), keras.Sequential([keras.Input((3,)), dense()])]
    ),
    "nested, then reshaped": lambda: simple(small_head(L.Reshape((CLASSES,)))),
    "convolution and Flatten": lambda: conv_head(L.Flatten()),
    "convolution and Reshape": lambda: conv_head(L.Reshape((CLASSES,))),
    "convolution and pooling of one pixel": lambda: conv_head(L.GlobalAveragePooling2D()),
    "branches": branches,
    "skip": skip,
    "twice nested": twice_nested,
    "a layer used elsewhere too": used_elsewhere_too,
    "a model used elsewhere too": model_used_elsewhere_too,
    "one of a nested model's outputs": second_of_two_outputs,
    "a nested model of two inputs": two_arguments,
    "dropout and augmentation": lambda: keras.Sequential(
        [
            keras.Input(SHAPE),
            L.RandomFlip(),
            L.RandomRotation(0.2),
            L.RandomBrightness(0.5, value_range=(-1, 1)),
            L.Flatten(),
            L.Dropout(0.5),
            dense(),
        ]
    ),
}


def images(model: keras.Model, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *model.input_shape[1:])).astype(np.float32)


def call(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(ops.cast(model(x, training=False), "float32"))


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("what", SOFTMAX)
def test_a_softmax_is_taken_off_at_its_call(what: str) -> None:
    model = draw(SOFTMAX[what]())
    x = images(model)
    before = call(model, x)
    assert np.allclose(before.sum(1), 1, atol=1e-5)
    assert heads.ending(model) == "softmax"
    bare = heads.logits(model)
    assert bare is not None
    logits = call(bare, x)
    assert np.abs(logits.sum(1) - 1).max() > 0.01
    assert np.allclose(log_softmax(logits), np.log(before), atol=1e-5)
    # Neither the given model nor its layers changed.
    assert (call(model, x) == before).all()


def tta() -> keras.Model:
    inner, inputs = simple(small_head()), keras.Input(SHAPE)
    return keras.Model(inputs, L.Average()([inner(inputs), inner(L.Rescaling(2.0)(inputs))]))


@pytest.mark.parametrize(
    ("build", "kind", "removable"),
    [
        (tta, "softmax", False),
        (lambda: simple(lambda x: L.Activation("log_softmax")(dense(None)(x))), "log_softmax", True),
        (lambda: simple(lambda x: ops.log(dense()(x))), "log_softmax", True),
        (lambda: simple(dense("sigmoid")), "sigmoid", True),
        (lambda: simple(dense(None)), "", False),
        (lambda: simple(dense("relu")), "", False),
        # A softmax, but not of the classes, or not the last operation.
        (lambda: simple(lambda x: L.Rescaling(2.0)(dense()(x))), "", False),
        (lambda: conv_head(lambda x: L.Flatten()(L.Softmax(axis=1)(x)), activation=None), "", False),
        (lambda: simple(lambda x: dense(None)(dense()(x))), "", False),
        (lambda: simple(lambda x: L.Average()([dense()(x), dense(None)(x)])), "", False),
        (lambda: conv_head(L.GlobalAveragePooling2D(), size=3), "", False),
    ],
)  # fmt: skip
def test_other_ends(build: Callable[[], keras.Model], kind: str, removable: bool) -> None:
    model = draw(build())
    assert heads.ending(model) == kind
    bare = heads.logits(model)
    assert (bare is not None) == removable
    if bare is not None:
        x, link = images(model), {"sigmoid": lambda z: 1 / (1 + np.exp(-z)), "log_softmax": log_softmax}[kind]
        assert np.allclose(link(call(bare, x)), call(model, x), atol=1e-5)


def saved(model: keras.Model, path: pathlib.Path) -> str:
    model.save(path)
    return str(path)


def load(path: str, classes: int = CLASSES, **changes: object) -> teachers.Teacher:
    return teachers.load(Config(teacher=(f"keras:{path}",), image_size=4, **changes), classes)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [tta, branches, skip, twice_nested])
def test_a_teachers_logits_give_its_probabilities(build: Callable[[], keras.Model], tmp_path: pathlib.Path) -> None:
    model = draw(build())
    teacher = load(saved(model, tmp_path / "t.keras"))
    assert teacher.probabilities == (build is tta)
    x = np.clip(images(model), -1, 1)
    assert np.allclose(log_softmax(teacher.logits(tf.constant(x)).numpy()), np.log(call(model, x)), atol=1e-5)


def test_a_half_precision_softmax_is_taken_off(tmp_path: pathlib.Path) -> None:
    inputs, x = features()
    model = draw(keras.Model(inputs, dense(dtype="mixed_float16")(x)))
    teacher = load(saved(model, tmp_path / "t.keras"))
    x = np.clip(images(model), -1, 1)
    logits = teacher.logits(tf.constant(x))
    assert logits.dtype == tf.float32
    assert not teacher.probabilities
    assert np.allclose(np.exp(log_softmax(logits.numpy())), call(model, x), atol=2e-3)


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_one_output_for_two_classes_becomes_two_logits(activation: str | None, tmp_path: pathlib.Path) -> None:
    """`label_mode="binary"` of Keras: the output is that of the second class."""
    inputs, x = features()
    model = draw(keras.Model(inputs, L.Dense(1, activation=activation)(x)))
    path = saved(model, tmp_path / "t.keras")
    teacher = load(path, classes=2)
    x = np.clip(images(model), -1, 1)
    probability = call(model, x)[:, 0] if activation else 1 / (1 + np.exp(-call(model, x)[:, 0]))
    assert np.allclose(np.exp(log_softmax(teacher.logits(tf.constant(x)).numpy()))[:, 1], probability, atol=1e-5)
    assert any("second class" in note for note in teacher.notes)
    with pytest.raises(DataError, match="has one output, which is for two classes"):
        load(path)


def several(kind: str) -> keras.Model:
    inputs, x = features()
    logits, other, vector = dense(None, name="logits")(x), dense(name="other")(x), L.Dense(7, name="features")(x)
    outputs: Any = {
        "list": [logits, vector],
        "tuple": (logits, other, vector),
        "dict": {"features": vector, "classes": logits},
        "same names": list(keras.Model(inputs, [logits, other], name="both")(inputs)),
        "list of one": [logits],
        "dict of one": {"classes": logits},
    }[kind]
    return draw(keras.Model(inputs, outputs))


@pytest.mark.parametrize(
    ("kind", "output", "index", "listed"),
    [
        ("list", "logits", 0, "0: logits (batch, 5), 1: features (batch, 7)"),
        ("tuple", "1", 1, "0: logits (batch, 5), 1: other (batch, 5), 2: features (batch, 7)"),
        ("dict", "classes", 0, "0: classes (batch, 5), 1: features (batch, 7)"),
        ("same names", "1", 1, "0: both (batch, 5), 1: both (batch, 5)"),
    ],
)
def test_one_of_several_outputs(kind: str, output: str, index: int, listed: str, tmp_path: pathlib.Path) -> None:
    model = several(kind)
    path = saved(model, tmp_path / "t.keras")
    with pytest.raises(DataError) as error:
        load(path)
    assert listed in str(error.value)
    assert "--teacher_output" in str(error.value)
    x = np.clip(images(model), -1, 1)
    expected = keras.tree.flatten(model(x))[index].numpy()
    teacher = load(path, teacher_output=(output,))
    got = teacher.logits(tf.constant(x)).numpy()
    assert np.allclose(got, expected, atol=1e-5) or np.allclose(np.exp(log_softmax(got)), expected, atol=1e-5)
    with pytest.raises(DataError, match=r"--teacher_output=nothing.*has no output of that name"):
        load(path, teacher_output=("nothing",))


def test_an_ambiguous_name_and_a_kind_without_outputs(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="has several outputs of that name"):
        load(saved(several("same names"), tmp_path / "t.keras"), teacher_output=("both",))
    with pytest.raises(ConfigError, match="has one output"):
        teachers.load(Config(teacher=("random:bit-tiny",), teacher_output=("x",)), CLASSES)


@pytest.mark.parametrize("kind", ["list of one", "dict of one"])
def test_an_only_output_needs_no_flag(kind: str, tmp_path: pathlib.Path) -> None:
    model = several(kind)
    x = np.clip(images(model), -1, 1)
    (expected,) = keras.tree.flatten(model(x))
    logits = load(saved(model, tmp_path / "t.keras")).logits(tf.constant(x))
    assert np.allclose(logits, expected, atol=1e-6)


def test_an_input_in_a_dictionary_and_a_fixed_batch(tmp_path: pathlib.Path) -> None:
    inputs = keras.Input(SHAPE, name="image")
    named = draw(keras.Model({"image": inputs}, dense()(L.Flatten()(inputs))))
    fixed = keras.Sequential([L.Flatten(), dense()])
    fixed(np.zeros((1, *SHAPE), np.float32))
    for number, model in enumerate((named, draw(fixed))):
        x = np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
        expected = np.concatenate([model({"image": row} if model is named else row) for row in np.split(x, 3)])
        teacher = load(saved(model, tmp_path / f"{number}.keras"))
        assert teacher.model.input_shape == (None, *SHAPE)
        assert np.allclose(log_softmax(teacher.logits(tf.constant(x)).numpy()), np.log(expected), atol=1e-5)


def test_augmentation_and_dropout_are_off_in_a_teacher(tmp_path: pathlib.Path) -> None:
    teacher = load(saved(draw(SOFTMAX["dropout and augmentation"]()), tmp_path / "t.keras"))
    x = tf.constant(np.clip(images(teacher.model), -1, 1))
    assert (teacher.logits(x).numpy() == teacher.logits(x).numpy()).all()


def inputs_of(*shapes: tuple[int, ...]) -> keras.Model:
    inputs = [keras.Input(shape) for shape in shapes]
    flat = [L.Flatten()(x) for x in inputs]
    return keras.Model(inputs, dense()(L.Concatenate()(flat) if len(flat) > 1 else flat[0]))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: inputs_of(SHAPE, (2,)), "has 2 inputs ("),
        (lambda: inputs_of((4, 4, 1)), "images of 1 channel (grey)"),
        (lambda: inputs_of((3, 4, 4)), "keras.layers.Permute((3, 1, 2))"),
        (lambda: inputs_of((4, 4, 4)), "images of 4 channels"),
        (lambda: inputs_of((12,)), "takes (batch, 12), not images"),
        (lambda: inputs_of((4, 6, 3)), "4 x 6 pixels; they must be square"),
        (lambda: keras.Sequential([keras.Input(SHAPE), dense()]), "returns (batch, 4, 4, 5)"),
        (lambda: keras.Sequential([keras.Input(SHAPE), dense()]), "model, keras.layers.GlobalAveragePooling2D()]"),
        (lambda: simple(lambda x: L.Reshape((1, 1, CLASSES))(dense()(x))), "model, keras.layers.Flatten()]"),
        (lambda: simple(lambda x: ops.argmax(dense()(x), axis=-1)), "without its last argmax"),
    ],
)
def test_models_that_are_no_classifiers_of_rgb_images(
    build: Callable[[], keras.Model], words: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(DataError) as error:
        load(saved(build(), tmp_path / "t.keras"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_layer_offered_for_grey_or_channels_first_works(tmp_path: pathlib.Path) -> None:
    """The wrappers in the messages."""
    for model, front in (
        (inputs_of((4, 4, 1)), L.Conv2D(1, 1, kernel_initializer=keras.initializers.Constant(1 / 3))),
        (inputs_of((3, 4, 4)), L.Permute((3, 1, 2))),
    ):
        wrapped = keras.Sequential([keras.Input(SHAPE), front, model])
        assert not load(saved(wrapped, tmp_path / "t.keras")).probabilities


def member(name: str, content: bytes) -> Callable[[pathlib.Path], None]:
    def write(path: pathlib.Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)

    return write


def content(data: bytes) -> Callable[[pathlib.Path], None]:
    return lambda path: path.write_bytes(data) and None


def weights_only(path: pathlib.Path) -> None:
    simple(dense()).save_weights(path)


def cut_short(path: pathlib.Path) -> None:
    simple(dense()).save(path)
    path.write_bytes(path.read_bytes()[:-500])


def folder(name: str) -> Callable[[pathlib.Path], None]:
    def write(path: pathlib.Path) -> None:
        path.mkdir()
        (path / name).write_bytes(b"x")

    return write


def keras2_archive(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.15.0"}))
        archive.writestr("config.json", "{}")


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("t.keras", content(b""), "it is empty (0 bytes)"),
        ("t.keras", content(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        ("t.keras", content(b"\n <!DOCTYPE html><html>"), "it is a web page"),
        ("t.keras", cut_short, "damaged or incomplete zip"),
        ("t.h5", cut_short, "damaged or incomplete HDF5 file"),
        ("t.weights.h5", weights_only, "it holds weights only"),
        ("t.keras", keras2_archive, "it is a file of Keras 2.15.0, which Keras 3 cannot read"),
        ("t.keras", content(b"\x80\x02}q\x00."), "it is a pickle"),
        ("t.pt", member("archive/data.pkl", b"x"), "it is a PyTorch file"),
        ("t.zip", member("run/teacher.keras", b"x"), "it is a zip with run/teacher.keras: unpack it"),
        ("t.zip", member("teacher/saved_model.pb", b"x"), "it is a zip with a SavedModel"),
        ("t.npz", member("head.npy", b"x"), "it is a NumPy archive"),
        ("t.tflite", content(b"\x1c\0\0\0TFL3" + bytes(40)), "it is a TensorFlow Lite model"),
        ("t.onnx", content(b"\x08\x07\x12\x07pytorch"), "it is an ONNX model"),
        ("t.bin", content(b"\x08\x07\x12\x07pytorch"), "it is an ONNX model"),
        ("saved_model.pb", content(b"\x08\x01\x12\x07"), "it is part of a SavedModel"),
        ("frozen.pb", content(b"\n\x01x"), "it is a TensorFlow graph"),
        ("t.safetensors", content((40).to_bytes(8, "little") + b'{"a":1}'), "it is a safetensors file"),
        ("t.index", content(b"\x00\x00\x11x"), "it is part of a TensorFlow checkpoint"),
        ("t.json", content(b'{"class_name": "Model"}'), "it is JSON, an architecture without weights"),
        ("t.keras", content(b"\x1f\x8b\x08abc"), "it is an archive: unpack it"),
        ("t.keras", content(b"something else"), "it is neither a zip (.keras) nor HDF5 (.h5)"),
        ("t", folder("saved_model.pb"), "it is a SavedModel: give saved_model:"),
        ("t", folder("a.keras"), "there is a model in it: a.keras"),
        ("t", folder("a.txt"), "there is no .keras or .h5 file in it, but a.txt"),
    ],
)
def test_other_files_are_named_by_their_content(
    name: str, write: Callable[[pathlib.Path], None], words: str, tmp_path: pathlib.Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError) as error:
        load(str(tmp_path / name))
    assert str(error.value).startswith(f"--teacher=keras:{tmp_path / name}")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def with_custom(what: str) -> keras.Model:
    class Mine(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return 2 * x

    def mine(x: Any) -> Any:
        return 2 * x

    if what == "class":
        layer = keras.saving.register_keras_serializable("zoo")(Mine)()
    elif what == "function":
        layer = L.Activation(keras.saving.register_keras_serializable("zoo")(mine))
    else:
        layer = Mine()
    return simple(lambda x: dense()(layer(x)))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("class", "it uses Mine (package zoo), not part of Keras"),
        ("unregistered class", "it uses Mine (package test_keras_files), not part of Keras"),
        ("function", "it uses mine (package zoo), not part of Keras"),
    ],
)
@pytest.mark.parametrize("end", ["keras", "h5"])
def test_a_missing_custom_class_is_named(what: str, words: str, end: str, tmp_path: pathlib.Path) -> None:
    path = saved(with_custom(what), tmp_path / f"t.{end}")
    keras.saving.get_custom_objects().clear()
    with pytest.raises(DataError) as error:
        load(path)
    if end == "h5":  # it does not say where an unregistered class is from
        words = words.replace(" (package test_keras_files)", "")
    assert words in str(error.value)
    assert "model.export('teacher')" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(tmp_path: pathlib.Path) -> None:
    path = saved(simple(dense()), tmp_path / "t.keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    layer = '"module": "keras.layers", "class_name": "GlobalAveragePooling2D"'
    assert layer in members["config.json"].decode()
    changed = members["config.json"].decode().replace(layer, '"module": "keras_hub.src.x", "class_name": "Backbone"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | {"config.json": changed.encode()}).items():
            archive.writestr(name, data)
    with pytest.raises(DataError, match=r"uses Backbone \(package keras_hub\).*install keras-hub, or"):
        load(path)


@pytest.mark.parametrize("end", ["keras", "h5"])
def test_a_lambda_is_refused(end: str, tmp_path: pathlib.Path) -> None:
    inputs, x = features()
    model = keras.Model(inputs, dense()(L.Lambda(lambda t: 2 * t, output_shape=(3,), name="twice")(x)))
    with pytest.raises(DataError, match=r"it has a Lambda layer \('twice'\), whose code is not run: .*model.export"):
        load(saved(model, tmp_path / f"t.{end}"))


def test_custom_losses_do_not_matter(tmp_path: pathlib.Path) -> None:
    """Neither of the model nor of a model inside it."""

    @keras.saving.register_keras_serializable("zoo")
    def my_loss(labels: Any, outputs: Any) -> Any:
        return ops.mean(labels - outputs)

    inner = draw(simple(dense(None)))
    inner.compile("adam", my_loss)
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, L.Softmax()(inner(inputs)))
    model.compile("sgd", my_loss, metrics=[my_loss])
    x = np.clip(images(model), -1, 1)
    expected = call(inner, x)
    path = saved(model, tmp_path / "t.keras")
    keras.saving.get_custom_objects().clear()
    assert np.allclose(load(path).logits(tf.constant(x)), expected, atol=1e-5)


def as_keras2(path: pathlib.Path) -> None:
    """Changes an `.h5` file to what Keras 2 writes: calls of nested models are counted from 1,
    depthwise convolutions have `groups`, and tf.nn.softmax has another name."""

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            if len(value) == 4 and value[0] in ("nested_sequential", "nested_functional"):
                return [value[0], value[1] + 1, *value[2:]]
            return [visit(item) for item in value]
        if isinstance(value, dict):
            changed = {key: visit(item) for key, item in value.items()}
            if changed.get("class_name") == "DepthwiseConv2D":
                changed["config"]["groups"] = 1
            if changed.get("activation") == "softmax":
                changed["activation"] = "softmax_v2"
            if "inbound_nodes" in changed:  # Keras 3 writes dictionaries, Keras 2 [layer, call, tensor, options]
                changed["inbound_nodes"] = [visit(_keras2_node(node)) for node in changed["inbound_nodes"]]
            return changed
        return value

    with h5py.File(path, "r+") as file:
        config = visit(json.loads(file.attrs["model_config"]))
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.15.0"


def _keras2_node(node: Any) -> Any:
    if isinstance(node, list):
        return node
    return [[*x["config"]["keras_history"], node["kwargs"]] for x in node["args"]]


def test_a_whole_model_in_h5(tmp_path: pathlib.Path) -> None:
    inputs = keras.Input(SHAPE)
    augmentation = keras.Sequential([keras.Input(SHAPE), L.RandomFlip("horizontal")], name="nested_sequential")
    base_in = keras.Input(SHAPE)
    base = keras.Model(base_in, L.GlobalAveragePooling2D()(L.DepthwiseConv2D(2)(base_in)), name="nested_functional")
    model = draw(keras.Model(inputs, dense()(L.Dropout(0.2)(base(augmentation(inputs), training=False)))))
    x = np.clip(images(model), -1, 1)
    expected = np.log(call(model, x))
    path = tmp_path / "t.h5"
    model.save(path)
    for version in (3, 2):
        if version == 2:
            as_keras2(path)
        teacher = load(str(path))
        assert not teacher.probabilities
        assert np.allclose(log_softmax(teacher.logits(tf.constant(x)).numpy()), expected, atol=1e-5), version


def test_operations_of_keras_2_are_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.h5"
    simple(dense()).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1] |= {"class_name": "TFOpLambda", "name": "tf.math.truediv"}
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(DataError, match=r"TensorFlow operations between its layers \(tf.math.truediv\)"):
        load(str(path))


def test_a_student_from_a_file_gives_logits(tmp_path: pathlib.Path) -> None:
    for number, build in enumerate((branches, lambda: simple(dense("sigmoid")))):
        model = draw(build())
        student = students.build(f"keras:{saved(model, tmp_path / f'{number}.keras')}", CLASSES, 4)
        x = images(model)
        expected = call(model, x)
        logits = call(student, x)
        got = np.exp(log_softmax(logits)) if build is branches else 1 / (1 + np.exp(-logits))
        assert np.allclose(got, expected, atol=1e-5)
        assert len(student.trainable_variables) == len(model.trainable_variables)
    with pytest.raises(DataError, match="a mean of probabilities"):
        students.build(f"keras:{saved(tta(), tmp_path / 't.keras')}", CLASSES, 4)
    with pytest.raises(DataError, match=r"has 2 outputs .* it must have one"):
        students.build(f"keras:{saved(several('list'), tmp_path / 't.keras')}", CLASSES, 4)
    with pytest.raises(DataError, match="takes images of 4 x 4 pixels, but --image_size is 6: give --image_size=4"):
        students.build(f"keras:{tmp_path / '0.keras'}", CLASSES, 6)


def test_evaluate_takes_an_output_and_refuses_in_one_line(data: str, tmp_path: pathlib.Path) -> None:
    inputs = keras.Input((IMAGE, IMAGE, 3))
    x = L.GlobalAveragePooling2D()(inputs)
    path = saved(draw(keras.Model(inputs, [dense()(x), L.Dense(7, name="features")(x)])), tmp_path / "t.keras")
    arguments = ["evaluate", f"--model=keras:{path}", f"--data={data}", "--split=test"]
    done = here(*arguments)
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith(f"error: --model=keras:{path} has 2 outputs (0: dense")
    assert line.endswith("--model_output")
    assert here(*arguments, "--model_output=0").returncode == 0
    done = here("evaluate", f"--model=keras:{tmp_path}", f"--data={data}")
    assert done.returncode == 3
    assert "it is a folder: give a file; there is a model in it: t.keras" in done.stderr


def test_another_version_of_keras_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.h5"
    simple(dense()).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][2]["config"]["setting_of_the_future"] = 1
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "3.99.0"
    with pytest.raises(DataError, match=r"\(saved by Keras 3\.99\.0, read by 3\.") as error:
        load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_files_that_keras_2_wrote(tmp_path: pathlib.Path) -> None:
    """Its `.h5` files load and give the same; the command in the error turns a `.keras` into
    one."""
    folder, packages = ROOT / "tests" / "keras2", tmp_path / "k2"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "--target", str(packages)]
    subprocess.run([*install, "-r", str(folder / "requirements.txt")], check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(packages), "TF_USE_LEGACY_KERAS": "1"}
    make = [sys.executable, str(folder / "make_files.py"), str(tmp_path), str(CLASSES), "32"]
    subprocess.run(make, check=True, env=environment)
    x = tf.constant(np.load(tmp_path / "images.npy"))

    def same(name: str) -> bool:
        expected = np.load(tmp_path / f"{name}.npy")
        logits = load(f"{tmp_path}/{name}.h5", teacher_image_size=(32,)).logits(x).numpy()
        return np.allclose(np.exp(log_softmax(logits)) if name == "chain" else logits, expected, rtol=1e-4, atol=1e-5)

    assert same("tutorial")
    assert same("chain")
    with pytest.raises(DataError, match="TensorFlow operations between its layers"):
        same("operations")
    for name in ("tutorial", "chain"):
        (tmp_path / f"{name}.h5").unlink()
        with pytest.raises(DataError, match=r"it is a file of Keras 2\.19\.0, which Keras 3 cannot read") as error:
            load(f"{tmp_path}/{name}.keras")
        arguments = shlex.split(str(error.value).split("`")[1])
        subprocess.run([sys.executable, *arguments[1:]], check=True, env=environment, cwd=tmp_path)
        assert same(name)
