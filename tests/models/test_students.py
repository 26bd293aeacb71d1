"""Students: normalisation, batch statistics, initial weights. Teachers from keras.applications."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, build_job, here, opinionated
from samples import first_batch, state

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError
from trainer.data.order import ExampleSampler
from trainer.models import bit, keras_files, students, teachers
from trainer.output import export
from trainer.run import build, loop
from trainer.run.plan import make_plan


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("mobilenetv3-small", "MobileNetV3Small"),
        ("mobilenetv3-large", "MobileNetV3Large"),
        pytest.param("resnet50v2", "ResNet50V2", marks=pytest.mark.slow),
    ],
)
def test_group_norm_replaces_batch_norm(name: str, same_as: str) -> None:
    """8 groups (paper, section 4.3), the same trained parameters and graph, no batch statistics."""
    original = getattr(keras.applications, same_as)(weights=None, classes=7, input_shape=(32, 32, 3))
    trained = [tuple(v.shape) for v in original.trainable_variables]
    plain, grouped = students.build(name, 7, 32), students.build(f"{name}-gn", 7, 32)
    for model in (plain, grouped):
        assert [tuple(v.shape) for v in model.trainable_variables] == trained
        assert sum(int(np.prod(s)) for s in trained) == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    norms = [layer for layer in grouped.layers if isinstance(layer, keras.layers.GroupNormalization)]
    assert len(norms) == len(students.batch_norms(plain)) > 20
    assert {layer.groups for layer in norms} == {8}
    assert not students.batch_norms(grouped)
    assert not grouped.non_trainable_variables
    x = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    together = grouped(x, training=True).numpy()
    assert together.shape == (3, 7)
    # An output does not depend on the rest of the batch, nor, without dropout, on `training`.
    assert np.allclose(grouped(x[:1], training=False).numpy(), together[:1], atol=1e-4)
    assert np.ptp(together) > 0


def test_group_norm_is_computed_over_eight_groups() -> None:
    model = students.build("mobilenetv3-small-gn", 3, 32)
    layer = next(x for x in model.layers if isinstance(x, keras.layers.GroupNormalization))
    channels = layer.gamma.shape[0]
    x = np.random.default_rng(0).normal(2, 3, (2, 4, 4, channels)).astype(np.float32)
    parts = x.reshape(2, 16, 8, channels // 8)
    parts = (parts - parts.mean((1, 3), keepdims=True)) / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-5)
    assert np.allclose(layer(x).numpy(), parts.reshape(x.shape), atol=1e-4)


def test_indivisible_groups_and_unknown_names() -> None:
    with pytest.raises(ConfigError, match="8 groups do not divide"):
        students.build("app:NASNetMobile-gn", 3, 32)
    with pytest.raises(ConfigError, match="did you mean mobilenetv3-large-gn"):
        students.build("mobilenetv3-large-gm", 3, 32)


def test_students_match_the_help_of_the_flag() -> None:
    """BiTs beyond bit-r50x1 are an ellipsis in the help."""
    text = next(field for field in dataclasses.fields(Config) if field.name == "student").metadata["help"]
    names = {name.removesuffix(students.GROUP_NORM) for name in students.STUDENTS}
    in_help = {name for name in names if re.search(rf"(?<![\w-]){name}(?![\w-])", text)}
    assert {name for name in names - in_help if not name.startswith("bit-")} == set()
    assert set(re.findall(r"\b(?:\w+-\w+|\w+:[A-Z]+|resnet\w+)\b", text)) <= names


def test_an_unknown_student_lists_the_table() -> None:
    with pytest.raises(ConfigError) as error:
        students.build("app:", CLASSES, IMAGE)
    assert str(error.value).endswith(", ".join(students.STUDENTS))


def normalized(path: pathlib.Path, classes: int = CLASSES, dropout: float = 0.0) -> str:
    """A small network with batch normalisation, in a file."""
    keras.utils.set_random_seed(classes)
    inputs = keras.Input((IMAGE, IMAGE, 3))
    x = inputs
    for width in (8, 12):
        x = keras.layers.Conv2D(width, 3, strides=2, use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.8)(x))
    x = keras.layers.Dropout(dropout)(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(inputs, keras.layers.Dense(classes)(x)).save(path)
    return str(path)


def test_batch_statistics_are_of_the_global_batch(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    """One and two replicas: the same weights and the same moving statistics."""
    config = make_config(student=f"keras:{normalized(tmp_path / 's.keras')}", steps=6, warmup_steps=0)
    states = {}
    for replicas in (1, 2):
        job = build_job(dataclasses.replace(config, workdir=f"{config.workdir}{replicas}"), replicas)
        assert [x.synchronized for x in students.batch_norms(job.student)] == [replicas > 1] * 2
        before = state(job)
        job.run_steps(6, ExampleSampler(0, len(job.train_store), 8))
        states[replicas] = state(job)
    moving = [name for name in states[1] if "moving" in name]
    assert len(moving) == 4
    assert all((before[name] != states[1][name]).any() for name in moving)
    for name, array in states[1].items():
        assert np.allclose(array, states[2][name], rtol=1e-3, atol=2e-4), name


def test_moving_statistics_match_numpy(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    """After one step on two replicas, against NumPy on the whole batch."""

    job = build_job(make_config(student=f"keras:{normalized(tmp_path / 's.keras')}"), 2)
    convolution, norm = (
        next(x for x in job.student.layers if isinstance(x, kind))
        for kind in (keras.layers.Conv2D, keras.layers.BatchNormalization)
    )
    seen = tf.nn.conv2d(first_batch(job).student, keras.ops.convert_to_numpy(convolution.kernel), 2, "VALID").numpy()
    job.run_steps(1, ExampleSampler(0, len(job.train_store), 8))
    mean, variance = (keras.ops.convert_to_numpy(v) for v in (norm.moving_mean, norm.moving_variance))
    assert np.allclose(mean, 0.2 * seen.mean((0, 1, 2)), atol=1e-5)
    assert np.allclose(variance, 0.8 + 0.2 * seen.var((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_statistics(
    make_config: Callable[..., Config], tmp_path: pathlib.Path, dropout: float
) -> None:
    """Moving statistics, and the dropout state of a user's file, are in the checkpoint."""
    config = make_config(student=f"keras:{normalized(tmp_path / 's.keras', dropout=dropout)}")
    whole, first, second = (build_job(config) for _ in range(3))
    order = ExampleSampler(0, len(whole.train_store), 8)
    for _ in range(3):
        whole.run_steps(2, order)
    first.run_steps(2, order)
    journal, checkpoints = build.open_run(first)
    loop.save(first, journal, checkpoints)
    loop.resume(second, *build.open_run(second), Console())
    for _ in range(2):
        second.run_steps(2, order)
    expected, resumed = state(whole), state(second)
    assert expected.keys() == resumed.keys()
    assert all((expected[name] == resumed[name]).all() for name in expected)


