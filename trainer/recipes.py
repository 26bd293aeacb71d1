"""List published settings: the paper's Table 4, its ImageNet run, the Keras example and its
notebook.

    python -m trainer.recipes                    # the table
    python -m trainer.recipes --out=recipes      # the flagfiles, one for each row

A recipe is a set of flags. `--recipe=flowers102_fast` uses them, and a flag beside it overrides one
of them. A recipe does not choose data or teacher; it names those its accuracy was published with.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags

from trainer import cli
from trainer.core.errors import ConfigError

PAPER = "Beyer et al. 2021, arXiv 2106.05237"
_SCHEDULE = "warm-up from big_vision, configs/proj/distill"
_ASSUMED = "warm-up assumed to be that of big_vision's longer budgets"
_EXAMPLE = "keras.io/examples/keras_recipes/better_knowledge_distillation"
_NOTEBOOKS = "github.com/sayakpaul/FunMatch-Distillation"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published run.

    Attributes:
        name: the value of `--recipe`.
        flags: values by the name of their flag.
        source: where the settings were published.
        teacher: the teacher of the published run.
        accuracy: published top-1 of the student on the test split (ImageNet: validation), in
            percent.
        teacher_accuracy: the teacher's, in percent; None where it was not published.
        note: a remark for the flagfile; may be empty.
    """

    name: str
    flags: dict[str, Any]
    source: str
    teacher: str
    accuracy: float
    teacher_accuracy: float | None
    note: str = ""


_PAPER_FLAGS: dict[str, Any] = {
    "student": "bit-r50x1",
    "views": "mix",
    "mixup": "batch",
    "distance": "kl",
    "optimizer": "adamw",
    "clip_norm": 1.0,
    "precision": "float32",
}
_SMALL_SET_FLAGS: dict[str, Any] = _PAPER_FLAGS | {
    "image_size": 128,
    "central_fraction": 0.8,
    "batch_size": 512,
    "warmup_steps": 1500,
}


class _Budget(NamedTuple):
    """One row of the paper's Table 4. The names fast, medium and long are big_vision's."""

    name: str
    epochs: int
    temperature: float
    learning_rate: float
    weight_decay: float
    accuracy: float
    note: str = ""


# Data set -> accuracy of the teacher in percent, rows.
_TABLE_4: dict[str, tuple[float, list[_Budget]]] = {
    "flowers102": (
        97.82,
        [
            _Budget("1000ep", 1_000, 10, 0.003, 1e-3, 77.51, "three quarters of its 1,992 steps are warm-up"),
            _Budget("fast", 10_000, 10, 0.003, 3e-4, 92.83),
            _Budget("medium", 100_000, 1, 0.001, 1e-4, 95.54),
            _Budget("long", 1_000_000, 1, 0.0003, 1e-5, 96.93),
        ],
    ),
    "pet37": (
        91.03,
        [
            _Budget("300ep", 300, 2, 0.01, 1e-5, 82.75, "three quarters of its 1,941 steps are warm-up"),
            _Budget("fast", 1_000, 5, 0.01, 1e-3, 88.01),
            _Budget("medium", 3_000, 10, 0.003, 3e-4, 90.08),
            _Budget("10000ep", 10_000, 2, 0.001, 1e-4, 90.98),
            _Budget("long", 30_000, 2, 0.003, 1e-5, 91.06),
        ],
    ),
    "food101": (
        86.24,
        [
            _Budget("fast", 100, 10, 0.01, 1e-3, 83.29),
            _Budget("medium", 1_000, 10, 0.001, 3e-4, 86.64),
            _Budget("long", 3_000, 5, 0.01, 1e-4, 87.20),
        ],
    ),
    "sun397": (
        74.22,
        [
            _Budget("fast", 100, 10, 0.01, 1e-3, 68.28),
            _Budget("medium", 1_000, 10, 0.003, 1e-4, 73.46, "big_vision's configuration has learning rate 0.001"),
            _Budget("long", 3_000, 10, 0.01, 3e-5, 74.26),
        ],
    ),
}

_EXAMPLE_FLAGS: dict[str, Any] = {
    "image_size": 128,
    "student_range": "0,1",
    "teacher_range": ("0,1",),
    "views": "mix",
    "mixup": "batch",
    "distance": "kl",
    "optimizer": "adamw",
    "clip_norm": 1.0,
    "warmup_steps": 1500,
}


def _paper_recipes() -> list[Recipe]:
    recipes = []
    for data, (teacher_accuracy, budgets) in _TABLE_4.items():
        for budget in budgets:
            budget_flags = {
                "epochs": float(budget.epochs),
                "temperature": float(budget.temperature),
                "learning_rate": budget.learning_rate,
                "weight_decay": budget.weight_decay,
            }
            recipes.append(
                Recipe(
                    name=f"{data}_{budget.name}",
                    flags=_SMALL_SET_FLAGS | budget_flags,
                    source=f"{PAPER}, Table 4; {_ASSUMED if budget.name.endswith('ep') else _SCHEDULE}",
                    teacher=f"BiT-M-R152x2 fine-tuned on {data} at 128 px",
                    accuracy=budget.accuracy,
                    teacher_accuracy=teacher_accuracy,
                    note=budget.note,
                )
            )
    return recipes


