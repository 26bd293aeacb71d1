"""Measure how a student with batch normalisation is evaluated with each kind of statistics.

    python benchmarks/batch_statistics.py --data=DATA --teacher=teacher.keras \\
        --student=mobilenetv3-small --image_size=64 --steps=300

Trains the student, then evaluates it on the test split with its moving averages and with statistics
that are estimated from mixed and from unmixed training views, of several numbers. Prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.run import accelerator, build
from trainer.run.batch_statistics import BatchStatistics
from trainer.run.job import Job
from trainer.run.plan import make_plan

LAST = 10  # steps that agreement in training is the mean of
UNMIXED, MIXED = (16384, 4096, 2048, 1024, 512, 256), (2048,)  # views, by kind


def row(job: Job, name: str, first: np.ndarray | None = None) -> np.ndarray:
    """Prints a row of the table and returns the student's logits.

    Args:
        job: trained.
        name: of the row.
        first: logits that the student's classes are compared with.
    """
    result = job.evaluator("test").run(job.student, job.teachers)
    metrics, logits = result.metrics(), result.student_logits
    same = "" if first is None else f"{(logits.argmax(1) == first.argmax(1)).mean():.1%}"
    top1 = f"{metrics['student_top1']:.1%}" if "student_top1" in metrics else ""
    print(f"| {name} | {metrics['agreement_top1']:.1%} | {metrics['kl']:.3f} | {top1} | {same} |", flush=True)
    return logits


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "teacher", "student"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in {"image_size": 64, "store_size": 96, "steps": 300, "batch_size": 64, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, default=0.003)
    parser.add_argument("--mixup", default="batch")
    values = vars(parser.parse_args())
    data, teacher = (values.pop(name) for name in ("data", "teacher"))
    console = Console()
    config = Config(data=(data,), teacher=(f"keras:{teacher}",), eval_batch_size=250, **values)
    job = build.build(make_plan(config), accelerator.resolve("none", console), console)
    while job.step < config.steps:
        metrics = job.run_steps(min(LAST, config.steps - job.step))
    print(f"in training, last {LAST} steps: agreement {metrics['agreement']:.1%}, KL {metrics['kl']:.3f}\n")
    print("| statistics | agreement | KL | top-1 | same class as the first estimate |\n|---|---|---|---|---|")
    row(job, "moving averages")
    first: np.ndarray | None = None
    kinds = {"unmixed": ("same/ic", UNMIXED), "mixed": ("mix", MIXED)}
    for kind, (mode, counts) in kinds.items():
        statistics = BatchStatistics(
            job.config,
            job.accelerator.strategy,
            job.student,
            job.train_store,
            job.sampler,
            jit_compile=job.accelerator.jit_compile(job.config.jit_compile),
        )
        statistics.config = dataclasses.replace(job.config, views=mode)
        for images in counts:
            statistics.batches = math.ceil(images / config.batch_size)
            with statistics.reestimated(job.step):
                logits = row(job, f"{images:,} {kind} views", first)
            first = logits if first is None else first


if __name__ == "__main__":
    main()
