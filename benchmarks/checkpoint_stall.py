"""Measure how long saving a checkpoint blocks the training loop.

    python benchmarks/checkpoint_stall.py --megabytes=300

Saves a state of that size (weights and two optimizer slots, as AdamW has them) to a disk, first in
the loop itself, then with the copy in the loop and the rest in a background thread, while a matrix
product on one core stands in for the device. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
import types
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trainer.run import loop
from trainer.run.checkpoint import Background, Checkpoints
from trainer.run.job import Job
from trainer.run.metric_writer import MetricWriter

ARRAYS_PER_WEIGHT = 3  # the weight and two moments


def make_job(megabytes: int) -> Job:
    """A job with a state of this size and no data, teachers or training step."""
    layers = 24
    width = int((megabytes * 1e6 / 4 / ARRAYS_PER_WEIGHT / layers) ** 0.5)
    student = keras.Sequential(
        [keras.Input((width,)), *(keras.layers.Dense(width, use_bias=False) for _ in range(layers))]
    )
    optimizer = keras.optimizers.AdamW()
    optimizer.build(student.trainable_variables)
    job: Any = Job.__new__(Job)
    job.student, job.optimizer, job.step, job.seconds = student, optimizer, 0, 0.0
    job.pending_metrics, job.best = [], {}
    job.accelerator = types.SimpleNamespace(chief=True)
    return job


def measure(megabytes: int, repeats: int, folder: str) -> dict[str, Any]:
    """Medians over the repeats, in seconds.

    Args:
        megabytes: size of the state, in 1e6 bytes.
        repeats: saves of each kind, at least 1.
        folder: on the disk to write to.

    Returns:
        state_mb and repeats; copy_s: copying the state to host memory; in_the_loop_s: a whole save
        in the loop;
        in_the_background_s: how long the loop waits for a save in the background;
            until_committed_s: until that
        save is committed.
    """
    job, metric_writer = make_job(megabytes), MetricWriter(folder)
    checkpoints = Checkpoints(f"{folder}/checkpoints", {}, 1)
    state_bytes = sum(array.nbytes for array in job.state().values())
    seconds: dict[str, list[float]] = {"in_the_loop": [], "in_the_background": [], "until_committed": [], "copy": []}

    def record(name: str, start: float) -> None:
        seconds[name].append(time.monotonic() - start)

    product = tf.function(lambda a: tf.linalg.matmul(a, a))
    matrix = tf.random.uniform([512, 512])
    product(matrix)
    for _ in range(repeats):
        start = time.monotonic()
        job.state()
        record("copy", start)
        job.step += 1
        start = time.monotonic()
        loop.save(job, metric_writer, checkpoints)
        record("in_the_loop", start)
        job.step += 1
        start = time.monotonic()
        with Background() as background:
            loop.save(job, metric_writer, checkpoints, background)
            record("in_the_background", start)
            while background._thread is not None and background._thread.is_alive():
                product(matrix)
        record("until_committed", start)
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == job.step
    assert all(np.array_equal(restored.arrays[name], array) for name, array in job.state().items())
    return {"state_mb": round(state_bytes / 1e6, 1), "repeats": repeats} | {
        f"{name}_s": round(statistics.median(values), 3) for name, values in seconds.items()
    }


def main() -> int:
    """Measures and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the state, in 1e6 bytes")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    parser.add_argument("--folder", default="", help="folder on the disk to measure; empty: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        print(json.dumps(measure(arguments.megabytes, arguments.repeats, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
