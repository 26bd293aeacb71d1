"""The distance against SciPy and NumPy, and the step: who changes, who does not, and the same at any replica count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from conftest import IMAGE, strategy
from scipy import special

from trainer import distill, loop
from trainer.accelerator import Accelerator
from trainer.config import Config
from trainer.journal import Screen
from trainer.store import Order


def reference_kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    p = special.log_softmax(teacher.astype(np.float64) / temperature, axis=1)
    q = special.log_softmax(student.astype(np.float64) / temperature, axis=1)
    return (
        temperature**2 * special.rel_entr(np.exp(p), np.exp(q)).sum(1)
        if np.exp(q).min() > 0
        else temperature**2 * (np.exp(p) * (p - q)).sum(1)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0, 10.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
def test_kl_is_scipys(temperature: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    t, s = (rng.normal(0, scale, (6, 9)).astype(np.float32) for _ in range(2))
    found = distill.kl(tf.constant(t), tf.constant(s), temperature).numpy()
    assert np.allclose(found, reference_kl(t, s, temperature), rtol=2e-4, atol=2e-6 * temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_gradient_of_kl_is_the_formula(temperature: float) -> None:
    """d/ds T^2 KL(p_t || p_s) = T (softmax(s / T) - softmax(t / T)), at logits where clipped forms have none."""
    t = np.array([[0.0, 50.0, -50.0], [1.0, 2.0, 3.0]], np.float32)
    s = tf.Variable([[80.0, -80.0, 0.0], [3.0, 2.0, 1.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(distill.kl(tf.constant(t), s, temperature))
    expected = temperature * (special.softmax(s.numpy() / temperature, 1) - special.softmax(t / temperature, 1))
    assert np.allclose(tape.gradient(loss, s), expected, atol=1e-5)
    assert np.abs(expected[0]).max() > 0.9


def test_kl_of_itself_is_zero_and_of_bfloat16_is_float32() -> None:
    t = tf.random.stateless_normal([4, 5], [1, 2])
    assert np.abs(distill.kl(t, t).numpy()).max() < 1e-6
    assert distill.kl(tf.cast(t, tf.bfloat16), tf.cast(t, tf.bfloat16)).dtype == tf.float32


def build(config: Config, replicas: int = 1) -> loop.Job:
    return loop.build(config, Accelerator(strategy(replicas), "CPU", 10), Screen())


def weights(model: object) -> list[np.ndarray]:
    return [w.copy() for w in model.get_weights()]  # type: ignore[attr-defined]


def test_the_student_learns_and_the_teacher_does_not(make_config: Callable[..., Config]) -> None:
    job = build(make_config(steps=40, warmup_steps=4))
    order = Order(0, len(job.train), 8)
    student, teacher = weights(job.student), weights(job.teachers[0].model)
    first = job.advance(2, order)
    for _ in range(18):
        job.advance(2, order)
    last = job.advance(2, order)
    assert last["kl"] < 0.7 * first["kl"]
    assert all((a == b).all() for a, b in zip(teacher, weights(job.teachers[0].model), strict=True))
    assert all((a != b).any() for a, b in zip(student, weights(job.student), strict=True))


def test_loss_is_the_mean_over_the_global_batch(make_config: Callable[..., Config]) -> None:
    """Against the definition, from the views themselves."""
    from trainer import views
    from trainer.models.teachers import mean_logits

    job = build(make_config(temperature=3.0))
    ids = Order(0, len(job.train), 8).batches(0, 1)[0]
    rows = views.Rows.of(0, 1, 8)
    chosen = ids[rows.numbers.numpy()]
    (view,), _ = views.training_views(
        tf.constant(job.train.images[chosen]),
        tf.constant(job.train.sizes[chosen]),
        rows,
        0,
        tf.constant(0),
        (IMAGE,),
        mixup=True,
    )
    teacher = mean_logits(job.teachers, {IMAGE: view}).numpy()
    student = np.asarray(job.student(view, training=True))
    metrics = job.advance(1, Order(0, len(job.train), 8))
    assert metrics["loss"] == pytest.approx(reference_kl(teacher, student, 3.0).mean(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(reference_kl(teacher, student, 1.0).mean(), rel=1e-5)
    assert metrics["agreement"] == pytest.approx((teacher.argmax(1) == student.argmax(1)).mean())


@pytest.mark.parametrize("changes", [{}, {"distance": "labels", "teacher": ()}])
def test_one_two_and_four_replicas_give_the_same_weights(make_config: Callable[..., Config], changes: dict) -> None:
    """All-reduce, then clip: a clip on each replica would differ at once, and so would a loss over a replica's share."""
    # SGD-like sensitivity: the clip binds (norms above 0.05) and Adam's epsilon does not hide the gradient's size.
    config = make_config(clip_norm=0.05, steps=6, warmup_steps=0, **changes)
    found = {}
    for replicas in (1, 2, 4):
        job = build(config, replicas)
        start = weights(job.student)
        metrics = job.advance(6, Order(0, len(job.train), 8))
        assert metrics["grad_norm"] > 0.05
        found[replicas] = (metrics, weights(job.student))
    for replicas in (2, 4):
        for name, value in found[1][0].items():
            assert found[replicas][0][name] == pytest.approx(value, rel=2e-3), name
        # Adam turns rounding of a gradient near zero into a whole step of that one weight, so the update is compared as one.
        moved = np.concatenate([(w - s).ravel() for w, s in zip(found[1][1], start, strict=True)])
        apart = np.concatenate([(w - m).ravel() for w, m in zip(found[1][1], found[replicas][1], strict=True)])
        assert np.linalg.norm(apart) < 0.03 * np.linalg.norm(moved)


