"""Builds a job from its configuration: data, models, optimizer, compiled loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.config import Config, fingerprint
from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError
from trainer.data.dataset import Dataset
from trainer.data.order import ExampleSampler
from trainer.data.records import CorruptRecord, CorruptRecordLog
from trainer.data.store import ConcatenatedStore, DiskStore, ImageStore, MemoryStore
from trainer.io import files
from trainer.method import optim, step, views
from trainer.method.feed import BatchPrefetcher
from trainer.models import students, teachers
from trainer.run import teacher_precision
from trainer.run.accelerator import Accelerator
from trainer.run.checkpoint import Checkpoints
from trainer.run.evaluator import Evaluator
from trainer.run.fixed_targets import fixed_targets
from trainer.run.job import Job
from trainer.run.metric_writer import MetricWriter
from trainer.run.stores import open_cache, plan_stores, report_corrupt_records, require_same_records


def identify(config: Config) -> tuple[Config, tuple[Dataset, ...], Dataset, dict[str, Any]]:
    """What a run is, without building it: resolved configuration, data sets, identity. Reads small files and teachers' bytes.

    Returns:
        The configuration, the sets to train on, the set to evaluate on, and what decides which weights come out.

    Raises:
        DataError: a data set or split is missing or empty.
    """
    sets = tuple(Dataset.load(folder) for folder in config.data)
    held_out = Dataset.load(config.eval_data, "eval_data") if config.eval_data else sets[0]
    splits = [dataset.split(config.train_split, "train_split") for dataset in sets]
    for flag in ("eval_split", "final_split"):
        held_out.split(getattr(config, flag), flag)
    if not held_out.classes:
        raise DataError(f"{held_out.folder} has no classes; evaluation needs labelled images: give --eval_data")
    for dataset in sets:
        if config.distance == "labels" and dataset.classes != held_out.classes:
            raise DataError(
                f"--distance=labels: {held_out.folder} has {len(held_out.classes)} classes and --data={dataset.folder} has "
                f"{len(dataset.classes)}, or their names differ: both must name the same classes in the same order"
            )
    config = config.resolve(sum(split.examples for split in splits))
    told = [f"{split.name}: {split.examples} examples, {split.crc32c}" for split in splits]
    if config.data_weights:
        told = [f"{one}, weight {weight:g}" for one, weight in zip(told, config.data_weights, strict=True)]
    identity = config.identity() | {
        # A file is known by its checksum, wherever it lies.
        "student": "keras" if config.student.startswith("keras:") else config.student,
        "classes": len(held_out.classes),
        "data": "; ".join(told),
        "teacher": [teachers.checksum(config, name) for name in config.teacher],
        "student_files": students.checksums(config.student, config.student_weights),
    }
    return config, sets, held_out, identity


def build(config: Config, accelerator: Accelerator, console: Console) -> Job:
    """Loads data and teachers, makes student, optimizer and the compiled loop.

    Args:
        config: as the user gave it.

    Raises:
        ConfigError, DataError: what cannot be run, as one line.
    """
    config, sets, held_out, identity = identify(config)
    if config.workdir:
        open_checkpoints(config, identity).require_ours()
    accelerator.check_batch(config.batch_size)
    config = dataclasses.replace(config, steps_per_loop=config.steps_per_loop or accelerator.steps_per_loop)
    for line in config.warnings() + accelerator.hints(config.precision):
        console.warning(f"{line}")
    kinds = plan_stores(config, accelerator, sets, held_out, console)
    strategy, classes = accelerator.strategy, len(held_out.classes)
    with strategy.scope():
        loaded = teachers.load(config, classes)
        for teacher in loaded:
            for note in teacher.notes:
                console.info(note)
            console.info(
                f"teacher {teacher.name}: {teacher.model.count_params():,} parameters, {teacher.size} px, {teacher.value_range}"
            )
        student = students.build(
            config.student,
            classes,
            config.image_size,
            precision=config.precision,
            seed=config.seed,
            initial_weights=config.student_weights,
            root_pool=config.root_pool,
        )
        console.info(f"student {config.student}: {student.count_params():,} parameters, {config.image_size} px")

    left_out: dict[str, list[CorruptRecord]] = {}

    def held(dataset: Dataset, flag: str, kind: str) -> ImageStore:
        split = dataset.split(getattr(config, flag), flag)
        damage = CorruptRecordLog(dataset, split, config.max_bad_fraction)
        told = f"decode {split.name}" if kind != "disk" else f"copy and check {split.name}, bytes"

        def progress(done: int, total: int) -> None:
            console.progress(told, done, total)

        made: ImageStore
        if kind == "disk":
            made = DiskStore(dataset, split, config.store_size, open_cache(config), progress, corrupt=damage)
        else:
            made = MemoryStore(dataset, split, config.store_size, progress, damage)
        report_corrupt_records(damage, split, console)
        if damage.records:
            left_out[split.name if len(sets) == 1 else f"{dataset.folder}, {split.name}"] = damage.records
        return made

    parts = [held(dataset, "train_split", kinds[0]) for dataset in sets]
    for part, dataset in zip(parts, sets, strict=True):
        if config.distance == "labels" and (part.labels < 0).any():
            raise DataError(
                f"--distance=labels, but {config.train_split} of {dataset.folder} has images without labels"
            )
        if part.classes != held_out.classes:
            part.labels[:] = -1
            if part.classes:
                console.info(
                    f"the labels of {dataset.folder} are not used: its classes are not those of {held_out.folder}"
                )
    train = parts[0] if len(parts) == 1 else ConcatenatedStore(parts)
    if config.distance in ("l2", "euclidean") and any(teacher.probabilities for teacher in loaded):
        raise ConfigError(
            f"--distance={config.distance} compares logits, and a teacher gives probabilities, which fix logits "
            "only up to a constant"
        )
    stores: dict[str, ImageStore] = {}
    for flag in ("eval_split", "final_split"):
        name = getattr(config, flag)
        if name not in stores:
            stores[name] = held(held_out, flag, kinds[1])
    if config.keep_best == "student_top1" and (stores[config.eval_split].labels < 0).all():
        raise ConfigError(
            f"--keep_best=student_top1, but {config.eval_split} has no labels: choose agreement_top1 or kl"
        )
    if config.max_bad_fraction and config.workdir and not (config.check or config.dry_run):
        require_same_records(config.workdir, left_out)
    jit_compile = accelerator.jit_compile(config.jit_compile)
    with strategy.scope():
        loaded = teacher_precision.convert_teachers(
            config, loaded, train, native=accelerator.int8_convolutions, jit_compile=jit_compile, console=console
        )
    targets: tuple[np.ndarray, ...] = ()
    if loaded and views.mode(config).fixed:
        asked = Evaluator(config, strategy, train, jit_compile=jit_compile)
        targets = fixed_targets(config, accelerator, asked, loaded, fingerprint(identity), console)
    with strategy.scope():
        optimizer = optim.build(config, student.trainable_variables)
    resident = None
    if kinds[0] == "device":
        everything = train.images if isinstance(train, MemoryStore) else train.take(np.arange(len(train)))
        # Each of several machines has read the data itself; TensorFlow's broadcast between machines knows no uint8.
        with strategy.scope() if accelerator.workers == 1 else contextlib.nullcontext():
            images, sizes, labels = (tf.Variable(a, trainable=False) for a in (everything, train.sizes, train.labels))
            tables = tuple(tf.Variable(a, trainable=False) for a in targets)
            resident = step.ExampleTables(images, sizes, labels, tables)
    run_steps = step.make_train_loop(
        config,
        strategy,
        student,
        loaded,
        optimizer,
        resident,
        # Replicas that meet in a normalisation cannot do so inside a program that was compiled for one of them.
        jit_compile=jit_compile and not any(layer.synchronized for layer in students.batch_norms(student)),
        local_replicas=accelerator.local_replicas(),
    )
    feed = BatchPrefetcher(
        config, strategy.num_replicas_in_sync, accelerator.local_replicas(), None if resident else train, targets
    )
    order = ExampleSampler(config.seed, [len(part) for part in parts], config.batch_size, config.data_weights)
    return Job(
        config,
        accelerator,
        identity,
        train,
        stores,
        order,
        feed,
        student,
        loaded,
        targets,
        optimizer,
        run_steps,
        left_out,
    )


def open_checkpoints(
    config: Config, identity: dict[str, Any], before_commit: Callable[[], None] = lambda: None
) -> Checkpoints:
    """The checkpoints of a run's workdir; `before_commit` raises where this process must not commit any more."""
    return Checkpoints(files.join(config.workdir, "checkpoints"), identity, config.keep_checkpoints, before_commit)


def open_run(job: Job, before_commit: Callable[[], None] = lambda: None) -> tuple[MetricWriter, Checkpoints]:
    """The journal and the checkpoints of a job's workdir."""
    journal = MetricWriter(job.config.workdir, job.config.tensorboard_dir, writes=job.accelerator.chief)
    return journal, open_checkpoints(job.config, job.identity, before_commit)
