"""What `--check` says, a line for each thing that a job depends on. What does not hold raises, and so ends with its exit code."""

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


def row(console: Console, what: str, text: str) -> None:
    """A row of the table."""
    console.info(f"  {what:12} {text}")


def check_environment(config: Config, console: Console) -> None:
    """Versions, user, working directory.

    Raises:
        DataError: the working directory cannot be written, read and cleared.
    """
    row(
        console,
        "versions",
        f"funmatch {__version__}, TensorFlow {tf.__version__}, Keras {keras.__version__}, Python {platform.python_version()}, "
        f"libtpu {_version('libtpu')}",
    )
    root = " (root: an image of this project runs as 10001)" if os.getuid() == 0 else ""
    row(console, "user", f"uid {os.getuid()}, gid {os.getgid()}{root}")
    began = time.monotonic()
    files.require_writable(config.workdir, "--workdir")
    row(
        console,
        "workdir",
        f"{config.workdir}: wrote, read back and deleted an object in {time.monotonic() - began:.2f} s",
    )


def check_job(job: Job, console: Console) -> None:
    """Accelerator, data, teachers, and room for what the run will write.

    Raises:
        DataError: a local working directory has too little room for the checkpoints that are kept.
    """
    config = job.config
    row(
        console,
        "accelerator",
        f"{job.accelerator.description}, {config.steps_per_loop} steps a loop, {config.precision}",
    )
    splits = ", ".join(f"{name} {len(store):,}" for name, store in job.stores.items())
    row(
        console,
        "data",
        f"{', '.join(config.data)}: {len(job.train):,} images to train on; {splits}; every record's checksum read",
    )
    for name, digest in zip(config.teacher, job.identity["teacher"], strict=True):
        row(console, "teacher", f"{name}: loads; SHA-256 {str(digest)[:16]}...")
    state = sum(array.nbytes for array in job.state().values())
    need = (config.keep_checkpoints + 1) * state
    folders = {"scratch": tempfile.gettempdir()} | (
        {} if files.is_remote(config.workdir) else {"workdir": config.workdir}
    )
    free = {name: shutil.disk_usage(path).free for name, path in folders.items()}
    told = ", ".join(f"{free[name] / _GIB:.1f} GiB free in {path}" for name, path in folders.items())
    row(console, "disk", f"{told}; checkpoints take {need / _GIB:.2f} GiB")
    if free.get("workdir", need) < need:
        raise DataError(
            f"--workdir={config.workdir} has {free['workdir'] / _GIB:.2f} GiB free and {config.keep_checkpoints} checkpoints and "
            f"one being written take {need / _GIB:.2f} GiB: choose another, or fewer with --keep_checkpoints"
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
