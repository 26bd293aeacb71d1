"""Students with batch normalisation are evaluated and exported with statistics of their weights."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, build_job, here
from matrix import result
from samples import batch_normalized, state

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.method import views
from trainer.models import students
from trainer.output.finish import finish
from trainer.run import batch_statistics, build, loop
from trainer.run.job import Job


@pytest.fixture
def student(tmp_path: pathlib.Path) -> str:
    return f"keras:{batch_normalized(tmp_path / 's.keras')}"


def moving(model: keras.Model) -> list[np.ndarray]:
    """Mean and variance of each batch normalisation, as inference uses them."""
    pairs = [(x.moving_mean, x.moving_variance) for x in students.batch_norms(model)]
    return [keras.ops.convert_to_numpy(variable) for pair in pairs for variable in pair]


def student_views(job: Job, step: int, mixed: bool) -> np.ndarray:
    """What the student sees of the step's batch, with or without mixup."""
    config = job.config
    if config.views == "mix" and not mixed:
        config = dataclasses.replace(config, views="same/ic")
    batch_rows = views.BatchRows.of(0, 1, config.batch_size, views.mixup_partner(config))
    ids = job.sampler.batches(step, 1)[0][batch_rows.rows.numpy()]
    inputs = tf.constant(job.train_store.take(ids)), tf.constant(job.train_store.sizes[ids])
    return views.training_views(config, *inputs, batch_rows, tf.constant(step), ()).student.numpy()


def reference(job: Job, step: int, mixed: bool) -> list[np.ndarray]:
    """The statistics in NumPy: moments of all the values that each layer normalises, each batch
    having been normalised by its own in the layer before.
    """
    batches = [student_views(job, step + number, mixed).astype(np.float64) for number in range(job.statistics.batches)]
    kernels = [keras.ops.convert_to_numpy(w) for w in job.student.trainable_variables]
    statistics = []
    for kernel, gamma, beta in (kernels[:3], kernels[3:6]):
        windows = [np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2] for x in batches]
        batches = [np.einsum("nhwcij,ijco->nhwo", x, kernel) for x in windows]
        everything = np.concatenate(batches)
        statistics += [everything.mean((0, 1, 2)), everything.var((0, 1, 2))]
        normal = [(x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3) for x in batches]
        batches = [np.maximum(x * gamma + beta, 0.0) for x in normal]
    return statistics


@pytest.mark.parametrize(
    ("replicas", "changes", "mixed"),
    [
        (1, {}, False),
        pytest.param(1, {"mixup": "example", "jit_compile": "on"}, True, marks=pytest.mark.slow),
        (1, {"views": "fix/cc", "store": "disk", "precision": "mixed_bfloat16"}, False),
        pytest.param(2, {"mixup": "example"}, True, marks=pytest.mark.slow),
        pytest.param(4, {"jit_compile": "on", "compat": ("mixup",)}, False, marks=pytest.mark.slow),
    ],
)
def test_statistics_equal_numpys(
    make_config: Callable[..., Config], student: str, replicas: int, changes: dict[str, object], mixed: bool
) -> None:
    """Over all values of all batches; a mixture of one coefficient for a batch is left out."""
    job = build_job(make_config(student=student, **changes), replicas)
    job.run_steps(2)
    before = state(job)
    assert job.statistics.batches == 2048 // 8
    job.statistics.batches = 3
    expected = reference(job, 2, mixed)
    with job.for_inference():
        found = moving(job.student)
    tolerance = 2e-2 if "precision" in changes else 1e-5
    for array, reference_array in zip(found, expected, strict=True):
        assert np.allclose(array, reference_array, rtol=tolerance, atol=tolerance)
    assert [x.momentum for x in students.batch_norms(job.student)] == [0.999] * 2
    assert all(array.tobytes() == before[name].tobytes() for name, array in state(job).items())


def test_a_layer_that_is_used_twice_has_the_statistics_of_both_uses(
    make_config: Callable[..., Config], tmp_path: pathlib.Path
) -> None:
    """Frozen layers, and those with momentum 1, keep what they have."""
    inputs = keras.Input((IMAGE, IMAGE, 3))
    layers = [keras.layers.BatchNormalization(name=name) for name in ("shared", "frozen", "constant")]
    layers[1].trainable, layers[2].momentum = False, 1.0
    x = layers[0](inputs) + layers[0](3.0 * inputs + 1.0)
    x = keras.layers.GlobalAveragePooling2D()(layers[2](layers[1](x)))
    keras.Model(inputs, keras.layers.Dense(CLASSES)(x)).save(tmp_path / "s.keras")
    job = build_job(make_config(student=f"keras:{tmp_path / 's.keras'}", views="same/ic"))
    job.statistics.batches = 2
    before = moving(job.student)
    with job.for_inference():
        after = moving(job.student)
    seen = np.concatenate([student_views(job, step, False) for step in (0, 1)]).astype(np.float64)
    both = np.concatenate([seen, 3 * seen + 1])
    assert np.allclose(after[0], both.mean((0, 1, 2)), atol=1e-5)
    assert np.allclose(after[1], both.var((0, 1, 2)), atol=1e-5)
    assert all((a == b).all() for a, b in zip(after[2:], before[2:], strict=True))


