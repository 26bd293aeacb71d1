"""Distil a big frozen image classifier into a small one by function matching (Beyer et al. 2021,
arXiv 2106.05237).

    python -m trainer.task --data=DATA --teacher=keras:teacher.keras --student=bit-r50x1 \\
        --epochs=1000 --workdir=RUN

The same command resumes a run that was stopped, and changes nothing about a finished one. A file of
flags: --flagfile=FILE.

Exit codes: 0 done; 2 bad flags; 3 bad data, teacher or checkpoint; 4 training diverged; 75 stopped
early, resumable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from trainer import cli, recipes
from trainer.core import environment
from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import DataError
from trainer.core.flags import define_flags, from_flags

if TYPE_CHECKING:
    from trainer.run.plan import RunPlan


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(
        __doc__,
        define_flags,
        lambda values: _main(on_vertex(from_flags(values, recipes.find(values.recipe)))),
        argv,
    )


def on_vertex(config: Config) -> Config:
    """The configuration with the folders that Vertex AI gives by variables, where flags do not say
    otherwise.
    """
    return dataclasses.replace(
        config,
        workdir=environment.workdir(config.workdir),
        model_dir=environment.model_dir(config.model_dir),
        tensorboard_dir=environment.tensorboard_dir(config.tensorboard_dir),
    )


def _main(config: Config) -> None:
    run(config, Console())


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the whole job.

    Args:
        config: as the user gave it.
        console: shows progress.

    Returns:
        What result.json holds; for --check and --dry_run an empty dictionary.

    Raises:
        FunmatchError: see trainer.core.errors.
    """
    config.require_complete()
    import tensorflow as tf

    from trainer.io import files, lock
    from trainer.output.finish import finish
    from trainer.run import accelerator, build, check, loop
    from trainer.run.evaluator import describe
    from trainer.run.plan import make_plan

    plan = make_plan(config)
    if result := _finished(plan):
        console.info(f"{config.workdir} is finished: nothing to do. {describe(result)}")
        return result
    with contextlib.ExitStack() as stack:
        workdir_lock: lock.WorkdirLock = lock.Unlocked()
        if config.check:
            check.check_environment(config, console)
        elif not config.dry_run:
            files.require_writable(config.workdir, "--workdir")
            if environment.is_chief():
                held = lock.hold_workdir(config.workdir, console, config.lease_seconds)
                workdir_lock = stack.enter_context(held)
        hardware = accelerator.resolve(config.tpu, console)
        console.info(f"{hardware.description}; {plan.config.steps:,} steps of {plan.config.batch_size} images")
        job = build.build(plan, hardware, console)
        if config.check or config.dry_run:
            check.rehearse(job, console)
            return {}
        workdir_lock.check()
        if hardware.chief:
            job.plan.record()
        writer, checkpoints = build.open_run(job, workdir_lock.check)
        try:
            loop.train(job, writer, checkpoints, console)
            if job.config.export_from == "best":
                loop.take_best(job, checkpoints)
            return finish(job, writer, console, workdir_lock.check)
        except tf.errors.OpError as error:
            if hardware.workers > 1:
                raise accelerator.worker_lost(error) from error
            raise


def _finished(plan: RunPlan) -> dict[str, Any] | None:
    """result.json of this very run, if it is there and describes the weights that are asked for.

    Raises:
        DataError: it is there and belongs to another configuration.
    """
    from trainer.io import files

    workdir = plan.config.workdir
    path = files.join(workdir, "result.json")
    if not files.exists(path):
        return None
    try:
        result = json.loads(files.read(path, "the result"))
        run_id, exported = result["fingerprint"], result.get("exported", "last")
        batch_norm = result.get("batch_norm", plan.config.batch_norm)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): delete it, and the same command makes it again") from error
    if run_id != plan.run_id:
        raise DataError(
            f"--workdir={workdir} holds a finished run of another configuration (see its config.json): "
            "choose another workdir"
        )
    return result if (exported, batch_norm) == (plan.config.export_from, plan.config.batch_norm) else None


if __name__ == "__main__":
    sys.exit(main())
