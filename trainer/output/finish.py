"""The end of a run: final evaluation, export, report, and result.json, which marks it finished."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import __version__
from trainer.core.console import Console
from trainer.io import files
from trainer.models import students
from trainer.output import export, report
from trainer.output.confusions import Predictions
from trainer.output.samples import eval_samples, train_samples
from trainer.run import loop
from trainer.run.evaluator import EvalResult, describe, describe_verdict
from trainer.run.job import Job
from trainer.run.metric_writer import MetricWriter

_REMEDY = "Train longer or with another --learning_rate, and check teacher and data"


def finish(
    job: Job, writer: MetricWriter, console: Console, before_commit: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Evaluates the final split and writes export, report and, last, result.json.

    Args:
        job: the trained job.
        writer: the run's metrics.
        console: shows the results.
        before_commit: raises if this process must not write any more.

    Returns:
        The content of result.json.

    Raises:
        DataError: a file cannot be written.
    """
    # All that shows the student in inference uses the same statistics.
    with job.for_inference():
        return _finish(job, writer, console, before_commit)


def _finish(job: Job, writer: MetricWriter, console: Console, before_commit: Callable[[], None]) -> dict[str, Any]:
    config = job.config
    evaluation = loop.evaluate(job, config.final_split, "final", writer, console)
    result = _result(job, writer, evaluation)
    if verdict := describe_verdict(evaluation.not_better()):
        console.warning(f"{verdict} on {config.final_split}. {_what_is_constant(evaluation)} {_REMEDY}")
    if not job.accelerator.chief:
        console.info(f"this machine is done: {describe(result)}; the chief writes the results")
        return result
    before_commit()
    # A crash between export and result must not leave a result of other weights.
    files.remove(files.join(config.workdir, "result.json"))
    folder = files.join(config.workdir, "export")
    classes = job.eval_stores[config.final_split].classes
    export.write(folder, job.student, classes, config, _card(job, evaluation))
    if config.model_dir:
        files.copy_tree(files.join(folder, "saved_model"), config.model_dir, "the served model", "saved_model.pb")
    files.write(files.join(config.workdir, "report.html"), _report(job, writer, result, evaluation), "the report")
    writer.flush()
    export.clean(folder)
    before_commit()
    write_json(files.join(config.workdir, "result.json"), result)
    console.info(f"finished: {describe(result)}")
    console.info(f"report {files.join(config.workdir, 'report.html')}, model {folder}")
    return result


def write_json(path: str, value: dict[str, Any]) -> None:
    """Writes a JSON file with sorted keys, whole or not at all."""
    files.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), "a result")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {
        "funmatch": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _result(job: Job, writer: MetricWriter, evaluation: EvalResult) -> dict[str, Any]:
    config = job.config
    speeds = [row["images_per_second"] for row in writer.rows if row["kind"] == "train"]
    skipped = {name: [dataclasses.asdict(record) for record in part] for name, part in job.skipped_records.items()}
    return evaluation.metrics() | {
        "split": config.final_split,
        "split_images": len(evaluation.labels),
        "labelled_images": evaluation.labelled,
        "not_better_than_constant": list(evaluation.not_better()),
        "teachers": [decision.findings() for decision in job.decisions],
        "left_out": skipped,
        "examples": len(job.train_store),
        "steps": job.step,
        "batch_size": config.batch_size,
        "images_per_second": speeds[-1] if speeds else 0.0,
        "wall_seconds": job.seconds,
        "seed": config.seed,
        "device": job.accelerator.description,
        "fingerprint": job.plan.run_id,
        "exported": config.export_from,
        "exported_step": job.best["step"] if config.export_from == "best" else job.step,
        "best": job.best,
        "versions": versions(),
        **({"batch_norm": config.batch_norm} if students.batch_norms(job.student) else {}),
    }


def _card(job: Job, evaluation: EvalResult) -> dict[str, Any]:
    """Rows of the model card's table."""
    config, labelled, images = job.config, evaluation.labelled, len(evaluation.labels)
    measured = f"{config.final_split} ({images:,} images)"
    if labelled < images:
        measured = f"{config.final_split} ({images:,} images, {labelled or 'none'} of them with a label)"
    rows: dict[str, Any] = {
        "student": config.student,
        "parameters": f"{job.student.count_params():,}",
        "teacher": ", ".join(config.teacher) or "none, trained from labels",
        "trained on": f"{', '.join(config.data)}, {config.train_split} ({len(job.train_store):,} images)",
        "measured on": measured,
        **{export.CARD_NAMES.get(name, name): f"{value:.4f}" for name, value in evaluation.metrics().items()},
        "steps": job.step,
        **({"weights of step": job.best["step"]} if config.export_from == "best" else {}),
        "images a step": config.batch_size,
    }
    if verdict := describe_verdict(evaluation.not_better()):
        rows["warning"] = f"{verdict}. {_what_is_constant(evaluation)}"
    return rows


def _what_is_constant(evaluation: EvalResult) -> str:
    constant = evaluation.constant
    if constant is None:
        return ""
    what = "commonest class of" if constant.logits is None else "teacher's mean answer on"
    return f"The best constant answer, the same for every image, is the {what} {constant.images:,} training images."


def _report(job: Job, writer: MetricWriter, result: dict[str, Any], evaluation: EvalResult) -> bytes:
    config = job.config
    teacher = evaluation.teacher_logits
    samples, choice = eval_samples(job, evaluation)
    verdict = describe_verdict(evaluation.not_better())
    warning = f"{verdict[0].upper()}{verdict[1:]}. {_what_is_constant(evaluation)}" if verdict else ""
    page = report.render(
        title=files.join(config.workdir).rstrip("/").rsplit("/", 1)[-1],
        config=config.to_dict(),
        history=writer.rows,
        result=result,
        train_samples=train_samples(job),
        eval_samples=samples,
        eval_choice=choice,
        warning=warning,
        predictions=Predictions(
            labels=evaluation.labels,
            teacher=None if teacher is None else teacher.argmax(1),
            student=evaluation.student_logits.argmax(1),
            classes=list(job.eval_stores[config.final_split].classes),
        ),
    )
    return page.encode()
