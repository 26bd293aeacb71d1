"""The update against a NumPy reference, and the schedule against its formula."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from conftest import strategy

from trainer.core.config import Config
from trainer.method import optim

CONFIG = Config(learning_rate=0.01, weight_decay=3e-3, steps=200, warmup_steps=20, clip_norm=1.0, epochs=0.0)


def test_schedule() -> None:
    found = [float(optim.schedule(CONFIG)(t)) for t in range(201)]
    assert np.allclose(found, [0.01 * reference.schedule(t, 20, 200) for t in range(201)], atol=1e-8)
    assert found[0] == 0.0
    assert found[20] == pytest.approx(0.01)
    assert found[200] == pytest.approx(0.0, abs=1e-9)
    assert float(optim.WarmupCosine(0.01, 0, 10)(0)) == pytest.approx(0.01)


def test_schedule_of_steps_is_big_transfers() -> None:
    """Its get_lr: after 100 of 500 updates a tenth for each of 200, 300 and 400 that has been passed."""
    config = Config(learning_rate=0.003, schedule="step", warmup_steps=100, boundaries=(200, 300, 400), steps=500)
    found = {t: float(optim.schedule(config)(t)) for t in (0, 50, 100, 200, 201, 300, 301, 400, 401, 499)}
    expected = [0.0, 0.0015, 3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6]
    assert np.allclose(list(found.values()), expected, rtol=1e-5, atol=1e-12)


def test_schedule_is_the_keras_examples_too() -> None:
    """Its WarmUpCosine with the notebook's numbers, past its end as well."""
    config = Config(learning_rate=0.01, warmup_steps=1500, schedule_steps=1940, steps=2100)
    found = [float(optim.schedule(config)(t)) for t in range(0, 2100, 7)]
    assert np.allclose(found, [0.01 * reference.example_schedule(t, 1500, 1940) for t in range(0, 2100, 7)], atol=2e-8)
    assert found[-1] == 0.0


# Each update in NumPy, in float64: arrays, gradients by step, which arrays are kernels -> arrays.


def by_formula(config: Config, start: list[np.ndarray], gradients: list[list[np.ndarray]], kernels: list[bool]) -> list:
    """p -= sched(t) * (lr * direction(clip(g)) + wd * p), decay on kernels only."""
    p = [w.astype(np.float64) for w in start]
    muon = config.optimizer == "muon"
    ways = [reference.Muon() if muon and i in MATRICES else reference.Adam(1e-8) for i in range(len(p))]
    for t, g in enumerate(gradients):
        rate = reference.schedule(t, config.warmup_steps, config.steps)
        for i, x in enumerate(reference.clip_global(g, config.clip_norm)):
            decay = config.weight_decay * p[i] if kernels[i] else 0
            p[i] = p[i] - rate * (config.learning_rate * ways[i](x) + decay)
    return p


def by_momentum(config: Config, start: list[np.ndarray], gradients: list, kernels: list[bool]) -> list:
    """v = 0.9 v - lr(t) g; p += v; p -= sched(t) * wd * p on kernels, first."""
    p, v = [w.astype(np.float64) for w in start], [np.zeros(w.shape) for w in start]
    for t, g in enumerate(gradients):
        rate = min(1.0, t / config.warmup_steps) * 0.1 ** sum(t > b for b in config.boundaries)
        for i, x in enumerate(g):
            p[i] = p[i] - rate * (config.weight_decay * p[i] if kernels[i] else 0)
            v[i] = 0.9 * v[i] - rate * config.learning_rate * x
            p[i] = p[i] + v[i]
    return p


