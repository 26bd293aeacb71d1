"""Non-finite numbers at each of 12 steps: training stops before a commit and names the cause."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from conftest import reconfigure, strategy

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import Diverged
from trainer.method import optim
from trainer.method import step as step_module
from trainer.run import build, loop
from trainer.run.accelerator import Accelerator
from trainer.run.plan import make_plan

STEPS = 12
PLACES = {
    "loss": "the loss",
    "gradient": "the gradient",
    "weight": "the student's weights",
    "teacher": "the teacher's output",
}


@pytest.mark.parametrize("place", PLACES)
def test_non_finite_value_stops_before_a_commit(
    place: str, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and infinity in turn at each step, in device loops of 1, 2 and 4 steps."""
    poisoned_step, poison = tf.Variable(-1, dtype=tf.int32), tf.Variable(0.0)

    def add_poison(value: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return value + tf.where(tf.equal(tf.cast(step, tf.int32), poisoned_step), poison, 0.0)

    real_losses, real_apply = step_module.example_losses, optim.apply_gradients

    def poisoned_losses(*args: object) -> dict[str, tf.Tensor]:
        losses = real_losses(*args)
        return losses | {"loss": add_poison(losses["loss"], args[-1])}

    def poisoned_apply(config: Config, optimizer: object, gradients: list[tf.Tensor], variables: list) -> tf.Tensor:
        poisoned = [add_poison(gradients[0], optimizer.iterations), *gradients[1:]]  # type: ignore[attr-defined]
        return real_apply(config, optimizer, poisoned, variables)

    if place == "loss":
        monkeypatch.setattr(step_module, "example_losses", poisoned_losses)
    if place == "gradient":
        monkeypatch.setattr(optim, "apply_gradients", poisoned_apply)
    config = make_config(steps=STEPS, eval_every=STEPS, checkpoint_every=2, log_every=STEPS, keep_checkpoints=1)
    job = build.build(make_plan(config), Accelerator(strategy(1), "CPU", 1), Console())
    start = job.state()
    variable = {"weight": job.student.trainable_variables[0], "teacher": job.teachers[0].model.variables[-1]}.get(place)
    good = None if variable is None else variable.numpy()
    run_steps = job.run_steps
    caught = 0
    for at in range(STEPS):
        job.load(start)
        job.step, job.pending_metrics = 0, []
        value = np.float32([np.nan, np.inf, -np.inf][at % 3])
        reconfigure(
            job,
            make_config(
                **{name: getattr(config, name) for name in ("steps", "eval_every", "log_every", "keep_checkpoints")},
                checkpoint_every=2,
                steps_per_loop=(1, 2, 4)[at % 3],
                workdir=f"{config.workdir}-{at}",
            ).resolve(40),
        )

        def poisoned(steps: int, step: int = at, value: np.float32 = value) -> dict[str, float]:
            # To poison a variable before a step, the steps before it run one by one.
            if variable is not None and job.step <= step < job.step + steps:
                while job.step < step:
                    run_steps(1)
                    steps -= 1
                variable.assign(np.full(variable.shape, value, np.float32))
            return run_steps(steps)

        job.run_steps = poisoned  # type: ignore[method-assign]
        if variable is None:
            poisoned_step.assign(at)
            poison.assign(value)
        writer, checkpoints = build.open_run(job)
        with pytest.raises(Diverged) as raised:
            loop.train(job, writer, checkpoints, Console())
        assert raised.value.exit_code == 4
        assert re.match(rf"not finite in step {at + 1} of {STEPS}: {PLACES[place]}\. The last good", str(raised.value))
        restored = checkpoints.restore()
        assert (restored.step if restored else 0) == at - at % 2, "the last good checkpoint is not there"
        assert restored is None or all(np.isfinite(array).all() for array in restored.arrays.values())
        caught += 1
        poisoned_step.assign(-1)
        if variable is not None:
            variable.assign(good)
    assert caught == STEPS