def test_exported_batch_norms_are_not_synchronized(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    job = build_job(make_config(student=f"keras:{normalized(tmp_path / 's.keras')}"), 2)
    job.run_steps(2, ExampleSampler(0, len(job.train_store), 8))
    copy = export.single_device_copy(job.student)
    assert [x.synchronized for x in students.batch_norms(copy)] == [False, False]
    for exported, trained in zip(copy.variables, job.student.variables, strict=True):
        assert (keras.ops.convert_to_numpy(exported) == keras.ops.convert_to_numpy(trained)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3-small", "mobilenetv3-small-gn"])
def test_mobilenets_learn(make_config: Callable[..., Config], name: str) -> None:
    job = build_job(make_config(student=name, image_size=32, steps=60, warmup_steps=6, learning_rate=0.003))
    order = ExampleSampler(0, len(job.train_store), 8)
    first = job.run_steps(2, order)
    for _ in range(28):
        job.run_steps(2, order)
    assert job.run_steps(2, order)["kl"] < 0.8 * first["kl"]


# Initial weights.


def weights_of(model: keras.Model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(w) for w in model.weights]


@pytest.mark.parametrize("kind", ["keras", "weights.h5", "h5"])
@pytest.mark.parametrize("classes", [CLASSES, CLASSES + 2])
def test_initial_weights_from_a_file_of_the_network(tmp_path: pathlib.Path, kind: str, classes: int) -> None:
    """With the classifier if it has as many classes; otherwise all but the classifier."""
    source = keras.saving.load_model(normalized(tmp_path / "source.keras", classes))
    rng = np.random.default_rng(0)
    source.set_weights([rng.uniform(0.1, 1, w.shape).astype(np.float32) for w in source.get_weights()])
    path = str(tmp_path / f"w.{kind}")
    source.save(path) if kind in ("keras", "h5") else source.save_weights(path)
    name = f"keras:{normalized(tmp_path / 'student.keras')}"
    start = f"{'keras' if kind == 'keras' else 'h5'}:{path}"
    if kind != "keras" and classes != CLASSES:
        # A file of weights has no network: only students by name can be rebuilt with other classes.
        with pytest.raises(DataError, match="another network"):
            students.build(name, CLASSES, IMAGE, initial_weights=start)
        return
    student = students.build(name, CLASSES, IMAGE, initial_weights=start)
    plain = students.build(name, CLASSES, IMAGE)
    head = 2
    for loaded, original in zip(weights_of(student)[:-head], weights_of(source)[:-head], strict=True):
        assert (loaded == original).all()
    expected = source if classes == CLASSES else plain
    assert all((a == b).all() for a, b in zip(weights_of(student)[-head:], weights_of(expected)[-head:], strict=True))
    assert students.checksums(name, start)[1] != students.checksums(name, start)[0]


def test_a_students_file_is_known_by_its_content_and_not_by_its_place(
    tmp_path: pathlib.Path, make_config: Callable[..., Config]
) -> None:
    """A run resumes when the file has moved, to a bucket for example, but not with another file."""

    def identity(name: str, seed: int = 0) -> dict[str, object]:
        model = keras.Sequential([keras.Input((IMAGE, IMAGE, 3)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)])
        rng = np.random.default_rng(seed)
        model.set_weights([rng.normal(0, 1, w.shape).astype(np.float32) for w in model.get_weights()])
        model.save(tmp_path / "saved.keras")
        (tmp_path / name).write_bytes((tmp_path / "saved.keras").read_bytes())
        return make_plan(make_config(student=f"keras:{tmp_path / name}")).identity

    expected = identity("one.keras")
    (tmp_path / "two.keras").write_bytes((tmp_path / "one.keras").read_bytes())
    assert make_plan(make_config(student=f"keras:{tmp_path / 'two.keras'}")).identity == expected
    assert identity("three.keras", 1) != expected
    assert make_plan(make_config(student="bit-tiny")).identity != expected


def test_initial_weights_with_other_classes(tmp_path: pathlib.Path) -> None:
    source = students.build("mobilenetv3-small", 11, 32, seed=3)
    source.save_weights(tmp_path / "s.weights.h5")
    start = f"h5:{tmp_path}/s.weights.h5"
    student = students.build("mobilenetv3-small", 5, 32, initial_weights=start)
    head = 2
    for loaded, original in zip(weights_of(student)[:-head], weights_of(source)[:-head], strict=True):
        assert (loaded == original).all()
    assert student.output_shape == (None, 5)
    with pytest.raises(DataError, match=r"does not fit .*another network"):
        students.build("mobilenetv3-small-gn", 5, 32, initial_weights=start)


def test_initial_weights_of_a_bit_from_a_teacher_file(teacher_file: str) -> None:
    """From `funmatch teacher` or an export: standardising folded kernels again changes nothing."""
    student = students.build("bit-tiny", CLASSES, IMAGE, initial_weights=f"keras:{teacher_file}")
    source = keras.saving.load_model(teacher_file)
    x = np.random.default_rng(0).uniform(-1, 1, (2, IMAGE, IMAGE, 3)).astype(np.float32)
    assert np.allclose(student(x), source(x), atol=1e-5)
    with pytest.raises(DataError, match="another network"):
        students.build("bit-small", CLASSES, IMAGE, initial_weights=f"keras:{teacher_file}")


@pytest.mark.parametrize("start", ["keras:", "h5:", "npz:x", "bit:R50x1@x.npz"])
def test_unknown_kinds_of_initial_weights(start: str) -> None:
    with pytest.raises(ConfigError, match=r"--student_weights=.*does not fit"):
        students.build("mobilenetv3-small", 5, 32, initial_weights=start)


# Teachers.


def test_kinds_of_teachers_match_the_help_of_the_flag() -> None:
    text = next(field for field in dataclasses.fields(Config) if field.name == "teacher").metadata["help"]
    assert set(re.findall(r"\b(\w+):[A-Z]", text)) == teachers.KINDS.keys()
    for kind, entry in teachers.KINDS.items():
        assert entry.usage.startswith(f"{kind}:")


@pytest.mark.parametrize("name", ["", "keras", "keras:", "app:MobileNetV2", "app:MobileNetV2@", "pickle:x"])
def test_an_unknown_teacher_lists_the_table(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        teachers.load(Config(teacher=(name,), image_size=32), CLASSES)
    assert all(entry.usage in str(error.value) for entry in teachers.KINDS.values())
    with pytest.raises(ConfigError, match=f"--teacher={name}: it must be"):
        teachers.checksum(Config(), name)


# Teachers from keras.applications.


def as_teacher(name: str, path: object, classes: int = CLASSES, **more: object) -> teachers.Teacher:
    return teachers.load(Config(teacher=(f"app:{name}@{path}",), image_size=32, steps=1, **more), classes)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("MobileNetV2", "w.weights.h5"),  # from -1 to 1
        ("MobileNetV3Small", "w.h5"),  # pixels, rescaled inside
        pytest.param("ResNet50", "w.h5", marks=pytest.mark.slow),  # BGR without its mean
        pytest.param("DenseNet121", "w.weights.h5", marks=pytest.mark.slow),  # mean and deviation of ImageNet
    ],
)
def test_an_application_is_a_teacher_with_its_own_preprocessing(tmp_path: pathlib.Path, name: str, layout: str) -> None:
    keras.utils.set_random_seed(0)
    function = getattr(keras.applications, name)
    model = function(weights=None, classes=CLASSES, classifier_activation=None, input_shape=(32, 32, 3))
    (model.save_weights if "weights" in layout else model.save)(tmp_path / layout)
    teacher = as_teacher(name, tmp_path / layout)
    view = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    module = {"MobileNetV2": "mobilenet_v2", "MobileNetV3Small": "mobilenet_v3", "ResNet50": "resnet"}.get(
        name, "densenet"
    )
    pixels = getattr(keras.applications, module).preprocess_input((view + 1) * 127.5)
    assert np.allclose(teacher.logits(tf.constant(view)), model(pixels, training=False), rtol=1e-3, atol=1e-4)
    # The logits of a new network hardly depend on its input, so the input is compared too.
    prepared = keras.Model(teacher.model.inputs, teacher.model.layers[1].output)((view + 1) * 127.5)
    assert np.allclose(prepared, pixels, atol=1e-3)
    assert not teacher.model.trainable_variables


def test_every_application_has_preprocessing() -> None:
    for name in students.application_names():
        assert np.isfinite(students.ApplicationPreprocessing(name)(np.full((1, 8, 8, 3), 200.0, np.float32))).all()


def test_applications_with_other_weights(tmp_path: pathlib.Path) -> None:
    model = keras.applications.MobileNetV3Small(weights=None, classes=CLASSES + 1, input_shape=(32, 32, 3))
    path = tmp_path / "w.weights.h5"
    model.save_weights(path)
    with pytest.raises(DataError, match=f"has {CLASSES + 1} classes"):
        as_teacher("MobileNetV3Small", path)
    with pytest.raises(DataError, match="another network"):
        as_teacher("MobileNetV3Large", path)
    with pytest.raises(ConfigError, match="did you mean app:MobileNetV3Small"):
        as_teacher("MobileNetV3Smal", path)
    with pytest.raises(DataError, match="no such file"):
        as_teacher("MobileNetV3Small", tmp_path / "none.h5")


def test_an_application_takes_pixels_only(data: str, tmp_path: pathlib.Path) -> None:
    """The model has its own preprocessing, so that another range would have no effect."""
    path = tmp_path / "w.weights.h5"
    keras.applications.MobileNetV3Small(weights=None, classes=CLASSES, input_shape=(32, 32, 3)).save_weights(path)
    for value_range in ("auto", "0,255"):
        assert as_teacher("MobileNetV3Small", path, teacher_range=(value_range,)).value_range == "0,255"
    for value_range in ("-1,1", "0,1"):
        done = here(
            "task",
            f"--data={data}",
            f"--teacher=app:MobileNetV3Small@{path}",
            f"--teacher_range={value_range}",
            "--student=bit-tiny",
            "--image_size=32",
            "--steps=1",
            "--dry_run",
            f"--workdir={tmp_path}/run",
        )
        assert done.returncode == 2
        message = done.stderr.strip().splitlines()[-1]
        assert f"--teacher_range={value_range}: app:MobileNetV3Small@{path} takes pixels from 0 to 255" in message
        assert message.endswith("give 0,255 or auto")
        assert "Traceback" not in done.stderr


def test_several_teachers_have_their_own_size_and_range(tmp_path: pathlib.Path) -> None:
    """The same function for three value ranges, at two sizes, gives the same logits."""
    paths = []
    for number, (side, scale, offset) in enumerate([(IMAGE, 1, 0), (IMAGE, 2, -1), (16, 1 / 127.5, -1)]):
        inner = opinionated(bit.bit("tiny", CLASSES, None, seed=1), 2)
        keras.Sequential([keras.Input((side, side, 3)), keras.layers.Rescaling(scale, offset), inner]).save(
            path := tmp_path / f"{number}.keras"
        )
        paths.append(f"keras:{path}")
    config = Config(
        teacher=tuple(paths), teacher_image_size=(IMAGE, IMAGE, 16), teacher_range=("-1,1", "0,1", "0,255"), steps=1
    )
    loaded = teachers.load(config, CLASSES)
    assert [(t.size, t.value_range) for t in loaded] == [(IMAGE, "-1,1"), (IMAGE, "0,1"), (16, "0,255")]
    x = tf.random.stateless_uniform([2, IMAGE, IMAGE, 3], [1, 2], -1, 1)
    first, second, third = teachers.teacher_logits(loaded, {IMAGE: x, 16: x[:, :16, :16]})
    assert np.allclose(first, second, atol=1e-4)
    assert np.allclose(loaded[0].model.layers[-1](x[:, :16, :16]), third, atol=1e-4)
    # Nested models are folded too.
    assert not any(isinstance(layer, bit.StdConv2D) for t in loaded for layer in bit.flat_layers(t.model))


def test_arrays_that_keras_skips_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For some old files, Keras only warns, and leaves the weights as they were."""
    source = keras.saving.load_model(normalized(tmp_path / "a.keras"))
    source.save_weights(tmp_path / "w.weights.h5")
    target = keras.models.clone_model(source)
    assert keras_files.load_weights(target, f"{tmp_path}/w.weights.h5", "x") == ""
    drawn = keras.models.clone_model(source)
    monkeypatch.setattr(keras.Model, "load_weights", lambda *_: None)
    assert "nothing for 3 of 12 arrays" in keras_files.load_weights(drawn, f"{tmp_path}/w.weights.h5", "x")
