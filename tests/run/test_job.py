"""The whole job: end to end, stopped, killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, ROOT, SIDE, build_job, funmatch, here, reconfigure
from matrix import final_state, result, rows
from PIL import Image
from samples import batch_normalized

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import DataError, Diverged, Stopped
from trainer.io import files
from trainer.output import finish
from trainer.run import build, loop, metric_writer
from trainer.run.checkpoint import Background, Checkpoints
from trainer.run.job import Job
from trainer.run.plan import make_plan


def assert_equal_runs(first: str, second: str) -> None:
    assert final_state(first) == final_state(second)
    assert rows(first) == rows(second)
    assert result(first) == result(second)


@pytest.fixture(scope="module")
def flags(data: str, teacher_file: str) -> list[str]:
    return [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        "--student=bit-tiny",
        f"--image_size={IMAGE}",
        f"--store_size={SIDE}",
        "--steps=12",
        "--batch_size=8",
        "--learning_rate=0.003",
        "--steps_per_loop=2",
        "--log_every=3",
        "--eval_every=6",
        "--checkpoint_every=4",
        "--eval_batch_size=10",
    ]


@pytest.fixture(scope="module")
def uninterrupted(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    workdir = str(tmp_path_factory.mktemp("whole") / "run")
    done = funmatch(*flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def test_files_and_metrics_of_a_finished_run(uninterrupted: str) -> None:
    names = set(os.listdir(uninterrupted))
    assert names == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "export",
        "result.json",
        "report.html",
        "teacher.json",
    }
    metrics = json.loads(pathlib.Path(uninterrupted, "result.json").read_text())
    expected = {
        "teacher_top1",
        "student_top1",
        "agreement_top1",
        "kl",
        "steps",
        "images_per_second",
        "wall_seconds",
        "seed",
        "versions",
    }
    assert expected <= metrics.keys()
    assert metrics["steps"] == 12
    assert metrics["images_per_second"] > 0
    events = list(pathlib.Path(uninterrupted, "tensorboard").iterdir())
    tags = {v.tag for e in events for event in tf.compat.v1.train.summary_iterator(str(e)) for v in event.summary.value}
    assert {"train/loss", "train/learning_rate", "eval/student_top1", "final/kl"} <= tags
    assert "<html" in pathlib.Path(uninterrupted, "report.html").read_text()
    config = json.loads(pathlib.Path(uninterrupted, "config.json").read_text())["config"]
    assert config["steps"] == 12


def test_metrics_have_no_gap_and_no_repeat(uninterrupted: str) -> None:
    steps = [(row["kind"], row["step"]) for row in rows(uninterrupted)]
    assert steps == [
        ("train", 3),
        ("train", 6),
        ("eval", 6),
        ("train", 9),
        ("train", 12),
        ("eval", 12),
        ("final", 12),
    ]
    assert all(np.isfinite(v) for row in rows(uninterrupted) for v in row.values() if isinstance(v, float))


def test_two_fresh_runs_are_equal_to_the_bit(flags: list[str], uninterrupted: str, tmp_path: pathlib.Path) -> None:
    assert funmatch(*flags, f"--workdir={tmp_path}/run").returncode == 0
    assert_equal_runs(uninterrupted, f"{tmp_path}/run")


@pytest.mark.parametrize("steps_per_loop", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_loop_length_does_not_change_the_weights(
    flags: list[str], uninterrupted: str, tmp_path: pathlib.Path, steps_per_loop: int
) -> None:
    assert here(*flags, f"--workdir={tmp_path}/run", f"--steps_per_loop={steps_per_loop}").returncode == 0
    assert final_state(f"{tmp_path}/run") == final_state(uninterrupted)


WAYS = [
    ["--optimizer=muon", "--mixup=example"],
    ["--views=fix/ic_ens", "--fixed_crops=3"],
    ["--recipe=keras_example", "--warmup_steps=3", "--student_range=0,255"],
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_other_methods_resume_to_the_bit(flags: list[str], tmp_path: pathlib.Path, way: list[str]) -> None:
    assert here(*flags, *way, f"--workdir={tmp_path}/whole/run").returncode == 0
    assert (
        run_with_signal([*flags, *way], f"{tmp_path}/cut/run", "run.job:Job.run_steps", 4, "SIGKILL") == -signal.SIGKILL
    )
    assert here(*flags, *way, f"--workdir={tmp_path}/cut/run").returncode == 0
    assert_equal_runs(f"{tmp_path}/whole/run", f"{tmp_path}/cut/run")


@pytest.mark.slow
def test_batch_norm_students_resume_to_the_bit(flags: list[str], tmp_path: pathlib.Path) -> None:
    """Killed in the loop after the evaluation of step 6, and again in the export."""
    way = [*flags, f"--student=keras:{batch_normalized(tmp_path / 's.keras', dropout=0.5)}"]
    assert here(*way, f"--workdir={tmp_path}/whole/run").returncode == 0
    cut = f"{tmp_path}/cut/run"
    for where, count in (("run.job:Job.run_steps", 4), ("output.export:write", 0)):
        assert run_with_signal(way, cut, where, count, "SIGKILL") == -signal.SIGKILL
    assert here(*way, f"--workdir={cut}").returncode == 0
    assert_equal_runs(f"{tmp_path}/whole/run", cut)
    exported = (f"{tmp_path}/{name}/run/export/model.keras" for name in ("whole", "cut"))
    one, other = (keras.saving.load_model(path).get_weights() for path in exported)
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_recipe_of_the_keras_example(flags: list[str], tmp_path: pathlib.Path) -> None:
    """All points of the example in one run, on small data."""
    done = here(*flags, "--recipe=keras_example", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "warm-up takes 1,500 of 12 steps" in done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["compat"] == ["keras_example"]
    assert (config["student"], config["student_range"], config["temperature"]) == ("bit-tiny", "0,1", 10.0)
    assert (config["steps"], config["schedule_steps"]) == (12, 12)
    assert "in [0, 1]" in (tmp_path / "run" / "export" / "MODEL_CARD.md").read_text()


KILLER = """
import os, signal, sys
import importlib
module = importlib.import_module('trainer.{module}')
owner = module if "{owner}" == "" else getattr(module, "{owner}")
real, calls = owner.{name}, iter(range(10**9))
def killing(*a, **k):
    n = next(calls)
    if n == {count} and not {after}: os.kill(os.getpid(), signal.{signal})
    out = real(*a, **k)
    if n == {count} and {after}: os.kill(os.getpid(), signal.{signal})
    return out
