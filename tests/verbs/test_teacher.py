"""Fine-tuning a teacher: BiT-HyperRule's table, crop and mixup; the saved model is a teacher."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, build_job, here
from samples import native_layout, shaken, state
from scipy import stats

from trainer import recipes
from trainer.core.config import Config
from trainer.core.console import Console
from trainer.data.order import ExampleSampler
from trainer.method import counter_rng, views
from trainer.models import teachers
from trainer.run import build, loop


@pytest.mark.parametrize(
    ("examples", "supports", "alpha"),
    [
        (1_020, (100, 200, 300, 400, 500), 0.0),
        (19_999, (100, 200, 300, 400, 500), 0.0),
        (20_000, (500, 3_000, 6_000, 9_000, 10_000), 0.1),
        (499_999, (500, 3_000, 6_000, 9_000, 10_000), 0.1),
        (500_000, (500, 6_000, 12_000, 18_000, 20_000), 0.1),
    ],
)
@pytest.mark.parametrize(("side", "sizes"), [(32, (160, 128)), (95, (160, 128)), (96, (512, 480)), (500, (512, 480))])
def test_hyperrule_matches_the_published_table(
    examples: int, supports: tuple[int, ...], alpha: float, side: int, sizes: tuple[int, int]
) -> None:
    rule = recipes.bit_hyperrule(examples, side, side)
    assert (rule["warmup_steps"], *rule["boundaries"], rule["steps"]) == supports
    assert (rule["resize_size"], rule["image_size"]) == sizes
    assert (rule["mixup_alpha"] if rule["views"] == "mix" else 0.0) == alpha
    assert (rule["learning_rate"], rule["batch_size"], rule["optimizer"]) == (0.003, 512, "sgdm")
    assert (rule["weight_decay"], rule["clip_norm"]) == (0.0, 0.0)
    Config(distance="labels", **rule).resolve(examples)


def test_hyperrule_resizes_then_crops() -> None:
    """Crops are from anywhere in the resized image, half of them mirrored; evaluation takes all."""
    config = Config(image_size=8, resize_size=11, views="same/ic", distance="labels", steps=9).resolve(64)
    assert config.store_size == 11
    images = np.random.default_rng(0).integers(0, 256, (64, 11, 11, 3)).astype(np.uint8)
    sizes = tf.tile([[30.0, 70.0]], [64, 1])
    rows = views.BatchRows.of(0, 1, 64, "")
    config = dataclasses.replace(config, batch_size=64)
    crops = views.training_views(config, tf.constant(images), sizes, rows, tf.constant(3), ()).student.numpy()
    pixels = (crops + 1) * 127.5
    places, mirrored = set(), 0
    for image, view in zip(images.astype(np.float32), pixels, strict=True):
        matches = [
            (top, left, flip)
            for top in range(4)
            for left in range(4)
            for flip in (False, True)
            if np.allclose(image[top : top + 8, left : left + 8][:, :: -1 if flip else 1], view, atol=0.01)
        ]
        assert len(matches) == 1
        places.add(matches[0][:2])
        mirrored += matches[0][2]
    assert len(places) > 12
    assert 16 < mirrored < 48
    whole = views.evaluation_view(config, tf.constant(images), sizes, 11).numpy()
    assert np.allclose((whole + 1) * 127.5, images, atol=0.01)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.9])
def test_beta_samples_match_scipy(alpha: float) -> None:
    draws = counter_rng.uniform(5, 7, tf.range(4000), 16, 100)
    samples, distribution = counter_rng.beta(draws, alpha).numpy()[:, 0], stats.beta(alpha, alpha)
    # Float32 is too coarse next to 1: compare the lower half of the distribution, and its size.
    low = samples[samples < 0.5]
    assert abs(len(low) / len(samples) - 0.5) < 0.03
    assert stats.kstest(low, lambda x: distribution.cdf(x) / distribution.cdf(0.5)).pvalue > 0.01


@pytest.mark.parametrize("mixup", ["batch", "example"])
def test_mixup_ratio_is_beta_distributed(mixup: str) -> None:
    config = Config(image_size=8, mixup_alpha=0.1, mixup=mixup, batch_size=32, steps=9).resolve(64)
    images, sizes = tf.zeros([33, 16, 16, 3], tf.uint8), tf.ones([33, 2]) * 16
    rows = views.BatchRows.of(0, 1, 32, "roll")
    ratios = [
        views.training_views(config, images, sizes, rows, tf.constant(s), ()).mixup_ratios.numpy() for s in range(40)
    ]
    shares = np.array(ratios)[:, :, 0]
    assert shares.shape == (40, 32)
    assert (np.ptp(shares, axis=1) == 0).all() == (mixup == "batch")
    # Most of Beta(0.1, 0.1) is next to 0 and 1.
    edge = ((shares < 0.1) | (shares > 0.9)).mean()
    assert stats.beta(0.1, 0.1).cdf(0.1) * 2 == pytest.approx(edge, abs=0.15)
    # Two replicas draw the same.
    half = views.training_views(
        config, images[:17], sizes[:17], views.BatchRows.of(1, 2, 32, "roll"), tf.constant(5), ()
    )
    assert (half.mixup_ratios.numpy() == ratios[5][16:]).all()


RULE = {
    "distance": "labels",
    "teacher": (),
    "views": "mix",
    "mixup_alpha": 0.1,
    "resize_size": 30,
    "optimizer": "sgdm",
    "schedule": "step",
    "boundaries": (4, 8),
    "warmup_steps": 2,
    "clip_norm": 0.0,
    "weight_decay": 0.0,
    "learning_rate": 0.03,
}


def test_fine_tuning_resumes_to_the_bit(make_config: Callable[..., Config]) -> None:
    config = make_config(**RULE)
    whole, first, second = (build_job(config) for _ in range(3))
    order = ExampleSampler(0, len(whole.train_store), 8)
    for _ in range(3):
        whole.run_steps(2, order)
    first.run_steps(2, order)
    loop.save(first, *build.open_run(first))
    loop.resume(second, *build.open_run(second), Console())
    for _ in range(2):
        second.run_steps(2, order)
    expected, resumed = state(whole), state(second)
    assert expected.keys() == resumed.keys()
    assert all((expected[name] == resumed[name]).all() for name in expected)
    assert any("momentum" in name for name in expected)


@pytest.mark.slow
def test_fine_tuning_on_one_and_two_replicas_agrees(make_config: Callable[..., Config]) -> None:
    states = []
    for replicas in (1, 2):
        job = build_job(make_config(**RULE, workdir=f"{make_config().workdir}{replicas}"), replicas)
        job.run_steps(6, ExampleSampler(0, len(job.train_store), 8))
        states.append(state(job))
    assert all(np.allclose(states[0][n], states[1][n], rtol=1e-3, atol=1e-5) for n in states[0])


def test_fine_tune_a_bit_from_a_file(data: str, tmp_path: pathlib.Path) -> None:
    """From a file with other classes; the rule is printed, and the result is a teacher."""
    source = shaken(CLASSES + 3)
    np.savez(tmp_path / "w.npz", **native_layout(source))
    flags = [
        f"--data={data}",
        "--hyperrule",
        f"--model=bit:tiny@{tmp_path}/w.npz",
        f"--image_size={IMAGE}",
        "--resize_size=30",
        "--batch_size=8",
        "--steps=3",
        "--learning_rate=0.000001",
        f"--out={tmp_path}/t.keras",
    ]
    done = here("teacher", *flags)
    assert done.returncode == 0, done.stderr
    assert "BiT-HyperRule for 40 images" in done.stderr
    settings = json.loads((tmp_path / "t" / "config.json").read_text())["config"]
    assert (settings["student"], settings["student_weights"]) == ("bit-tiny", f"bit:tiny@{tmp_path}/w.npz")
    assert (settings["optimizer"], settings["boundaries"], settings["steps"]) == ("sgdm", [200, 300, 400], 3)
    assert settings["views"] == "same/ic"
    (teacher,) = teachers.load(Config(teacher=(f"keras:{tmp_path}/t.keras",), steps=1), CLASSES)
    # So small a rate has moved nothing: the network is the file's, below a head that is new.
    x = np.random.default_rng(0).uniform(-1, 1, (2, IMAGE, IMAGE, 3)).astype(np.float32)
    deep = [keras.Model(m.inputs, m.get_layer("pool").output)(x).numpy() for m in (source, teacher.model)]
    assert np.allclose(*deep, rtol=1e-3, atol=1e-3)
    assert np.abs(teacher.logits(tf.constant(x)).numpy()).max() < 0.1


def test_invalid_fine_tuning_flags(data: str, tmp_path: pathlib.Path) -> None:
    for flags, code, words in (
        (["--hyperrule"], 2, "--data is missing"),
        (
            [f"--data={data}", "--model=bit:BiT-M-R50x11", "--steps=1"],
            2,
            "--model=bit:BiT-M-R50x11: did you mean bit:BiT-M-R50x1?",
        ),
        ([f"--data={data}", "--model=bit:tiny@x.npz", "--student_weights=h5:x", "--steps=1"], 2, "drop one"),
    ):
        done = here("teacher", *flags, f"--out={tmp_path}/t.keras")
        assert done.returncode == code, done.stderr
        assert words in done.stderr
