"""Jobs that are killed and resumed, and how their results are compared: for test_kills.py,
test_gcs_job.py and `make soak`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
from zygote import Zygote

STEPS = 12
CLOCKS = ("images_per_second", "wall_seconds")  # differ from run to run
PRELOAD = (
    "hooks",
    "matplotlib.pyplot",
    "trainer.task",
    "trainer.run.loop",
    "trainer.output.export",
    "trainer.output.report",
    "trainer.run.metric_writer",
    "trainer.io.lock",
)


def rows(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without `CLOCKS`."""
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def result(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The content of result.json without `CLOCKS`."""
    content = json.loads(pathlib.Path(workdir, "result.json").read_text())
    return {k: v for k, v in content.items() if k not in CLOCKS}


def final_state(workdir: str | pathlib.Path) -> dict[str, str]:
    """SHA-256 of each array of the newest checkpoint, by name: weights, optimizer slots and their
    counter.
    """
    folder = pathlib.Path(workdir, "checkpoints")
    commit = json.loads(max(folder.glob("checkpoint-*.json")).read_text())
    with np.load(folder / commit["state"], allow_pickle=False) as archive:
        return {name: hashlib.sha256(archive[name].tobytes()).hexdigest() for name in archive.files}


def names(workdir: str | pathlib.Path) -> list[str]:
    """Names of a run's files, sorted.

    Without TensorBoard's, of which each process writes one, and without the steps of checkpoints.
    """
    root = pathlib.Path(workdir)
    paths = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(re.sub(r"-\d{10}(-[0-9a-f]{16})?", "", path) for path in paths if not path.startswith("tensorboard/"))


def differences(one: str | pathlib.Path, other: str | pathlib.Path) -> list[str]:
    """What differs between two finished runs: weights and slots (to the bit), rows, result, names
    of files.
    """
    return [part.__name__ for part in (final_state, rows, result, names) if part(one) != part(other)]


def flags(data: str, teacher: str, student: str) -> list[str]:
    """Flags of a job of 12 steps, one per loop, that saves after 4, 8 and 12 and evaluates after 6
    and 12.

    Args:
        data: a prepared data set.
        teacher: path of a `.keras` file.
        student: value of --student.
    """
    return [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher}",
        "--teacher_range=-1,1",
        "--force_teacher",  # it is untrained
        f"--student={student}",
        "--image_size=24",
        "--store_size=32",
        f"--steps={STEPS}",
        "--batch_size=8",
        "--learning_rate=0.003",
        "--steps_per_loop=1",
        "--log_every=3",
        "--eval_every=6",
        "--checkpoint_every=4",
        "--eval_batch_size=16",
    ]


@dataclasses.dataclass(frozen=True)
class Point:
    """How a job is stopped, once or several times.

    Attributes:
        name: of the test.
        hooks: of each process but the last (tests/hooks.py).
        ends: exit code of each of these processes, or minus the signal that ends it.
    """

    name: str
    hooks: tuple[dict[str, Any], ...]
    ends: tuple[int, ...]


def go(zygote: Zygote, argv: list[str], workdir: pathlib.Path, point: Point, whole: pathlib.Path) -> str:
    """Stops a job at a point, gives the same command again, and compares the result.

    Args:
        zygote: has `PRELOAD`.
        argv: the job, without --workdir.
        workdir: new; deleted if all went well.
        point: where the job is stopped.
        whole: workdir of a run that was never stopped.

    Returns:
        What is wrong; empty if nothing is.
    """
    output = workdir.with_suffix(".txt")
    command = [*argv, f"--workdir={workdir}"]

    def run(*hooks: dict[str, Any]) -> int:
        return zygote.start("hooks", "job", output, argv=command, hooks=list(hooks)).wait()

    for hook, expected in zip(point.hooks, point.ends, strict=True):
        if (code := run(hook)) != expected:
            return f"exit code {code} instead of {expected}: {output.read_text()[-1500:]}"
        if (workdir / "result.json").exists():
            return "the job finished before it was stopped"
    if code := run():
        return f"the same command ended with {code}: {output.read_text()[-1500:]}"
    if "Traceback" in output.read_text():
        return f"a traceback was shown: {output.read_text()[-1500:]}"
    if parts := differences(whole, workdir):
        return f"{', '.join(parts)} differ from those of the run that was never stopped"
    shutil.rmtree(workdir)
    return ""
