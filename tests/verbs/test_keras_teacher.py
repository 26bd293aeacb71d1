"""A teacher made as in Keras's tutorials needs no flag, and has the accuracy that Keras measures.

`image_dataset_from_directory`, a `Rescaling` inside, a softmax at the end.
"""

from __future__ import annotations

import json
import pathlib

import keras
import numpy as np
import pytest
from conftest import here
from PIL import Image

CLASSES, SIDE = 4, 32


def draw(folder: pathlib.Path, images: int, seed: int) -> None:
    """Oblong photographs of noise with a disc, whose colour is that of its class, more or less."""
    rng = np.random.default_rng(seed)
    colours = np.array([(200, 60, 60), (160, 110, 60), (60, 160, 80), (60, 90, 180)])
    for number in range(images):
        label = number % CLASSES
        height, width = ((48, 80), (80, 48), (56, 64))[number % 3]
        pixels = rng.normal(120, 35, (height, width, 3))
        y, x = np.mgrid[:height, :width]
        radius = rng.uniform(0.15, 0.3) * min(height, width)
        disc = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2 < radius**2
        pixels[disc] = colours[label] + rng.normal(0, 25, 3) + rng.normal(0, 15, (int(disc.sum()), 3))
        path = folder / f"species {label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("photographs")
    for seed, (split, images) in enumerate({"train": 480, "validation": 96, "test": 120}.items()):
        draw(root / split, images, seed)
    return root


def tutorial(photographs: pathlib.Path) -> keras.Model:
    """https://www.tensorflow.org/tutorials/images/classification, smaller."""
    keras.utils.set_random_seed(0)
    data = keras.utils.image_dataset_from_directory(
        photographs / "train", image_size=(SIDE, SIDE), batch_size=32, seed=1, verbose=False
    )
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3)),
            layers.RandomFlip("horizontal"),
            layers.Rescaling(1.0 / 255),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(data, epochs=8, verbose=0)
    return model


@pytest.mark.slow
def test_the_tutorials_teacher_needs_no_flag(
    photographs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tutorial(photographs)
    model.save(tmp_path / "teacher.keras")
    test = keras.utils.image_dataset_from_directory(
        photographs / "test", image_size=(SIDE, SIDE), shuffle=False, verbose=False
    )
    _, expected = model.evaluate(test, verbose=0)
    assert 0.6 < expected < 1  # else it could not tell one view from another

    data, name = f"--data={tmp_path}/data", f"keras:{tmp_path}/teacher.keras"
    assert here("prepare", f"--dataset=folder:{photographs}", f"--out={tmp_path}/data").returncode == 0
    job = [
        "task",
        data,
        f"--teacher={name}",
        "--student=bit-tiny",
        f"--image_size={SIDE}",
        "--steps=2",
        "--batch_size=8",
    ]
    done = here(*job, "--eval_split=validation", "--final_split=test", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "takes 0,255 (it begins with Rescaling, which gives 0 to 1), returns probabilities" in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(t["value_range"], t["outputs"], t["split"]) for t in result["teachers"]] == [
        ("0,255", "logits", "validation")
    ]
    if result["teachers"][0]["view"] == "squash":
        assert abs(result["teacher_own_view_top1"] - expected) <= 1.01 / 120
        assert "Teacher, own view" in (tmp_path / "run" / "report.html").read_text()

    capsys.readouterr()
    assert here("evaluate", f"--model={name}", data, "--model_view=squash").returncode == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["own_view_top1"] == pytest.approx(expected, abs=1.01 / 120)
    assert measured["interval"][0] < measured["top1"] < measured["interval"][1]
    assert measured["own_view_top1"] >= measured["top1"]  # the central crop lacks some of the discs
