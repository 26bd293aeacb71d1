"""Run the whole job on drawn flowers, on a CPU in minutes, without account or network.

    python -m trainer.smoke --workdir=smoke

It prints and runs four commands: prepare, teacher, task, and task from labels. The two students
have the same network, images and steps, so they can be compared. The same command resumes a stopped
run.
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
    """Sizes of a smoke run.

    Attributes:
        classes: species of flowers.
        teacher_images: labelled images that the teacher is trained on.
        student_images: images that the student is trained on, and images for validation.
        test_images: images for the final evaluation.
        store_size: side of the drawn images in pixels.
        image_size: side of the models' input in pixels.
        teacher_steps: updates of the teacher.
        student_steps: updates of each student.
        batch_size: images per step.
    """

    classes: int
    teacher_images: int
    student_images: int
    test_images: int
    store_size: int
    image_size: int
    teacher_steps: int
    student_steps: int
    batch_size: int


PRESETS = {
    # Chosen by trial, so that teacher, student and the student from labels together take five
    # minutes on two cores.
    "default": Preset(
        classes=12,
        teacher_images=6000,
        student_images=120,
        test_images=1500,
        store_size=64,
        image_size=32,
        teacher_steps=900,
        student_steps=2400,
        batch_size=128,
    ),
    "tiny": Preset(
        classes=8,
        teacher_images=640,
        student_images=80,
        test_images=160,
        store_size=48,
        image_size=24,
        teacher_steps=60,
        student_steps=60,
        batch_size=64,
    ),
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the verb's flags in `values`."""
    group: dict[str, Any] = {"flag_values": values, "module_name": "smoke"}
    flags.DEFINE_string("workdir", "smoke", "Folder or gs:// prefix for all files of the run.", **group)
    flags.DEFINE_enum(
        "preset",
        "default",
        list(PRESETS),
        "default: about five minutes on two cores. tiny: under a minute, only to see that it runs.",
        **group,
    )
    flags.DEFINE_integer("seed", 0, "Seed of images and models.", **group)
    flags.DEFINE_string("tpu", "none", "As for trainer.task.", **group)


