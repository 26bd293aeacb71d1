"""The update against a NumPy reference, and the schedule against its formula."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from conftest import strategy

from trainer.core import options
from trainer.core.config import Config
from trainer.method import optim

CONFIG = Config(learning_rate=0.01, weight_decay=3e-3, steps=200, warmup_steps=20, clip_norm=1.0, epochs=0.0)


def test_schedules_and_optimizers_are_the_flags_choices() -> None:
    assert tuple(optim.SCHEDULES) == options.SCHEDULES
    assert tuple(optim.OPTIMIZERS) == options.OPTIMIZERS


def test_schedule() -> None:
    rates = [float(optim.schedule(CONFIG)(t)) for t in range(201)]
    assert np.allclose(rates, [0.01 * reference.schedule(t, 20, 200) for t in range(201)], atol=1e-8)
    assert rates[0] == 0.0
    assert rates[20] == pytest.approx(0.01)
    assert rates[200] == pytest.approx(0.0, abs=1e-9)
    assert float(optim.WarmupCosine(0.01, 0, 10)(0)) == pytest.approx(0.01)


def test_schedule_of_steps_is_big_transfers() -> None:
    """Its get_lr: 100 steps of warm-up, then a tenth for each of 200, 300 and 400 passed."""
    config = Config(learning_rate=0.003, schedule="step", warmup_steps=100, boundaries=(200, 300, 400), steps=500)
    rates = {t: float(optim.schedule(config)(t)) for t in (0, 50, 100, 200, 201, 300, 301, 400, 401, 499)}
    expected = [0.0, 0.0015, 3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6]
    assert np.allclose(list(rates.values()), expected, rtol=1e-5, atol=1e-12)


def test_schedule_is_the_keras_examples_too() -> None:
    """Its WarmUpCosine with the notebook's numbers, past its end as well."""
    config = Config(learning_rate=0.01, warmup_steps=1500, schedule_steps=1940, steps=2100)
    rates = [float(optim.schedule(config)(t)) for t in range(0, 2100, 7)]
    assert np.allclose(rates, [0.01 * reference.example_schedule(t, 1500, 1940) for t in range(0, 2100, 7)], atol=2e-8)
    assert rates[-1] == 0.0


# Updates in NumPy and float64: a function of the configuration, the start, the gradients of each
# step and which arrays are kernels, to the arrays after these steps.


def paper_updates(
    config: Config, start: list[np.ndarray], gradients: list[list[np.ndarray]], kernels: list[bool]
) -> list[np.ndarray]:
    """p -= sched(t) * (lr * direction(clip(g)) + wd * p), decay on kernels only."""
    p = [w.astype(np.float64) for w in start]
    muon = config.optimizer == "muon"
    directions = [reference.Muon() if muon and i in MATRICES else reference.Adam(1e-8) for i in range(len(p))]
    for t, step_gradients in enumerate(gradients):
        rate = reference.schedule(t, config.warmup_steps, config.steps)
        for i, g in enumerate(reference.clip_global(step_gradients, config.clip_norm)):
            decay = config.weight_decay * p[i] if kernels[i] else 0
            p[i] = p[i] - rate * (config.learning_rate * directions[i](g) + decay)
    return p


def momentum_updates(
    config: Config, start: list[np.ndarray], gradients: list[list[np.ndarray]], kernels: list[bool]
) -> list[np.ndarray]:
    """p -= sched(t) * wd * p on kernels; v = 0.9 v - lr(t) g; p += v."""
    p, v = [w.astype(np.float64) for w in start], [np.zeros(w.shape) for w in start]
    for t, step_gradients in enumerate(gradients):
        rate = min(1.0, t / config.warmup_steps) * 0.1 ** sum(t > b for b in config.boundaries)
        for i, g in enumerate(step_gradients):
            p[i] = p[i] - rate * (config.weight_decay * p[i] if kernels[i] else 0)
            v[i] = 0.9 * v[i] - rate * config.learning_rate * g
            p[i] = p[i] + v[i]
    return p


def example_updates(
    config: Config, start: list[np.ndarray], gradients: list[list[np.ndarray]], _: list[bool]
) -> list[np.ndarray]:
    """tfa.optimizers.AdamW(clipnorm): clips each by its own norm; p -= wd * p; then Adam."""
    p = [w.astype(np.float64) for w in start]
    directions = [reference.Adam(1e-7) for _ in p]
    for t, step_gradients in enumerate(gradients):
        rate = config.learning_rate * reference.example_schedule(t, config.warmup_steps, config.steps)
        for i, g in enumerate(reference.clip_each(step_gradients, config.clip_norm)):
            p[i] = p[i] - config.weight_decay * p[i]
            p[i] = p[i] - rate * directions[i](g)
    return p


SHAPES = [(3, 3, 2, 5), (5,), (3, 4), (4,), (3, 3, 4, 1), (2, 3)]
KERNELS = [True, False, True, False, True, True]
MATRICES = {0, 2}  # for Muon: not the depthwise kernel, nor the last one, which is the classifier's
UPDATES = {
    "adamw": (CONFIG, paper_updates),
    "muon": (dataclasses.replace(CONFIG, optimizer="muon"), paper_updates),
    "sgdm": (
        dataclasses.replace(CONFIG, optimizer="sgdm", schedule="step", boundaries=(60, 120, 180), clip_norm=0.0),
        momentum_updates,
    ),
    "keras_example": (dataclasses.replace(CONFIG, compat=("clip", "decay")), example_updates),
}


@pytest.mark.parametrize("optimizer_name", UPDATES)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_two_hundred_updates_are_the_formula(optimizer_name: str, replicas: int) -> None:
    config, expected_updates = UPDATES[optimizer_name]
    rng = np.random.default_rng(0)
    start = [rng.normal(0, 1, s).astype(np.float32) for s in SHAPES]
    # By step and replica. Sizes vary, so that some steps are clipped and some are not.
    gradients = [
        [[rng.normal(0, 10 ** rng.uniform(-2, 1), s).astype(np.float32) for s in SHAPES] for _ in range(replicas)]
        for _ in range(200)
    ]
    distribution = strategy(replicas)
    with distribution.scope():
        variables = [
            keras.Variable(w, name=f"{i}_{'kernel' if k else 'bias'}")
            for i, (w, k) in enumerate(zip(start, KERNELS, strict=True))
        ]
        optimizer = optim.build(config, variables)

    @tf.function
    def update(by_replica: list[tf.Tensor]) -> None:
        def replica_update(by_replica: list[tf.Tensor]) -> None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            optim.apply_gradients(config, optimizer, [tf.gather(g, replica) for g in by_replica], variables)

        distribution.run(replica_update, (by_replica,))

    for step in gradients:
        update([tf.constant(np.stack([replica[i] for replica in step])) for i in range(len(SHAPES))])
    totals = [[np.sum([replica[i] for replica in step], axis=0) for i in range(len(SHAPES))] for step in gradients]
    for variable, expected in zip(variables, expected_updates(config, start, totals, KERNELS), strict=True):
        # Newton-Schulz is run in float32 and amplifies rounding a little.
        tolerance = 5e-4 if optimizer_name == "muon" else 2e-5
        assert np.allclose(keras.ops.convert_to_numpy(variable), expected, rtol=1e-4, atol=tolerance)


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
        factor = 0.5 if optim.is_kernel(v) else 1.0
        assert np.allclose(keras.ops.convert_to_numpy(v), factor * before[v.path], atol=1e-6), v.path
