"""Training on images without labels, with a separate data set for evaluation and without."""

from __future__ import annotations

import html
import json
import pathlib
import subprocess

import keras
import numpy as np
import pytest
from conftest import CLASSES, IMAGE, SIDE, here
from matrix import final_state, result, rows
from samples import image, put

from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit

IMAGES = 16
NAMES = ("ash", "beech", "cedar", "fir", "oak")  # of the teacher's CLASSES


@pytest.mark.slow
def test_distillation_on_unlabelled_images(data: str, teacher_file: str, tmp_path: pathlib.Path) -> None:
    """The same images with labels, which are not used, give the same weights to the bit."""
    for number in range(IMAGES):
        content = image(number, (IMAGE + number, SIDE))
        for name in (f"plain/{number:02}.jpg", f"sorted/{'cats' if number < 7 else 'dogs'}/{number:02}.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    stderr = {}
    for kind in ("plain", "sorted"):
        prepared = f"{tmp_path}/{kind}.data"
        done = here("prepare", f"--dataset=folder:{tmp_path}/{kind}", f"--out={prepared}")
        assert done.returncode == 0, done.stderr
        dataset = Dataset.load(prepared)
        assert dataset.classes == (("cats", "dogs") if kind == "sorted" else ())
        assert (EncodedSplit(dataset, dataset.splits["train"]).labels == -1).all() == (kind == "plain")
        done = here(
            "task",
            f"--data={prepared}",
            f"--eval_data={data}",
            f"--teacher=keras:{teacher_file}",
            "--student=bit-tiny",
            f"--image_size={IMAGE}",
            f"--store_size={SIDE}",
            "--steps=6",
            "--batch_size=5",  # does not divide the epoch
            "--warmup_steps=0",
            "--learning_rate=0.003",
            "--steps_per_loop=2",
            "--log_every=2",
            "--eval_every=6",
            f"--workdir={tmp_path}/{kind}.run",
        )
        assert done.returncode == 0, done.stderr
        stderr[kind] = done.stderr
    runs = [tmp_path / "plain.run", tmp_path / "sorted.run"]
    assert final_state(runs[0]) == final_state(runs[1])
    assert rows(runs[0]) == rows(runs[1])
    trained = [row for row in rows(runs[0]) if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [2, 4, 6]
    assert all(np.isfinite(row["loss"]) for row in trained)
    metrics = result(runs[0])
    assert 0 <= metrics["student_top1"] <= 1
    assert 0 <= metrics["teacher_top1"] <= 1
    # The exported model has the classes of the evaluation data.
    names = json.loads((runs[0] / "export" / "classes.json").read_text())
    assert tuple(names) == Dataset.load(data).classes
    assert len(names) == CLASSES
    assert f"the labels of {tmp_path}/sorted.data are not used" in stderr["sorted"]
    assert "not used" not in stderr["plain"]
    config = json.loads((runs[0] / "config.json").read_text())["config"]
    assert (config["data"], config["eval_data"]) == ([f"{tmp_path}/plain.data"], data)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A flat folder of photographs, a file with the names of a teacher's classes, and `data`
    prepared from both.
    """
    root = tmp_path_factory.mktemp("photos")
    put(root / "photos", *(f"{number:02}.jpg" for number in range(30)))
    (root / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    done = here(
        "prepare",
        f"--dataset=folder:{root}/photos",
        f"--out={root}/data",
        "--unlabelled",
        f"--classes={root}/names.txt",
        "--splits=train:0.5,validation:0.2,test:0.3",
    )
    assert done.returncode == 0, done.stderr
    return root


def job(data: pathlib.Path, teacher_file: str, workdir: pathlib.Path, *more: str) -> subprocess.CompletedProcess[str]:
    return here(
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher_file}",
        "--student=bit-tiny",
        f"--image_size={IMAGE}",
        f"--store_size={SIDE}",
        "--steps=4",
        "--batch_size=4",
        "--eval_every=2",
        f"--workdir={workdir}",
        *more,
    )


def test_photographs_and_a_teacher_are_enough(
    photos: pathlib.Path, teacher_file: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that a run writes has agreement and KL, and no accuracy."""
    assert Dataset.load(str(photos / "data")).classes == NAMES
    assert here("prepare", f"--verify={photos}/data").returncode == 0
    done = job(photos / "data", teacher_file, tmp_path / "run", "--keep_best=kl", "--export_from=best")
    assert done.returncode == 0, done.stderr
    metrics = result(tmp_path / "run")
    shown = f"agreement {100 * metrics['agreement_top1']:.1f}%, KL {metrics['kl']:.3f} nats (best constant answer: "
    assert f"test ({metrics['split_images']} images without labels): {shown}" in done.stderr
    assert f"finished: {shown}" in done.stderr
    assert "student 0" not in done.stderr
    assert not [name for name in metrics if name.endswith(("_top1", "_top5")) and name != "agreement_top1"]
    assert metrics["labelled_images"] == 0
    assert metrics["best"]["by"] == "kl"
    evaluated = [row for row in rows(tmp_path / "run") if row["kind"] != "train"]
    assert [row["kind"] for row in evaluated] == ["eval", "eval", "final"]
    assert all({"kl", "agreement_top1", "constant_kl", "constant_agreement"} <= row.keys() for row in evaluated)
    assert metrics["best"]["value"] == min(row["kl"] for row in evaluated if row["kind"] == "eval")
    export = tmp_path / "run" / "export"
    assert tuple(json.loads((export / "classes.json").read_text())) == NAMES
    card = (export / "MODEL_CARD.md").read_text()
    assert f"| measured on | test ({metrics['split_images']} images, none of them with a label) |" in card
    assert f"| agreement of the best constant answer | {metrics['constant_agreement']:.4f} |" in card
    assert "accuracy is not known" in card
    assert "Accuracy was measured" not in card
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"the teacher's class on {100 * metrics['agreement_top1']:.1f}% of the {metrics['split_images']}" in (
        html.unescape(page)
    )
    assert "no final result" not in page
    assert ("disagree with the highest confidence" in page) == (metrics["agreement_top1"] < 1)
    assert "Most frequent disagreements" in page
    assert "Most frequent mistakes" not in page
    assert "class -1" not in page
    capsys.readouterr()
    evaluate = ("evaluate", f"--model=keras:{export}/model.keras", f"--data={photos}/data")
    done = here(*evaluate, f"--teacher=keras:{teacher_file}", f"--image_size={IMAGE}", f"--store_size={SIDE}")
    assert done.returncode == 0, done.stderr
    measured = json.loads(capsys.readouterr().out)
    assert measured["agreement_top1"] == metrics["agreement_top1"]
    assert measured["kl"] == pytest.approx(metrics["kl"], abs=1e-4)
    assert "top1" not in measured
    assert measured["per_class"] == {}
    assert "images without labels): agreement" in done.stderr
    done = here(*evaluate)
    assert done.returncode == 3
    assert "has no labels, so there is no accuracy to measure: give a --teacher" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_without_names_the_teacher_decides_the_classes(
    photos: pathlib.Path, teacher_file: str, tmp_path: pathlib.Path
) -> None:
    """The same weights as with names; two teachers must have as many classes."""
    prepare = ("prepare", f"--dataset=folder:{photos}/photos", f"--out={tmp_path}/data")
    assert here(*prepare, "--splits=train:0.5,validation:0.2,test:0.3").returncode == 0
    done = job(tmp_path / "data", teacher_file, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"names no classes: they are {CLASSES}, numbered as the teacher's" in done.stderr
    names = json.loads((tmp_path / "run" / "export" / "classes.json").read_text())
    assert names == [f"class {number}" for number in range(CLASSES)]
    identity = json.loads((tmp_path / "run" / "config.json").read_text())["identity"]
    assert identity["classes"] == 0
    # The same command finds its run finished.
    assert "is finished: nothing to do. agreement" in job(tmp_path / "data", teacher_file, tmp_path / "run").stderr
    other = tmp_path / "other.keras"
    keras.Sequential([keras.Input((IMAGE, IMAGE, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]).save(other)
    done = job(tmp_path / "data", teacher_file, tmp_path / "two", f"--teacher=keras:{other}")
    assert done.returncode == 3
    assert f"has 3 classes and --teacher=keras:{teacher_file} has {CLASSES}" in done.stderr.splitlines()[-1]
    done = here(
        "task",
        f"--data={tmp_path}/data",
        "--teacher=random:bit-tiny",
        "--steps=1",
        f"--workdir={tmp_path}/three",
    )
    assert done.returncode == 3
    assert "--teacher=random:bit-tiny has no classes of its own" in done.stderr.splitlines()[-1]
