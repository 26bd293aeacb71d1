"""The training loop: log, evaluate and save between the loops that run on the device."""

from __future__ import annotations

import dataclasses
import math

from trainer.core import environment
from trainer.core.console import Console
from trainer.core.errors import DataError, Stopped
from trainer.core.signals import OTHER_MACHINE, StopRequest
from trainer.io import files
from trainer.run.checkpoint import Background, Checkpoints
from trainer.run.evaluator import EvalResult, describe, describe_split, describe_verdict
from trainer.run.job import Job
from trainer.run.metric_writer import MetricWriter
from trainer.run.throughput import Throughput


def train(job: Job, writer: MetricWriter, checkpoints: Checkpoints, console: Console) -> None:
    """Trains to the end of the run, from its newest checkpoint.

    Args:
        job: a built job; its step and weights are set to the checkpoint's, then updated.
        writer: the run's metrics.
        checkpoints: the run's checkpoints.
        console: shows progress, evaluations and warnings.

    Raises:
        Diverged: a value is not finite; the last good checkpoint is kept.
        Stopped: after a signal, once the state is saved.
        DataError: a record or a checkpoint cannot be read or written.
    """
    config, accelerator = job.config, job.accelerator
    resume(job, writer, checkpoints, console)
    if not accelerator.same_on_all(job.step):
        raise DataError(
            f"this machine resumed at step {job.step} and another did not: --workdir must be one folder "
            "that all machines share"
        )
    throughput = Throughput(job)
    with StopRequest() as signal, Background() as saving:
        stopping = accelerator.any_worker(bool(signal.name))
        while job.step < config.steps and not stopping:
            saving.check()
            steps = job.steps_to_next_event(job.step)
            metrics = job.run_steps(steps)
            job.pending_metrics.append((steps, metrics))
            console.progress("train", job.step, config.steps, throughput.update(steps, metrics))
            improved = False
            if job.is_due(config.log_every):
                writer.add("train", job.step, _weighted_mean(job.pending_metrics) | throughput.row())
                job.pending_metrics.clear()
            if job.is_due(config.eval_every):
                result = evaluate(job, config.eval_split, "eval", writer, console)
                improved = _update_best(job, result.metrics())
                throughput.pause()
            # Read the stop flag once per iteration, so that all workers, and both the save and the
            # exit, agree on it.
            stopping = accelerator.any_worker(bool(signal.name))
            if improved or stopping or job.is_due(config.checkpoint_every):
                save(job, writer, checkpoints, saving)
                throughput.pause()
            _print_warnings(writer, checkpoints, console)
        saving.wait()
    _print_warnings(writer, checkpoints, console)
    console.close()
    # A barrier: no worker continues before the chief's last checkpoint, or alone after a late
    # signal.
    if accelerator.any_worker(stopping or bool(signal.name)):
        raise Stopped(
            f"stopped by {signal.name or OTHER_MACHINE} at step {job.step} of {config.steps}; saved: "
            "the same command resumes"
        )


def resume(job: Job, writer: MetricWriter, checkpoints: Checkpoints, console: Console) -> None:
    """Loads the newest complete checkpoint, if there is one, and removes what a crash left behind.

    Args:
        job: gets the checkpoint's weights, step, time and metrics.
        writer: drops rows after the checkpoint's step.
        checkpoints: the run's checkpoints.
        console: shows the step, and damaged checkpoints as warnings.

    Raises:
        DataError: the checkpoint belongs to another run, or all are damaged.
    """
    restored = checkpoints.restore()
    for line in checkpoints.passed_over:
        console.warning(line)
    if restored is not None:
        job.load(restored.arrays)
        job.step, job.seconds = restored.step, restored.extra["seconds"]
        job.pending_metrics = [(steps, metrics) for steps, metrics in restored.extra["pending"]]
        best = restored.extra.get("best", {})
        job.best = best if best.get("by") == job.config.keep_best else {}
        if job.accelerator.chief:
            checkpoints.clean(job.step, job.best.get("step"))
        console.info(f"resumed at step {job.step} of {job.config.steps}")
    writer.rewind(job.step)
    if job.accelerator.chief:
        files.remove_temporary(job.config.workdir)


def save(job: Job, writer: MetricWriter, checkpoints: Checkpoints, saving: Background | None = None) -> None:
    """Writes the rows of metrics, then the checkpoint, so that a crash loses no row.

    Only the chief writes.

    Args:
        job: the job; its state is copied to host memory before this returns.
        writer: the run's metrics.
        checkpoints: the run's checkpoints.
        saving: background thread that writes; None: write before this returns.
    """
    if not job.accelerator.chief:
        return
    if saving is not None:
        saving.wait()  # one copy of the state at a time
    step, arrays, text, best = job.step, job.state(), writer.text(), dict(job.best)
    extra = {"seconds": job.seconds, "pending": list(job.pending_metrics), "best": best}

    def commit() -> None:
        writer.write(text)
        checkpoints.save(step, arrays, extra, best.get("step"))

    if saving is None:
        commit()
    else:
        saving.start(commit)


def take_best(job: Job, checkpoints: Checkpoints) -> None:
    """Loads the weights of the best evaluation into the job, for `--export_from=best`.

    Raises:
        DataError: there was no evaluation, or its checkpoint is damaged.
    """
    if not job.best:
        raise DataError(
            f"--export_from=best: {job.config.workdir} holds no checkpoint chosen by "
            f"--keep_best={job.config.keep_best}: the run was made without that flag; give --export_from=last"
        )
    job.load(checkpoints.load(job.best["step"]).arrays)


def evaluate(job: Job, split: str, kind: str, writer: MetricWriter, console: Console) -> EvalResult:
    """Evaluates student and teachers on a split, writes a row of metrics and prints it.

    Args:
        job: the job with the student and the teachers.
        split: name in `job.eval_stores`.
        kind: kind of the row: "eval" or "final".
        writer: the run's metrics.
        console: shows the result as a line.
    """
    with job.for_inference():
        result = job.evaluator(split).run(job.student, job.teachers)
    constant = job.constant(lambda done, total: console.progress("teacher on training images", done, total))
    result = dataclasses.replace(result, constant=constant)
    metrics = result.metrics()
    writer.add(kind, job.step, {"split": split} | metrics)
    if kind == "eval" and job.accelerator.chief and job.config.hp_metric in metrics:
        environment.report_metric(job.config.hp_metric, metrics[job.config.hp_metric], job.step)
    not_better = result.not_better()
    verdict = f": {describe_verdict(not_better)}" if not_better else ""
    console.info(f"step {job.step}, {describe_split(split, result.labels)}: {describe(metrics)}{verdict}")
    return result


def _update_best(job: Job, metrics: dict[str, float]) -> bool:
    """Records an evaluation if it beats the best one by `--keep_best`; returns whether it does."""
    name = job.config.keep_best
    if name == "none" or not math.isfinite(metrics.get(name, math.nan)):
        return False
    sign = -1.0 if name == "kl" else 1.0
    if job.best and sign * metrics[name] <= sign * job.best["value"]:
        return False
    job.best = {"by": name, "value": metrics[name], "step": job.step}
    return True


def _weighted_mean(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each metric over all steps, from numbers of steps and the means over them."""
    total = sum(steps for steps, _ in parts)
    return {name: sum(steps * metrics[name] for steps, metrics in parts) / total for name in parts[0][1]}


def _print_warnings(writer: MetricWriter, checkpoints: Checkpoints, console: Console) -> None:
    for warnings in (writer.warnings, checkpoints.warnings):
        while warnings:
            console.warning(warnings.pop(0))
