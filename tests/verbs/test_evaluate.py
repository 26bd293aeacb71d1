"""Evaluation counts every example once; the exported model gives the evaluated logits."""

from __future__ import annotations

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, SIDE, opinionated, strategy

from trainer.core.config import Config
from trainer.data.dataset import Dataset
from trainer.data.records import EncodedSplit
from trainer.data.store import MemoryStore
from trainer.models import bit, teachers
from trainer.output import export
from trainer.run import evaluator


@pytest.fixture(scope="module")
def store(data: str) -> MemoryStore:
    dataset = Dataset.load(data)
    return MemoryStore(dataset, dataset.split("test", "final_split"), SIDE, lambda *_: None)


def settings(batch: int, **changes: object) -> Config:
    return Config(image_size=IMAGE, store_size=SIDE, eval_batch_size=batch, **changes)  # type: ignore[arg-type]


def evaluate(store: MemoryStore, teacher_file: str, batch: int, replicas: int) -> evaluator.EvalResult:
    distribution = strategy(replicas)
    with distribution.scope():
        student = opinionated(bit.bit("tiny", CLASSES, IMAGE, seed=2), 5)
        loaded = teachers.load(Config(teacher=(f"keras:{teacher_file}",), steps=1), CLASSES)
    return evaluator.Evaluator(settings(batch), distribution, store, jit_compile=False).run(student, loaded)


@pytest.mark.parametrize(("batch", "replicas"), [(1, 1), (7, 1), (23, 1), (64, 1), (8, 2), (10, 4)])
def test_every_example_is_counted_once(store: MemoryStore, teacher_file: str, batch: int, replicas: int) -> None:
    """The last batch of the 23 examples is full in only two of the cases."""
    result = evaluate(store, teacher_file, batch, replicas)
    expected = evaluate(store, teacher_file, 5, 1)
    for one, other in (
        (result.student_logits, expected.student_logits),
        (result.teacher_logits, expected.teacher_logits),
    ):
        assert one.shape == (23, CLASSES)
        assert np.allclose(one, other, atol=1e-4)
    assert (result.labels == store.labels).all()


def test_metrics_of_a_worked_example() -> None:
    labels = np.array([0, 1, 2, -1])
    student = np.array([[3, 2, 1], [3, 2, 1], [3, 2, 1], [0, 0, 9]], np.float32)
    teacher = np.array([[3, 2, 1], [0, 5, 1], [1, 2, 0], [9, 0, 0]], np.float32)
    metrics = evaluator.EvalResult(labels, student, teacher).metrics()
    assert metrics["student_top1"] == pytest.approx(1 / 3)
    assert metrics["teacher_top1"] == pytest.approx(2 / 3)
    assert metrics["student_top5"] == 1.0
    assert metrics["agreement_top1"] == pytest.approx(1 / 4)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (teacher.astype(float), student.astype(float)))
    assert metrics["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert "teacher_top1" not in evaluator.EvalResult(labels, student, None).metrics()
    assert "student_top1" not in evaluator.EvalResult(np.full(4, -1), student, None).metrics()


def test_outputs_that_are_not_finite_agree_with_nothing() -> None:
    """The largest of NaNs is the first, which is no answer."""
    teacher = np.array([[1, 0], [0, 1]], np.float32)
    result = evaluator.EvalResult(np.array([0, 1]), np.full((2, 2), np.nan, np.float32), teacher)
    assert result.metrics()["agreement_top1"] == 0.0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_agrees_with_keras_without_ties(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 9)).astype(np.float32), rng.integers(0, 9, 200)
    expected = keras.ops.convert_to_numpy(keras.metrics.sparse_top_k_categorical_accuracy(labels, logits, k)).mean()
    assert evaluator.top_k(logits, labels, k) == pytest.approx(expected)


def test_tied_logits_are_not_correct() -> None:
    labels = np.array([0, 1])
    assert evaluator.top_k(np.zeros((2, 3), np.float32), labels, 1) == 0.0
    assert evaluator.top_k(np.full((2, 3), np.nan, np.float32), labels, 1) == 0.0


def test_teacher_logits_are_computed_once(store: MemoryStore, teacher_file: str) -> None:
    calls = []

    class Counting(teachers.Teacher):
        def logits(self, views: tf.Tensor) -> tf.Tensor:
            calls.append(1)
            return super().logits(views)

    (loaded,) = teachers.load(Config(teacher=(f"keras:{teacher_file}",), steps=1), CLASSES)
    counting = Counting(loaded.name, loaded.model, loaded.size, loaded.value_range, loaded.probabilities)
    student = bit.bit("tiny", CLASSES, IMAGE)
    evaluating = evaluator.Evaluator(settings(10), strategy(1), store, jit_compile=False)
    with strategy(1).scope():
        student = bit.bit("tiny", CLASSES, IMAGE)
    first, second = evaluating.run(student, (counting,)), evaluating.run(student, (counting,))
    assert len(calls) == 1
    assert first.teacher_logits is second.teacher_logits


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("float32", {}),
        ("mixed_bfloat16", {}),
        ("float32", {"student_range": "0,255", "central_fraction": 0.5}),
        ("float32", {"student_range": "0,1", "compat": ("keras_example",)}),
    ],
)
def test_exported_model_gives_the_evaluated_logits(
    store: MemoryStore, data: str, tmp_path: pathlib.Path, precision: str, changes: dict
) -> None:
    """A reloaded SavedModel, for encoded images and tensors, against the evaluator's logits."""
    config = settings(23, **changes)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        with strategy(1).scope():
            student = opinionated(bit.bit("tiny", CLASSES, IMAGE, seed=2), 5)
    finally:
        keras.config.set_dtype_policy(policy)
    measured = evaluator.Evaluator(config, strategy(1), store, jit_compile=False).run(student, ()).student_logits
    # In bfloat16 training precision the exported float32 model is the more exact of the two.
    near = 1e-4 if precision == "float32" else 0.2
    dataset = Dataset.load(data)
    export.write(str(tmp_path), student, dataset.classes, config, {"student": "bit-tiny"})
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    encoded = EncodedSplit(dataset, dataset.splits["test"])
    images = [encoded.record(i).encoded for i in range(23)]
    served = loaded.signatures["serving_default"](image_bytes=tf.constant(images))
    assert np.abs(served["logits"].numpy() - measured).max() < near
    assert np.allclose(served["probabilities"].numpy().sum(1), 1, atol=1e-5)
    best = served["logits"].numpy().argmax(1)
    assert [name.decode() for name in served["top_classes"].numpy()[:, 0]] == [dataset.classes[c] for c in best]
    for i in (0, 7):
        image = tf.io.decode_image(images[i], channels=3)[None]
        one = loaded.signatures["images"](images=image)["logits"].numpy()[0]
        assert np.abs(one - measured[i]).max() < near
    assert json.loads((tmp_path / "classes.json").read_text()) == list(dataset.classes)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "bit-tiny" in card
    assert f"in [{config.student_range.replace(',', ', ')}]" in card