def test_evaluations_do_not_change_training(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    """To the bit, also for a student whose dropout has a state."""
    path = batch_normalized(tmp_path / "s.keras", dropout=0.5)
    config = make_config(student=f"keras:{path}")
    plain, evaluated = build_job(config), build_job(config)
    writer, _ = build.open_run(evaluated)
    for job in (plain, evaluated):
        for _ in range(2):
            job.run_steps(2)
            if job is evaluated:
                job.statistics.batches = 2
                loop.evaluate(job, "validation", "eval", writer, Console())
    expected, found = state(plain), state(evaluated)
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []


def test_an_error_leaves_the_moving_averages(make_config: Callable[..., Config], student: str) -> None:
    job = build_job(make_config(student=student))
    job.statistics.batches = 1
    before = moving(job.student)

    def evaluate() -> None:
        with job.for_inference():
            assert not np.allclose(moving(job.student)[0], before[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert all((a == b).all() for a, b in zip(moving(job.student), before, strict=True))


def test_short_run_with_momentum_0_999_evaluates_as_it_trained(
    make_config: Callable[..., Config], student: str
) -> None:
    """After 60 steps the moving averages still are their initial values, nearly."""
    settings = {"distance": "labels", "teacher": (), "views": "same/ic", "min_crop_area": 0.9, "student_range": "0,255"}
    job = build_job(
        make_config(student=student, steps=60, batch_size=32, learning_rate=0.03, eval_split="train", **settings)
    )
    for _ in range(6):
        trained = job.run_steps(10)["agreement"]
    writer, _ = build.open_run(job)
    found = loop.evaluate(job, "train", "eval", writer, Console()).metrics()["student_top1"]
    lagging = job.evaluator("train").run(job.student, job.teachers).metrics()["student_top1"]
    assert trained > 0.6
    assert found > trained - 0.1
    assert lagging < found - 0.2


def test_a_student_without_batch_norm_costs_nothing(
    make_config: Callable[..., Config], student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(*_: object) -> None:
        raise AssertionError("statistics were estimated")

    monkeypatch.setattr(batch_statistics.BatchStatistics, "estimate", estimate)
    for changes in ({"student": "bit-tiny"}, {"student": student, "batch_norm": "moving"}):
        job = build_job(make_config(**changes))
        assert not job.statistics.layers
        with job.for_inference():
            pass


def test_export_of_the_best_step_has_its_statistics(make_config: Callable[..., Config], student: str) -> None:
    """They are those of the step's own evaluation, though the job is at the last step; the file
    gives the logits that were evaluated.
    """
    config = make_config(student=student, keep_best="student_top1", export_from="best", eval_every=2)
    job = build_job(config)
    writer, checkpoints = build.open_run(job)
    seen: dict[int, list[np.ndarray]] = {}
    run = job.evaluator("validation").run

    def evaluate(model: keras.Model, *rest: object) -> object:
        seen[job.step] = moving(model)
        return run(model, *rest)  # type: ignore[arg-type]

    job.evaluator("validation").run = evaluate  # type: ignore[method-assign,assignment]
    loop.train(job, writer, checkpoints, Console())
    best = job.best["step"]
    assert best < 12
    loop.take_best(job, checkpoints)
    metrics = finish(job, writer, Console())
    assert metrics["batch_norm"] == "reestimate"
    exported = keras.saving.load_model(f"{config.workdir}/export/model.keras")
    assert all((a == b).all() for a, b in zip(moving(exported), seen[best], strict=True))
    done = here("evaluate", f"--model=keras:{config.workdir}/export/model.keras", f"--data={config.data[0]}")
    assert done.returncode == 0, done.stderr
    assert f"{100 * metrics['student_top1']:.2f}" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_finished_run_takes_the_other_statistics(
    data: str, teacher_file: str, student: str, tmp_path: pathlib.Path
) -> None:
    """The same command with another --batch_norm evaluates and exports again; it trains nothing."""
    flags = [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--student={student}",
        f"--workdir={tmp_path}/run",
        f"--image_size={IMAGE}",
        "--steps=4",
        "--batch_size=8",
    ]
    moved, again, same = here(*flags, "--batch_norm=moving"), here(*flags), here(*flags)
    assert moved.returncode == again.returncode == same.returncode == 0, again.stderr
    assert "resumed at step 4 of 4" in again.stderr
    assert "nothing to do" in same.stderr
    assert result(tmp_path / "run")["batch_norm"] == "reestimate"
