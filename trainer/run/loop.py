"""The outer loop: what the host does between the device's loops."""

from __future__ import annotations

import math
from typing import Any

from trainer.core import environment
from trainer.core.console import Console
from trainer.core.errors import DataError, Stopped
from trainer.core.signals import OTHER_MACHINE, StopRequest
from trainer.io import files
from trainer.run.checkpoint import Background, Checkpoints
from trainer.run.job import Job
from trainer.run.metric_writer import MetricWriter
from trainer.run.throughput import Throughput


def train(job: Job, journal: MetricWriter, checkpoints: Checkpoints, console: Console) -> None:
    """Trains to the end of the run from its newest checkpoint.

    Raises:
        Diverged: a value that is not finite; the last good checkpoint is kept.
        Stopped: a signal asked for it; the state is saved.
    """
    config = job.config
    resume(job, journal, checkpoints, console)
    meter, hardware = Throughput(job), job.accelerator
    if not hardware.same_on_all(job.step):
        raise DataError(
            f"this machine resumed at step {job.step} and another did not: --workdir must be one folder that all machines share"
        )

    def tell() -> None:
        for told in (journal.warnings, checkpoints.warnings):
            while told:
                console.warning(f"{told.pop(0)}")

    with StopRequest() as stop, Background() as saving:
        stopping = hardware.any_worker(bool(stop.name))
        while job.step < config.steps and not stopping:
            saving.check()
            steps = job.until_due(job.step)
            metrics = job.advance(steps, job.order)
            job.pending.append((steps, metrics))
            note = meter.tick(steps, metrics)
            console.progress("train", job.step, config.steps, note)
            last, better = job.step == config.steps, False
            if last or job.step % config.log_every == 0:
                journal.add("train", job.step, _mean(job.pending) | meter.row())
                job.pending.clear()
            if last or job.step % config.eval_every == 0:
                better = _note_best(job, evaluate(job, config.eval_split, "eval", journal, console).metrics())
                meter.skip()
            # Asked once a turn, so that all machines, and saving and ending, go by the same answer.
            stopping = hardware.any_worker(bool(stop.name))
            if last or better or stopping or job.step % config.checkpoint_every == 0:
                save(job, journal, checkpoints, saving)
                meter.skip()
            tell()
        saving.wait()
    tell()
    console.close()
    # Of several machines none goes on before the chief's last checkpoint is whole, nor alone after a late signal.
    if hardware.any_worker(stopping or bool(stop.name)):
        raise Stopped(
            f"stopped by {stop.name or OTHER_MACHINE} at step {job.step} of {config.steps}; saved: the same command goes on"
        )


def resume(job: Job, journal: MetricWriter, checkpoints: Checkpoints, console: Console) -> None:
    """Takes up the newest whole checkpoint, if there is one, and removes what a crash left behind.

    Raises:
        DataError: it belongs to another run, or all are damaged.
    """
    restored = checkpoints.restore()
    for line in checkpoints.passed_over:
        console.warning(f"{line}")
    if restored is not None:
        job.load(restored.arrays)
        job.step, job.seconds = restored.step, restored.extra["seconds"]
        job.pending = [(steps, metrics) for steps, metrics in restored.extra["pending"]]
        best = restored.extra.get("best", {})
        job.best = best if best.get("by") == job.config.keep_best else {}
        if job.accelerator.chief:
            checkpoints.clean(job.step, job.best.get("step"))
        console.info(f"resumed at step {job.step} of {job.config.steps}")
    journal.rewind(job.step)
    if job.accelerator.chief:
        files.remove_temporary(job.config.workdir)


def save(job: Job, journal: MetricWriter, checkpoints: Checkpoints, saving: Background | None = None) -> None:
    """Commits the state: rows of metrics first, so that none is missing after a crash, then the state, then the commit.

    Args:
        saving: does all of it but the copy of the state into host memory; None: here, now.

    Of several machines the chief alone does.
    """
    if not job.accelerator.chief:
        return
    if saving is not None:
        saving.wait()  # one copy of the state at a time
    step, arrays, text, best = job.step, job.state(), journal.text(), dict(job.best)
    extra = {"seconds": job.seconds, "pending": list(job.pending), "best": best}

    def work() -> None:
        journal.write(text)
        checkpoints.save(step, arrays, extra, best.get("step"))

    if saving is None:
        work()
    else:
        saving.start(work)


def _note_best(job: Job, metrics: dict[str, float]) -> bool:
    """Whether these are the best so far by `--keep_best`; the first of equals is."""
    by = job.config.keep_best
    if by == "none" or not math.isfinite(metrics.get(by, math.nan)):
        return False
    sign = -1.0 if by == "kl" else 1.0
    if job.best and sign * metrics[by] <= sign * job.best["value"]:
        return False
    job.best = {"by": by, "value": metrics[by], "step": job.step}
    return True


def take_best(job: Job, checkpoints: Checkpoints) -> None:
    """Gives the job the weights of its best evaluation, for `--export_from=best`.

    Raises:
        DataError: no evaluation has been, or its checkpoint is not whole.
    """
    if not job.best:
        raise DataError(
            f"--export_from=best: {job.config.workdir} holds no checkpoint chosen by --keep_best={job.config.keep_best}: "
            "the run was made without that flag; give --export_from=last"
        )
    job.load(checkpoints.load(job.best["step"]).arrays)


def evaluate(job: Job, split: str, kind: str, journal: MetricWriter, console: Console) -> Any:
    """Evaluates on one of the job's splits, writes a row, says it, and returns the `Outcome`."""
    outcome = job.evaluator(split).run(job.student, job.teachers)
    metrics = outcome.metrics()
    journal.add(kind, job.step, {"split": split} | metrics)
    if kind == "eval" and job.accelerator.chief and job.config.hp_metric in metrics:
        environment.report_metric(job.config.hp_metric, metrics[job.config.hp_metric], job.step)
    names = {"student_top1": "student", "teacher_top1": "teacher", "agreement_top1": "agreement"}
    told = ", ".join(f"{word} {100 * metrics[name]:.1f}%" for name, word in names.items() if name in metrics)
    console.info(f"step {job.step}, {split} ({len(outcome.labels)} images): {told}")
    return outcome


def _mean(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    total = sum(steps for steps, _ in parts)
    return {name: sum(steps * values[name] for steps, values in parts) / total for name in parts[0][1]}
