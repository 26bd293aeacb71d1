"""How long saving holds the training loop: the copy of the state off the device, and what a thread then does beside it.

    python benchmarks/checkpoint_stall.py --megabytes=300

Saves a state of that size (weights and two optimizer slots, as AdamW has them) to a disk, first as the loop did before it had a
thread, then as it does now, while the "device" (a product of matrices on one core) goes on. Prints one line of JSON.
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

PARTS = 3  # weights and two moments


def job(megabytes: int) -> Job:
    """A job with a state of this size and nothing else."""
    layers = 24
    width = int((megabytes * 1e6 / 4 / PARTS / layers) ** 0.5)
    student = keras.Sequential(
        [keras.Input((width,)), *(keras.layers.Dense(width, use_bias=False) for _ in range(layers))]
    )
    optimizer = keras.optimizers.AdamW()
    optimizer.build(student.trainable_variables)
    made: Any = Job.__new__(Job)
    made.student, made.optimizer, made.step, made.seconds, made.pending_metrics, made.best = (
        student,
        optimizer,
        0,
        0.0,
        [],
        {},
    )
    made.accelerator = types.SimpleNamespace(chief=True)
    return made


def measure(megabytes: int, repeats: int, folder: str) -> dict[str, Any]:
    """Medians in seconds: how long a save holds its caller, in the caller and in the background, and how long it takes there."""
    saved, journal = job(megabytes), MetricWriter(folder)
    checkpoints = Checkpoints(f"{folder}/checkpoints", {}, 1)
    state = sum(array.nbytes for array in saved.state().values())
    held: dict[str, list[float]] = {"in_the_loop": [], "in_the_background": [], "until_committed": [], "copy": []}

    def clocked(name: str, began: float) -> None:
        held[name].append(time.monotonic() - began)

    product = tf.function(lambda a: tf.linalg.matmul(a, a))
    matrix = tf.random.uniform([512, 512])
    product(matrix)
    for _ in range(repeats):
        began = time.monotonic()
        saved.state()
        clocked("copy", began)
        saved.step += 1
        began = time.monotonic()
        loop.save(saved, journal, checkpoints)
        clocked("in_the_loop", began)
        saved.step += 1
        began = time.monotonic()
        with Background() as saving:
            loop.save(saved, journal, checkpoints, saving)
            clocked("in_the_background", began)
            while saving._thread is not None and saving._thread.is_alive():
                product(matrix)
        clocked("until_committed", began)
    found = checkpoints.restore()
    assert found is not None
    assert found.step == saved.step
    assert all(np.array_equal(found.arrays[name], array) for name, array in saved.state().items())
    return {"state_mb": round(state / 1e6, 1), "repeats": repeats} | {
        f"{name}_s": round(statistics.median(values), 3) for name, values in held.items()
    }


def main() -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default="", help="where to save; empty: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder or None) as folder:
        print(json.dumps(measure(asked.megabytes, asked.repeats, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
