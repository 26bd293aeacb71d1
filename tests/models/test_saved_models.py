"""SavedModel teachers of Keras and of plain TensorFlow; unsafe ones are refused."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import fake_gcs
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, ROOT, build_job, here, opinionated

from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.data.order import ExampleSampler
from trainer.models import bit, teachers
from trainer.models.saved_models import SavedServable


def network() -> keras.Model:
    """Not a BiT, which would be converted (test_saved_model_to_bit.py)."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((IMAGE, IMAGE, 3))
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, strides=2, activation="relu")(x)
        x = keras.layers.GroupNormalization(8)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return opinionated(keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x)))


def exported(path: pathlib.Path) -> str:
    """Keras 3's export for inference."""
    network().export(str(path), verbose=False)
    return f"saved_model:{path}"


class PlainTensorFlow(tf.Module):
    """Two signatures, one of a classifier; it returns features beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = tf.Variable(np.random.default_rng(0).normal(0, 1, (3, CLASSES)).astype(np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
    def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        pooled = tf.reduce_mean(images, axis=(1, 2))
        return {"logits": pooled @ self.kernel, "features": pooled}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def describe(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"length": tf.strings.length(text)}


def view(count: int = 4) -> tf.Tensor:
    return tf.constant(np.random.default_rng(1).uniform(-1, 1, (count, IMAGE, IMAGE, 3)).astype(np.float32))


def load(name: str, **changes: object) -> teachers.Teacher:
    return teachers.load(Config(teacher=(name,), image_size=IMAGE, **changes), CLASSES)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_keras_export_has_the_networks_logits(tmp_path: pathlib.Path, compiled: bool) -> None:
    teacher = load(exported(tmp_path / "saved"))
    run = tf.function(teacher.logits, jit_compile=compiled)
    assert np.allclose(run(view()), np.asarray(network()(view())), atol=1e-4)
    assert (teacher.size, teacher.probabilities) == (IMAGE, False)
    assert teacher.model.count_params() == network().count_params()


def test_a_model_in_a_bucket_is_the_same(tmp_path: pathlib.Path, gcs: fake_gcs.Server) -> None:
    """In another process: TensorFlow's client holds a lock that this process's server needs.

    The checksum, which a resumed run compares, is the same in both places.
    """
    name, there = exported(tmp_path / "saved"), "saved_model:gs://bucket/teachers/one"
    gcs.put_tree(tmp_path / "saved", "bucket", "teachers/one")
    code = f"""
import numpy as np
import tensorflow as tf
from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.models import teachers

def load(name):
    return teachers.load(Config(teacher=(name,), image_size={IMAGE}), {CLASSES})[0]

view = tf.constant(np.random.default_rng(1).uniform(-1, 1, (4, {IMAGE}, {IMAGE}, 3)).astype(np.float32))
here, there = {name!r}, {there!r}
print(np.array_equal(load(there).logits(view), load(here).logits(view)))
print(teachers.checksum(Config(teacher=(there,)), there) == teachers.checksum(Config(teacher=(here,)), here))
try:
    load("saved_model:gs://bucket/teachers/two")
except DataError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | gcs.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    same_logits, same_checksum, missing = done.stdout.splitlines()
    assert (same_logits, same_checksum) == ("True", "True")
    assert "--teacher=saved_model:gs://bucket/teachers/two" in missing


def test_signature_and_output_are_chosen(tmp_path: pathlib.Path) -> None:
    module = PlainTensorFlow()
    signatures = {"serving_default": module.describe, "classify": module.classify}
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=signatures)
    teacher = load(f"saved_model:{tmp_path}/saved", teacher_range=("0,1",))
    expected = tf.reduce_mean((view() + 1) / 2, axis=(1, 2)) @ module.kernel
    assert np.allclose(teacher.logits(view()), expected, atol=1e-5)


def test_probabilities_are_recognised(tmp_path: pathlib.Path) -> None:
    model = network()
    keras.Sequential([model, keras.layers.Softmax()]).export(str(tmp_path / "saved"), verbose=False)
    teacher = load(f"saved_model:{tmp_path}/saved")
    assert teacher.probabilities
    probabilities = tf.nn.softmax(teacher.logits(view()))
    assert np.allclose(probabilities, tf.nn.softmax(model(view())), atol=1e-5)


@pytest.mark.slow
def test_the_job_trains_alike_at_one_and_two_replicas(
    tmp_path: pathlib.Path, make_config: Callable[..., Config]
) -> None:
    """And as with the same network from a .keras file."""
    name = exported(tmp_path / "saved")
    network().save(tmp_path / "same.keras")
    metrics = {}
    for replicas, teacher in ((1, name), (2, name), (0, f"keras:{tmp_path}/same.keras")):
        job = build_job(make_config(teacher=(teacher,), teacher_range=("-1,1",)), max(1, replicas))
        metrics[replicas] = job.run_steps(2, ExampleSampler(0, len(job.train_store), 8))
    for variant in (2, 0):
        assert metrics[variant] == pytest.approx(metrics[1], rel=2e-3)


def test_a_changed_model_has_another_checksum(tmp_path: pathlib.Path) -> None:
    config = Config(teacher=(exported(tmp_path / "one"),))
    first = teachers.checksum(config, config.teacher[0])
    assert teachers.checksum(config, config.teacher[0]) == first
    variables = tmp_path / "one" / "variables" / "variables.data-00000-of-00001"
    content = bytearray(variables.read_bytes())
    content[100] ^= 1
    variables.write_bytes(bytes(content))
    assert teachers.checksum(config, config.teacher[0]) != first


