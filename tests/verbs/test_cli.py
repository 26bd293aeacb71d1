"""The command line: fast help, errors as one line, exit codes."""

from __future__ import annotations

import json
import os
import pathlib
import time

import keras
import pytest
from conftest import CLASSES, IMAGE, ROOT, funmatch, here

from trainer import cli
from trainer.data.dataset import Dataset, Split

FLAGS = [
    "--steps=2",
    "--batch_size=4",
    f"--image_size={IMAGE}",
    "--student=bit-tiny",
    "--store_size=32",
]


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_help_takes_under_a_second_without_tensorflow(verb: str, tmp_path: pathlib.Path) -> None:
    # A stand-in for TensorFlow that fails on import.
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    began = time.monotonic()
    done = funmatch(verb, "--help", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "  --" in done.stdout
    assert time.monotonic() - began < 1.0


def one_line(done, code: int) -> str:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("typo", "flag"),
    [
        ("--tempreature=2", "temperature"),
        ("--learnign_rate=1", "learning_rate"),
        ("--worksdir=x", "workdir"),
        ("--stduent=x", "student"),
    ],
)
def test_mistyped_flag_names_the_nearest(typo: str, flag: str) -> None:
    assert flag in one_line(here("task", typo), 2)


def test_mistyped_verb_names_the_nearest() -> None:
    done = here("taks")
    assert done.returncode == 2
    assert "did you mean task?" in done.stderr


def test_invalid_arguments_are_one_line() -> None:
    assert "--name=value" in one_line(here("task", "workdir"), 2)
    assert "--steps" in one_line(here("task", "--steps=many"), 2).replace("flag --", "--")
    assert "--data is missing" in one_line(here("task"), 2)
    assert "--out is missing" in one_line(here("prepare", "--dataset=synthetic"), 2)
    assert "nowhere.flags" in one_line(here("task", "--flagfile=nowhere.flags"), 2)


def test_missing_data(tmp_path: pathlib.Path, teacher_file: str) -> None:
    done = here(
        "task",
        "--data=/no/such",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        *FLAGS,
    )
    line = one_line(done, 3)
    assert "/no/such" in line
    assert "trainer.prepare" in line


def test_missing_split_names_the_existing_ones(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    done = here(
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        "--eval_split=valid",
        *FLAGS,
    )
    line = one_line(done, 3)
    assert "validation (15)" in line
    assert "--eval_split" in line


def test_empty_split(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    dataset = Dataset.load(data)
    empty = Dataset(
        str(tmp_path / "d"),
        "x",
        dataset.classes,
        dataset.splits | {"train": Split("train", ())},
        {},
    )
    empty.save()
    done = here(
        "task",
        f"--data={tmp_path}/d",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        *FLAGS,
    )
    assert "is empty" in one_line(done, 3)


def test_teacher_with_another_number_of_classes(data: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.keras"
    keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(CLASSES + 2)]).save(path)
    done = here("task", f"--data={data}", f"--teacher=keras:{path}", f"--workdir={tmp_path}/r", *FLAGS)
    line = one_line(done, 3)
    assert f"has {CLASSES + 2} classes" in line
    assert f"has {CLASSES}" in line


def test_unwritable_workdir(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    # A file where a folder should be: root may write anywhere.
    (tmp_path / "file").write_text("")
    done = here(
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/file/run",
        *FLAGS,
    )
    line = one_line(done, 3)
    assert "not writable" in line
    assert str(tmp_path / "file") in line


def test_unreadable_image(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in/train/daisy").mkdir(parents=True)
    (tmp_path / "in/train/daisy/1.jpg").write_bytes(b"\xff\xd8\xff not an image")
    done = here("prepare", f"--dataset=folder:{tmp_path}/in", f"--out={tmp_path}/out")
    assert "train/daisy/1.jpg" in one_line(done, 3)
    assert not (tmp_path / "out/dataset.json").exists()


def test_unknown_student_names_the_nearest(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    done = here(
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        *FLAGS,
        "--student=bit-r50x11",
    )
    assert "did you mean bit-r50x1?" in one_line(done, 2)


def test_dry_run_writes_nothing_and_check_stops_early(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    job = [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        *FLAGS,
    ]
    done = here(*job, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "plan: 2 steps = 8 images" in done.stderr
    assert not (tmp_path / "r").exists()
    done = here(*job, "--check")
    assert "check passed" in done.stderr
    assert list((tmp_path / "r").iterdir()) == []


def test_missing_tpu(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    job = [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        *FLAGS,
    ]
    assert "tensorflow-tpu" in one_line(funmatch(*job, "--tpu=local"), 2)
    assert "no TPU is named" in one_line(funmatch(*job, "--tpu="), 2)


def test_finished_run_is_not_repeated(data: str, tmp_path: pathlib.Path, teacher_file: str) -> None:
    job = [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        f"--workdir={tmp_path}/r",
        *FLAGS,
    ]
    assert here(*job).returncode == 0
    before = json.loads((tmp_path / "r/result.json").read_text())
    again = here(*job)
    assert again.returncode == 0
    assert "is finished" in again.stderr
    assert json.loads((tmp_path / "r/result.json").read_text()) == before
    other = here(*job, "--temperature=3")
    assert "another configuration" in one_line(other, 3)
