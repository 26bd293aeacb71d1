"""Distil a big frozen image classifier into a small one by function matching (Beyer et al. 2021, arXiv 2106.05237).

    python -m trainer.task --data=DATA --teacher=keras:teacher.keras --student=bit-r50x1 --epochs=1000 --workdir=RUN

The same command goes on where an earlier one stopped; on a finished run it says so. A file of flags: --flagfile=FILE.
Exit codes: 0 done; 2 bad flags; 3 bad data, teacher or checkpoint; 4 training diverged; 75 stopped early, resumable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer import __version__, cli, recipes
from trainer.core import config, environment
from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.core.flags import define_flags, from_flags

if TYPE_CHECKING:
    from trainer.core.console import Console
    from trainer.run.job import Job
from trainer.output.samples import samples


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(
        __doc__,
        define_flags,
        lambda values: _main(on_vertex(from_flags(values, recipes.find(values.recipe)))),
        argv,
    )


def on_vertex(chosen: Config) -> Config:
    """The configuration with the folders that Vertex AI names by variables, where flags do not say otherwise."""
    return dataclasses.replace(
        chosen,
        workdir=environment.workdir(chosen.workdir),
        model_dir=environment.model_dir(chosen.model_dir),
        tensorboard_dir=environment.tensorboard_dir(chosen.tensorboard_dir),
    )


def _main(chosen: Config) -> None:
    from trainer.core.console import Console

    run(chosen, Console())


def run(chosen: Config, console: Console) -> dict[str, Any]:
    """The whole job; returns what result.json holds (for --check and --dry_run: nothing).

    Args:
        chosen: as the user gave it.
        console: where progress goes.

    Raises:
        FunmatchError: see trainer.core.errors.
    """
    chosen.require_complete()
    import tensorflow as tf

    from trainer.io import files, lock
    from trainer.run import accelerator, build, check, loop

    resolved, _, _, identity = build.identify(chosen)
    print_ = config.fingerprint(identity)
    if done := _finished(chosen, print_):
        console.info(f"{chosen.workdir} is finished: nothing to do. {_summary(done)}")
        return done
    with contextlib.ExitStack() as stack:
        held: lock.WorkdirLock = lock.Unlocked()
        if chosen.check:
            check.check_environment(chosen, console)
        elif not chosen.dry_run:
            files.require_writable(chosen.workdir, "--workdir")
            if environment.is_chief():
                held = stack.enter_context(lock.hold_workdir(chosen.workdir, console, chosen.lease_seconds))
        hardware = accelerator.resolve(chosen.tpu, console)
        console.info(f"{hardware.description}; {resolved.steps:,} steps of {resolved.batch_size} images")
        job = build.build(chosen, hardware, console)
        if chosen.check or chosen.dry_run:
            _rehearse(job, console)
            return {}
        held.check()
        if hardware.chief:
            _write_json(
                files.join(chosen.workdir, "config.json"),
                {"config": job.config.to_dict(), "identity": identity},
            )
        journal, checkpoints = build.open_run(job, held.check)
        try:
            loop.train(job, journal, checkpoints, console)
            if job.config.export_from == "best":
                loop.take_best(job, checkpoints)
            return finish(job, journal, console, print_, held.check)
        except tf.errors.OpError as error:
            if hardware.workers > 1:
                raise accelerator.worker_lost(error) from error
            raise


def finish(
    job: Job, journal: Any, console: Console, fingerprint: str, before_commit: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Measures on the final split, exports, reports, and writes result.json last: with it the run is finished.

    `before_commit` raises where this process must not write any more.
    """
    from trainer.io import files
    from trainer.output import export, report
    from trainer.run import loop

    settings = job.config
    outcome = loop.evaluate(job, settings.final_split, "final", journal, console)
    measured = outcome.metrics()
    rates = [row["images_per_second"] for row in journal.rows if row["kind"] == "train"]
    result = measured | {
        "split": settings.final_split,
        "left_out": {name: [dataclasses.asdict(bad) for bad in bads] for name, bads in job.left_out.items()},
        "examples": len(job.train),
        "steps": job.step,
        "batch_size": settings.batch_size,
        "images_per_second": rates[-1] if rates else 0.0,
        "wall_seconds": job.seconds,
        "seed": settings.seed,
        "device": job.accelerator.description,
        "fingerprint": fingerprint,
        "exported": settings.export_from,
        "exported_step": job.best["step"] if settings.export_from == "best" else job.step,
        "best": job.best,
        "versions": versions(),
    }
    if not job.accelerator.chief:
        console.info(f"this machine is done: {_summary(result)}; the chief writes the results")
        return result
    store = job.stores[settings.final_split]
    card = {
        "student": settings.student,
        "parameters": f"{job.student.count_params():,}",
        "teacher": ", ".join(settings.teacher) or "none, trained from labels",
        "trained on": f"{', '.join(settings.data)}, {settings.train_split} ({len(job.train):,} images)",
        "measured on": f"{settings.final_split} ({len(store):,} images)",
        **{name: f"{value:.4f}" for name, value in measured.items()},
        "steps": job.step,
        **({"weights of step": job.best["step"]} if settings.export_from == "best" else {}),
        "images a step": settings.batch_size,
    }
    before_commit()
    files.remove(files.join(settings.workdir, "result.json"))  # one of other weights does not outlive their export
    folder = files.join(settings.workdir, "export")
    export.write(folder, job.student, store.classes, settings, card)
    if settings.model_dir:
        files.copy_tree(files.join(folder, "saved_model"), settings.model_dir, "the served model", "saved_model.pb")
    trained_on, measured_on = samples(job, outcome)
    page = report.render(
        title=files.join(settings.workdir).rstrip("/").rsplit("/", 1)[-1],
        config=settings.to_dict(),
        history=journal.rows,
        result=result,
        train_samples=trained_on,
        eval_samples=measured_on,
        predictions=report.Predictions(
            labels=outcome.labels,
            teacher=None if outcome.teacher is None else outcome.teacher.argmax(1),
            student=outcome.student.argmax(1),
            classes=list(store.classes),
        ),
    )
    files.write(files.join(settings.workdir, "report.html"), page.encode(), "the report")
    journal.flush()
    export.clean(folder)
    before_commit()
    _write_json(files.join(settings.workdir, "result.json"), result)
    console.info(f"finished: {_summary(result)}")
    console.info(f"report {files.join(settings.workdir, 'report.html')}, model {folder}")
    return result


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    import keras
    import numpy
    import tensorflow

    return {
        "funmatch": __version__,
        "tensorflow": tensorflow.__version__,
        "keras": keras.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _rehearse(job: Job, console: Console) -> None:
    """Two short turns of the real step, of which nothing is kept, and the plan that follows from them."""
    import time

    from trainer.run import check

    settings = job.config
    began = time.monotonic()
    metrics = job.advance(1)
    compiled = time.monotonic() - began
    console.info(
        f"first step: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.4f}, {compiled:.1f} s with compilation"
    )
    if settings.check:
        check.check_job(job, console)
        console.info("check passed: accelerator, data, teacher, workdir and the first batch are fine")
        return
    began = time.monotonic()
    job.advance(2)
    rate = 2 * settings.batch_size / (time.monotonic() - began)
    images = settings.steps * settings.batch_size
    state = sum(array.nbytes for array in job.state().values())
    console.info(
        f"plan: {settings.steps:,} steps = {images:,} images = {images / len(job.train):,.1f} epochs of {len(job.train):,}; "
        f"{rate:,.0f} images/s here: {images / rate / 3600:.2f} h; a checkpoint is {state / 2**20:.1f} MiB, "
        f"every {settings.checkpoint_every:,} steps, {settings.keep_checkpoints} kept. Nothing was written"
    )


def _finished(chosen: Config, fingerprint: str) -> dict[str, Any] | None:
    """result.json of this very run, if it is there and is about the weights that are asked for.

    Raises:
        DataError: it is there and belongs to another configuration.
    """
    from trainer.io import files

    workdir = chosen.workdir
    path = files.join(workdir, "result.json")
    if not files.exists(path):
        return None
    try:
        result = json.loads(files.read(path, "the result"))
        same, exported = result["fingerprint"] == fingerprint, result.get("exported", "last")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): delete it to have it made again") from error
    if not same:
        raise DataError(
            f"--workdir={workdir} holds a finished run of another configuration (see its config.json): choose another workdir"
        )
    return result if exported == chosen.export_from else None


def _summary(result: dict[str, Any]) -> str:
    told = [
        ("student", "student_top1"),
        ("teacher", "teacher_top1"),
        ("agreement", "agreement_top1"),
    ]
    return ", ".join(f"{word} {100 * result[name]:.1f}%" for word, name in told if name in result)


def _write_json(path: str, value: dict[str, Any]) -> None:
    from trainer.io import files

    files.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), "a result")


if __name__ == "__main__":
    sys.exit(main())
