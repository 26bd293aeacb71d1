"""Train a teacher with labels and save it as a `.keras` file: the same loop, checkpoints and resume as the main job.

python -m trainer.teacher --data=DATA --train_split=pretrain --model=bit-small --epochs=20 --out=teacher.keras
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags

from trainer import cli, config, environment
from trainer.errors import ConfigError

_HIDDEN = (
    "teacher",
    "teacher_image_size",
    "teacher_range",
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
    config.define_flags(values, skip=_HIDDEN, views="same/ic")
    own: dict[str, Any] = {"flag_values": values, "module_name": "teacher"}
    flags.DEFINE_string("model", "bit-r50x1", "What to train: a name as for --student of trainer.task.", **own)
    flags.DEFINE_string("out", "", "The .keras file to write, on a disk or gs://.", **own)
    flags.DEFINE_string("workdir", "", "Where the run keeps its results; empty: --out without .keras.", **own)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def _main(values: Any) -> None:
    if not values.out.endswith(".keras"):
        raise ConfigError(f"--out={values.out}: it must name a file that ends in .keras")
    workdir = values.workdir or values.out.removesuffix(".keras")
    chosen = config.from_flags(values, student=values.model, distance="labels", workdir=workdir)
    from trainer import files, task
    from trainer.journal import Screen

    screen = Screen()
    if not task.run(chosen, screen):
        return  # --check or --dry_run
    if not environment.is_chief():
        return
    model = files.join(workdir, "export", "model.keras")
    files.write(values.out, files.read(model, "the trained teacher"), "the teacher")
    screen.say(f"teacher {values.out}")


if __name__ == "__main__":
    sys.exit(main())