@pytest.mark.parametrize("kind", ["write", "read", "python"])
def test_programs_that_touch_files_or_processes_are_refused_before_they_run(tmp_path: pathlib.Path, kind: str) -> None:
    class Hostile(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
        def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            if kind == "write":
                tf.io.write_file(str(tmp_path / "written"), "x")
            elif kind == "read":
                images += tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)
            else:
                (images,) = tf.py_function(lambda x: [x], [images], [tf.float32])
                images = tf.ensure_shape(images, [None, None, None, 3])
            return {"logits": tf.reduce_mean(images, axis=(1, 2)) @ tf.ones([3, CLASSES])}

    module = Hostile()
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": module.classify})
    (tmp_path / "written").unlink(missing_ok=True)
    with pytest.raises(DataError, match="refused"):
        load(f"saved_model:{tmp_path}/saved")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("takes", ["pixels", "files"])
def test_a_saver_by_name_alone_is_no_way_around(tmp_path: pathlib.Path, takes: str) -> None:
    """The signature calls a function with a saver's name; `funmatch evaluate` loads `files`."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def inner_traced_save_function(text: tf.Tensor) -> tf.Tensor:
        tf.io.write_file(str(tmp_path / "written"), text)
        return tf.ones([3, CLASSES])

    class Sly(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
        def pixels(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"logits": tf.reduce_mean(images, axis=(1, 2)) @ inner_traced_save_function("x")}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def files(self, encoded: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"logits": tf.ones([tf.size(encoded), 3]) @ inner_traced_save_function("x")}

    module = Sly()
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": getattr(module, takes)})
    (tmp_path / "written").unlink(missing_ok=True)
    attempt = {
        "pixels": lambda: load(f"saved_model:{tmp_path}/saved"),
        "files": lambda: SavedServable(str(tmp_path / "saved"), "model"),
    }
    with pytest.raises(DataError, match=r"WriteFile.*refused"):
        attempt[takes]()
    assert not (tmp_path / "written").exists()


def test_a_saved_model_of_tensorflow_1_is_refused(tmp_path: pathlib.Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        images = tf.compat.v1.placeholder(tf.float32, [None, 8, 8, 3])
        outputs = tf.reduce_mean(images, axis=(1, 2))
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "saved"), {"images": images}, {"logits": outputs})
    with pytest.raises(DataError, match="TensorFlow 1"):
        load(f"saved_model:{tmp_path}/saved")


def test_what_is_not_a_classifier_is_refused(tmp_path: pathlib.Path, data: str) -> None:
    with pytest.raises(DataError, match=r"no saved_model\.pb"):
        load(f"saved_model:{tmp_path}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"\x0a\xff\xff\xff\xff\x0f")
    with pytest.raises(DataError, match="damaged"):
        load(f"saved_model:{tmp_path}/broken")
    module = PlainTensorFlow()
    tf.saved_model.save(module, str(tmp_path / "text"), signatures={"serving_default": module.describe})
    with pytest.raises(DataError, match="has no signature"):
        load(f"saved_model:{tmp_path}/text")
    model = bit.bit("tiny", CLASSES + 1, IMAGE)
    model.export(str(tmp_path / "other"), verbose=False)
    flags = ["task", f"--data={data}", f"--teacher=saved_model:{tmp_path}/other", "--student=bit-tiny", "--steps=2"]
    done = here(*flags, f"--image_size={IMAGE}", "--batch_size=4", f"--workdir={tmp_path}/run")
    assert done.returncode == 3
    assert f"has {CLASSES + 1} classes" in done.stderr


def test_one_of_several_outputs_of_a_saved_model(tmp_path: pathlib.Path) -> None:
    inputs = keras.Input((IMAGE, IMAGE, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = {"classes": keras.layers.Dense(CLASSES)(x), "features": keras.layers.Dense(7)(x)}
    model = keras.Model(inputs, outputs)
    model.export(str(tmp_path / "s"), verbose=False)
    name = f"saved_model:{tmp_path}/s"
    with pytest.raises(DataError) as error:
        load(name)
    assert "has 2 outputs (0: classes (batch, 5), 1: features (batch, 7)): choose one" in str(error.value)
    for output in ("classes", "0"):
        logits = load(name, teacher_output=(output,)).logits(view())
        assert np.allclose(logits, model(view())["classes"], atol=1e-5)
    with pytest.raises(DataError, match=r"--teacher_output=third: .* has no output of that name; it has 0: classes"):
        load(name, teacher_output=("third",))
    with pytest.raises(DataError, match="has 7 classes"):
        load(name, teacher_output=("features",))


def test_what_else_may_be_given_as_a_saved_model(tmp_path: pathlib.Path) -> None:
    inputs = keras.Input((IMAGE, IMAGE, 3))
    binary = keras.layers.Dense(1, activation="sigmoid")(keras.layers.GlobalAveragePooling2D()(inputs))
    model = keras.Model(inputs, binary)
    model.export(str(tmp_path / "s"), verbose=False)
    model.save(tmp_path / "t.keras")
    for name, words in (
        (f"{tmp_path}/s", "has one output, and does not say whether"),
        (f"{tmp_path}/s/saved_model.pb", "give the folder that it is in"),
        (f"{tmp_path}/t.keras", f"give keras:{tmp_path}/t.keras"),
        (f"{tmp_path}/nothing", "there is no such folder"),
        (str(tmp_path), "there is no saved_model.pb in it"),
    ):
        with pytest.raises(DataError) as error:
            load(f"saved_model:{name}")
        assert words in str(error.value)
