"""Teacher outputs that do not change: computed once for the modes `--views=fix/...`."""

from __future__ import annotations

import io
import time
import zipfile

import numpy as np

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import Stopped
from trainer.core.signals import OTHER_MACHINE, StopRequest
from trainer.io import files
from trainer.method import views
from trainer.models import teachers
from trainer.run.accelerator import Accelerator
from trainer.run.evaluator import Evaluator

_KEEP_SECONDS = 60.0  # between keepings of half-made fixed targets


def fixed_targets(
    config: Config,
    accelerator: Accelerator,
    evaluator: Evaluator,
    loaded: tuple[teachers.Teacher, ...],
    key: str,
    console: Console,
) -> tuple[np.ndarray, ...]:
    """For each teacher its constant output float32 [examples, classes]: the mean of its logits over the fixed views.

    The sum so far is kept in the workdir every `_KEEP_SECONDS` and when a signal stops the job, so that the same command goes on.

    Raises:
        Stopped: by a signal.
    """
    crops = config.fixed_crops if views.mode(config).teacher == "crops" else 1
    rehearsal = config.check or config.dry_run
    path = "" if rehearsal or not config.workdir else files.join(config.workdir, f"targets-{key[:16]}.npz")
    total, done = _kept_targets(path, console)
    if rehearsal:
        crops = 1  # their mean is not used
    if done < crops:
        logits, kept = evaluator.fixed_logits(loaded), time.monotonic()
        with StopRequest() as stop:
            stopping = accelerator.any_worker(bool(stop.name))
            while done < crops and not stopping:
                total, done = total + logits(done).astype(np.float64), done + 1
                console.progress("fixed targets", done, crops)
                stopping = accelerator.any_worker(bool(stop.name))
                if (
                    path
                    and accelerator.chief
                    and (done == crops or stopping or time.monotonic() > kept + _KEEP_SECONDS)
                ):
                    buffer = io.BytesIO()
                    np.savez(buffer, total=total, done=done)
                    files.write(path, buffer.getvalue(), "the fixed targets")
                    kept = time.monotonic()
        if done < crops:
            raise Stopped(
                f"stopped by {stop.name or OTHER_MACHINE} after {done} of {crops} crops of the fixed targets: the same command goes on"
            )
    mean = (total / done).astype(np.float32)
    return tuple(np.ascontiguousarray(mean[:, number]) for number in range(len(loaded)))


def _kept_targets(path: str, console: Console) -> tuple[np.ndarray, int]:
    """The sum and the number of crops that an earlier process of this very run has kept, else nothing."""
    if path and files.exists(path):
        try:
            with np.load(io.BytesIO(files.read(path, "the fixed targets")), allow_pickle=False) as archive:
                return archive["total"], int(archive["done"])
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            console.warning(f"{path} is damaged and is made again")
    return np.zeros(1), 0
