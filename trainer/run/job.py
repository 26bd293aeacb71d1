"""A built job: its models, data and state, and how it runs steps on the device."""

from __future__ import annotations

import contextlib
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
from trainer.models.teachers import Teacher
from trainer.run import baseline
from trainer.run.accelerator import Accelerator
from trainer.run.batch_statistics import BatchStatistics
from trainer.run.evaluator import Evaluator
from trainer.run.plan import RunPlan

# What to try, by the first value that was not finite.
REMEDY = {step.FINITE_CHECKS[0]: "check the teacher's file, --teacher_range and --teacher_precision"}


@dataclasses.dataclass
class Job:
    """A run, built and ready to train.

    Attributes:
        plan: what the run is; its config has `steps_per_loop` filled in.
        train_store: the training images, of all sets.
        eval_stores: images of the evaluation and the final split, by the split's name.
        skipped_records: corrupt records by split, which the run does without (--max_bad_fraction).
        sampler: which examples make batch t.
        prefetcher: makes the inputs of the device's loops.
        targets: for each teacher its constant logits float32 [examples, classes] on the training
            split, where the views fix them; else empty.
        train_loop: the compiled loop of `step.make_train_loop`.
        statistics: re-estimates the student's batch normalisations for evaluation and export.
        step: updates made so far.
        seconds: wall time of training so far, over all processes of this run.
        pending_metrics: steps and mean metrics of the device's loops since the last logged row.
        best: with `--keep_best`, the metric's name ("by"), its best "value" so far and the "step"
            of that evaluation; else empty.
    """

    plan: RunPlan
    accelerator: Accelerator
    train_store: ImageStore
    eval_stores: dict[str, ImageStore]
    skipped_records: dict[str, list[CorruptRecord]]
    sampler: ExampleSampler
    prefetcher: BatchPrefetcher
    student: keras.Model
    teachers: tuple[Teacher, ...]
    targets: tuple[np.ndarray, ...]
    optimizer: keras.optimizers.Optimizer
    train_loop: Callable[..., dict[str, tf.Tensor]]
    statistics: BatchStatistics
    step: int = 0
    seconds: float = 0.0
    pending_metrics: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    _evaluators: dict[str, Evaluator] = dataclasses.field(default_factory=dict)
    _constant: baseline.Constant | None = None

    @property
    def config(self) -> Config:
        """The plan's configuration."""
        return self.plan.config

    def evaluator(self, split: str) -> Evaluator:
        """The evaluator of one of `eval_stores`."""
        if split not in self._evaluators:
            self._evaluators[split] = Evaluator(
                self.config,
                self.accelerator.strategy,
                self.eval_stores[split],
                jit_compile=self.accelerator.jit_compile(self.config.jit_compile),
            )
        return self._evaluators[split]

    def for_inference(self) -> contextlib.AbstractContextManager[None]:
        """Within it the student is as it is evaluated and exported: see `batch_statistics`."""
        # The updates that made the weights that are loaded, which may be those of an earlier step.
        return self.statistics.reestimated(int(keras.ops.convert_to_numpy(self.optimizer.iterations)))

    def constant(self, progress: Callable[[int, int], None]) -> baseline.Constant:
        """The best constant answer, computed at the first call; all machines must call it.

        A function of data, teachers and configuration: a resumed run computes the same, to the bit.

        Args:
            progress: called with the number of the teachers' images done and in all.
        """
        if self._constant is None:
            split, train = self.config.eval_split, self.train_store
            if self.teachers:
                ids = baseline.sample(len(train), len(self.eval_stores[split]))
                logits = self.evaluator(split).logits_elsewhere(self.teachers, train, ids, progress)
                self._constant = baseline.of_teacher(logits)
            else:
                self._constant = baseline.of_labels(train.labels)
        return self._constant

    def is_due(self, every: int) -> bool:
        """Whether an action of every `every` steps is due; all are due at the end of the run."""
        return self.step == self.config.steps or self.step % every == 0

    def steps_to_next_event(self, step: int) -> int:
        """Steps until the next log, evaluation or checkpoint, at most `steps_per_loop`; 0 at the
        end.
        """
        config = self.config
        intervals = (config.log_every, config.eval_every, config.checkpoint_every)
        cap = min(config.steps_per_loop, self.prefetcher.max_steps or config.steps_per_loop)
        return max(0, min(config.steps - step, cap, *(every - step % every for every in intervals)))

    def run_steps(self, steps: int, sampler: ExampleSampler | None = None) -> dict[str, float]:
        """Makes `steps` updates in one loop of the device.

        Args:
            steps: number of updates, >= 1.
            sampler: of the examples; by default the job's.

        Returns:
            The mean over these steps of each of `step.METRICS`.

        Raises:
            Diverged: a loss or gradient was not finite.
            DataError: an image cannot be read or decoded.
        """
        first, sampler = self.step, sampler or self.sampler
        ids, streamed = self.prefetcher.take(first, steps, sampler)
        if next_steps := self.steps_to_next_event(first + steps):
            # Decodes on the host while the device runs this loop.
            self.prefetcher.prefetch(first + steps, next_steps, sampler)
        outputs = self.train_loop(ids, tf.constant(first, tf.int64), *([streamed] if streamed else []))
        metrics = {name: float(outputs[name]) for name in step.METRICS}
        bad_step = int(outputs["non_finite_step"])
        if bad_step >= 0 or not all(math.isfinite(value) for value in metrics.values()):
            where = f"in step {bad_step + 1}" if bad_step >= 0 else f"between steps {first} and {first + steps}"
            cause = step.first_non_finite(outputs["non_finite"].numpy())
            remedy = REMEDY.get(cause, "try a lower --learning_rate, a longer --warmup_steps or --precision=float32")
            raise Diverged(
                f"not finite {where} of {self.config.steps}: {cause}. The last good checkpoint is kept; {remedy}"
            )
        self.step += steps
        iterations = int(keras.ops.convert_to_numpy(self.optimizer.iterations))
        if iterations != self.step:
            raise AssertionError(f"the optimizer counts {iterations} updates at step {self.step}")
        return metrics

    def state(self) -> dict[str, np.ndarray]:
        """The state that changes from step to step, copied to host memory.

        Keras numbers layers and optimizers per process. So a name holds the variable's position in
        its model and the end of its own name, which are equal in every process.
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
            different = sorted(set(names) ^ set(arrays))[:5]
            raise DataError(
                f"the checkpoint does not hold this model's variables; the first that differ: {', '.join(different)}"
            )
        for variable, (name, array) in zip(variables, arrays.items(), strict=True):
            if tuple(variable.shape) != array.shape:
                raise DataError(
                    f"the checkpoint's {name} has shape {array.shape}; this model's has {tuple(variable.shape)}"
                )
            variable.assign(array)
