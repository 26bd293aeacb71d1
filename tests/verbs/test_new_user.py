"""A user's own teacher and data, with the mistakes that people make: a good start or one line."""

from __future__ import annotations

import pathlib
import re
import zipfile
from collections.abc import Callable

import keras
import numpy as np
import pytest
from conftest import here
from PIL import Image

# Colours of equal hue and other brightness, which are told apart in the right value range only.
COLOURS = np.array([(30, 90, 38), (115, 12, 37), (60, 180, 75), (128, 128, 128), (230, 25, 75)], np.float32) / 255
NAMES = ("dark green", "dark red", "green", "grey", "red")
ORDER = (0, 1, 2, 3, 4)
LAYERS = keras.layers


def colour_folder(folder: pathlib.Path, counts: dict[str, int]) -> None:
    """Writes SPLIT/COLOUR/N.png: noise around one colour."""
    for split, count in counts.items():
        for row, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([len(split), row, number])
                pixels = 255 * COLOURS[row] + rng.normal(0, 12, (40, 40, 3))
                picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                picture.save(folder / split / name / f"{number}.png")


def colour_classifier(
    low: float,
    high: float,
    *,
    order: tuple[int, ...] = ORDER,
    before: Callable[[object], object] = lambda x: x,
    after: Callable[[object], object] = keras.ops.softmax,
    side: int | None = 32,
    channels: int = 3,
) -> keras.Model:
    """A classifier that is right on every colour, for images from `low` to `high`."""
    colours = COLOURS[list(order)]
    inputs = keras.Input((side, side, channels))
    head = LAYERS.Dense(len(order), name="colours")
    pooled = LAYERS.GlobalAveragePooling2D()(before(inputs))
    if channels == 1:
        pooled = LAYERS.Concatenate()([pooled] * 3)
    model = keras.Model(inputs, after(head(pooled)))
    scale = 40 / (high - low)
    head.set_weights([scale * colours.T, -20 * (colours**2).sum(1) - scale * low * colours.sum(1)])
    return model


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the prepared data set `data` and what users have beside it."""
    folder = tmp_path_factory.mktemp("colours")
    colour_folder(folder / "photos", {"train": 10, "validation": 12, "test": 8})
    done = here("prepare", f"--dataset=folder:{folder / 'photos'}", f"--out={folder / 'data'}")
    assert done.returncode == 0, done.stderr
    return folder


def start(colours: pathlib.Path, teacher: str, *flags: str) -> tuple[int, str]:
    """Code and output of README's command, up to the first step."""
    done = here(
        "task",
        f"--data={colours / 'data'}",
        f"--teacher={teacher}",
        "--student=bit-tiny",
        "--image_size=32",
        "--epochs=10",
        "--batch_size=10",
        "--temperature=2",
        "--eval_split=validation",
        "--final_split=test",
        f"--workdir={colours / 'run'}",
        "--dry_run",
        *flags,
    )
    return done.returncode, done.stderr


def saved(model: keras.Model, path: pathlib.Path) -> str:
    """Saves a model; returns its `--teacher`."""
    model.save(path)
    return f"keras:{path}"


def rescaling(images: object) -> object:
    return LAYERS.Rescaling(1 / 255)(images)


def augmented(images: object) -> object:
    return LAYERS.RandomBrightness(0.5, value_range=(0, 255))(LAYERS.RandomRotation(0.2)(LAYERS.RandomFlip()(images)))


def nested(images: object) -> object:
    inputs = keras.Input((32, 32, 3))
    return keras.Model(inputs, LAYERS.Conv2D(3, 1, kernel_initializer="zeros", use_bias=False)(inputs))(images)


# What users do without any flag about the teacher; all of it must work, with the teacher at 100 %.
ORDINARY: dict[str, Callable[[], keras.Model]] = {
    "Rescaling inside, softmax at the end": lambda: colour_classifier(0, 1, before=rescaling),
    "Rescaling inside, logits": lambda: colour_classifier(0, 1, before=rescaling, after=lambda x: x),
    "images from 0 to 1": lambda: colour_classifier(0, 1),
    "images from -1 to 1": lambda: colour_classifier(-1, 1),
    "images from 0 to 255": lambda: colour_classifier(0, 255),
    "augmentation inside": lambda: colour_classifier(0, 1, before=lambda x: rescaling(augmented(x))),
    "a resize in front": lambda: colour_classifier(
        0, 1, before=lambda x: rescaling(LAYERS.Resizing(24, 24)(x)), side=48
    ),
    "a skip connection": lambda: colour_classifier(0, 1, before=lambda x: rescaling(LAYERS.Add()([x, nested(x)]))),
    "any image size": lambda: colour_classifier(0, 1, before=rescaling, side=None),
    "softmax in an Activation, then float32": lambda: colour_classifier(
        0,
        1,
        before=rescaling,
        after=lambda x: LAYERS.Activation("linear", dtype="float32")(LAYERS.Activation("softmax")(x)),
    ),
}


