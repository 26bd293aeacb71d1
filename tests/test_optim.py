"""The update against a NumPy reference, and the schedule against its formula."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy

from trainer import optim
from trainer.config import Config

CONFIG = Config(learning_rate=0.01, weight_decay=3e-3, steps=200, warmup_steps=20, clip_norm=1.0, epochs=0.0)


def schedule(t: int, config: Config = CONFIG) -> float:
    """big_vision's: min(1, t / warmup) times half a cosine over the rest."""
    rise = min(1.0, t / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(1.0, max(0.0, (t - config.warmup_steps) / (config.steps - config.warmup_steps)))
    return rise * 0.5 * (1 + np.cos(np.pi * progress))


def test_schedule() -> None:
    found = [float(optim.WarmupCosine(0.01, 20, 200)(t)) for t in range(201)]
    assert np.allclose(found, [0.01 * schedule(t) for t in range(201)], atol=1e-8)
    assert found[0] == 0.0
    assert found[20] == pytest.approx(0.01)
    assert found[200] == pytest.approx(0.0, abs=1e-9)
    assert float(optim.WarmupCosine(0.01, 0, 10)(0)) == pytest.approx(0.01)


def reference(start: list[np.ndarray], gradients: list[list[np.ndarray]], kernels: list[bool]) -> list[np.ndarray]:
    """p -= sched(t) * (lr * adam(clip(g)) + wd * p), decay on kernels only, in float64."""
    p = [w.astype(np.float64) for w in start]
    m, v = [np.zeros_like(w) for w in p], [np.zeros_like(w) for w in p]
    for t, g in enumerate(gradients):
        norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g))
        clip = min(1.0, CONFIG.clip_norm / norm)
        for i, x in enumerate(g):
            x = x * clip
            m[i] = 0.9 * m[i] + 0.1 * x
            v[i] = 0.999 * v[i] + 0.001 * x**2
            adam = (m[i] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[i] / (1 - 0.999 ** (t + 1))) + 1e-8)
            p[i] = p[i] - schedule(t) * (
                CONFIG.learning_rate * adam + (CONFIG.weight_decay * p[i] if kernels[i] else 0)
            )
    return p


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_two_hundred_updates_are_the_formula(replicas: int) -> None:
    rng = np.random.default_rng(0)
    shapes, kernels = [(3, 4), (4,), (2, 3)], [True, False, True]
    start = [rng.normal(0, 1, s).astype(np.float32) for s in shapes]
    # Each replica's share of the gradient; sizes change over time so that the clip binds at times.
    parts = [
        [[rng.normal(0, 10 ** rng.uniform(-2, 1), s).astype(np.float32) for s in shapes] for _ in range(replicas)]
        for _ in range(200)
    ]
    made = strategy(replicas)
    with made.scope():
        variables = [
            keras.Variable(w, name=f"{i}_{'kernel' if k else 'bias'}")
            for i, (w, k) in enumerate(zip(start, kernels, strict=True))
        ]
        optimizer = optim.build(CONFIG, variables)

    @tf.function
    def update(shares: list[tf.Tensor]) -> None:
        def one(shares: list[tf.Tensor]) -> None:
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            optim.apply(CONFIG, optimizer, [tf.gather(s, number) for s in shares], variables)

        made.run(one, (shares,))

    for step in parts:
        update([tf.constant(np.stack([replica[i] for replica in step])) for i in range(len(shapes))])
    totals = [[np.sum([replica[i] for replica in step], axis=0) for i in range(len(shapes))] for step in parts]
    for variable, expected in zip(variables, reference(start, totals, kernels), strict=True):
        assert np.allclose(keras.ops.convert_to_numpy(variable), expected, rtol=1e-4, atol=2e-5)


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