_IMAGENET = Recipe(
    name="imagenet_1200ep",
    flags=_PAPER_FLAGS
    | {
        "image_size": 224,
        "central_fraction": 0.875,
        "batch_size": 4096,
        "warmup_steps": 5000,
        "epochs": 1200.0,
        "temperature": 1.0,
        "learning_rate": 0.03,
        "weight_decay": 3e-4,
    },
    source=f"{PAPER}, appendix F and Table 3",
    teacher="BiT-M-R152x2 fine-tuned on ImageNet at 224 px",
    accuracy=81.54,
    teacher_accuracy=83.0,
    note="trained on train[:98%], selected on train[98%:]; 9,600 epochs reached 82.31; decoded at 448 px its images "
    "take 704 GiB, so they stay on the disk (--store)",
)
_KERAS_EXAMPLE = Recipe(
    name="keras_example",
    flags=_EXAMPLE_FLAGS
    | {
        "student": "resnet50v2",
        "compat": ("keras_example",),
        "steps": 480,
        "schedule_steps": 1992,
        "batch_size": 64,
        "temperature": 10.0,
        "learning_rate": 0.003,
        "weight_decay": 1e-3,
    },
    source=_EXAMPLE,
    teacher="BiT-R101x3 fine-tuned on flowers102 at 128 px, a SavedModel that takes [0, 1]",
    accuracy=1.07,
    teacher_accuracy=98.18,
    note="30 epochs, all of them warm-up of a longer schedule: the accuracy is chance, as the example itself says",
)
_NOTEBOOK = Recipe(
    name="notebook_pet37_300ep",
    flags=_EXAMPLE_FLAGS
    | {
        "student": "bit-r50x1",
        "compat": ("central", "mixup", "t2", "clip", "decay"),
        "min_crop_area": 0.1,
        "steps": 2100,
        "schedule_steps": 1940,
        "batch_size": 512,
        "temperature": 2.0,
        "learning_rate": 0.01,
        "weight_decay": 1e-5,
    },
    source=f"{_NOTEBOOKS}, funmatch_distillation.ipynb",
    teacher="BiT-R101x3 fine-tuned on pet37 at 128 px, a SavedModel that takes [0, 1]",
    accuracy=81.3,
    teacher_accuracy=90.92,
    note="300 epochs of 7 steps; the schedule ends at step 1,940, so the last 160 have learning rate 0; the notebook "
    "squashes images to 384 x 384 before it crops them, funmatch crops in the original proportions",
)

RECIPES = {recipe.name: recipe for recipe in (*_paper_recipes(), _IMAGENET, _KERAS_EXAMPLE, _NOTEBOOK)}


def bit_hyperrule(examples: int, height: int, width: int) -> dict[str, Any]:
    """The settings with which BiT-HyperRule fine-tunes a BiT (Kolesnikov et al. 2020, section 3.3).

    Args:
        examples: number of images in the training split.
        height: of its images in pixels; of images of many sizes, the median.
        width: likewise.

    Returns:
        Values by the name of their flag.
    """
    resize, crop = (160, 128) if height * width < 96 * 96 else (512, 480)
    warmup, *boundaries, steps = next(
        schedule
        for limit, schedule in (
            (20_000, (100, 200, 300, 400, 500)),
            (500_000, (500, 3_000, 6_000, 9_000, 10_000)),
            (math.inf, (500, 6_000, 12_000, 18_000, 20_000)),
        )
        if examples < limit
    )
    mixup: dict[str, Any] = {"views": "same/ic"} if examples < 20_000 else {"views": "mix", "mixup_alpha": 0.1}
    return mixup | {
        "resize_size": resize,
        "image_size": crop,
        "optimizer": "sgdm",
        "learning_rate": 0.003,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "schedule": "step",
        "warmup_steps": warmup,
        "boundaries": tuple(boundaries),
        "steps": steps,
        "batch_size": 512,
    }


def find(name: str) -> dict[str, Any]:
    """The flags of a recipe; none for an empty name.

    Raises:
        ConfigError: no recipe has this name; the message suggests the nearest one.
    """
    if not name:
        return {}
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--recipe={name} is unknown: {hint}`funmatch recipes` lists all")
    return RECIPES[name].flags


def flagfile(recipe: Recipe) -> str:
    """The recipe as the text of a file for `--flagfile`."""
    teacher = "" if recipe.teacher_accuracy is None else f"; its teacher {recipe.teacher_accuracy:.2f} %"
    lines = [
        "# Made by `python -m trainer.recipes --out=recipes`; change trainer/recipes.py instead.",
        f"# {recipe.name}: {recipe.source}.",
        f"# Published top-1 {recipe.accuracy:.2f} %{teacher}.",
        f"# Teacher: {recipe.teacher}.",
    ]
    if recipe.note:
        lines.append(f"# Note: {recipe.note}.")
    for name, value in recipe.flags.items():
        lines += [f"--{name}={item}" for item in (value if isinstance(value, tuple) else (value,))]
    return "\n".join(lines) + "\n"


def table() -> str:
    """All recipes as a Markdown table."""
    rows = ["| recipe | length | T | lr | wd | top-1 % | teacher's |", "|---|---|---|---|---|---|---|"]
    for recipe in RECIPES.values():
        values = recipe.flags
        length = f"{values['epochs']:,.0f} epochs" if "epochs" in values else f"{values['steps']:,} steps"
        teacher = "" if recipe.teacher_accuracy is None else f"{recipe.teacher_accuracy:.2f}"
        rows.append(
            f"| `{recipe.name}` | {length} | {values['temperature']:g} | {values['learning_rate']:g} "
            f"| {values['weight_decay']:g} | {recipe.accuracy:.2f} | {teacher} |"
        )
    return "\n".join(rows) + "\n"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the verb's flags in `values`."""
    flags.DEFINE_string(
        "out", "", "Folder for the flagfiles; empty: print the table.", flag_values=values, module_name="recipes"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the verb and returns its exit code."""
    return cli.run(__doc__, define_flags, _main, argv, tensorflow=False)


def _main(values: flags.FlagValues) -> None:
    if not values.out:
        print(table(), end="")
        return
    folder = pathlib.Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES.values():
        (folder / f"{recipe.name}.flags").write_text(flagfile(recipe), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
