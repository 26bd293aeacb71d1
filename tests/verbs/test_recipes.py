"""Published settings: the table against the sources, the flagfiles against the table."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from conftest import ROOT, here

from trainer import recipes
from trainer.core.config import Config
from trainer.core.flags import define_flags, from_flags

# The paper's Table 4, row by row: set, epochs, temperature, learning rate, weight decay, accuracy.
TABLE_4 = """
flowers102 1000 10 0.003 1e-3 77.51
flowers102 10000 10 0.003 3e-4 92.83
flowers102 100000 1 0.001 1e-4 95.54
flowers102 1000000 1 3e-4 1e-5 96.93
pet37 300 2 0.01 1e-5 82.75
pet37 1000 5 0.01 1e-3 88.01
pet37 3000 10 0.003 3e-4 90.08
pet37 10000 2 0.001 1e-4 90.98
pet37 30000 2 0.003 1e-5 91.06
food101 100 10 0.01 1e-3 83.29
food101 1000 10 0.001 3e-4 86.64
food101 3000 5 0.01 1e-4 87.20
sun397 100 10 0.01 1e-3 68.28
sun397 1000 10 0.003 1e-4 73.46
sun397 3000 10 0.01 3e-5 74.26
"""
# Steps that big_vision's rule, round(epochs * examples / batch), makes of them.
STEPS = {"flowers102_fast": (1020, 19_922), "flowers102_long": (1020, 1_992_188), "pet37_long": (3312, 194_062)}


def parsed(*arguments: str) -> Config:
    values = flags.FlagValues()
    define_flags(values)
    values(["test", *arguments])
    return from_flags(values, recipes.find(values.recipe))


def test_table_4_row_by_row() -> None:
    rows = []
    for recipe in recipes.RECIPES.values():
        data = recipe.name.rsplit("_", 1)[0]
        if data in ("flowers102", "pet37", "food101", "sun397"):
            f = recipe.flags
            rows.append((data, f["epochs"], f["temperature"], f["learning_rate"], f["weight_decay"], recipe.accuracy))
            common = ("bit-r50x1", 128, 512, 1500, "mix", "kl", "batch", 1.0, 0.8)
            names = ("student", "image_size", "batch_size", "warmup_steps", "views", "distance", "mixup", "clip_norm")
            assert tuple(f[name] for name in (*names, "central_fraction")) == common
    expected = [(row.split()[0], *map(float, row.split()[1:])) for row in TABLE_4.strip().splitlines()]
    assert rows == expected


@pytest.mark.parametrize("name", STEPS)
def test_steps_match_big_vision(name: str) -> None:
    examples, steps = STEPS[name]
    assert parsed(f"--recipe={name}").resolve(examples).steps == steps


def test_imagenet() -> None:
    config = parsed("--recipe=imagenet_1200ep")
    assert (config.image_size, config.batch_size, config.learning_rate, config.weight_decay) == (224, 4096, 0.03, 3e-4)
    assert (config.temperature, config.warmup_steps, config.central_fraction) == (1.0, 5000, 0.875)
    # 98 % of 1,281,167 examples.
    assert config.resolve(1_255_544).steps == 367_835


def test_keras_example_and_notebook() -> None:
    example = parsed("--recipe=keras_example")
    assert example.compat == ("keras_example",)
    assert (example.steps, example.schedule_steps, example.batch_size) == (16 * 30, int(1020 / 512 * 1000), 64)
    assert (example.student, example.student_range, example.teacher_range) == ("resnet50v2", "0,1", ("0,1",))
    assert example.resolve(1020).warnings()
    notebook = parsed("--recipe=notebook_pet37_300ep")
    assert (notebook.steps, notebook.schedule_steps) == (300 * 7, int(3312 / 512 * 300))
    assert not notebook.like_example("crop")
    assert notebook.like_example("central")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_flagfiles_match_the_table(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.flags"
    assert path.read_text(encoding="utf-8") == recipes.flagfile(recipes.RECIPES[name])
    by_file, by_name = parsed(f"--flagfile={path}").to_dict(), parsed(f"--recipe={name}").to_dict()
    assert by_file | {"recipe": name} == by_name


def test_documented_table_matches_the_table() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert text.split("<!-- recipes -->\n")[1].split("<!-- /recipes -->")[0] == recipes.table()


def test_every_flagfile_has_a_recipe() -> None:
    assert {path.stem for path in (ROOT / "recipes").iterdir()} == set(recipes.RECIPES)


def test_flag_overrides_the_recipe() -> None:
    plain = parsed("--recipe=flowers102_fast")
    config = parsed("--recipe=flowers102_fast", "--temperature=2", "--batch_size=64")
    assert (config.temperature, config.batch_size, config.learning_rate) == (2.0, 64, plain.learning_rate)
    # Even where the flag says what is the default without a recipe.
    assert parsed("--recipe=flowers102_fast", "--temperature=1").temperature == 1.0
    assert parsed("--temperature=1", "--recipe=flowers102_fast").temperature == 1.0


def test_steps_or_epochs_override_the_recipes_length() -> None:
    assert (parsed("--recipe=flowers102_fast", "--steps=7").steps, plain_epochs("--steps=7")) == (7, 0.0)
    config = parsed("--recipe=keras_example", "--epochs=1000")
    assert (config.epochs, config.steps, config.schedule_steps) == (1000.0, 0, 0)


def plain_epochs(flag: str) -> float:
    return parsed("--recipe=flowers102_fast", flag).epochs


def test_unknown_recipe_names_the_nearest() -> None:
    done = here("task", "--recipe=flowers102_fats")
    assert done.returncode == 2
    assert "flowers102_fast?" in done.stderr


def test_every_recipe_has_a_source() -> None:
    for recipe in recipes.RECIPES.values():
        assert re.search(r"arXiv|keras\.io|github\.com", recipe.source)
        assert 0 < recipe.accuracy < 100
        assert recipe.teacher


def test_verb_prints_and_writes(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "trainer.recipes"]
    stdout = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"`{name}`" in stdout for name in recipes.RECIPES)
    subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, check=True)
    assert {path.stem for path in tmp_path.iterdir()} == set(recipes.RECIPES)
