"""The distance against SciPy and NumPy, and the step: who changes, who does not, and the same at any replica count."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
from collections.abc import Callable

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from conftest import CLASSES, IMAGE, build_job, opinionated
from samples import first_batch
from scipy import special

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError, Stopped
from trainer.data.order import ExampleSampler
from trainer.method import distances, keras_example, views
from trainer.models import bit, teachers
from trainer.run import build, evaluator, loop


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0, 10.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0, 10_000.0])
def test_kl_is_scipys(temperature: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    t, s = (rng.normal(0, scale, (6, 9)).astype(np.float32) for _ in range(2))
    found = distances.kl(tf.constant(t), tf.constant(s), temperature).numpy()
    assert np.allclose(found, reference.kl(t, s, temperature), rtol=2e-4, atol=2e-6 * temperature**2)
    if scale <= 1:
        p, q = (special.softmax(z.astype(np.float64) / temperature, axis=1) for z in (t, s))
        assert np.allclose(found, temperature**2 * special.rel_entr(p, q).sum(1), rtol=2e-4, atol=2e-6 * temperature**2)


def gradient(function: Callable, teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(function(tf.constant(teacher), variable))
    return tape.gradient(loss, variable).numpy()


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 10_000.0])
def test_other_distances_are_their_formulas(scale: float) -> None:
    """Values and gradients, at extreme logits too."""
    rng = np.random.default_rng(1)
    t, s = (rng.normal(0, scale, (6, 9)).astype(np.float32) for _ in range(2))
    for smoothing in (0.0, 0.1):
        found = distances.hard(tf.constant(t), tf.constant(s), smoothing).numpy()
        assert np.allclose(found, reference.hard(t, s, smoothing), rtol=1e-5, atol=1e-5)
        target = np.where(np.eye(9)[t.argmax(1)] > 0, 1 - smoothing, smoothing / 8)
        found = gradient(lambda a, b, e=smoothing: distances.hard(a, b, e), t, s)
        assert np.allclose(found, special.softmax(s.astype(np.float64), 1) - target, atol=1e-5)
    assert np.allclose(distances.l2(t, s).numpy(), reference.l2(t, s), rtol=1e-5)
    assert np.allclose(gradient(distances.l2, t, s), 2 * (s - t), rtol=1e-5)
    assert np.allclose(distances.euclidean(t, s).numpy(), np.sqrt(reference.l2(t, s)), rtol=1e-5)
    expected = (s - t) / np.sqrt(reference.l2(t, s))[:, None]
    assert np.allclose(gradient(distances.euclidean, t, s), expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(gradient(distances.euclidean, t, t)).all()


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_compat_distance_is_keras_kl_divergence(temperature: float) -> None:
    rng = np.random.default_rng(2)
    t, s = (rng.normal(0, 20, (6, 9)).astype(np.float32) for _ in range(2))
    found = keras_example.clipped_kl(tf.constant(t), tf.constant(s), temperature).numpy()
    assert np.allclose(found, reference.example_kl(t, s, temperature), rtol=1e-4, atol=1e-6)
    softmaxes = (tf.nn.softmax(z / temperature, axis=1) for z in (t, s))
    assert np.mean(found) == pytest.approx(float(keras.losses.KLDivergence()(*softmaxes)), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_gradient_of_kl_is_the_formula(temperature: float) -> None:
    """d/ds T^2 KL(p_t || p_s) = T (softmax(s / T) - softmax(t / T)), at logits where clipped forms have none."""
    t = np.array([[0.0, 50.0, -50.0], [1.0, 2.0, 3.0]], np.float32)
    s = tf.Variable([[80.0, -80.0, 0.0], [3.0, 2.0, 1.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(distances.kl(tf.constant(t), s, temperature))
    expected = temperature * (special.softmax(s.numpy() / temperature, 1) - special.softmax(t / temperature, 1))
    assert np.allclose(tape.gradient(loss, s), expected, atol=1e-5)
    assert np.abs(expected[0]).max() > 0.9


def test_kl_of_itself_is_zero_and_of_bfloat16_is_float32() -> None:
    t = tf.random.stateless_normal([4, 5], [1, 2])
    assert np.abs(distances.kl(t, t).numpy()).max() < 1e-6
    assert distances.kl(tf.cast(t, tf.bfloat16), tf.cast(t, tf.bfloat16)).dtype == tf.float32


def weights(model: object) -> list[np.ndarray]:
    return [w.copy() for w in model.get_weights()]  # type: ignore[attr-defined]


def test_the_student_learns_and_the_teacher_does_not(make_config: Callable[..., Config]) -> None:
    job = build_job(make_config(steps=40, warmup_steps=4))
    order = ExampleSampler(0, len(job.train), 8)
    student, teacher = weights(job.student), weights(job.teachers[0].model)
    first = job.advance(2, order)
    for _ in range(18):
        job.advance(2, order)
    last = job.advance(2, order)
    assert last["kl"] < 0.7 * first["kl"]
    assert all((a == b).all() for a, b in zip(teacher, weights(job.teachers[0].model), strict=True))
    assert all((a != b).any() for a, b in zip(student, weights(job.student), strict=True))


DISTANCES = {
    "kl": lambda t, s: reference.kl(t, s, 3.0),
    "hard": lambda t, s: reference.hard(t, s, 0.1),
    "l2": reference.l2,
    "euclidean": lambda t, s: np.sqrt(reference.l2(t, s)),
    "compat distance": lambda t, s: reference.example_kl(t, s, 3.0),
    "compat t2": lambda t, s: reference.kl(t, s, 3.0) / 9.0,
}


@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_is_the_mean_over_the_global_batch(make_config: Callable[..., Config], distance: str) -> None:
    """Against the definition, from the views themselves."""
    kind = {"compat": (distance.split()[1],)} if distance.startswith("compat") else {"distance": distance}
    job = build_job(make_config(temperature=3.0, label_smoothing=0.1, **kind))
    opinionated(job.student, 4)
    made = first_batch(job)
    teacher = job.teachers[0].logits(made.teachers[IMAGE]).numpy()
    student = np.asarray(job.student(made.student, training=True))
    metrics = job.advance(1, ExampleSampler(0, len(job.train), 8))
    assert metrics["loss"] == pytest.approx(DISTANCES[distance](teacher, student).mean(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(reference.kl(teacher, student, 1.0).mean(), rel=1e-5)
    assert metrics["agreement"] == pytest.approx((teacher.argmax(1) == student.argmax(1)).mean())


@pytest.mark.parametrize("how", ["mean_logits", "mean_probabilities", "sum_losses"])
def test_loss_of_several_teachers(make_config: Callable[..., Config], teacher_file: str, how: str) -> None:
    """Two teachers that disagree, each with its own size."""
    names = (f"keras:{teacher_file}", "random:bit-tiny")
    job = build_job(make_config(teacher=names, teacher_image_size=(IMAGE, 16), temperature=2.0, ensemble=how))
    opinionated(job.student, 4)
    opinionated(job.teachers[1].model, 5)
    made = first_batch(job)
    one, two = (t.logits(made.teachers[t.size]).numpy().astype(np.float64) for t in job.teachers)
    student = np.asarray(job.student(made.student, training=True))
    mean_p = (special.softmax(one / 2, 1) + special.softmax(two / 2, 1)) / 2
    expected = {
        "mean_logits": reference.kl((one + two) / 2, student, 2.0),
        "mean_probabilities": reference.kl(2 * np.log(mean_p), student, 2.0),
        "sum_losses": reference.kl(one, student, 2.0) + reference.kl(two, student, 2.0),
    }[how]
    assert job.advance(1, ExampleSampler(0, len(job.train), 8))["loss"] == pytest.approx(expected.mean(), rel=1e-5)


def test_sum_of_kls_is_kl_to_the_mean_probabilities_up_to_a_constant() -> None:
    """So their gradients are the same but for the number of teachers."""
    rng = np.random.default_rng(0)
    said = [tf.constant(rng.normal(0, 3, (5, 7)).astype(np.float32)) for _ in range(3)]
    student = tf.Variable(rng.normal(0, 3, (5, 7)).astype(np.float32))
    with tf.GradientTape(persistent=True) as tape:
        summed = tf.add_n([distances.kl(t, student, 4.0) for t in said])
        joint = distances.kl(teachers.ensemble(said, "mean_probabilities", 4.0), student, 4.0)
    assert np.allclose(tape.gradient(summed, student), 3 * tape.gradient(joint, student), atol=1e-5)


@pytest.mark.parametrize("mode", ["fix/rs", "fix/cc", "fix/ic_ens"])
def test_fixed_teachers_are_asked_once(
    make_config: Callable[..., Config], teacher_file: str, tmp_path: pathlib.Path, mode: str
) -> None:
    """The loss is the distance to constants, which are the teacher's mean over the fixed views of each example."""
    opinionated(bit.bit("tiny", CLASSES, 16, seed=5), 8).save(tmp_path / "small.keras")
    names = (f"keras:{teacher_file}", f"keras:{tmp_path}/small.keras")
    job = build_job(
        make_config(views=mode, teacher=names, teacher_image_size=(IMAGE, 16), fixed_crops=5, temperature=2.0)
    )
    opinionated(job.student, 4)
    settings, ids = job.config, np.arange(len(job.train), dtype=np.int32)
    pictures = tf.constant(job.train.images), tf.constant(job.train.sizes), tf.constant(ids)
    for table, teacher in zip(job.targets, job.teachers, strict=True):
        assert np.ptp(table) > 0.1
        crops = range(5 if mode == "fix/ic_ens" else 1)
        said = [teacher.logits(views.fixed_view(settings, *pictures, tf.constant(c), teacher.size)) for c in crops]
        assert np.allclose(table, np.mean(said, axis=0), atol=2e-4)
    chosen = ExampleSampler(0, len(job.train), 8).batches(0, 1)[0]
    target = np.mean([table[chosen] for table in job.targets], axis=0)
    student = np.asarray(job.student(first_batch(job).student, training=True))
    metrics = job.advance(1, ExampleSampler(0, len(job.train), 8))
    assert metrics["loss"] == pytest.approx(reference.kl(target, student, 2.0).mean(), rel=1e-4)


