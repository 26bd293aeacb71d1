"""How good the student is and how close to its teacher: every example of a split exactly once, on the central crop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

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
        student: float32 [n, classes].
        teacher: float32 [n, classes], or None without teacher.
    """

    labels: np.ndarray
    student: np.ndarray
    teacher: np.ndarray | None

    def metrics(self) -> dict[str, float]:
        """student_top1, student_top5, teacher_top1, teacher_top5, agreement_top1 (all 0..1) and kl (nats, T = 1).

        Accuracies are over labelled examples and absent if there are none; what needs a teacher is absent without one.
        """
        found: dict[str, float] = {}
        labelled = self.labels >= 0
        for name, logits in (("student", self.student), ("teacher", self.teacher)):
            if logits is not None and labelled.any():
                found[f"{name}_top1"] = top_k(logits[labelled], self.labels[labelled], 1)
                found[f"{name}_top5"] = top_k(logits[labelled], self.labels[labelled], 5)
        if self.teacher is not None:
            found["agreement_top1"] = float((self.teacher.argmax(1) == self.student.argmax(1)).mean())
            found["kl"] = float(distances.kl(self.teacher, self.student).numpy().mean(dtype=np.float64))
        return found


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share (0..1) of rows whose label is among the k largest logits; ties count against the label."""
    own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    # Anything that is not a finite number is no correct answer.
    rank = (logits >= own).sum(axis=1)
    return float((np.isfinite(logits).all(axis=1) & (rank <= k)).mean())


def per_class(logits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """For each class with examples: `top1` (0..1, ties against the label) and `images`, their number."""
    found = {}
    for number, name in enumerate(names):
        own = labels == number
        if own.any():
            found[name] = {"top1": top_k(logits[own], labels[own], 1), "images": int(own.sum())}
    return found


class Evaluator:
    """Runs models over one split. A frozen teacher sees the same views each time, so its logits are computed once."""

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
        self._share = -(-min(config.eval_batch_size, max(1, len(store))) // replicas)
        self._teacher: np.ndarray | None = None
        self._student: Callable[[np.ndarray, np.ndarray], tf.Tensor] | None = None
        self._model: keras.Model | None = None

    def run(self, student: keras.Model, teachers: tuple[Teacher, ...]) -> EvalResult:
        """Logits of both on the central crop of every example. The teachers must be the same at each call."""
        if self._model is not student:
            self._model = student
            self._student = self._compile(
                {self._config.image_size},
                lambda made: student(
                    value_range.to_range(made[self._config.image_size], self._config.student_range), training=False
                ),
            )
        if teachers and self._teacher is None:
            how = self._config.ensemble
            self._teacher = self._over_all(
                self._compile({t.size for t in teachers}, lambda made: ensemble(teacher_logits(teachers, made), how))
            )
        assert self._student is not None
        return EvalResult(self._store.labels, self._over_all(self._student), self._teacher)

    def fixed_logits(self, teachers: tuple[Teacher, ...]) -> Callable[[int], np.ndarray]:
        """What the teachers say of the fixed views (`--views=fix/...`).

        Returns:
            A function of the crop's number (0 where there is but one) to float32 [examples, teachers, classes].
        """
        config = self._config

        def forward(images: tf.Tensor, originals: tf.Tensor, ids: tf.Tensor, crop: tf.Tensor) -> tf.Tensor:
            made = {t.size: views.fixed_view(config, images, originals, ids, crop, t.size) for t in teachers}
            return tf.stack(teacher_logits(teachers, made), axis=1)

        run = self._distributed(forward)

        def logits(crop: int) -> np.ndarray:
            number = tf.constant(crop)
            return self._over_all(lambda *batch: run(*batch, number))

        return logits

    def _compile(self, sizes: set[int], model: Callable[[dict[int, tf.Tensor]], tf.Tensor]) -> Callable:
        def forward(images: tf.Tensor, originals: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
            del ids  # the central crop is the same whichever example it is
            made = {size: views.evaluation_view(self._config, images, originals, size) for size in sizes}
            return tf.cast(model(made), tf.float32)

        return self._distributed(forward)

    def _distributed(self, forward: Callable) -> Callable:
        compiled = tf.function(forward, jit_compile=self._jit, autograph=False)
        strategy = self._strategy

        def run(*values: tf.distribute.DistributedValues) -> Any:
            made = strategy.run(compiled, values)
            elsewhere = len(strategy.experimental_local_results(made)) < strategy.num_replicas_in_sync
            return strategy.gather(made, axis=0) if elsewhere else made  # rows of other machines come here

        return tf.function(run, autograph=False)

    def _over_all(self, run: Callable) -> np.ndarray:
        """Concatenates what `run` gives for images, original sizes and ids of each batch."""
        store, strategy = self._store, self._strategy
        batch = self._share * strategy.num_replicas_in_sync

        def make(start: int) -> list:
            # The last batch is filled up with the split's last image, so that every shape is the same; the filling is cut off.
            ids = np.minimum(np.arange(start, start + batch), len(store) - 1).astype(np.int32)

            def share(context: tf.distribute.ValueContext, source: np.ndarray) -> tf.Tensor:
                first = context.replica_id_in_sync_group * self._share
                return tf.constant(source[first : first + self._share])

            distribute = strategy.experimental_distribute_values_from_function
            return [distribute(lambda c, s=source: share(c, s)) for source in (store.take(ids), store.sizes[ids], ids)]

        parts = []
        for values in prefetched(make, range(0, len(store), batch)):
            local = strategy.experimental_local_results(run(*values))
            parts.append(np.concatenate([value.numpy() for value in local]))
        return np.concatenate(parts)[: len(store)]
