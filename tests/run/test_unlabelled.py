"""Training on images without labels, with a separate data set for evaluation."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from conftest import CLASSES, IMAGE, SIDE, here
from matrix import final_state, result, rows
from samples import image

from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit

IMAGES = 16


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


def test_unlabelled_data_needs_eval_data(teacher_file: str, tmp_path: pathlib.Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / "plain" / split).mkdir(parents=True)
        (tmp_path / "plain" / split / "1.jpg").write_bytes(image(1))
    assert here("prepare", f"--dataset=folder:{tmp_path}/plain", f"--out={tmp_path}/data").returncode == 0
    done = here(
        "task",
        f"--data={tmp_path}/data",
        f"--teacher=keras:{teacher_file}",
        "--student=bit-tiny",
        f"--image_size={IMAGE}",
        "--steps=1",
        "--batch_size=1",
        f"--workdir={tmp_path}/run",
    )
    assert done.returncode == 3
    last = done.stderr.strip().splitlines()[-1]
    assert f"{tmp_path}/data has no classes" in last
    assert "give --eval_data" in last
