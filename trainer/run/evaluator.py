"""Evaluation of student and teachers: every example of a split once, on the central crop.

A teacher that was trained on other views, such as whole images, is measured on those too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.data.store import ImageStore, prefetched
from trainer.method import distances, views
from trainer.models import value_range
from trainer.models.teachers import Teacher, ensemble, teacher_logits
from trainer.run import baseline
from trainer.run.baseline import Constant

# The constant answer's metric beside each of the student's.
_CONSTANT = {"student_top1": "constant_top1", "agreement_top1": "constant_agreement", "kl": "constant_kl"}


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Logits on a whole split.

    Attributes:
        labels: int32 [n], -1 where there is none.
        student_logits: float32 [n, classes].
        teacher_logits: float32 [n, classes], of the ensemble of teachers; None without teacher.
        constant: the best answer that ignores the image, to compare with; None: not compared.
        own_view_logits: float32 [n, classes], `teacher_logits` on the views that the teachers were
            trained on; None if those are the central crops.
    """

    labels: np.ndarray
    student_logits: np.ndarray
    teacher_logits: np.ndarray | None
    constant: Constant | None = None
    own_view_logits: np.ndarray | None = None

    @functools.cached_property
    def labelled(self) -> int:
        """Number of examples with a label."""
        return int((self.labels >= 0).sum())

    def metrics(self) -> dict[str, float]:
        """student_top1, student_top5, teacher_top1, teacher_top5, agreement_top1 (0..1) and kl.

        kl is in nats at T = 1. Accuracies are over labelled examples, and missing if there are
        none. Metrics of the teacher are missing without a teacher. teacher_own_view_top1 is there
        if the teacher's own views are others; all else compares the models on the same view. Of the
        constant answer:
        constant_agreement and constant_kl, or, without a teacher, constant_top1.
        """
        metrics: dict[str, float] = {}
        student, teacher = self.student_logits, self.teacher_logits
        labelled = self.labels >= 0
        for name, logits in (("student", student), ("teacher", teacher)):
            if logits is not None and labelled.any():
                metrics[f"{name}_top1"] = top_k(logits[labelled], self.labels[labelled], 1)
                metrics[f"{name}_top5"] = top_k(logits[labelled], self.labels[labelled], 5)
        if self.own_view_logits is not None and labelled.any():
            metrics["teacher_own_view_top1"] = top_k(self.own_view_logits[labelled], self.labels[labelled], 1)
        if teacher is not None:
            # The largest of values with a NaN is the first NaN: an answer that was not given.
            finite = np.isfinite(teacher).all(axis=1) & np.isfinite(student).all(axis=1)
            metrics["agreement_top1"] = float(((teacher.argmax(1) == student.argmax(1)) & finite).mean())
            metrics["kl"] = float(distances.kl(teacher, student).numpy().mean(dtype=np.float64))
        for name, (_, constant) in self._losses.items():
            mean = float(constant.mean(dtype=np.float64))
            metrics[_CONSTANT[name]] = mean if name == "kl" else 1.0 - mean
        return metrics

    def not_better(self) -> tuple[str, ...]:
        """The metrics in which the student is no better than the constant answer.

        Returns:
            Of "student_top1" without a teacher, and else of "agreement_top1" and "kl": all of them
            if in none the student is better beyond chance (95 %, paired by image); otherwise those
            in which its mean is not better. Empty if there is nothing to compare with.
        """
        if not any(baseline.is_better(student, constant) for student, constant in self._losses.values()):
            return tuple(self._losses)
        return tuple(name for name, (student, constant) in self._losses.items() if not student.mean() < constant.mean())

    @functools.cached_property
    def _losses(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each metric that the constant has: the student's and the constant's loss by image."""
        student, teacher, constant = self.student_logits, self.teacher_logits, self.constant
        if constant is None:
            return {}
        if teacher is None or constant.logits is None:
            rows = self.labels >= 0
            labels, answers = self.labels[rows], student[rows].argmax(1)
            return {"student_top1": (answers != labels, labels != constant.top1)} if rows.any() else {}
        top1 = teacher.argmax(1)
        return {
            "agreement_top1": (student.argmax(1) != top1, top1 != constant.top1),
            "kl": (distances.kl(teacher, student).numpy(), distances.kl(teacher, constant.logits[None]).numpy()),
        }


def describe(metrics: dict[str, Any]) -> str:
    """The figures of an evaluation in one line; those that are missing are left out.

    Args:
        metrics: of `EvalResult.metrics`; more keys are ignored.
    """
    names = {"student_top1": "student", "teacher_top1": "teacher", "agreement_top1": "agreement"}
    parts = [f"{word} {100 * metrics[name]:.1f}%" for name, word in names.items() if name in metrics]
    if "teacher_own_view_top1" in metrics and "teacher_top1" in metrics:
        at = list(names).index("teacher_top1")
        parts[at] += f" ({100 * metrics['teacher_own_view_top1']:.1f}% on its own view)"
    if "kl" in metrics:
        parts.append(f"KL {metrics['kl']:.3f} nats")
    text = ", ".join(parts)
    constant = [f"{100 * metrics[name]:.1f}%" for name in ("constant_top1", "constant_agreement") if name in metrics]
    if "constant_kl" in metrics:
        constant.append(f"{metrics['constant_kl']:.3f} nats")
    return f"{text} (best constant answer: {', '.join(constant)})" if constant else text


def describe_verdict(not_better: Collection[str]) -> str:
    """What `EvalResult.not_better` means, as a clause; empty if the student is better."""
    if not not_better:
        return ""
    if "kl" in not_better and "agreement_top1" not in not_better:
        return "the student's KL is no better than a constant's"
    if "agreement_top1" in not_better and "kl" not in not_better:
        return "the student's agreement is no better than a constant's"
    return "the student is no better than a constant"


def describe_split(split: str, labels: np.ndarray) -> str:
    """Name and number of images of a split, and how many have labels: int [n], -1 is none."""
    labelled = int((labels >= 0).sum())
    how_many = "" if labelled == len(labels) else f", {labelled:,} with labels" if labelled else " without labels"
    return f"{split} ({len(labels):,} images{how_many})"


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


def _key(teachers: tuple[Teacher, ...], kinds: tuple[str, ...]) -> tuple:
    """What decides the logits of teachers on a split."""
    kinds = kinds or ("central",) * len(teachers)
    return tuple(
        (id(t.model), t.value_range, t.probabilities, t.sigmoid, kind) for t, kind in zip(teachers, kinds, strict=True)
    )


class _Traced:
    """A teacher's model as one function of TensorFlow."""

    def __init__(self, model: Any) -> None:
        self.output_shape = model.output_shape
        self._model = model  # keeps it, and so its id, alive
        self._call = tf.function(lambda images: model(images, training=False), autograph=False)

    def __call__(self, images: tf.Tensor, *, training: bool = False) -> tf.Tensor:
        del training
        return self._call(images)


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
        self._teacher_logits: dict[tuple, np.ndarray] = {}
        self._teachers: dict[tuple, Callable] = {}
        self._traced: dict[int, _Traced] = {}
        self._student: Callable[[np.ndarray, np.ndarray], tf.Tensor] | None = None
        self._model: keras.Model | None = None

    @property
    def labels(self) -> np.ndarray:
        """int32 [n], -1 where there is none."""
        return self._store.labels

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
        assert self._student is not None
        central = own = None
        if teachers:
            central = self.teacher_logits(teachers)
            if any(teacher.view != "central" for teacher in teachers):
                own = self.teacher_logits(teachers, tuple(teacher.view for teacher in teachers))
        logits = self._run_over_split(self._student)
        return EvalResult(self._store.labels, logits, central, own_view_logits=own)

    def teacher_logits(
        self,
        teachers: tuple[Teacher, ...],
        kinds: tuple[str, ...] = (),
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> np.ndarray:
        """Logits of the ensemble of teachers on every example, computed once for each set of views.

        Args:
            teachers: at least one.
            kinds: of each teacher's views, of `views.TEACHER_VIEWS`; empty: central crops.
            progress: called with the number of images done and in all.

        Returns:
            float32 [n, classes].
        """
        key = _key(teachers, kinds)
        if key not in self._teacher_logits:
            run = self._compiled_teacher(teachers, kinds)
            self._teacher_logits[key] = self._run_over_split(run, progress=progress)
        return self._teacher_logits[key]

    def logits_elsewhere(
        self,
        teachers: tuple[Teacher, ...],
        store: ImageStore,
        ids: np.ndarray,
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        """The teachers' logits on the central crop of images of another split.

        Args:
            teachers: those of `run`, whose compiled function is used.
            store: the other split.
            ids: int32 [n], examples of `store`.
            progress: called with the number of images done and in all.

        Returns:
            float32 [n, classes], of the ensemble.
        """
        return self._run_over_split(self._compiled_teacher(teachers), store, ids, progress)

    def _compiled_teacher(self, teachers: tuple[Teacher, ...], kinds: tuple[str, ...] = ()) -> Callable:
        key, kinds = _key(teachers, kinds), kinds or ("central",) * len(teachers)
        if key not in self._teachers:
            traced = list(teachers)
            if self._strategy.num_replicas_in_sync == 1:
                # One trace of a model serves all its ranges and views. With several replicas the
                # trace of one would read its variables for all, on devices that are not theirs.
                traced = [
                    dataclasses.replace(t, model=self._traced.setdefault(id(t.model), _Traced(t.model)))
                    for t in teachers
                ]
            wanted = {(teacher.size, kind) for teacher, kind in zip(teachers, kinds, strict=True)}

            def forward(images: tf.Tensor, originals: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
                del ids  # the view does not depend on the example
                inputs = {
                    (size, kind): views.evaluation_view(self._config, images, originals, size, kind)
                    for size, kind in sorted(wanted)
                }
                logits = [t.logits(inputs[t.size, kind]) for t, kind in zip(traced, kinds, strict=True)]
                return ensemble(logits, self._config.ensemble)

            self._teachers[key] = self._distributed(forward)
        return self._teachers[key]

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

        # A plain function: a compiled one given to `run` would be one program for all replicas,
        # whose variables are on several devices.
        @tf.autograph.experimental.do_not_convert
        def on_replica(*values: tf.Tensor) -> tf.Tensor:
            return compiled(*values)

        def run(*values: tf.distribute.DistributedValues) -> tf.Tensor | tf.distribute.DistributedValues:
            outputs = strategy.run(on_replica, values)
            several_machines = len(strategy.experimental_local_results(outputs)) < strategy.num_replicas_in_sync
            return strategy.gather(outputs, axis=0) if several_machines else outputs

        return tf.function(run, autograph=False)

    def _run_over_split(
        self,
        run: Callable,
        store: ImageStore | None = None,
        examples: np.ndarray | None = None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> np.ndarray:
        """Concatenates a function's results on images, original sizes and ids of all batches.

        By default of all examples of the evaluator's split.
        """
        strategy = self._strategy
        store = self._store if store is None else store
        examples = np.arange(len(store), dtype=np.int32) if examples is None else examples
        batch = self._replica_batch * strategy.num_replicas_in_sync

        def make(start: int) -> list:
            # The last batch is padded with the last image, so that every shape is the same.
            ids = examples[np.minimum(np.arange(start, start + batch), len(examples) - 1)]

            def share(context: tf.distribute.ValueContext, source: np.ndarray) -> tf.Tensor:
                first = context.replica_id_in_sync_group * self._replica_batch
                return tf.constant(source[first : first + self._replica_batch])

            distribute = strategy.experimental_distribute_values_from_function
            return [distribute(lambda c, s=source: share(c, s)) for source in (store.take(ids), store.sizes[ids], ids)]

        parts = []
        for number, values in enumerate(prefetched(make, range(0, len(examples), batch)), 1):
            local = strategy.experimental_local_results(run(*values))
            parts.append(np.concatenate([value.numpy() for value in local]))
            progress(min(number * batch, len(examples)), len(examples))
        return np.concatenate(parts)[: len(examples)]
