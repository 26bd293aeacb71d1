"""The best constant answer: its figures, how students are compared with it, and that it is computed
alike in every process of a run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import RecordingConsole, build_job

from trainer.core.config import Config
from trainer.run import baseline, build, loop
from trainer.run.evaluator import EvalResult, Evaluator, describe, describe_verdict


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def teacher_logits(seed: int, images: int, classes: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (images, classes)).astype(np.float32)


def test_figures_agree_with_their_definitions() -> None:
    train, teacher = teacher_logits(0, 300) + np.arange(6), teacher_logits(1, 50)
    mean = softmax(train).mean(0)
    result = EvalResult(np.full(50, -1), teacher, teacher, baseline.of_teacher(train))
    p, commonest = softmax(teacher), np.bincount(softmax(train).argmax(1)).argmax()
    metrics = result.metrics()
    assert metrics["constant_kl"] == pytest.approx((p * np.log(p / mean)).sum(1).mean(), rel=1e-5)
    assert metrics["constant_agreement"] == pytest.approx((p.argmax(1) == commonest).mean())
    labels = np.array([2, 2, 1, -1, -1, -1])
    constant = baseline.of_labels(labels)
    assert (constant.top1, constant.images) == (2, 3)
    measured = EvalResult(np.array([2, 1, 2, -1]), np.zeros((4, 3), np.float32), None, constant).metrics()
    assert measured["constant_top1"] == pytest.approx(2 / 3)
    assert "constant_kl" not in measured


def test_no_constant_has_a_lower_kl_on_its_own_images() -> None:
    logits = teacher_logits(2, 400)
    constant = baseline.of_teacher(logits)
    assert constant.logits is not None
    kl = EvalResult(np.full(400, -1), logits, logits, constant).metrics()["constant_kl"]
    for change in np.random.default_rng(0).normal(0, 0.1, (20, 6)).astype(np.float32):
        other = baseline.Constant(constant.logits + change, 0, 400)
        assert EvalResult(np.full(400, -1), logits, logits, other).metrics()["constant_kl"] > kl


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[1e4, 0, -1e4], [1e4, 0, -1e4]], np.float32)
    constant = baseline.of_teacher(logits)
    assert np.isfinite(constant.logits).all()
    metrics = EvalResult(np.array([0, 0]), logits, logits, constant).metrics()
    assert metrics["constant_kl"] == pytest.approx(0.0, abs=1e-6)


def compared(student: np.ndarray, teacher: np.ndarray) -> tuple[str, ...]:
    constant = baseline.of_teacher(teacher_logits(9, 500))
    return EvalResult(np.full(len(teacher), -1), student, teacher, constant).not_better()


def test_only_students_that_look_at_the_image_are_better() -> None:
    teacher = teacher_logits(3, 200)
    mean = baseline.of_teacher(teacher_logits(9, 500)).logits
    noise = np.random.default_rng(4).normal(0, 2, teacher.shape).astype(np.float32)
    both = ("agreement_top1", "kl")
    assert compared(np.zeros_like(teacher), teacher) == both
    assert compared(np.tile(mean, (200, 1)), teacher) == both
    assert compared(noise, teacher) == both
    assert compared(np.full_like(teacher, np.nan), teacher) == both
    assert compared(teacher + noise / 4, teacher) == ()
    assert compared(50 * (teacher + noise / 4), teacher) == ("kl",)  # right, but much too sure


def test_a_student_may_be_better_in_one_figure_only() -> None:
    """It follows the image a little, and never enough for another class than the commonest."""
    teacher, train = (teacher_logits(seed, 200) + np.float32([4, 0, 0, 0, 0, 0]) for seed in (3, 9))
    constant = baseline.of_teacher(train)
    student = constant.logits + 0.1 * (teacher - teacher.mean(0))
    assert EvalResult(np.full(200, -1), student, teacher, constant).not_better() == ("agreement_top1",)


def test_chance_alone_is_not_better() -> None:
    """The agreement of a student that guesses is above the constant's half of the time, and beyond
    chance in one of forty.
    """
    neither = 0
    for seed in range(40):
        teacher = teacher_logits(100 + seed, 60, 2)
        constant = baseline.of_teacher(teacher_logits(7, 500, 2))
        guesses = np.random.default_rng(seed).normal(0, 3, teacher.shape).astype(np.float32)
        result = EvalResult(np.full(60, -1), guesses, teacher, constant)
        neither += result.not_better() == ("agreement_top1", "kl")
    assert neither >= 37


def test_labels_are_compared_with_the_commonest() -> None:
    labels = np.array([0] * 30 + [1] * 10 + [-1] * 5)
    constant = baseline.of_labels(labels)
    always, right = (np.eye(2, dtype=np.float32)[np.maximum(x, 0)] for x in (0 * labels, labels))
    assert EvalResult(labels, always, None, constant).not_better() == ("student_top1",)
    assert EvalResult(labels, right, None, constant).not_better() == ()
    assert EvalResult(np.full(45, -1), right, None, constant).not_better() == ()


def test_words() -> None:
    assert describe_verdict(()) == ""
    assert describe_verdict(("agreement_top1", "kl")) == "the student is no better than a constant"
    assert describe_verdict(("student_top1",)) == "the student is no better than a constant"
    assert describe_verdict(("kl",)) == "the student's KL is no better than a constant's"
    metrics = {"agreement_top1": 0.043, "kl": 5.81, "constant_agreement": 0.041, "constant_kl": 5.6}
    assert describe(metrics) == "agreement 4.3%, KL 5.810 nats (best constant answer: 4.1%, 5.600 nats)"


@pytest.mark.parametrize(
    ("examples", "evaluated", "count"), [(40, 15, 40), (5000, 100, 256), (5000, 900, 900), (10**6, 10**5, 2048)]
)
def test_images_are_evenly_spaced_and_bounded(examples: int, evaluated: int, count: int) -> None:
    ids = baseline.sample(examples, evaluated)
    assert len(ids) == count
    assert ids[0] == 0
    steps = np.diff(ids)
    assert set(steps) <= {examples // count, -(-examples // count)}
    assert ids[-1] >= examples - -(-examples // count)


def test_a_job_computes_it_once_and_alike_in_every_process(make_config: Callable[..., Config]) -> None:
    """A run that is resumed after its last step evaluates only the final split."""
    settings = make_config(eval_batch_size=64)  # so that the splits have batches of their own, 15 and 23
    job, console = build_job(settings), RecordingConsole()
    constant = job.constant(lambda *_: None)
    assert job.constant(lambda *_: None) is constant
    assert constant.images == 40
    whole = Evaluator(settings.resolve(40), job.accelerator.strategy, job.train_store, jit_compile=False)
    logits = whole.run(job.student, job.teachers).teacher_logits
    assert logits is not None
    assert np.allclose(np.exp(constant.logits), softmax(logits).mean(0), atol=1e-4)
    resumed = build_job(settings)
    writer, _ = build.open_run(resumed)
    result = loop.evaluate(resumed, "test", "final", writer, console)
    assert result.constant is not None
    assert result.constant.logits is not None
    assert result.constant.logits.tobytes() == constant.logits.tobytes()
    # An untrained student has a zero head.
    assert result.not_better() == ("agreement_top1", "kl")
    assert console.lines[-1].startswith("step 0, test (23 images): student ")
    assert console.lines[-1].endswith("the student is no better than a constant")
    row = writer.rows[-1]
    assert {name: row[name] for name in ("constant_kl", "constant_agreement")} == {
        name: result.metrics()[name] for name in ("constant_kl", "constant_agreement")
    }
