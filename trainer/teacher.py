"""Train a teacher with labels and save it as a `.keras` file.

Loop, checkpoints and resume are those of the main job.

    python -m trainer.teacher --data=DATA --hyperrule --model=bit:BiT-M-R101x3 --out=teacher.keras
    python -m trainer.teacher --data=DATA --train_split=pretrain --model=bit-small \\
        --epochs=20 --out=teacher.keras

--hyperrule takes resolution, mixup, schedule and optimizer from the size of the data set
(BiT-HyperRule); a flag on the command line takes precedence.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.core import environment
from trainer.core import flags as task_flags
from trainer.core.errors import ConfigError

if TYPE_CHECKING:
    from trainer.core.console import Console

_HIDDEN = (
    "teacher",
    "teacher_image_size",
    "teacher_range",
    "teacher_output",
    "teacher_outputs",
    "teacher_sha256",
    "ensemble",
    "recipe",
    "student",
    "student_range",
    "distance",
    "temperature",
    "label_smoothing",
    "fixed_crops",
    "compat",
    "workdir",
)


def define_flags(values: flags.FlagValues) -> None:
    """The main job's flags without those about teachers, and this verb's own."""
    task_flags.define_flags(values, skip=_HIDDEN, views="same/ic")
    define: dict[str, Any] = {"flag_values": values, "module_name": "teacher"}
    flags.DEFINE_string(
        "model",
        "bit-r50x1",
        "Model to train: a name as for --student of trainer.task, or bit:ARCH@FILE.npz or a published "
        "bit:NAME, whose classifier is replaced unless it has the number of classes of the data.",
        **define,
    )
    flags.DEFINE_boolean(
        "hyperrule", False, "Fine-tune with BiT-HyperRule, whose settings depend on the size of the data set.", **define
    )
    flags.DEFINE_string("out", "", "File to write, local or gs://; it must end in .keras.", **define)
    flags.DEFINE_string(
        "workdir", "", "Folder or gs:// prefix for checkpoints and results. Empty: --out without .keras.", **define
    )


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def _main(values: flags.FlagValues) -> None:
    if not values.out.endswith(".keras"):
        raise ConfigError(f"--out={values.out}: it must name a file that ends in .keras")
    workdir = values.workdir or values.out.removesuffix(".keras")
    from trainer import task
    from trainer.core.console import Console
    from trainer.io import files

    console = Console()
    rule = _hyperrule(values, console) if values.hyperrule else {}
    config = task_flags.from_flags(values, rule, distance="labels", workdir=workdir, **_model(values))
    if not task.run(config, console):
        return  # --check or --dry_run
    if not environment.is_chief():
        return
    model = files.join(workdir, "export", "model.keras")
    files.write(values.out, files.read(model, "the trained teacher"), "the teacher")
    console.info(f"teacher {values.out}")


def _model(values: flags.FlagValues) -> dict[str, str]:
    """The configuration fields that `--model` sets."""
    kind, _, rest = values.model.partition(":")
    if kind != "bit":
        return {"student": values.model}
    from trainer.models import bit_weights

    if values.student_weights:
        raise ConfigError(
            f"--model={values.model} has weights, and --student_weights={values.student_weights} too: drop one"
        )
    return {"student": f"bit-{bit_weights.parse_source(rest, 'model').arch.lower()}", "student_weights": values.model}


def _hyperrule(values: flags.FlagValues, console: Console) -> dict[str, Any]:
    """The flags that BiT-HyperRule sets for the data set; prints them."""
    from trainer import recipes
    from trainer.data.dataset import Dataset

    if not values.data:
        raise ConfigError("--data is missing: the folder or gs:// prefix that `python -m trainer.prepare` wrote")
    dataset = Dataset.load(values.data[0])
    splits = [Dataset.load(folder).split(values.train_split, "train_split") for folder in values.data]
    examples = sum(split.examples for split in splits)
    height, width = (dataset.image_size[f"median_{side}"] for side in ("height", "width"))
    rule = recipes.bit_hyperrule(examples, height, width)
    if values["image_size"].present:  # keeps the crop's share of the squashed image
        rule["resize_size"] = round(values.image_size * rule["resize_size"] / rule["image_size"])
    console.info(
        f"BiT-HyperRule for {examples:,} images of {height} x {width} pixels: "
        + " ".join(f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in rule.items())
    )
    return rule


if __name__ == "__main__":
    sys.exit(main())
