"""Exports load without this package, are written atomically, and leave nothing after a crash."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import fake_gcs
import keras
import numpy as np
import pytest
from conftest import CLASSES, IMAGE, opinionated

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError
from trainer.core.options import PRECISIONS, ROOT_POOLS
from trainer.models import bit, students
from trainer.output import export

NAMES = tuple(f"species {n}" for n in range(CLASSES))


def model() -> keras.Model:
    return keras.Sequential(
        [keras.Input((IMAGE, IMAGE, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(CLASSES)]
    )


def test_a_bucket_gets_whole_objects_and_refusals_that_pass_are_not_felt(
    gcs_here: fake_gcs.Server, make_config: Callable[..., Config]
) -> None:
    """TensorFlow alone would write under temporary names and give up at the first error."""
    faults = [
        gcs_here.fail("403", "start", match=f"export/{name}") for name in ("saved_model/variables", "model.keras")
    ]
    export.write("gs://bucket/run/export", model(), NAMES, make_config(), {})
    assert [fault.consumed for fault in faults] == [1, 1]
    assert gcs_here.requests("rewrite") == gcs_here.requests("delete") == []
    written = [request.object for request in gcs_here.requests("chunk")]
    assert sorted(written) == gcs_here.names("bucket")
    saved = [name for name in written if "/saved_model/" in name]
    assert len(saved) == 4
    assert saved[-1] == "run/export/saved_model/saved_model.pb"  # last, so that its presence means a complete model
    gcs_here.fail("403", "start", match="saved_model", times=None)
    with pytest.raises(
        DataError, match=r"^cannot write the exported model gs://bucket/run/export/saved_model/.*HTTP 403"
    ):
        export.write("gs://bucket/run/export", model(), NAMES, make_config(), {})


def test_what_a_crash_left_on_a_disk_goes(tmp_path: pathlib.Path, make_config: Callable[..., Config]) -> None:
    export.write(str(tmp_path), model(), NAMES, make_config(), {})
    whole = sorted(tmp_path.rglob("*"))
    for name in ("model.keras", "saved_model/saved_model.pb", "saved_model/variables/variables.index"):
        (tmp_path / f"{name}.0123abcd.tmp").write_bytes(b"half")
    export.clean(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == whole


def test_an_export_has_every_format(tmp_path: pathlib.Path, make_config: Callable[..., Config]) -> None:
    export.write(str(tmp_path), model(), NAMES, make_config(), {})
    assert set(os.listdir(tmp_path)) == {*export.EXPORTERS, "classes.json", "MODEL_CARD.md"}
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert all(f"`{name}` takes" in card for name in export.EXPORTERS)


# Loads each file of its arguments in a process where this package cannot be imported, and runs it.
LOAD_ALONE = """
import sys

sys.modules["trainer"] = None  # importing it raises ImportError, also where it is installed
import keras
import numpy as np

for path in sys.argv[1:]:
    model = keras.saving.load_model(path)
    np.save(path + ".outputs.npy", np.asarray(model(np.load(path + ".inputs.npy"))))
"""


def check_loads_alone(folder: pathlib.Path, variants: list[dict[str, object]]) -> None:
    """Exports students of these arguments of `students.build` and compares outputs to the bit."""
    expected = {}
    for number, variant in enumerate(variants):
        path = str(folder / f"{number}.keras")
        student = students.build(classes=CLASSES, **variant)  # type: ignore[arg-type]
        if any(layer.name == "head" for layer in student.layers):
            opinionated(student)  # a BiT starts with a head of zeros
        side = student.input_shape[1]
        images = np.random.default_rng(number).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
        copy = export.single_device_copy(student)
        export.save_keras(copy, path)
        np.save(f"{path}.inputs.npy", images)
        expected[path] = np.asarray(copy(images))
        assert np.ptp(expected[path]) > 0
        if variant.get("precision") != "mixed_bfloat16":
            assert np.allclose(np.asarray(student(images, training=False)), expected[path], rtol=1e-4, atol=1e-5)
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_ALONE, *expected], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for (path, outputs), variant in zip(expected.items(), variants, strict=True):
        assert (np.load(f"{path}.outputs.npy") == outputs).all(), variant


def variants_of(name: str, even: int) -> list[dict[str, object]]:
    """Every value of the options that shape the student's graph."""
    root_pools = ROOT_POOLS if name.startswith("bit-") else ROOT_POOLS[:1]
    return [
        {"name": name, "root_pool": root_pool, "precision": precision, "image_size": size}
        for root_pool, precision, size in itertools.product(root_pools, PRECISIONS, (even, even + 1))
    ]


