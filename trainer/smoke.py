"""The whole job in minutes on a CPU, without account or network: drawn flowers, a teacher, a student, a report.

    python -m trainer.smoke --workdir=smoke

It runs the commands that it prints: prepare, teacher, task, and once more task from labels, so that the two students can be
compared: same network, same pictures, same steps. Run it again and it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

from absl import flags

from trainer import cli
from trainer.core.errors import DataError, FunmatchError


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a smoke run; `steps` of (teacher, student)."""

    classes: int
    pretrain: int
    train: int
    test: int
    picture: int
    image: int
    steps: tuple[int, int]
    batch: int


PRESETS = {
    # Chosen by trial, so that teacher, student and the student from labels together take five minutes on two cores.
    "default": Preset(
        classes=12, pretrain=6000, train=120, test=1500, picture=64, image=32, steps=(900, 2400), batch=128
    ),
    "tiny": Preset(classes=8, pretrain=640, train=80, test=160, picture=48, image=24, steps=(60, 60), batch=64),
}


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags."""
    own: dict[str, Any] = {"flag_values": values, "module_name": "smoke"}
    flags.DEFINE_string("workdir", "smoke", "Folder or gs:// prefix for everything that the run makes.", **own)
    flags.DEFINE_enum(
        "preset",
        "default",
        list(PRESETS),
        "default: about five minutes on two cores. tiny: proves that it runs.",
        **own,
    )
    flags.DEFINE_integer("seed", 0, "Seed of pictures and models.", **own)
    flags.DEFINE_string("tpu", "none", "As for trainer.task.", **own)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def commands(preset: Preset, workdir: str, seed: int, tpu: str) -> list[tuple[str, list[str]]]:
    """The verbs to run with their flags, in order."""
    data, teacher = f"{workdir}/data", f"{workdir}/teacher.keras"
    shared = [
        f"--data={data}",
        f"--image_size={preset.image}",
        f"--store_size={preset.picture}",
        f"--batch_size={preset.batch}",
        "--eval_batch_size=250",
        f"--seed={seed}",
        f"--tpu={tpu}",
    ]
    student = [
        *shared,
        "--student=bit-tiny",
        f"--steps={preset.steps[1]}",
        "--learning_rate=0.012",
        "--weight_decay=0.0001",
        f"--checkpoint_every={preset.steps[1] // 4}",
        f"--eval_every={preset.steps[1] // 4}",
    ]
    return [
        (
            "prepare",
            [
                "--dataset=synthetic",
                f"--out={data}",
                f"--seed={seed}",
                f"--classes={preset.classes}",
                f"--size={preset.picture}",
                f"--pretrain={preset.pretrain}",
                f"--train={preset.train}",
                f"--validation={preset.train}",
                f"--test={preset.test}",
            ],
        ),
        (
            "teacher",
            [
                *shared,
                "--model=bit-small",
                "--train_split=pretrain",
                f"--steps={preset.steps[0]}",
                "--learning_rate=0.003",
                f"--eval_every={preset.steps[0] // 2}",
                f"--checkpoint_every={preset.steps[0] // 2}",
                f"--out={teacher}",
            ],
        ),
        ("task", [*student, f"--teacher=keras:{teacher}", "--temperature=2", f"--workdir={workdir}/distill"]),
        ("task", [*student, "--distance=labels", f"--workdir={workdir}/labels"]),
    ]


def _main(values: Any) -> None:
    import importlib

    from trainer.core.console import Console
    from trainer.io import files

    console, began = Console(), time.monotonic()
    workdir, preset = values.workdir.rstrip("/"), PRESETS[values.preset]
    for verb, arguments in commands(preset, workdir, values.seed, values.tpu):
        console.info(f"\n$ funmatch {verb} {' '.join(arguments)}")
        if verb == "prepare" and files.exists(files.join(workdir, "data", "dataset.json")):
            console.info("the data set is there already")
            continue
        if code := importlib.import_module(f"trainer.{verb}").main(arguments):
            error = FunmatchError(f"funmatch {verb} ended with exit code {code}")
            error.exit_code = code
            raise error
    results = {
        name: json.loads(files.read(f"{workdir}/{name}/result.json", "a result"))
        for name in ("teacher", "distill", "labels")
    }
    served = _serve(workdir, results["distill"]["student_top1"])
    table = summary(results, served, time.monotonic() - began)
    files.write(f"{workdir}/summary.md", table.encode(), "the summary")
    console.info(f"\n{table}\nreport: {workdir}/distill/report.html")


def _serve(workdir: str, expected: float) -> float:
    """Top-1 of the exported SavedModel on the test split's JPEG bytes, which must be what evaluation measured.

    Raises:
        DataError: it is not.
    """
    import numpy as np
    import tensorflow as tf

    from trainer.data.dataset import Dataset
    from trainer.data.records import EncodedSplit

    dataset = Dataset.load(f"{workdir}/data")
    encoded = EncodedSplit(dataset, dataset.split("test", "final_split"))
    model = tf.saved_model.load(f"{workdir}/distill/export/saved_model")
    right = 0
    for start in range(0, len(encoded), 256):
        ids = range(start, min(start + 256, len(encoded)))
        batch = tf.constant([encoded.record(example).encoded for example in ids])
        logits = model.signatures["serving_default"](image_bytes=batch)["logits"].numpy()
        right += int((logits.argmax(1) == encoded.labels[start : start + len(ids)]).sum())
    top1 = right / len(encoded)
    # Rounding may turn a near tie; more than one in five hundred is another preprocessing.
    if abs(top1 - expected) > 0.002 + 1 / len(encoded) or not np.isfinite(logits).all():
        raise DataError(f"the exported model has top-1 {top1:.4f}; evaluation measured {expected:.4f}")
    return top1


def summary(results: dict[str, dict[str, Any]], served: float, seconds: float) -> str:
    """The run's table in Markdown."""
    distilled, labels = results["distill"], results["labels"]
    teacher = distilled["teacher_top1"]

    def row(name: str, top1: float, agreement: str) -> str:
        return f"| {name} | {100 * top1:.1f} % | {agreement} |"

    return "\n".join(
        [
            "| model | test top-1 | agrees with the teacher |",
            "|---|---|---|",
            row("teacher (bit-small, trained from labels on many pictures)", teacher, ""),
            row(
                "student by function matching (bit-tiny, few pictures, no labels)",
                distilled["student_top1"],
                f"{100 * distilled['agreement_top1']:.1f} %",
            ),
            row(
                "the same student from labels (same pictures, same steps)",
                labels["student_top1"],
                "",
            ),
            row("the distilled student as exported, on JPEG bytes", served, ""),
            "",
            f"{distilled['steps']} steps of {distilled['batch_size']} images on {distilled['examples']} pictures; "
            f"distillation {distilled['images_per_second']:,.0f} images/s; {seconds / 60:.1f} min in all; "
            f"{distilled['device']}, {os.cpu_count()} cores, TensorFlow {distilled['versions']['tensorflow']}.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
