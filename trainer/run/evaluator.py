"""Evaluation of student and teachers: every example of a split once, on the central crop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.data.store import ImageStore, prefetched
from trainer.method import distances, views
from trainer.models import value_range
from trainer.models.teachers import Teacher, ensemble, teacher_logits


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Logits on a whole split.

    Attributes:
        labels: int32 [n], -1 where there is none.
        student_logits: float32 [n, classes].
        teacher_logits: float32 [n, classes], of the ensemble of teachers; None without teacher.
    """

    labels: np.ndarray
    student_logits: np.ndarray
    teacher_logits: np.ndarray | None

    def metrics(self) -> dict[str, float]:
        """student_top1, student_top5, teacher_top1, teacher_top5, agreement_top1 (0..1) and kl.

        kl is in nats at T = 1. Accuracies are over labelled examples, and missing if there are
        none. Metrics of the teacher are missing without a teacher.
        """
        metrics: dict[str, float] = {}
        student, teacher = self.student_logits, self.teacher_logits
        labelled = self.labels >= 0
        for name, logits in (("student", student), ("teacher", teacher)):
            if logits is not None and labelled.any():
                metrics[f"{name}_top1"] = top_k(logits[labelled], self.labels[labelled], 1)
                metrics[f"{name}_top5"] = top_k(logits[labelled], self.labels[labelled], 5)
        if teacher is not None:
            metrics["agreement_top1"] = float((teacher.argmax(1) == student.argmax(1)).mean())
            metrics["kl"] = float(distances.kl(teacher, student).numpy().mean(dtype=np.float64))
        return metrics


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Top-k accuracy; ties count against the label.

    Args:
        logits: float32 [n, classes]; a row with a value that is not finite counts as wrong.
        labels: int [n], each in 0 .. classes - 1.
        k: >= 1.

    Returns:
        Share of rows whose label is among the k largest logits, in [0, 1].
    """
    label_logits = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    rank = (logits >= label_logits).sum(axis=1)
    return float((np.isfinite(logits).all(axis=1) & (rank <= k)).mean())


def per_class(logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Accuracy by class.

    Args:
        logits: float32 [n, classes].
        labels: int [n], -1 where there is none.
        names: of the classes.

    Returns:
        For each class with examples: `top1` in [0, 1] (ties count against the label) and `images`,
        their number.
    """
    accuracies = {}
    for number, name in enumerate(names):
        rows = labels == number
        if rows.any():
            accuracies[name] = {"top1": top_k(logits[rows], labels[rows], 1), "images": int(rows.sum())}
    return accuracies


class Evaluator:
    """Runs models over one split; teacher logits are computed once, since views are fixed."""

    def __init__(
        self,
        config: Config,
        strategy: tf.distribute.Strategy,
        store: ImageStore,
        *,
        jit_compile: bool,
    ) -> None:
        """
        Args:
            config: resolved. Its eval_batch_size is rounded up to a multiple of the replicas.
            strategy: that the models were made under.
            store: the split.
            jit_compile: let XLA compile the forward passes.
        """
        self._config, self._strategy, self._store, self._jit = config, strategy, store, jit_compile
        replicas = strategy.num_replicas_in_sync
        self._replica_batch = -(-min(config.eval_batch_size, max(1, len(store))) // replicas)
        self._teacher_logits: np.ndarray | None = None
        self._student: Callable[[np.ndarray, np.ndarray], tf.Tensor] | None = None
        self._model: keras.Model | None = None

    def run(self, student: keras.Model, teachers: tuple[Teacher, ...]) -> EvalResult:
        """Logits of student and teachers on the central crop of every example.

        Args:
            student: compiled once, as long as it is the same model.
            teachers: the same at each call.
        """
        size, value_range_ = self._config.image_size, self._config.student_range
        if self._model is not student:
            self._model = student
            self._student = self._compile(
                {size}, lambda images: student(value_range.to_range(images[size], value_range_), training=False)
            )
        if teachers and self._teacher_logits is None:
            how = self._config.ensemble
            forward = self._compile(
                {teacher.size for teacher in teachers},
                lambda images: ensemble(teacher_logits(teachers, images), how),
            )
            self._teacher_logits = self._run_over_split(forward)
        assert self._student is not None
        return EvalResult(self._store.labels, self._run_over_split(self._student), self._teacher_logits)

    def fixed_logits(self, teachers: tuple[Teacher, ...]) -> Callable[[int], np.ndarray]:
        """The teachers' logits on the fixed views (`--views=fix/...`).

        Returns:
            A function of the crop's number (0 where there is only one) to float32 [examples,
            teachers, classes].
        """
        config = self._config

        def forward(images: tf.Tensor, originals: tf.Tensor, ids: tf.Tensor, crop: tf.Tensor) -> tf.Tensor:
            inputs = {t.size: views.fixed_view(config, images, originals, ids, crop, t.size) for t in teachers}
            return tf.stack(teacher_logits(teachers, inputs), axis=1)

        run = self._distributed(forward)

        def logits(crop: int) -> np.ndarray:
            number = tf.constant(crop)
            return self._run_over_split(lambda *batch: run(*batch, number))

        return logits

    def _compile(self, sizes: set[int], model: Callable[[dict[int, tf.Tensor]], tf.Tensor]) -> Callable:
        def forward(images: tf.Tensor, originals: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
            del ids  # the central crop does not depend on the example
            inputs = {size: views.evaluation_view(self._config, images, originals, size) for size in sizes}
            return tf.cast(model(inputs), tf.float32)

        return self._distributed(forward)

    def _distributed(self, forward: Callable) -> Callable:
        compiled = tf.function(forward, jit_compile=self._jit, autograph=False)
        strategy = self._strategy

        def run(*values: tf.distribute.DistributedValues) -> tf.Tensor | tf.distribute.DistributedValues:
            outputs = strategy.run(compiled, values)
            several_machines = len(strategy.experimental_local_results(outputs)) < strategy.num_replicas_in_sync
            return strategy.gather(outputs, axis=0) if several_machines else outputs

        return tf.function(run, autograph=False)

    def _run_over_split(self, run: Callable) -> np.ndarray:
        """Concatenates a function's results on images, original sizes and ids of all batches."""
        store, strategy = self._store, self._strategy
        batch = self._replica_batch * strategy.num_replicas_in_sync

        def make(start: int) -> list:
            # The last batch is padded with the split's last image, so that every shape is the same.
            ids = np.minimum(np.arange(start, start + batch), len(store) - 1).astype(np.int32)

            def share(context: tf.distribute.ValueContext, source: np.ndarray) -> tf.Tensor:
                first = context.replica_id_in_sync_group * self._replica_batch
                return tf.constant(source[first : first + self._replica_batch])

            distribute = strategy.experimental_distribute_values_from_function
            return [distribute(lambda c, s=source: share(c, s)) for source in (store.take(ids), store.sizes[ids], ids)]

        parts = []
        for values in prefetched(make, range(0, len(store), batch)):
            local = strategy.experimental_local_results(run(*values))
            parts.append(np.concatenate([value.numpy() for value in local]))
        return np.concatenate(parts)[: len(store)]