def test_labels_are_mixed_as_the_pictures_are(make_config: Callable[..., Config]) -> None:
    from trainer import views

    job = build(make_config(distance="labels", teacher=()))
    ids = Order(0, len(job.train), 8).batches(0, 1)[0]
    labels = job.train.labels[ids]
    own = float(views.uniform(0, tf.constant(0), tf.constant([2**31 - 1]), 1)[0, 0])
    truth = np.eye(5)[labels] * own + np.eye(5)[np.roll(labels, 1)] * (1 - own)
    # A head of zeros says the same of all classes: log 5 whatever the target; a bias tells the target.
    bias = np.array([0.5, -1.0, 2.0, 0.0, 1.0], np.float32)
    head = job.student.get_layer("head")
    head.set_weights([head.get_weights()[0], bias])
    expected = -(truth * special.log_softmax(bias)).sum(1).mean()
    assert job.advance(1, Order(0, len(job.train), 8))["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_whole_step_compiles_with_xla_and_gives_the_same(
    make_config: Callable[..., Config],
) -> None:
    """A TPU runs nothing else: static shapes, no host callback, no string or image-decoding operation in the step."""
    found = []
    for flag in ("off", "on"):
        job = build(make_config(jit_compile=flag, warmup_steps=0))
        found.append(job.advance(2, Order(0, len(job.train), 8)))
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("student", ["mobilenetv3-small", "resnet50v2"])
def test_batch_norm_students_compile_with_xla(make_config: Callable[..., Config], student: str) -> None:
    job = build(make_config(student=student, image_size=32, teacher_image_size=(IMAGE,), jit_compile="on"))
    assert np.isfinite(list(job.advance(2, Order(0, len(job.train), 8)).values())).all()


def test_batch_norm_and_ensembles_and_sizes_train(make_config: Callable[..., Config], teacher_file: str) -> None:
    job = build(
        make_config(
            student="mobilenetv3-small",
            image_size=32,
            teacher=(f"keras:{teacher_file}", "random:bit-tiny"),
            teacher_image_size=(IMAGE, 16),
            precision="mixed_bfloat16",
        )
    )
    moving = [v.numpy().copy() for v in job.student.non_trainable_variables]
    metrics = job.advance(2, Order(0, len(job.train), 8))
    assert np.isfinite(list(metrics.values())).all()
    assert any((a != v.numpy()).any() for a, v in zip(moving, job.student.non_trainable_variables, strict=True))
