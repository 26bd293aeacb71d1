"""Jobs that are stopped and told to go on, and what must come out: the kill matrix (test_kills.py) and `make soak` share it."""

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
CLOCKS = ("images_per_second", "wall_seconds")  # what depends on the clock
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
    """metrics.jsonl without what depends on the clock."""
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def result(workdir: str | pathlib.Path) -> dict[str, Any]:
    found = json.loads(pathlib.Path(workdir, "result.json").read_text())
    return {k: v for k, v in found.items() if k not in CLOCKS}


def final_state(workdir: str | pathlib.Path) -> dict[str, str]:
    """A digest of every array of the newest checkpoint: weights, optimizer slots and their counter."""
    folder = pathlib.Path(workdir, "checkpoints")
    commit = json.loads(max(folder.glob("checkpoint-*.json")).read_text())
    with np.load(folder / commit["state"], allow_pickle=False) as archive:
        return {name: hashlib.sha256(archive[name].tobytes()).hexdigest() for name in archive.files}


def names(workdir: str | pathlib.Path) -> list[str]:
    """Every file of a run but TensorBoard's, of which each process writes one; of checkpoints how many, not of which steps."""
    root = pathlib.Path(workdir)
    found = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(re.sub(r"-\d{10}(-[0-9a-f]{16})?", "", name) for name in found if not name.startswith("tensorboard/"))


def differences(one: str | pathlib.Path, other: str | pathlib.Path) -> list[str]:
    """In what two finished runs differ: weights and slots to the bit, rows, result, files that lie around."""
    return [look.__name__ for look in (final_state, rows, result, names) if look(one) != look(other)]


def flags(data: str, teacher: str, student: str) -> list[str]:
    """A job of 12 steps, a step at a time, that saves after 4, 8 and 12 and evaluates after 6 and 12."""
    return [
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher}",
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
    """A way to be stopped: the hooks (tests/hooks.py) of each process but the last, and how each of these must end."""

    name: str
    hooks: tuple[dict[str, Any], ...]
    ends: tuple[int, ...]


def go(zygote: Zygote, argv: list[str], workdir: pathlib.Path, point: Point, whole: pathlib.Path) -> str:
    """Stops a job as told, gives the same command again, and says what is wrong with what came out; empty: nothing."""
    told = workdir.with_suffix(".txt")
    command = [*argv, f"--workdir={workdir}"]

    def run(*hooks: dict[str, Any]) -> int:
        return zygote.start("hooks", "job", told, argv=command, hooks=list(hooks)).wait()

    for hook, expected in zip(point.hooks, point.ends, strict=True):
        if (code := run(hook)) != expected:
            return f"ended with {code} where {expected} was due: {told.read_text()[-1500:]}"
        if (workdir / "result.json").exists():
            return "was stopped too late: it had finished"
    if code := run():
        return f"the same command again ended with {code}: {told.read_text()[-1500:]}"
    if "Traceback" in told.read_text():
        return f"showed a traceback: {told.read_text()[-1500:]}"
    if found := differences(whole, workdir):
        return f"{', '.join(found)} differ from those of the run that was never stopped"
    shutil.rmtree(workdir)
    return ""
