"""`--check` and `--dry_run`: tests all that a job depends on, and prints a line for each.

A check that fails raises, so the verb ends with the exit code of that error.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time

import keras
import tensorflow as tf

from trainer import __version__
from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import DataError
from trainer.io import files
from trainer.run.job import Job

_GIB = 2**30


def check_environment(config: Config, console: Console) -> None:
    """Prints versions and user, and checks that the workdir is writable.

    Raises:
        DataError: an object in the workdir cannot be written, read or deleted.
    """
    _row(
        console,
        "versions",
        f"funmatch {__version__}, TensorFlow {tf.__version__}, Keras {keras.__version__}, "
        f"Python {platform.python_version()}, libtpu {_version('libtpu')}",
    )
    root = " (root: an image of this project runs as 10001)" if os.getuid() == 0 else ""
    _row(console, "user", f"uid {os.getuid()}, gid {os.getgid()}{root}")
    start = time.monotonic()
    files.require_writable(config.workdir, "--workdir")
    seconds = time.monotonic() - start
    _row(console, "workdir", f"{config.workdir}: wrote, read back and deleted an object in {seconds:.2f} s")


def rehearse(job: Job, console: Console) -> None:
    """Runs three steps of the job without writing results, and prints the plan of the run.

    Args:
        job: built, at step 0.
        console: gets the first step's loss and, for --check, what `check_job` prints; for --dry_run
            the plan: length, speed on this machine, size of checkpoints.

    Raises:
        DataError: see `check_job`.
        Diverged: a step is not finite.
    """
    config = job.config
    start = time.monotonic()
    metrics = job.run_steps(1)
    seconds = time.monotonic() - start
    console.info(
        f"first step: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.4f}, "
        f"{seconds:.1f} s with compilation"
    )
    if config.check:
        check_job(job, console)
        console.info("check passed: accelerator, data, teacher, workdir and the first batch are fine")
        return
    start = time.monotonic()
    job.run_steps(2)
    rate = 2 * config.batch_size / (time.monotonic() - start)
    images, examples = config.steps * config.batch_size, len(job.train_store)
    console.info(
        f"plan: {config.steps:,} steps = {images:,} images = {images / examples:,.1f} epochs of {examples:,}; "
        f"{rate:,.0f} images/s here: {images / rate / 3600:.2f} h; a checkpoint is {_state_bytes(job) / 2**20:.1f} MiB, "
        f"every {config.checkpoint_every:,} steps, {config.keep_checkpoints} kept. Nothing was written"
    )


def check_job(job: Job, console: Console) -> None:
    """Prints accelerator, data, teachers and free disk space.

    Raises:
        DataError: a local working directory has too little room for the checkpoints that are kept.
    """
    config = job.config
    _row(
        console,
        "accelerator",
        f"{job.accelerator.description}, {config.steps_per_loop} steps a loop, {config.precision}",
    )
    splits = ", ".join(f"{name} {len(store):,}" for name, store in job.eval_stores.items())
    _row(
        console,
        "data",
        f"{', '.join(config.data)}: {len(job.train_store):,} images to train on; {splits}; "
        "every record's checksum read",
    )
    for found, digest in zip(job.decisions, job.plan.identity["teacher"], strict=True):
        known = "accuracy not known" if found.top1 is None else f"{found.top1:.1%} on {found.split}"
        _row(
            console,
            "teacher",
            f"{found.teacher}: takes {found.value_range}; {known}; SHA-256 {str(digest)[:16]}...",
        )
    need = (config.keep_checkpoints + 1) * _state_bytes(job)
    folders = {"scratch": tempfile.gettempdir()} | (
        {} if files.is_remote(config.workdir) else {"workdir": config.workdir}
    )
    free = {name: shutil.disk_usage(path).free for name, path in folders.items()}
    sizes = ", ".join(f"{free[name] / _GIB:.1f} GiB free in {path}" for name, path in folders.items())
    _row(console, "disk", f"{sizes}; checkpoints take {need / _GIB:.2f} GiB")
    if free.get("workdir", need) < need:
        raise DataError(
            f"--workdir={config.workdir} has {free['workdir'] / _GIB:.2f} GiB free and {config.keep_checkpoints} "
            f"checkpoints and one being written take {need / _GIB:.2f} GiB: choose another, or fewer with "
            "--keep_checkpoints"
        )


def _row(console: Console, subject: str, text: str) -> None:
    console.info(f"  {subject:12} {text}")


def _state_bytes(job: Job) -> int:
    return sum(array.nbytes for array in job.state().values())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