def test_fixed_targets_are_kept_in_the_workdir(make_config: Callable[..., Config], monkeypatch: object) -> None:
    settings = make_config(views="fix/cc")
    first = build_job(settings)
    monkeypatch.setattr(evaluator.Evaluator, "fixed_logits", None)  # type: ignore[attr-defined]
    again = build_job(settings)
    assert (first.targets[0] == again.targets[0]).all()
    with pytest.raises(TypeError):
        build_job(dataclasses.replace(settings, seed=5))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_damaged_targets_are_made_again(make_config: Callable[..., Config], content: bytes) -> None:
    settings = make_config(views="fix/cc")
    first = build_job(settings)
    (kept,) = pathlib.Path(settings.workdir).glob("targets-*")
    kept.write_bytes(content)
    assert (build_job(settings).targets[0] == first.targets[0]).all()
    assert kept.read_bytes() != content


def test_a_signal_among_the_fixed_crops_keeps_their_sum(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    settings = make_config(views="fix/ic_ens", fixed_crops=6)
    real, asked = evaluator.Evaluator.fixed_logits, []

    def counting(self: evaluator.Evaluator, loaded: tuple, signal_at: int = 2) -> Callable[[int], np.ndarray]:
        logits = real(self, loaded)

        def one(crop: int) -> np.ndarray:
            asked.append(crop)
            if len(asked) == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return logits(crop)

        return one

    monkeypatch.setattr(evaluator.Evaluator, "fixed_logits", counting)
    with pytest.raises(Stopped, match="after 2 of 6 crops"):
        build_job(settings)
    stopped = build_job(settings)
    assert asked == [0, 1, 2, 3, 4, 5]
    whole = build_job(dataclasses.replace(settings, workdir=str(tmp_path / "whole")))
    assert (stopped.targets[0] == whole.targets[0]).all()


def test_a_rehearsal_asks_for_one_crop_and_keeps_nothing(make_config: Callable[..., Config]) -> None:
    settings = make_config(views="fix/ic_ens", fixed_crops=10**6, dry_run=True)
    assert build_job(settings).targets[0].shape == (40, CLASSES)
    assert not list(pathlib.Path(settings.workdir).glob("targets-*"))


def test_another_runs_workdir_is_refused_before_the_work(make_config: Callable[..., Config]) -> None:
    settings = make_config(views="fix/cc")
    loop.save(job := build_job(settings), *build.open_run(job))
    with pytest.raises(DataError, match=r"belongs to another run .*temperature"):
        build_job(dataclasses.replace(settings, temperature=3.0))
    assert len(list(pathlib.Path(settings.workdir).glob("targets-*"))) == 1


def test_probabilities_are_no_logits_for_l2(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    model = bit.bit("tiny", CLASSES, IMAGE)
    inputs = keras.Input((IMAGE, IMAGE, 3))
    keras.Model(inputs, keras.ops.softmax(model(inputs))).save(tmp_path / "p.keras")
    with pytest.raises(ConfigError, match="up to a constant"):
        build_job(make_config(distance="l2", teacher=(f"keras:{tmp_path}/p.keras",)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"distance": "labels", "teacher": ()}, marks=pytest.mark.slow),
        pytest.param({"views": "ind/ic", "optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param({"mixup": "example"}, marks=pytest.mark.slow),
        pytest.param({"views": "fix/ic_ens", "fixed_crops": 3}, marks=pytest.mark.slow),
        pytest.param({"compat": ("keras_example",)}, marks=pytest.mark.slow),
    ],
)
def test_one_two_and_four_replicas_give_the_same_weights(make_config: Callable[..., Config], changes: dict) -> None:
    """All-reduce, then clip: a clip on each replica would differ at once, and so would a loss over a replica's share."""
    # SGD-like sensitivity: the clip binds (norms above 0.05) and Adam's epsilon does not hide the gradient's size.
    config = make_config(clip_norm=0.05, steps=6, warmup_steps=0, **changes)
    found = {}
    for replicas in (1, 2, 4):
        # A workdir each, or the second would take the first one's fixed targets.
        job = build_job(dataclasses.replace(config, workdir=f"{config.workdir}{replicas}"), replicas)
        start = weights(job.student)
        metrics = job.advance(6, ExampleSampler(0, len(job.train), 8))
        assert metrics["grad_norm"] > 0.05
        found[replicas] = (metrics, weights(job.student))
    for replicas in (2, 4):
        for name, value in found[1][0].items():
            assert found[replicas][0][name] == pytest.approx(value, rel=2e-3), name
        # Adam turns rounding of a gradient near zero into a whole step of that one weight, so the update is compared as one.
        moved = np.concatenate([(w - s).ravel() for w, s in zip(found[1][1], start, strict=True)])
        apart = np.concatenate([(w - m).ravel() for w, m in zip(found[1][1], found[replicas][1], strict=True)])
        # The example's clip, of each variable, makes more of the smallest gradients. test_optim.py is exact about both.
        near = 0.1 if config.compat else 0.03
        assert np.linalg.norm(apart) < near * np.linalg.norm(moved)


@pytest.mark.parametrize("changes", [{}, {"mixup": "example"}, {"compat": ("mixup",)}, {"views": "same/ic"}])
def test_labels_are_mixed_as_the_pictures_are(make_config: Callable[..., Config], changes: dict) -> None:
    job = build_job(make_config(distance="labels", teacher=(), **changes))
    ids = ExampleSampler(0, len(job.train), 8).batches(0, 1)[0]
    own = np.eye(5)[job.train.labels[ids]]
    pictures = job.train.images[ids], job.train.sizes[ids]
    options = {"each": changes.get("mixup") == "example", "reverse": "compat" in changes}
    share = reference.step_views(job.config.views, *pictures, 0, 0, 4, 4, **options)[2][:, None]
    other = own[::-1] if options["reverse"] else np.roll(own, 1, axis=0)
    truth = share * own + (1 - share) * other
    # A head of zeros says the same of all classes: log 5 whatever the target; a bias tells the target.
    bias = np.array([0.5, -1.0, 2.0, 0.0, 1.0], np.float32)
    head = job.student.get_layer("head")
    head.set_weights([head.get_weights()[0], bias])
    expected = -(truth * special.log_softmax(bias)).sum(1).mean()
    assert job.advance(1, ExampleSampler(0, len(job.train), 8))["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"optimizer": "muon", "views": "ind/rc", "distance": "hard"}, marks=pytest.mark.slow),
        pytest.param({"compat": ("keras_example",), "student_range": "0,1"}, marks=pytest.mark.slow),
        pytest.param({"views": "fix/ic_ens", "fixed_crops": 2, "distance": "l2"}, marks=pytest.mark.slow),
        pytest.param({"mixup": "example", "ensemble": "mean_probabilities"}, marks=pytest.mark.slow),
    ],
)
def test_the_whole_step_compiles_with_xla_and_gives_the_same(
    make_config: Callable[..., Config], teacher_file: str, changes: dict
) -> None:
    """A TPU runs nothing else: static shapes, no host callback, no string or image-decoding operation in the step."""
    found = []
    if "ensemble" in changes:
        changes = changes | {"teacher": (f"keras:{teacher_file}", "random:bit-tiny")}
    for flag in ("off", "on"):
        job = build_job(make_config(jit_compile=flag, warmup_steps=0, **changes))
        found.append(job.advance(2, ExampleSampler(0, len(job.train), 8)))
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("student", ["mobilenetv3-small", "resnet50v2"])
def test_batch_norm_students_compile_with_xla(make_config: Callable[..., Config], student: str) -> None:
    job = build_job(make_config(student=student, image_size=32, teacher_image_size=(IMAGE,), jit_compile="on"))
    assert np.isfinite(list(job.advance(2, ExampleSampler(0, len(job.train), 8)).values())).all()


@pytest.mark.slow
def test_batch_norm_and_ensembles_and_sizes_train(make_config: Callable[..., Config], teacher_file: str) -> None:
    job = build_job(
        make_config(
            student="mobilenetv3-small",
            image_size=32,
            teacher=(f"keras:{teacher_file}", "random:bit-tiny"),
            teacher_image_size=(IMAGE, 16),
            precision="mixed_bfloat16",
        )
    )
    moving = [v.numpy().copy() for v in job.student.non_trainable_variables]
    metrics = job.advance(2, ExampleSampler(0, len(job.train), 8))
    assert np.isfinite(list(metrics.values())).all()
    assert any((a != v.numpy()).any() for a, v in zip(moving, job.student.non_trainable_variables, strict=True))
