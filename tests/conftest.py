"""Small data and models that the tests share, and four virtual CPU devices for replicas."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import fake_gcs

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow's gs:// client reads these once. For `gcs_here`; a subprocess gets its own environment.
os.environ.update(fake_gcs.KNOBS)

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import cli
from trainer.core.config import Config
from trainer.core.console import Console, SilentConsole
from trainer.ingest.synthetic_source import write_synthetic_dataset
from trainer.models import bit
from trainer.run import build
from trainer.run.accelerator import Accelerator
from trainer.run.job import Job
from trainer.run.plan import make_plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES, TRAIN, SIDE, IMAGE = 5, 40, 32, 24

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)
tf.get_logger().setLevel("ERROR")


def silent(task: str, done: int, total: int) -> None:
    """Ignores progress."""


class RecordingConsole(SilentConsole):
    """Keeps the printed lines in `lines`, warnings with their prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


def strategy(replicas: int) -> tf.distribute.Strategy:
    """A strategy over this number of virtual CPU devices."""
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy("CPU:0")
    # Keys of collectives clash between strategies of one process; a sum on one device has none.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def funmatch(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m trainer.cli ...` in a subprocess."""
    inherited = {name: value for name, value in os.environ.items() if name not in fake_gcs.KNOBS}
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=inherited | environment,
        check=False,
    )


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in this process, which has TensorFlow loaded already."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = cli.main(list(arguments))
    return subprocess.CompletedProcess(arguments, code, "", stderr.getvalue())


def small_classifier(seed: int) -> keras.Model:
    """A classifier so small that hundreds of jobs take minutes: convolution, norm, head."""
    initializer = keras.initializers.RandomNormal(stddev=0.3, seed=seed)
    return keras.Sequential(
        [
            keras.Input((IMAGE, IMAGE, 3)),
            keras.layers.Conv2D(8, 5, strides=4, kernel_initializer=initializer),
            keras.layers.GroupNormalization(2),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(CLASSES, kernel_initializer=initializer),
        ]
    )


@pytest.fixture(scope="session")
def storage() -> Iterator[fake_gcs.Server]:
    """A fake Google Cloud Storage for this process; tests use `gcs` or `gcs_here`."""
    with fake_gcs.Server() as server:
        yield server


@pytest.fixture
def gcs(storage: fake_gcs.Server) -> fake_gcs.Server:
    """The fake with an empty bucket named "bucket", no faults and an empty log."""
    storage.reset("bucket")
    return storage


@pytest.fixture
def gcs_here(gcs: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch) -> fake_gcs.Server:
    """`gcs`, also used by TensorFlow and google-cloud-storage of this process."""
    for name, value in gcs.route.items():
        monkeypatch.setenv(name, value)
    return gcs


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set of 5 species: 40 train, 15 validation, 23 test images, up to 32 px."""
    out = str(tmp_path_factory.mktemp("data") / "flowers")
    write_synthetic_dataset(out, 0, CLASSES, SIDE, {"train": TRAIN, "validation": 15, "test": 23}, silent)
    return out


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `.keras` teacher of 24 x 24 pixels with a random head."""
    path = str(tmp_path_factory.mktemp("teacher") / "teacher.keras")
    opinionated(bit.bit("tiny", CLASSES, IMAGE, seed=11)).save(path)
    return path


def build_job(config: Config, replicas: int = 1) -> Job:
    """The job of a configuration on this number of virtual CPU devices."""
    return build.build(make_plan(config), Accelerator(strategy(replicas), "CPU", 10), Console())


def reconfigure(job: Job, config: Config) -> None:
    """Changes the configuration of a built job; models and data stay."""
    job.plan = dataclasses.replace(job.plan, config=config)


def opinionated(model: keras.Model, seed: int = 0) -> keras.Model:
    """Replaces the zero head of a model by a random one."""
    rng = np.random.default_rng(seed)
    head = model.get_layer("head")
    head.set_weights([rng.normal(0, 0.3, w.shape).astype(np.float32) for w in head.get_weights()])
    return model


@pytest.fixture
def make_config(data: str, teacher_file: str, tmp_path: pathlib.Path) -> Callable[..., Config]:
    """Makes the configuration of a small job; keyword arguments replace its values."""

    def make(**changes: object) -> Config:
        values: dict[str, object] = {
            "data": data,
            "teacher": (f"keras:{teacher_file}",),
            "workdir": str(tmp_path / "run"),
            "student": "bit-tiny",
            "image_size": IMAGE,
            "store_size": SIDE,
            "steps": 12,
            "batch_size": 8,
            "learning_rate": 0.003,
            "steps_per_loop": 2,
            "log_every": 3,
            "eval_every": 6,
            "checkpoint_every": 4,
            "eval_batch_size": 10,
        }
        return Config(**(values | changes))  # type: ignore[arg-type]

    return make
