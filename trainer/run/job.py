"""A built job: its models, data and state, and how it runs steps on the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.core.errors import DataError, Diverged
from trainer.data.order import ExampleSampler
from trainer.data.records import CorruptRecord
from trainer.data.store import ImageStore
from trainer.method import step
from trainer.method.feed import BatchPrefetcher
from trainer.models import teachers
from trainer.run.accelerator import Accelerator
from trainer.run.evaluator import Evaluator

REMEDY = {step.FINITE_CHECKS[0]: "check the teacher's file, --teacher_range and --teacher_precision"}


@dataclasses.dataclass
class Job:
    """A run, built and ready to train.

    Attributes:
        config: resolved; nothing in it is left to a default.
        identity: JSON value that decides which weights come out: configuration, data, teachers.
        train: the training images, of all sets.
        order: which of them make batch t.
        feed: makes the inputs of the device's loops.
        targets: for each teacher its constant logits on the training split, where the views fix them; else none.
        left_out: bad records by split, which the run does without (--max_bad_fraction).
        step: updates made so far.
        seconds: wall time of training so far, over all processes of this run.
        pending: steps and metrics of the device's loops since the last row of metrics.
        best: with `--keep_best`, what it is about ("by"), its best "value" so far and the "step" of that; else empty.
    """

    config: Config
    accelerator: Accelerator
    identity: dict[str, Any]
    train: ImageStore
    stores: dict[str, ImageStore]
    order: ExampleSampler
    feed: BatchPrefetcher
    student: keras.Model
    teachers: tuple[teachers.Teacher, ...]
    targets: tuple[np.ndarray, ...]
    optimizer: keras.optimizers.Optimizer
    run_steps: Callable[..., dict[str, tf.Tensor]]
    left_out: dict[str, list[CorruptRecord]] = dataclasses.field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    pending: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluators: dict[str, Evaluator] = dataclasses.field(default_factory=dict)

    def evaluator(self, split: str) -> Evaluator:
        """The evaluator of one of `stores`."""
        if split not in self.evaluators:
            self.evaluators[split] = Evaluator(
                self.config,
                self.accelerator.strategy,
                self.stores[split],
                jit_compile=self.accelerator.jit_compile(self.config.jit_compile),
            )
        return self.evaluators[split]

    def until_due(self, step: int) -> int:
        """Steps from `step` to the next moment at which the host has something to do, at most a loop's; 0 at the end."""
        config = self.config
        intervals = (config.log_every, config.eval_every, config.checkpoint_every)
        most = min(config.steps_per_loop, self.feed.max_steps or config.steps_per_loop)
        return max(0, min(config.steps - step, most, *(every - step % every for every in intervals)))

    def advance(self, steps: int, order: ExampleSampler | None = None) -> dict[str, float]:
        """Makes `steps` updates on the device and returns the mean of each metric over them.

        Args:
            steps: in one loop of the device.
            order: of the examples; by default the job's.

        Raises:
            Diverged: a loss or gradient was not finite.
            DataError: an image cannot be read or decoded.
        """
        first, order = self.step, order or self.order
        ids, streamed = self.feed.take(first, steps, order)
        if then := self.until_due(first + steps):
            self.feed.prefetch(first + steps, then, order)  # on the host, while the device runs this loop
        told = self.run_steps(ids, tf.constant(first, tf.int64), *([streamed] if streamed else []))
        metrics = {name: float(told[name]) for name in step.METRICS}
        bad = int(told["non_finite_step"])
        if bad >= 0 or not all(math.isfinite(value) for value in metrics.values()):
            at = f"in step {bad + 1}" if bad >= 0 else f"between steps {first} and {first + steps}"
            cause = step.first_non_finite(told["non_finite"].numpy())
            raise Diverged(
                f"not finite {at} of {self.config.steps}: {cause}. The last good checkpoint is kept; "
                f"{REMEDY.get(cause, 'try a lower --learning_rate, a longer --warmup_steps or --precision=float32')}"
            )
        self.step += steps
        made = int(keras.ops.convert_to_numpy(self.optimizer.iterations))
        if made != self.step:
            raise AssertionError(f"{made} updates were made where {self.step} were due")
        return metrics

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on beside configuration, data and teachers, by name: copies in host memory.

        Keras numbers layers and optimizers by how many a process has made before, so a name holds a variable's place in
        its model and the end of its own name: the same in every process.
        """
        student = {
            f"student/{number:04d}/{variable.path.rsplit('/', 1)[-1]}": variable
            for number, variable in enumerate(self.student.variables)
        }
        slots = {
            f"optimizer/{number:04d}/{variable.path.replace('/', '_').rsplit('_', 1)[-1]}": variable
            for number, variable in enumerate(self.optimizer.variables)
        }
        return {name: keras.ops.convert_to_numpy(variable) for name, variable in (student | slots).items()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`.

        Raises:
            DataError: names or shapes differ.
        """
        variables = [*self.student.variables, *self.optimizer.variables]
        names = list(self.state())
        if names != list(arrays):
            odd = sorted(set(names) ^ set(arrays))[:5]
            raise DataError(
                f"the checkpoint does not hold this model's variables; the first that differ: {', '.join(odd)}"
            )
        for variable, (name, array) in zip(variables, arrays.items(), strict=True):
            if tuple(variable.shape) != array.shape:
                raise DataError(
                    f"the checkpoint's {name} has shape {array.shape}; this model's has {tuple(variable.shape)}"
                )
            variable.assign(array)
