"""Builds a job from a plan: models, images, optimizer, compiled training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.data.order import ExampleSampler
from trainer.data.store import MemoryStore
from trainer.io import files
from trainer.method import optim, step
from trainer.method.feed import BatchPrefetcher
from trainer.models import quantize, students, teachers
from trainer.models.teachers import Teacher
from trainer.run import teacher_check, teacher_precision
from trainer.run.accelerator import Accelerator
from trainer.run.batch_statistics import BatchStatistics
from trainer.run.checkpoint import Checkpoints
from trainer.run.fixed_targets import fixed_targets
from trainer.run.job import Job
from trainer.run.metric_writer import MetricWriter
from trainer.run.plan import RunPlan, check_teachers
from trainer.run.stores import Stores, choose_kinds, fit_store_size, open_stores, print_fidelity


def build(plan: RunPlan, accelerator: Accelerator, console: Console) -> Job:
    """Loads models and images, and makes the optimizer and the compiled training loop.

    Args:
        plan: of the run.
        accelerator: that the job runs on.
        console: shows progress and warnings.

    Raises:
        ConfigError: the configuration does not fit the accelerator, the data or the teachers.
        DataError: data, teacher, weights or checkpoint cannot be used.
    """
    plan = _fit_to_accelerator(plan, accelerator, console)
    config, strategy = plan.config, accelerator.strategy
    if config.workdir:
        open_checkpoints(plan).require_same_run()
    kinds = choose_kinds(plan, accelerator, console)  # fails at once where there is no room
    begun_before = teacher_check.begun_before(plan)
    loaded, student, plan = _load_models(plan, accelerator, console, begun_before)
    view_sizes = [config.image_size, *(teacher.size for teacher in loaded)]
    plan = fit_store_size(plan, kinds, view_sizes, accelerator, lambda: _step_macs(config, loaded, student))
    stores = open_stores(plan, kinds, console)
    print_fidelity(plan, kinds, stores.train.sizes, max(view_sizes), console)
    loaded, plan, decisions, evaluators = teacher_check.settle(
        plan, accelerator, loaded, stores, console, begun_before=begun_before
    )
    config = plan.config
    check_teachers(plan, loaded)
    jit_compile = accelerator.jit_compile(config.jit_compile)
    with strategy.scope():
        loaded = teacher_precision.convert_teachers(
            config,
            loaded,
            stores.train,
            native=accelerator.int8_convolutions,
            jit_compile=jit_compile,
            console=console,
        )
    targets = fixed_targets(plan, accelerator, stores.train, loaded, console)
    with strategy.scope():
        optimizer = optim.build(config, student.trainable_variables)
    resident = _copy_to_device(stores, targets, accelerator) if kinds[0] == "device" else None
    local = accelerator.local_replicas()
    # Synchronized batch normalization reduces over replicas; XLA compiles for one replica.
    compiled = jit_compile and not any(layer.synchronized for layer in students.batch_norms(student))
    train_loop = step.make_train_loop(
        config, strategy, student, loaded, optimizer, resident, jit_compile=compiled, local_replicas=local
    )
    streamed = None if resident else stores.train
    sampler = ExampleSampler(config.seed, stores.train_sizes, config.batch_size, config.data_weights)
    return Job(
        plan=plan,
        accelerator=accelerator,
        train_store=stores.train,
        eval_stores=stores.eval,
        skipped_records=stores.skipped,
        sampler=sampler,
        prefetcher=BatchPrefetcher(config, strategy.num_replicas_in_sync, local, streamed, targets),
        student=student,
        teachers=loaded,
        targets=targets,
        optimizer=optimizer,
        train_loop=train_loop,
        decisions=decisions,
        evaluators=evaluators,
        statistics=BatchStatistics(config, strategy, student, stores.train, sampler, jit_compile=jit_compile),
    )


def _fit_to_accelerator(plan: RunPlan, accelerator: Accelerator, console: Console) -> RunPlan:
    """Checks the batch size, sets `steps_per_loop`, and prints warnings about the configuration."""
    accelerator.check_batch(plan.config.batch_size)
    steps_per_loop = plan.config.steps_per_loop or accelerator.steps_per_loop
    config = dataclasses.replace(plan.config, steps_per_loop=steps_per_loop)
    for line in config.warnings() + accelerator.hints(config.precision):
        console.warning(line)
    return dataclasses.replace(plan, config=config)


def _load_models(
    plan: RunPlan, accelerator: Accelerator, console: Console, begun_before: bool
) -> tuple[tuple[Teacher, ...], keras.Model, RunPlan]:
    """Loads the teachers and makes the student, under the accelerator's strategy.

    The plan comes back with the teacher's classes where the data has none.
    """
    config = plan.config
    with accelerator.strategy.scope():
        loaded = teachers.load(config, plan.classes, as_version_0_1=begun_before)
        teachers.print_notes(loaded, console)
        for teacher in loaded:
            console.info(f"teacher {teacher.name}: {teacher.model.count_params():,} parameters, {teacher.size} px")
        if not plan.classes:
            plan = plan.name_classes(loaded[0].classes)
            console.info(
                f"{plan.eval_set.folder} names no classes: they are {plan.classes:,}, numbered as the teacher's; "
                "`prepare --unlabelled --classes=FILE` names them"
            )
        student = students.build(
            config.student,
            plan.classes,
            config.image_size,
            precision=config.precision,
            seed=config.seed,
            initial_weights=config.student_weights,
            root_pool=config.root_pool,
        )
    console.info(f"student {config.student}: {student.count_params():,} parameters, {config.image_size} px")
    return loaded, student, plan


def _step_macs(config: Config, loaded: tuple[Teacher, ...], student: keras.Model) -> float:
    """Multiplications and additions (pairs) of all models for one image in a training step."""
    models = [(student, config.image_size), *((teacher.model, teacher.size) for teacher in loaded)]
    if not all(isinstance(model, keras.Model) for model, _ in models):
        return math.inf  # a program cannot be counted outside of a replica
    macs = [quantize.cost(model, size).macs for model, size in models]
    if None in macs:
        return math.inf
    return float(sum(filter(None, macs)) + 2 * (macs[0] or 0))  # a backward pass is about two forward passes


def _copy_to_device(stores: Stores, targets: tuple[np.ndarray, ...], accelerator: Accelerator) -> step.ExampleTables:
    """The whole training split on every device."""
    train = stores.train
    images = train.images if isinstance(train, MemoryStore) else train.take(np.arange(len(train)))
    # Each machine has read the data: TensorFlow cannot broadcast uint8 between machines.
    scope = accelerator.strategy.scope() if accelerator.workers == 1 else contextlib.nullcontext()
    with scope:
        arrays = (images, train.sizes, train.labels, *targets)
        variables = [tf.Variable(array, trainable=False) for array in arrays]
    return step.ExampleTables(variables[0], variables[1], variables[2], tuple(variables[3:]))


def open_checkpoints(plan: RunPlan, before_commit: Callable[[], None] = lambda: None) -> Checkpoints:
    """The checkpoints of a run's workdir.

    Args:
        plan: of the run.
        before_commit: raises where this process must not commit any more.
    """
    folder = files.join(plan.config.workdir, "checkpoints")
    return Checkpoints(folder, plan.identity, plan.config.keep_checkpoints, before_commit)


def open_run(job: Job, before_commit: Callable[[], None] = lambda: None) -> tuple[MetricWriter, Checkpoints]:
    """The metrics and the checkpoints of a job's workdir.

    Args:
        job: built.
        before_commit: raises where this process must not commit any more.
    """
    writer = MetricWriter(job.config.workdir, job.config.tensorboard_dir, writes=job.accelerator.chief)
    return writer, open_checkpoints(job.plan, before_commit)