def main(argv: list[str] | None = None) -> int:
    """Runs the verb and returns its exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def commands(preset: Preset, workdir: str, seed: int, tpu: str) -> list[tuple[str, list[str]]]:
    """The verbs to run with their flags, in order.

    Args:
        preset: sizes.
        workdir: folder or gs:// prefix for all files of the run.
        seed: of images and models, >= 0.
        tpu: value of `--tpu`.
    """
    data, teacher = f"{workdir}/data", f"{workdir}/teacher.keras"
    shared = [
        f"--data={data}",
        f"--image_size={preset.image_size}",
        f"--store_size={preset.store_size}",
        f"--batch_size={preset.batch_size}",
        "--eval_batch_size=250",
        f"--seed={seed}",
        f"--tpu={tpu}",
    ]
    student = [
        *shared,
        "--student=bit-tiny",
        f"--steps={preset.student_steps}",
        "--learning_rate=0.012",
        "--weight_decay=0.0001",
        f"--checkpoint_every={preset.student_steps // 4}",
        f"--eval_every={preset.student_steps // 4}",
    ]
    return [
        (
            "prepare",
            [
                "--dataset=synthetic",
                f"--out={data}",
                f"--seed={seed}",
                f"--classes={preset.classes}",
                f"--size={preset.store_size}",
                f"--pretrain={preset.teacher_images}",
                f"--train={preset.student_images}",
                f"--validation={preset.student_images}",
                f"--test={preset.test_images}",
            ],
        ),
        (
            "teacher",
            [
                *shared,
                "--model=bit-small",
                "--train_split=pretrain",
                f"--steps={preset.teacher_steps}",
                "--learning_rate=0.003",
                f"--eval_every={preset.teacher_steps // 2}",
                f"--checkpoint_every={preset.teacher_steps // 2}",
                f"--out={teacher}",
            ],
        ),
        ("task", [*student, f"--teacher=keras:{teacher}", "--temperature=2", f"--workdir={workdir}/distill"]),
        ("task", [*student, "--distance=labels", f"--workdir={workdir}/labels"]),
    ]


def _main(values: flags.FlagValues) -> None:
    import importlib

    from trainer.core.console import Console
    from trainer.io import files

    console, start = Console(), time.monotonic()
    workdir, preset = values.workdir.rstrip("/"), PRESETS[values.preset]
    for verb, arguments in commands(preset, workdir, values.seed, values.tpu):
        console.info(f"\n$ funmatch {verb} {' '.join(arguments)}")
        if verb == "prepare" and files.exists(files.join(workdir, "data", "dataset.json")):
            console.info("the data set is complete")
            continue
        if code := importlib.import_module(f"trainer.{verb}").main(arguments):
            error = FunmatchError(f"funmatch {verb} ended with exit code {code}")
            error.exit_code = code
            raise error
    results = {
        name: json.loads(files.read(f"{workdir}/{name}/result.json", "a result"))
        for name in ("teacher", "distill", "labels")
    }
    served_top1 = _served_top1(workdir, results["distill"]["student_top1"])
    table = summary(results, served_top1, time.monotonic() - start)
    files.write(f"{workdir}/summary.md", table.encode(), "the summary")
    console.info(f"\n{table}\nreport: {workdir}/distill/report.html")


def _served_top1(workdir: str, expected: float) -> float:
    """Top-1 of the exported SavedModel on the JPEG bytes of the test split.

    Args:
        workdir: of the smoke run.
        expected: top-1 that the job's evaluation measured.

    Raises:
        DataError: the two differ.
    """
    import numpy as np
    import tensorflow as tf

    from trainer.data.dataset import Dataset
    from trainer.data.records import EncodedSplit

    dataset = Dataset.load(f"{workdir}/data")
    encoded = EncodedSplit(dataset, dataset.split("test", "final_split"))
    model = tf.saved_model.load(f"{workdir}/distill/export/saved_model")
    correct = 0
    for start in range(0, len(encoded), 256):
        ids = range(start, min(start + 256, len(encoded)))
        batch = tf.constant([encoded.record(example).encoded for example in ids])
        logits = model.signatures["serving_default"](image_bytes=batch)["logits"].numpy()
        correct += int((logits.argmax(1) == encoded.labels[start : start + len(ids)]).sum())
    top1 = correct / len(encoded)
    # Rounding may change a near tie. More than one image in 500 means a different preprocessing.
    if abs(top1 - expected) > 0.002 + 1 / len(encoded) or not np.isfinite(logits).all():
        raise DataError(f"the exported model has top-1 {top1:.4f}; evaluation measured {expected:.4f}")
    return top1


def summary(results: dict[str, dict[str, Any]], served_top1: float, seconds: float) -> str:
    """The results as a Markdown table.

    Args:
        results: result.json of "teacher", "distill" and "labels".
        served_top1: top-1 of the exported SavedModel, in [0, 1].
        seconds: wall time of the smoke run.
    """
    distilled, labels = results["distill"], results["labels"]
    teacher = distilled["teacher_top1"]

    def row(name: str, top1: float, agreement: str) -> str:
        return f"| {name} | {100 * top1:.1f} % | {agreement} |"

    return "\n".join(
        [
            "| model | test top-1 | agrees with the teacher |",
            "|---|---|---|",
            row("teacher (bit-small, trained from labels on many images)", teacher, ""),
            row(
                "student by function matching (bit-tiny, few images, no labels)",
                distilled["student_top1"],
                f"{100 * distilled['agreement_top1']:.1f} %",
            ),
            row(
                "the same student from labels (same images, same steps)",
                labels["student_top1"],
                "",
            ),
            row("the distilled student as exported, on JPEG bytes", served_top1, ""),
            "",
            f"{distilled['steps']} steps of {distilled['batch_size']} images on {distilled['examples']} examples; "
            f"distillation {distilled['images_per_second']:,.0f} images/s; {seconds / 60:.1f} min in all; "
            f"{distilled['device']}, {os.cpu_count()} cores, TensorFlow {distilled['versions']['tensorflow']}.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