owner.{name} = killing
from trainer import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def run_with_signal(flags: list[str], workdir: str, where: str, count: int, number: str, after: bool = True) -> int:
    """Runs the job, which sends itself a signal at call `count` of `where`; returns the exit
    status.
    """
    module, _, rest = where.partition(":")
    owner, _, name = rest.rpartition(".")
    code = KILLER.format(module=module, owner=owner, name=name, count=count, after=after, signal=number)
    arguments = [sys.executable, "-c", code, *flags, f"--workdir={workdir}"]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=240, check=False).returncode


KILLS = [  # (function, which call, before or after it); test_kills.py has many more, in forked processes
    ("run.job:Job.run_steps", 3, True),
    ("output.export:write", 0, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count", "after"), KILLS)
def test_killed_run_resumes_to_the_bit(
    flags: list[str],
    uninterrupted: str,
    tmp_path: pathlib.Path,
    where: str,
    count: int,
    after: bool,
) -> None:
    workdir = str(tmp_path / "run")
    assert run_with_signal(flags, workdir, where, count, "SIGKILL", after) == -signal.SIGKILL
    assert not os.path.exists(f"{workdir}/result.json")
    done = funmatch(*flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(uninterrupted, workdir)


@pytest.mark.slow
def test_run_killed_between_checkpoints_resumes_to_the_bit(
    flags: list[str], uninterrupted: str, tmp_path: pathlib.Path
) -> None:
    """The two steps after the checkpoint of step 8 are repeated."""
    workdir = str(tmp_path / "run")
    assert run_with_signal(flags, workdir, "run.job:Job.run_steps", 7, "SIGKILL") == -signal.SIGKILL
    done = funmatch(*flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 8 of 12" in done.stderr
    assert_equal_runs(uninterrupted, workdir)


def test_sigterm_saves_and_exits_75(flags: list[str], uninterrupted: str, tmp_path: pathlib.Path) -> None:
    """Step 11 is in the middle of a row of metrics, whose mean must include all its steps."""
    workdir = str(tmp_path / "run")
    assert run_with_signal(flags, workdir, "run.job:Job.run_steps", 6, "SIGTERM") == 75
    (commit,) = pathlib.Path(workdir, "checkpoints").glob("checkpoint-*11.json")
    assert json.loads(commit.read_text())["extra"]["pending"]
    # Resume in a process with another optimizer: Keras numbers their names.
    keras.optimizers.AdamW()
    done = here(*flags, f"--workdir={workdir}")
    assert "resumed at step 11 of 12" in done.stderr
    assert_equal_runs(uninterrupted, workdir)


def test_sigint_from_another_process(flags: list[str], tmp_path: pathlib.Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "trainer.cli",
        *flags,
        "--steps=100000",
        f"--workdir={tmp_path}/run",
    ]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/checkpoint-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGINT" in stderr


@pytest.fixture
def built(make_config: Callable[..., Config]) -> Job:
    return build_job(make_config())


@pytest.mark.parametrize("what", ["student", "teacher", "optimizer"])
def test_non_finite_values_stop_before_a_commit(built: Job, what: str) -> None:
    """NaN after step 6; the checkpoint of step 4 is finite and stays."""
    writer, checkpoints = build.open_run(built)
    real = built.run_steps

    def poisoned(steps: int) -> dict[str, float]:
        if built.step == 6:
            variable = {
                "student": built.student.trainable_variables[0],
                "teacher": built.teachers[0].model.variables[-1],
                "optimizer": built.optimizer.variables[3],
            }[what]
            variable.assign(np.full(variable.shape, np.nan, np.float32))
        return real(steps)

    built.run_steps = poisoned  # type: ignore[method-assign]
    message = {
        "student": "in step 7 of 12: the student's weights",
        "teacher": "in step 7 of 12: the teacher's output",
        "optimizer": "in step 8 of 12: the student's weights",  # step 7 computed them from a NaN moment
    }[what]
    with pytest.raises(Diverged, match=f"not finite {message}") as raised:
        loop.train(built, writer, checkpoints, Console())
    assert raised.value.exit_code == 4
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == 4
    assert all(np.isfinite(a).all() for a in restored.arrays.values())


def test_save_writes_metrics_then_state_then_commit(built: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is copied at once; later changes of the job are not in the checkpoint."""
    writer, checkpoints = build.open_run(built)
    writer.add("train", 3, {"loss": 1.0})
    written, gate, real = [], threading.Event(), files.write

    def write(path: str, content: bytes, what: str) -> None:
        assert gate.wait(30)
        written.append(pathlib.Path(path).name.partition("-")[0])
        real(path, content, what)

    monkeypatch.setattr(files, "write", write)
    before = built.state()
    with Background() as saving:
        loop.save(built, writer, checkpoints, saving)
        assert not written, "save blocked its caller"
        writer.add("train", 4, {"loss": 2.0})
        for variable in built.student.trainable_variables:
            variable.assign_add(tf.ones_like(variable))
        built.pending_metrics.append((1, {"loss": 9.0}))
        gate.set()
    assert written == ["metrics.jsonl", "state", "checkpoint"]
    restored = checkpoints.restore()
    assert restored is not None
    assert all(restored.arrays[name].tobytes() == array.tobytes() for name, array in before.items())
    assert restored.extra["pending"] == []
    assert [row["step"] for row in rows(built.config.workdir)] == [3]


def test_failed_save_ends_the_job(built: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, checkpoints = build.open_run(built)
    real = files.write

    def write(path: str, content: bytes, what: str) -> None:
        if "state-0000000008" in path:
            raise DataError("cannot write a checkpoint: No space left on device")
        real(path, content, what)

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(DataError, match="No space left"):
        loop.train(built, writer, checkpoints, Console())
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == 4


def test_tensorboard_errors_are_warnings(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    writer = metric_writer.MetricWriter(str(tmp_path))
    for step in (1, 2):
        writer.add("train", step, {"loss": 1.0})
        writer.flush()
    assert [w.partition(":")[0] for w in writer.warnings] == [f"nothing more is written to {tmp_path}/tensorboard"]
    assert [row["step"] for row in rows(str(tmp_path))] == [1, 2]


def test_best_checkpoint_is_kept_and_exported(
    built: Job, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations after steps 2, 4, ..., 12 give the listed values; of equal ones the first is
    kept.
    """
    values = {
        "student_top1": iter([0.1, 0.6, 0.6, 0.5, float("nan"), 0.2]),
        "kl": iter([3.0, 1.0, 1.0, 2.0, 5.0, 1.5]),
    }
    for by in values:
        settings = make_config(keep_best=by, export_from="best", eval_every=2, checkpoint_every=12, keep_checkpoints=1)
        reconfigure(built, dataclasses.replace(settings, workdir=f"{settings.workdir}-{by}").resolve(40))
        writer, checkpoints = build.open_run(built)
        kept = {}

        class FakeResult:
            def metrics(self, by: str = by) -> dict[str, float]:
                kept[built.step] = built.state()  # noqa: B023
                return {by: next(values[by])}

        monkeypatch.setattr(loop, "evaluate", lambda *_: FakeResult())
        built.step, built.best = 0, {}
        built.optimizer.iterations.assign(0)
        loop.train(built, writer, checkpoints, Console())
        assert built.best["step"] == 4
        steps = sorted(int(p.stem[-10:]) for p in pathlib.Path(built.config.workdir, "checkpoints").glob("c*.json"))
        assert steps == [4, 12]
        loop.take_best(built, checkpoints)
        assert all(built.state()[name].tobytes() == array.tobytes() for name, array in kept[4].items())
        # On resume, the best step is read from the newest checkpoint.
        built.best = {}
        loop.resume(built, writer, checkpoints, Console())
        assert (built.step, built.best["step"]) == (12, 4)
    built.best = {}
    with pytest.raises(DataError, match="the run was made without that flag"):
        loop.take_best(built, checkpoints)


def test_checkpoint_of_another_model_is_refused(built: Job) -> None:
    state = built.state()
    first = next(iter(state))
    with pytest.raises(DataError, match="shape"):
        built.load(state | {first: np.zeros((1, 1), np.float32)})
    with pytest.raises(DataError, match="does not hold"):
        built.load({k: v for k, v in state.items() if k != first})


def test_state_round_trip(built: Job) -> None:
    before = built.state()
    rng = np.random.default_rng(0)
    changed = {k: rng.normal(size=v.shape).astype(v.dtype) for k, v in before.items()}
    built.load(changed)
    after = built.state()
    assert all(after[k].tobytes() == v.tobytes() for k, v in changed.items())


def test_other_flags_in_the_same_workdir_are_refused(built: Job) -> None:
    writer, checkpoints = build.open_run(built)
    loop.save(built, writer, checkpoints)
    identity = built.plan.identity | {"temperature": 9.0}
    with pytest.raises(DataError, match=r"temperature: 1\.0 there, 9\.0 here"):
        Checkpoints(f"{built.config.workdir}/checkpoints", identity, 2).restore()


def test_changed_teacher_is_refused(
    make_config: Callable[..., Config], tmp_path: pathlib.Path, teacher_file: str
) -> None:
    path = tmp_path / "teacher.keras"
    path.write_bytes(pathlib.Path(teacher_file).read_bytes())
    config = make_config(teacher=(f"keras:{path}",))
    before = make_plan(config).identity
    model = keras.saving.load_model(path)
    model.set_weights([w * 1.01 for w in model.get_weights()])
    model.save(path)
    assert make_plan(config).identity["teacher"] != before["teacher"]


def test_metrics_are_truncated_to_the_checkpoint(tmp_path: pathlib.Path) -> None:
    first = metric_writer.MetricWriter(str(tmp_path))
    for step in (1, 2, 3):
        first.add("train", step, {"loss": float(step)})
    first.add("final", 3, {"kl": 0.0})
    first.flush()
    second = metric_writer.MetricWriter(str(tmp_path))
    second.rewind(2)
    assert [row["step"] for row in second.rows] == [1, 2]
    second.rewind(3)
    assert [row["kind"] for row in second.rows] == ["train"] * 3


@pytest.mark.slow
def test_bring_your_own_images_and_teacher(tmp_path: pathlib.Path) -> None:
    """Grey, transparent, CMYK and odd-sized images; a softmax teacher of another size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("valid", 3)):
        for name, level in (("dark", 60), ("light", 190)):
            for i in range(count):
                mode, bands, kind = [
                    ("L", 1, "png"),
                    ("RGBA", 4, "png"),
                    ("CMYK", 4, "jpg"),
                    ("RGB", 3, "jpg"),
                ][i % 4]
                pixels = np.clip(
                    rng.normal(level, 30, (int(rng.integers(9, 70)), int(rng.integers(9, 70)), bands)),
                    0,
                    255,
                ).astype(np.uint8)
                path = tmp_path / "images" / split / name / f"{i}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode).save(path)
    keras.Sequential(
        [
            keras.Input((20, 20, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    ).save(tmp_path / "mine.keras")
    assert here("prepare", f"--dataset=folder:{tmp_path}/images", f"--out={tmp_path}/data").returncode == 0
    done = here(
        "task",
        f"--data={tmp_path}/data",
        f"--teacher=keras:{tmp_path}/mine.keras",
        "--teacher_range=0,255",
        "--student=app:MobileNetV2",
        "--image_size=32",
        "--epochs=2",
        "--batch_size=4",
        "--eval_split=valid",
        "--final_split=valid",
        f"--workdir={tmp_path}/run",
    )
    assert done.returncode == 0, done.stderr
    metrics = result(f"{tmp_path}/run")
    assert metrics["steps"] == 6
    assert 0 <= metrics["teacher_top1"] <= 1


def test_train_a_teacher_with_labels(data: str, tmp_path: pathlib.Path) -> None:
    done = here(
        "teacher",
        f"--data={data}",
        "--model=bit-tiny",
        f"--image_size={IMAGE}",
        "--steps=4",
        "--batch_size=8",
        f"--out={tmp_path}/t.keras",
    )
    assert done.returncode == 0, done.stderr
    assert keras.saving.load_model(tmp_path / "t.keras").output_shape == (None, CLASSES)
    assert "student_top1" in result(f"{tmp_path}/t")
    assert here("teacher", f"--data={data}", "--out=t.h5").returncode == 2


@pytest.mark.slow
def test_smoke_run_prints_its_table(tmp_path: pathlib.Path) -> None:
    done = funmatch("smoke", "--preset=tiny", f"--workdir={tmp_path}/smoke", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "student by function matching" in (tmp_path / "smoke/summary.md").read_text()
    assert (tmp_path / "smoke/distill/report.html").exists()


def test_signal_handlers_are_restored() -> None:
    assert Stopped("x").exit_code == 75
    before = signal.getsignal(signal.SIGTERM)
    from trainer.core.signals import StopRequest

    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert finish.versions()["tensorflow"] == tf.__version__