def by_example(config: Config, start: list[np.ndarray], gradients: list[list[np.ndarray]], _: list[bool]) -> list:
    """tfa.optimizers.AdamW(clipnorm): every variable by its own norm; p -= wd * p at any rate; then Adam."""
    p = [w.astype(np.float64) for w in start]
    ways = [reference.Adam(1e-7) for _ in p]
    for t, g in enumerate(gradients):
        rate = config.learning_rate * reference.example_schedule(t, config.warmup_steps, config.steps)
        for i, x in enumerate(reference.clip_each(g, config.clip_norm)):
            p[i] = p[i] - config.weight_decay * p[i]
            p[i] = p[i] - rate * ways[i](x)
    return p


SHAPES = [(3, 3, 2, 5), (5,), (3, 4), (4,), (3, 3, 4, 1), (2, 3)]
KERNELS = [True, False, True, False, True, True]
MATRICES = {0, 2}  # for Muon: not the depthwise kernel, nor the last one, which is the classifier's
UPDATES = {
    "adamw": (CONFIG, by_formula),
    "muon": (dataclasses.replace(CONFIG, optimizer="muon"), by_formula),
    "sgdm": (
        dataclasses.replace(CONFIG, optimizer="sgdm", schedule="step", boundaries=(60, 120, 180), clip_norm=0.0),
        by_momentum,
    ),
    "keras_example": (dataclasses.replace(CONFIG, compat=("clip", "decay")), by_example),
}


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_two_hundred_updates_are_the_formula(kind: str, replicas: int) -> None:
    config, formula = UPDATES[kind]
    rng = np.random.default_rng(0)
    start = [rng.normal(0, 1, s).astype(np.float32) for s in SHAPES]
    # Each replica's share of the gradient; sizes change over time so that the clip binds at times.
    parts = [
        [[rng.normal(0, 10 ** rng.uniform(-2, 1), s).astype(np.float32) for s in SHAPES] for _ in range(replicas)]
        for _ in range(200)
    ]
    made = strategy(replicas)
    with made.scope():
        variables = [
            keras.Variable(w, name=f"{i}_{'kernel' if k else 'bias'}")
            for i, (w, k) in enumerate(zip(start, KERNELS, strict=True))
        ]
        optimizer = optim.build(config, variables)

    @tf.function
    def update(shares: list[tf.Tensor]) -> None:
        def one(shares: list[tf.Tensor]) -> None:
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            optim.apply_gradients(config, optimizer, [tf.gather(s, number) for s in shares], variables)

        made.run(one, (shares,))

    for step in parts:
        update([tf.constant(np.stack([replica[i] for replica in step])) for i in range(len(SHAPES))])
    totals = [[np.sum([replica[i] for replica in step], axis=0) for i in range(len(SHAPES))] for step in parts]
    for variable, expected in zip(variables, formula(config, start, totals, KERNELS), strict=True):
        # Newton-Schulz is run in float32 and amplifies rounding a little.
        near = 5e-4 if kind == "muon" else 2e-5
        assert np.allclose(keras.ops.convert_to_numpy(variable), expected, rtol=1e-4, atol=near)


def test_muon_takes_convolutions_and_hidden_layers() -> None:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.DepthwiseConv2D(3, name="depthwise"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5, name="hidden"),
            keras.layers.Dense(2, name="classifier"),
        ]
    )
    assert [path.split("/")[-2] for path in optim.muon_variables(model.trainable_variables)] == ["conv", "hidden"]


def test_decay_is_on_kernels_only() -> None:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.GroupNormalization(2),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    decayed = [v.path.split("/")[-1] for v in model.trainable_variables if optim.is_kernel(v)]
    assert decayed == ["kernel", "kernel", "kernel"]
    before = {v.path: keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables}
    optimizer = optim.build(
        Config(learning_rate=0.1, weight_decay=0.5, steps=10, warmup_steps=0),
        model.trainable_variables,
    )
    optimizer.apply_gradients([(tf.zeros(v.shape), v) for v in model.trainable_variables])
    for v in model.trainable_variables:
        share = 0.5 if optim.is_kernel(v) else 1.0
        assert np.allclose(keras.ops.convert_to_numpy(v), share * before[v.path], atol=1e-6), v.path