def test_small_students_load_without_this_package(tmp_path: pathlib.Path) -> None:
    check_loads_alone(tmp_path, [*variants_of("bit-tiny", 24), *variants_of("mobilenetv3-small-gn", 32)[1:3]])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in students.STUDENTS if ":" not in name])
def test_every_student_loads_without_this_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """BiTs with few filters and at most two units a block: the released ones repeat the second."""
    narrow = {
        key: dataclasses.replace(arch, filters=8, groups=8, units=tuple(min(2, units) for units in arch.units))
        for key, arch in bit.ARCHS.items()
    }
    monkeypatch.setattr(bit, "ARCHS", narrow)
    check_loads_alone(tmp_path, variants_of(name, 32))


# The smallest model of each module of keras.applications, and the least even side that it takes.
APPLICATIONS = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 76,
    "InceptionV3": 76,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "VGG19": 32,
    "Xception": 72,
}


def test_every_module_of_keras_applications_is_exported() -> None:
    modules = {name: inspect.getmodule(getattr(keras.applications, name)) for name in students.application_names()}
    assert {modules[name] for name in APPLICATIONS} == set(modules.values())


@pytest.mark.slow
@pytest.mark.parametrize("application", APPLICATIONS)
def test_applications_load_without_this_package(tmp_path: pathlib.Path, application: str) -> None:
    """With the options that are furthest from an application's defaults: an odd size, bfloat16."""
    variant = {"name": f"app:{application}", "image_size": APPLICATIONS[application] + 1, "precision": "mixed_bfloat16"}
    check_loads_alone(tmp_path, [variant])


def test_a_student_file_loads_without_this_package(tmp_path: pathlib.Path) -> None:
    bit_with_head = opinionated(bit.bit("tiny", CLASSES, IMAGE, root_pool="inf"))
    keras.Sequential([keras.Input((IMAGE, IMAGE, 3)), bit_with_head, keras.layers.Softmax()]).save(
        tmp_path / "student.keras"
    )
    check_loads_alone(tmp_path, [{"name": f"keras:{tmp_path}/student.keras", "image_size": IMAGE}])


@keras.saving.register_keras_serializable(package="test")
class CustomLayer(keras.layers.Layer):
    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return inputs


@keras.saving.register_keras_serializable(package="test")
def custom_activation(inputs: keras.KerasTensor) -> keras.KerasTensor:
    return inputs


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (CustomLayer, "test>CustomLayer"),
        (lambda: keras.layers.Activation(custom_activation), "test>custom_activation"),
        (lambda: keras.layers.Lambda(lambda x: x, output_shape=lambda shape: shape), "__lambda__"),
        (lambda: keras.Sequential([CustomLayer()]), "test>CustomLayer"),
    ],
)
def test_custom_layers_are_refused_before_training_and_at_export(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, layer: Callable[[], keras.Layer], name: str
) -> None:
    inputs = keras.Input((IMAGE, IMAGE, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(layer()(inputs))
    custom = keras.Model(inputs, keras.layers.Dense(CLASSES)(pooled))
    monkeypatch.setitem(students.STUDENTS, "custom", lambda _: custom)
    with pytest.raises(ConfigError, match=f"--student=custom uses {name}, not part of Keras"):
        students.build("custom", CLASSES, IMAGE)
    with pytest.raises(DataError, match=f"{name} is not part of Keras"):
        export.save_keras(custom, str(tmp_path / "model.keras"))
    assert os.listdir(tmp_path) == []
