"""`funmatch evaluate` and `funmatch profile` print what the library measures, for all models."""

from __future__ import annotations

import json
import pathlib
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, here, opinionated, strategy

from trainer.core.config import Config
from trainer.data.dataset import Dataset
from trainer.data.store import MemoryStore
from trainer.models import bit, teachers
from trainer.output import export
from trainer.run import evaluator, teacher_precision


def run_verb(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict, str]:
    done: subprocess.CompletedProcess[str] = here(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(capsys.readouterr().out), done.stderr


def no_progress(done: int, total: int) -> None:
    """Ignores progress."""


def evaluate_model(data: str, model: keras.Model, split: str = "test", side: int = 2 * IMAGE) -> evaluator.EvalResult:
    """Evaluates with the library, which other tests check against definitions."""
    dataset = Dataset.load(data)
    store = MemoryStore(dataset, dataset.splits[split], side, no_progress)
    config = Config(image_size=IMAGE, store_size=side, steps=1, batch_size=9).resolve(1)
    return evaluator.Evaluator(config, strategy(1), store, jit_compile=False).run(model, ())


def test_evaluate_a_keras_file_with_a_teacher(
    data: str, teacher_file: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = opinionated(bit.bit("tiny", CLASSES, IMAGE, seed=3), 7)
    model.save(tmp_path / "m.keras")
    flags = [f"--model=keras:{tmp_path}/m.keras", f"--data={data}", f"--teacher=keras:{teacher_file}", "--batch_size=7"]
    metrics, stdout = run_verb(capsys, "evaluate", *flags, "--split=test")
    (teacher,) = teachers.load(Config(teacher=(f"keras:{teacher_file}",), steps=1), CLASSES)
    mine, theirs = evaluate_model(data, model), evaluate_model(data, teacher.model)
    both = evaluator.EvalResult(mine.labels, mine.student_logits, theirs.student_logits).metrics()
    for name in ("agreement_top1", "kl", "teacher_top1", "teacher_top5"):
        assert metrics[name] == pytest.approx(both[name], abs=1e-5), name
    assert (metrics["top1"], metrics["top5"]) == (both["student_top1"], both["student_top5"])
    assert metrics["images"] == 23
    names = Dataset.load(data).classes
    assert metrics["per_class"].keys() == set(names)
    for number, name in enumerate(names):
        rows = mine.labels == number
        right = (mine.student_logits[rows].argmax(1) == number).mean()
        assert metrics["per_class"][name] == {"top1": pytest.approx(right), "images": int(rows.sum())}
    assert f"top-1 {metrics['top1']:.2%}" in stdout
    assert "KL" in stdout


def test_evaluate_an_exported_student(data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The SavedModel takes encoded images, and includes the value range and the crop."""
    model = opinionated(bit.bit("tiny", CLASSES, IMAGE, seed=3), 7)
    names = Dataset.load(data).classes
    config = Config(image_size=IMAGE, student_range="0,1", central_fraction=0.5, steps=1).resolve(1)
    export.write(str(tmp_path), model, names, config, {})
    dataset = Dataset.load(data)
    store = MemoryStore(dataset, dataset.splits["test"], config.store_size, no_progress)
    expected = evaluator.Evaluator(config, strategy(1), store, jit_compile=False).run(model, ()).metrics()
    flags = [f"--model=saved_model:{tmp_path}/saved_model", f"--data={data}"]
    metrics, _ = run_verb(capsys, "evaluate", *flags)
    assert metrics["top1"] == expected["student_top1"]
    assert "kl" not in metrics
    metrics, _ = run_verb(capsys, "evaluate", *flags, "--teacher=random:bit-tiny", f"--teacher_image_size={IMAGE}")
    assert metrics["top1"] == expected["student_top1"]
    assert 0 < metrics["kl"] < 50


def test_evaluate_a_saved_model_with_a_value_range(
    data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images in [0, 1] to logits, like the Keras example's published student."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((IMAGE, IMAGE, 3)),
            layers.Conv2D(8, 5, activation="relu"),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    outer = keras.Sequential([keras.Input((IMAGE, IMAGE, 3)), keras.layers.Rescaling(2.0, -1.0), inner])
    outer.export(str(tmp_path / "s"), verbose=False)
    flags = [f"--model=saved_model:{tmp_path}/s", f"--data={data}", "--model_range=0,1", "--split=validation"]
    metrics, _ = run_verb(capsys, "evaluate", *flags)
    expected = evaluate_model(data, inner, "validation").metrics()
    assert metrics["top1"] == expected["student_top1"]
    assert metrics["images"] == 15


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--data={data}"], 2, "--model is missing"),
        (["--model=keras:x.keras"], 2, "--data is given 0 times"),
        (["--model=keras:/no/x.keras", "--data={data}"], 3, "--model=/no/x.keras: there is no such file"),
        (["--model=pickle:x", "--data={data}"], 2, "--model=pickle:x: it must be keras:PATH"),
        (["--model=keras:{teacher}", "--data={data}", "--split=tset"], 3, "--split"),
        (["--model=keras:{teacher}", "--data={data}", "--image_size=30"], 2, "takes 24 x 24"),
    ],
)
def test_invalid_flags_are_one_line(data: str, teacher_file: str, flags: list[str], code: int, message: str) -> None:
    done = here("evaluate", *(flag.format(data=data, teacher=teacher_file) for flag in flags))
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_profile_of_each_precision(
    data: str, teacher_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_precision, "IMAGES", 64)
    monkeypatch.setattr(teacher_precision, "CALIBRATION_IMAGES", 64)
    flags = [f"--teacher=keras:{teacher_file}", f"--data={data}", "--batch_size=8"]
    metrics, stdout = run_verb(capsys, "profile", *flags)
    model = keras.saving.load_model(teacher_file)
    assert metrics["parameters"] == model.count_params()
    assert metrics["image_size"] == IMAGE
    assert metrics["gflops"] == pytest.approx(2e-9 * metrics["macs"])
    expected = evaluate_model(data, bit.fold(model)).metrics()["student_top1"]
    rows = metrics["forms"]
    assert list(rows) == ["float32", "bfloat16", "int8"]
    assert rows["float32"]["top1"] == pytest.approx(expected)
    assert "kl" not in rows["float32"]
    assert rows["float32"]["bytes"] == 4 * model.count_params()
    assert rows["float32"]["bytes"] > rows["bfloat16"]["bytes"] > rows["int8"]["bytes"]
    for form in ("bfloat16", "int8"):
        assert 0.5 < rows[form]["agreement_top1"] <= 1
        assert 0 < rows[form]["kl"] < 0.1
        assert rows[form]["views"] == 64
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert "| int8 |" in stdout


def test_profile_of_a_saved_model_is_float32_only(
    data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = keras.Sequential(
        [keras.Input((IMAGE, IMAGE, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    )
    network.export(str(tmp_path / "s"), verbose=False)
    flags = [f"--teacher=saved_model:{tmp_path}/s", f"--data={data}", "--batch_size=8", "--teacher_range=-1,1"]
    metrics, stdout = run_verb(capsys, "profile", *flags)
    assert list(metrics["forms"]) == ["float32"]
    assert "only float32 is profiled" in stdout
    assert metrics["parameters"] == network.count_params()
    assert metrics["macs"] in (None, 22 * 22 * 4 * 27 + 22 * 22 * 4 * CLASSES)
    assert np.isfinite(metrics["forms"]["float32"]["images_per_second"])


def test_servable_is_distinguished_from_a_classifier(tmp_path: pathlib.Path) -> None:
    from trainer.models import saved_models

    class Bytes(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, files: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"scores": tf.zeros([tf.shape(files)[0], 3])}

    module = Bytes()
    tf.saved_model.save(module, str(tmp_path / "b"), signatures=module.__call__)
    keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]).export(
        str(tmp_path / "f"), verbose=False
    )
    assert saved_models.is_servable(str(tmp_path / "b"), "model")
    assert not saved_models.is_servable(str(tmp_path / "f"), "model")
    assert saved_models.SavedServable(str(tmp_path / "b"), "model")([b"x", b"y"]).shape == (2, 3)
