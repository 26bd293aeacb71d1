"""Teacher outputs that do not change: computed once for the modes `--views=fix/...`."""

from __future__ import annotations

import io
import time
import zipfile

import numpy as np

from trainer.core.console import Console
from trainer.core.errors import Stopped
from trainer.core.signals import OTHER_MACHINE, StopRequest
from trainer.data.store import ImageStore
from trainer.io import files
from trainer.method import views
from trainer.models.teachers import Teacher
from trainer.run.accelerator import Accelerator
from trainer.run.evaluator import Evaluator
from trainer.run.plan import RunPlan

_SAVE_SECONDS = 60.0  # between saves of the sum so far


def fixed_targets(
    plan: RunPlan,
    accelerator: Accelerator,
    train: ImageStore,
    teachers: tuple[Teacher, ...],
    console: Console,
) -> tuple[np.ndarray, ...]:
    """The mean of each teacher's logits over the fixed views of each training image.

    The sum so far is saved in the workdir every `_SAVE_SECONDS` and when a signal stops the job, so
    that the same command resumes.

    Args:
        plan: the run's plan.
        accelerator: the accelerator that the teachers run on.
        train: the training images.
        teachers: the loaded teachers.
        console: shows progress.

    Returns:
        For each teacher float32 [examples, classes]; empty where views are not fixed.

    Raises:
        Stopped: after a signal.
    """
    config = plan.config
    mode = views.mode(config)
    if not teachers or not mode.fixed:
        return ()
    # A rehearsal does not use the targets: one crop checks that they can be computed.
    rehearsal = config.check or config.dry_run
    crops = config.fixed_crops if mode.teacher == "crops" and not rehearsal else 1
    path = "" if rehearsal or not config.workdir else files.join(config.workdir, f"targets-{plan.run_id[:16]}.npz")
    total, done = _saved_targets(path, console)
    if done < crops:
        evaluator = Evaluator(
            config, accelerator.strategy, train, jit_compile=accelerator.jit_compile(config.jit_compile)
        )
        logits, saved = evaluator.fixed_logits(teachers), time.monotonic()
        with StopRequest() as signal:
            stopping = accelerator.any_worker(bool(signal.name))
            while done < crops and not stopping:
                total, done = total + logits(done).astype(np.float64), done + 1
                console.progress("fixed targets", done, crops)
                stopping = accelerator.any_worker(bool(signal.name))
                due = done == crops or stopping or time.monotonic() > saved + _SAVE_SECONDS
                if path and accelerator.chief and due:
                    _save_targets(path, total, done)
                    saved = time.monotonic()
        if done < crops:
            raise Stopped(
                f"stopped by {signal.name or OTHER_MACHINE} after {done} of {crops} crops of the fixed targets: "
                "the same command resumes"
            )
    mean = (total / done).astype(np.float32)
    return tuple(np.ascontiguousarray(mean[:, number]) for number in range(len(teachers)))


def _save_targets(path: str, total: np.ndarray, done: int) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, total=total, done=done)
    files.write(path, buffer.getvalue(), "the fixed targets")


def _saved_targets(path: str, console: Console) -> tuple[np.ndarray, int]:
    """The sum and the number of crops that an earlier process saved; zeros if there are none."""
    if path and files.exists(path):
        try:
            with np.load(io.BytesIO(files.read(path, "the fixed targets")), allow_pickle=False) as archive:
                return archive["total"], int(archive["done"])
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            console.warning(f"{path} is damaged; the fixed targets are computed again")
    return np.zeros(1), 0