# Seconds each, and much like others: the fast part must stay under ten minutes.
LONGER = ("Rescaling inside, logits", "images from -1 to 1", "a resize in front", "any image size")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONGER else []) for name in ORDINARY]
)
def test_an_ordinary_teacher_needs_no_flag(name: str, colours: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code, output = start(colours, saved(ORDINARY[name](), tmp_path / "teacher.keras"))
    assert code == 0, output
    assert re.search(r"teacher .*100\.0%", output), output


def untrained() -> keras.Model:
    return keras.Sequential([keras.Input((32, 32, 3)), LAYERS.Flatten(), LAYERS.Dense(5)])


def of_nans() -> keras.Model:
    model = colour_classifier(-1, 1)
    weights = model.get_weights()
    model.set_weights([np.full_like(weights[0], np.nan), weights[1]])
    return model


def two_outputs() -> keras.Model:
    model = colour_classifier(0, 1, before=rescaling)
    features = LAYERS.Dense(7, name="features")(model.layers[-3].output)
    return keras.Model(model.inputs, {"classes": model.output, "features": features})


def caffe() -> keras.Model:
    """Takes another range than the three, as the ResNet50 of keras.applications does."""
    return colour_classifier(-2000, 3000, order=(4, 3, 2, 1, 0))


# name: (model, flags, what the one line must contain)
MISTAKES: dict[str, tuple[Callable[[], keras.Model], tuple[str, ...], tuple[str, ...]]] = {
    "four classes": (lambda: colour_classifier(0, 1, order=ORDER[:4]), (), ("4", "5", "classes")),
    "another order of classes": (
        lambda: colour_classifier(0, 1, before=rescaling, order=ORDER[::-1]),
        (),
        ("order",),
    ),
    "an untrained teacher": (untrained, (), ("--force_teacher",)),
    "weights that are NaN": (of_nans, (), ("finite",)),
    "two outputs": (two_outputs, (), ("--teacher_output", "classes", "features")),
    "grey images": (lambda: colour_classifier(0, 1, channels=1), (), ("channel",)),
    "the wrong range": (
        lambda: colour_classifier(0, 1, before=rescaling),
        ("--teacher_range=0,1",),
        ("--teacher_range", "0,255"),
    ),
    "another image size": (lambda: colour_classifier(0, 1), ("--teacher_image_size=64",), ("32", "64")),
    "a range that is none of the three": (caffe, (), ("--teacher_range",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_with_a_teacher_is_one_line(name: str, colours: pathlib.Path, tmp_path: pathlib.Path) -> None:
    make, flags, words = MISTAKES[name]
    code, output = start(colours, saved(make(), tmp_path / "teacher.keras"), *flags)
    assert code in (2, 3), output
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


def test_a_mistake_with_paths_is_one_line(colours: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = colour_classifier(0, 1)
    model.export(tmp_path / "saved", verbose=False)
    model.save_weights(tmp_path / "teacher.weights.h5")
    model.save(tmp_path / "teacher.keras")
    with zipfile.ZipFile(tmp_path / "teacher.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    expected = {
        f"{tmp_path / 'teacher.keras'}": "keras:",
        f"keras:{tmp_path / 'missing.keras'}": "missing.keras",
        f"keras:{tmp_path / 'saved'}": "saved_model:",
        f"keras:{tmp_path / 'teacher.weights.h5'}": "weights",
        f"keras:{tmp_path / 'teacher.pth'}": "PyTorch",
    }
    for teacher, word in expected.items():
        code, output = start(colours, teacher)
        last = output.rstrip().splitlines()[-1]
        assert code in (2, 3), output
        assert last.startswith("error: ")
        assert word in last, last


def test_a_teacher_in_hdf5_works(colours: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code, output = start(colours, saved(colour_classifier(0, 1, before=rescaling), tmp_path / "teacher.h5"))
    assert code == 0, output
    assert re.search(r"teacher .*100\.0%", output), output


def test_images_that_were_not_prepared_are_one_line(colours: pathlib.Path, tmp_path: pathlib.Path) -> None:
    teacher = saved(colour_classifier(0, 1), tmp_path / "teacher.keras")
    code, output = start(colours, teacher, f"--data={colours / 'photos'}")
    assert code in (2, 3)
    assert "prepare" in output.rstrip().splitlines()[-1]
    code, output = start(colours, teacher, "--eval_split=dev")
    assert code == 3
    assert "dev" in output.rstrip().splitlines()[-1]
