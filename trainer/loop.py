"""The outer loop: what the host does between the device's loops."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import time
import zipfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import agreement, distill, environment, files, optim, views
from trainer.accelerator import Accelerator
from trainer.cache import Cache, too_little
from trainer.checkpoint import Background, Checkpoints
from trainer.config import Config, fingerprint
from trainer.errors import ConfigError, DataError, Diverged, Stopped
from trainer.feed import Feed
from trainer.journal import Journal, Screen
from trainer.measure import Evaluator
from trainer.models import students, teachers
from trainer.records import Bad, Damage, Dataset, Split
from trainer.signals import StopRequest
from trainer.store import DiskStore, MemoryStore, Order, SeveralStores, Store, choose, decoded_bytes, free_memory

_OTHER = "a signal to another machine"
_KEEP_SECONDS = 60.0  # between keepings of half-made fixed targets
_REMEDY = {distill.CAUSES[0]: "check the teacher's file, --teacher_range and --teacher_precision"}


@dataclasses.dataclass
class Job:
    """A run, built and ready to train.

    Attributes:
        config: resolved; nothing in it is left to a default.
        identity: JSON value that decides which weights come out: configuration, data, teachers.
        train: the training images, of all sets.
        order: which of them make batch t.
        feed: makes the inputs of the device's loops.
        targets: for each teacher its constant logits on the training split, where the views fix them; else none.
        left_out: bad records by split, which the run does without (--max_bad_fraction).
        step: updates made so far.
        seconds: wall time of training so far, over all processes of this run.
        pending: steps and metrics of the device's loops since the last row of metrics.
        best: with `--keep_best`, what it is about ("by"), its best "value" so far and the "step" of that; else empty.
    """

    config: Config
    accelerator: Accelerator
    identity: dict[str, Any]
    train: Store
    stores: dict[str, Store]
    order: Order
    feed: Feed
    student: keras.Model
    teachers: tuple[teachers.Teacher, ...]
    targets: tuple[np.ndarray, ...]
    optimizer: keras.optimizers.Optimizer
    run_steps: Callable[..., dict[str, tf.Tensor]]
    left_out: dict[str, list[Bad]] = dataclasses.field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    pending: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluators: dict[str, Evaluator] = dataclasses.field(default_factory=dict)

    def evaluator(self, split: str) -> Evaluator:
        """The evaluator of one of `stores`."""
        if split not in self.evaluators:
            self.evaluators[split] = Evaluator(
                self.config,
                self.accelerator.strategy,
                self.stores[split],
                jit_compile=self.accelerator.jit_compile(self.config.jit_compile),
            )
        return self.evaluators[split]

    def until_due(self, step: int) -> int:
        """Steps from `step` to the next moment at which the host has something to do, at most a loop's; 0 at the end."""
        config = self.config
        intervals = (config.log_every, config.eval_every, config.checkpoint_every)
        most = min(config.steps_per_loop, self.feed.most_steps or config.steps_per_loop)
        return max(0, min(config.steps - step, most, *(every - step % every for every in intervals)))

    def advance(self, steps: int, order: Order | None = None) -> dict[str, float]:
        """Makes `steps` updates on the device and returns the mean of each metric over them.

        Args:
            steps: in one loop of the device.
            order: of the examples; by default the job's.

        Raises:
            Diverged: a loss or gradient was not finite.
            DataError: an image cannot be read or decoded.
        """
        first, order = self.step, order or self.order
        ids, streamed = self.feed.take(first, steps, order)
        if then := self.until_due(first + steps):
            self.feed.ahead(first + steps, then, order)  # on the host, while the device runs this loop
        told = self.run_steps(ids, tf.constant(first, tf.int64), *([streamed] if streamed else []))
        metrics = {name: float(told[name]) for name in distill.METRICS}
        bad = int(told["bad_step"])
        if bad >= 0 or not all(math.isfinite(value) for value in metrics.values()):
            at = f"in step {bad + 1}" if bad >= 0 else f"between steps {first} and {first + steps}"
            cause = distill.cause(told["faults"].numpy())
            raise Diverged(
                f"not finite {at} of {self.config.steps}: {cause}. The last good checkpoint is kept; "
                f"{_REMEDY.get(cause, 'try a lower --learning_rate, a longer --warmup_steps or --precision=float32')}"
            )
        self.step += steps
        made = int(keras.ops.convert_to_numpy(self.optimizer.iterations))
        if made != self.step:
            raise AssertionError(f"{made} updates were made where {self.step} were due")
        return metrics

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on beside configuration, data and teachers, by name: copies in host memory.

        Keras numbers layers and optimizers by how many a process has made before, so a name holds a variable's place in
        its model and the end of its own name: the same in every process.
        """
        student = {
            f"student/{number:04d}/{variable.path.rsplit('/', 1)[-1]}": variable
            for number, variable in enumerate(self.student.variables)
        }
        slots = {
            f"optimizer/{number:04d}/{variable.path.replace('/', '_').rsplit('_', 1)[-1]}": variable
            for number, variable in enumerate(self.optimizer.variables)
        }
        return {name: keras.ops.convert_to_numpy(variable) for name, variable in (student | slots).items()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`.

        Raises:
            DataError: names or shapes differ.
        """
        variables = [*self.student.variables, *self.optimizer.variables]
        names = list(self.state())
        if names != list(arrays):
            odd = sorted(set(names) ^ set(arrays))[:5]
            raise DataError(
                f"the checkpoint does not hold this model's variables; the first that differ: {', '.join(odd)}"
            )
        for variable, (name, array) in zip(variables, arrays.items(), strict=True):
            if tuple(variable.shape) != array.shape:
                raise DataError(
                    f"the checkpoint's {name} has shape {array.shape}; this model's has {tuple(variable.shape)}"
                )
            variable.assign(array)


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


def build(config: Config, accelerator: Accelerator, screen: Screen) -> Job:
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
        screen.say(f"warning: {line}")
    kinds = plan(config, accelerator, sets, held_out, screen)
    strategy, classes = accelerator.strategy, len(held_out.classes)
    with strategy.scope():
        loaded = teachers.load(config, classes)
        for teacher in loaded:
            for note in teacher.notes:
                screen.say(note)
            screen.say(
                f"teacher {teacher.name}: {teacher.model.count_params():,} parameters, {teacher.size} px, {teacher.value_range}"
            )
        student = students.build(
            config.student,
            classes,
            config.image_size,
            precision=config.precision,
            seed=config.seed,
            start=config.student_weights,
            root_pool=config.root_pool,
        )
        screen.say(f"student {config.student}: {student.count_params():,} parameters, {config.image_size} px")

    left_out: dict[str, list[Bad]] = {}

    def held(dataset: Dataset, flag: str, kind: str) -> Store:
        split = dataset.split(getattr(config, flag), flag)
        damage = Damage(dataset, split, config.max_bad_fraction)
        told = f"decode {split.name}" if kind != "disk" else f"copy and check {split.name}, bytes"

        def progress(done: int, total: int) -> None:
            screen.progress(told, done, total)

        made: Store
        if kind == "disk":
            made = DiskStore(dataset, split, config.store_size, open_cache(config), progress, damage=damage)
        else:
            made = MemoryStore(dataset, split, config.store_size, progress, damage)
        _say_damage(damage, split, screen)
        if damage.bad:
            left_out[split.name if len(sets) == 1 else f"{dataset.folder}, {split.name}"] = damage.bad
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
                screen.say(
                    f"the labels of {dataset.folder} are not used: its classes are not those of {held_out.folder}"
                )
    train = parts[0] if len(parts) == 1 else SeveralStores(parts)
    if config.distance in ("l2", "euclidean") and any(teacher.probabilities for teacher in loaded):
        raise ConfigError(
            f"--distance={config.distance} compares logits, and a teacher gives probabilities, which fix logits "
            "only up to a constant"
        )
    stores: dict[str, Store] = {}
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
        loaded = agreement.cheapen(
            config, loaded, train, native=accelerator.int8_convolutions, jit_compile=jit_compile, say=screen.say
        )
    targets: tuple[np.ndarray, ...] = ()
    if loaded and views.mode(config).fixed:
        asked = Evaluator(config, strategy, train, jit_compile=jit_compile)
        targets = fixed_targets(config, accelerator, asked, loaded, fingerprint(identity), screen)
    with strategy.scope():
        optimizer = optim.build(config, student.trainable_variables)
    resident = None
    if kinds[0] == "device":
        everything = train.images if isinstance(train, MemoryStore) else train.take(np.arange(len(train)))
        # Each of several machines has read the data itself; TensorFlow's broadcast between machines knows no uint8.
        with strategy.scope() if accelerator.workers == 1 else contextlib.nullcontext():
            images, sizes, labels = (tf.Variable(a, trainable=False) for a in (everything, train.sizes, train.labels))
            tables = tuple(tf.Variable(a, trainable=False) for a in targets)
            resident = distill.Data(images, sizes, labels, tables)
    run_steps = distill.make_loop(
        config,
        strategy,
        student,
        loaded,
        optimizer,
        resident,
        # Replicas that meet in a normalisation cannot do so inside a program that was compiled for one of them.
        jit_compile=jit_compile and not any(layer.synchronized for layer in students.batch_norms(student)),
        local=accelerator.local_replicas(),
    )
    feed = Feed(
        config, strategy.num_replicas_in_sync, accelerator.local_replicas(), None if resident else train, targets
    )
    order = Order(config.seed, [len(part) for part in parts], config.batch_size, config.data_weights)
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


def _say_damage(damage: Damage, split: Split, screen: Screen, most: int = 20) -> None:
    lines = damage.lines()
    for line in lines[:most]:
        screen.say(f"warning: left out: {line}")
    if lines:
        more = f"{len(lines) - most} more; " if len(lines) > most else ""
        screen.say(f"warning: {more}{len(lines)} of {split.examples:,} records of {split.name!r} are bad and left out")


def require_same_records(workdir: str, left_out: dict[str, list[Bad]]) -> None:
    """Writes down which records a run does without, once: the order of the others depends on it.

    Raises:
        DataError: an earlier process of this run did without others.
    """
    path = files.join(workdir, "left_out.json")
    text = json.dumps({name: [dataclasses.asdict(bad) for bad in bads] for name, bads in left_out.items()}, indent=1)
    if not files.exists(path):
        files.write(path, f"{text}\n".encode(), "the list of bad records")
    elif files.read(path, "the list of bad records").decode(errors="replace") != f"{text}\n":
        raise DataError(
            f"other records are bad now than when this run began ({path} lists those): it would not go on as it began. "
            "Mend the data, or take another --workdir"
        )


def plan(
    config: Config, accelerator: Accelerator, sets: tuple[Dataset, ...], held_out: Dataset, screen: Screen
) -> tuple[str, str]:
    """Where the images of training and of evaluation will be kept (`store.choose`), said in a line.

    Raises:
        DataError: there is no room for them, neither in memory nor on the disk; the line has the sizes.
    """
    train = [(dataset, dataset.split(config.train_split, "train_split")) for dataset in sets]
    names = dict.fromkeys((config.eval_split, config.final_split))
    others = [(held_out, held_out.splits[name]) for name in names]
    need, other = (sum(decoded_bytes(split, config.store_size) for _, split in group) for group in (train, others))
    kinds = choose(config.store, accelerator.image_bytes, free_memory(), need, other)
    on_disk = (train if kinds[0] == "disk" else []) + (others if kinds[1] == "disk" else [])
    if on_disk:
        cache = open_cache(config)
        found = cache.need(on_disk)
        if found.copies > found.room:
            raise DataError(
                f"the images take {(need + other) / 2**30:.2f} GiB decoded at {config.store_size} pixels, which is "
                f"not in memory (--store={config.store}), and {too_little(found, cache.folder)}"
            )
    if kinds != ("device", "host"):
        screen.say(f"{need / 2**30:.2f} GiB of training images at {config.store_size} pixels: store {kinds[0]}")
    return kinds


def open_cache(config: Config) -> Cache:
    """The cache of copies of shards that the configuration names."""
    return Cache(config.cache_dir or files.join(files.cache_folder(), "data"), int(config.cache_gb * 2**30))


def fixed_targets(
    config: Config,
    accelerator: Accelerator,
    evaluator: Evaluator,
    loaded: tuple[teachers.Teacher, ...],
    key: str,
    screen: Screen,
) -> tuple[np.ndarray, ...]:
    """For each teacher its constant output float32 [examples, classes]: the mean of its logits over the fixed views.

    The sum so far is kept in the workdir every `_KEEP_SECONDS` and when a signal stops the job, so that the same command goes on.

    Raises:
        Stopped: by a signal.
    """
    crops = config.fixed_crops if views.mode(config).teacher == "crops" else 1
    rehearsal = config.check or config.dry_run
    path = "" if rehearsal or not config.workdir else files.join(config.workdir, f"targets-{key[:16]}.npz")
    total, done = _kept_targets(path, screen)
    if rehearsal:
        crops = 1  # their mean is not used
    if done < crops:
        logits, kept = evaluator.fixed_logits(loaded), time.monotonic()
        with StopRequest() as stop:
            stopping = accelerator.any_worker(bool(stop.name))
            while done < crops and not stopping:
                total, done = total + logits(done).astype(np.float64), done + 1
                screen.progress("fixed targets", done, crops)
                stopping = accelerator.any_worker(bool(stop.name))
                if (
                    path
                    and accelerator.chief
                    and (done == crops or stopping or time.monotonic() > kept + _KEEP_SECONDS)
                ):
                    buffer = io.BytesIO()
                    np.savez(buffer, total=total, done=done)
                    files.write(path, buffer.getvalue(), "the fixed targets")
                    kept = time.monotonic()
        if done < crops:
            raise Stopped(
                f"stopped by {stop.name or _OTHER} after {done} of {crops} crops of the fixed targets: the same command goes on"
            )
    mean = (total / done).astype(np.float32)
    return tuple(np.ascontiguousarray(mean[:, number]) for number in range(len(loaded)))


def _kept_targets(path: str, screen: Screen) -> tuple[np.ndarray, int]:
    """The sum and the number of crops that an earlier process of this very run has kept, else nothing."""
    if path and files.exists(path):
        try:
            with np.load(io.BytesIO(files.read(path, "the fixed targets")), allow_pickle=False) as archive:
                return archive["total"], int(archive["done"])
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            screen.say(f"warning: {path} is damaged and is made again")
    return np.zeros(1), 0


def train(job: Job, journal: Journal, checkpoints: Checkpoints, screen: Screen) -> None:
    """Trains to the end of the run from its newest checkpoint.

    Raises:
        Diverged: a value that is not finite; the last good checkpoint is kept.
        Stopped: a signal asked for it; the state is saved.
    """
    config = job.config
    resume(job, journal, checkpoints, screen)
    meter, hardware = _Meter(job), job.accelerator
    if not hardware.same_on_all(job.step):
        raise DataError(
            f"this machine resumed at step {job.step} and another did not: --workdir must be one folder that all machines share"
        )

    def tell() -> None:
        for told in (journal.warnings, checkpoints.warnings):
            while told:
                screen.say(f"warning: {told.pop(0)}")

    with StopRequest() as stop, Background() as saving:
        stopping = hardware.any_worker(bool(stop.name))
        while job.step < config.steps and not stopping:
            saving.check()
            steps = job.until_due(job.step)
            metrics = job.advance(steps, job.order)
            job.pending.append((steps, metrics))
            note = meter.tick(steps, metrics)
            screen.progress("train", job.step, config.steps, note)
            last, better = job.step == config.steps, False
            if last or job.step % config.log_every == 0:
                journal.add("train", job.step, _mean(job.pending) | meter.row())
                job.pending.clear()
            if last or job.step % config.eval_every == 0:
                better = _note_best(job, evaluate(job, config.eval_split, "eval", journal, screen).metrics())
                meter.skip()
            # Asked once a turn, so that all machines, and saving and ending, go by the same answer.
            stopping = hardware.any_worker(bool(stop.name))
            if last or better or stopping or job.step % config.checkpoint_every == 0:
                save(job, journal, checkpoints, saving)
                meter.skip()
            tell()
        saving.wait()
    tell()
    screen.close()
    # Of several machines none goes on before the chief's last checkpoint is whole, nor alone after a late signal.
    if hardware.any_worker(stopping or bool(stop.name)):
        raise Stopped(
            f"stopped by {stop.name or _OTHER} at step {job.step} of {config.steps}; saved: the same command goes on"
        )


def resume(job: Job, journal: Journal, checkpoints: Checkpoints, screen: Screen) -> None:
    """Takes up the newest whole checkpoint, if there is one, and removes what a crash left behind.

    Raises:
        DataError: it belongs to another run, or all are damaged.
    """
    restored = checkpoints.restore()
    for line in checkpoints.passed_over:
        screen.say(f"warning: {line}")
    if restored is not None:
        job.load(restored.arrays)
        job.step, job.seconds = restored.step, restored.extra["seconds"]
        job.pending = [(steps, metrics) for steps, metrics in restored.extra["pending"]]
        best = restored.extra.get("best", {})
        job.best = best if best.get("by") == job.config.keep_best else {}
        if job.accelerator.chief:
            checkpoints.clean(job.step, job.best.get("step"))
        screen.say(f"resumed at step {job.step} of {job.config.steps}")
    journal.rewind(job.step)
    if job.accelerator.chief:
        files.remove_temporary(job.config.workdir)


def save(job: Job, journal: Journal, checkpoints: Checkpoints, saving: Background | None = None) -> None:
    """Commits the state: rows of metrics first, so that none is missing after a crash, then the state, then the commit.

    Args:
        saving: does all of it but the copy of the state into host memory; None: here, now.

    Of several machines the chief alone does.
    """
    if not job.accelerator.chief:
        return
    if saving is not None:
        saving.wait()  # one copy of the state at a time
    step, arrays, text, best = job.step, job.state(), journal.text(), dict(job.best)
    extra = {"seconds": job.seconds, "pending": list(job.pending), "best": best}

    def work() -> None:
        journal.write(text)
        checkpoints.save(step, arrays, extra, best.get("step"))

    if saving is None:
        work()
    else:
        saving.start(work)


def _note_best(job: Job, metrics: dict[str, float]) -> bool:
    """Whether these are the best so far by `--keep_best`; the first of equals is."""
    by = job.config.keep_best
    if by == "none" or not math.isfinite(metrics.get(by, math.nan)):
        return False
    sign = -1.0 if by == "kl" else 1.0
    if job.best and sign * metrics[by] <= sign * job.best["value"]:
        return False
    job.best = {"by": by, "value": metrics[by], "step": job.step}
    return True


def take_best(job: Job, checkpoints: Checkpoints) -> None:
    """Gives the job the weights of its best evaluation, for `--export_from=best`.

    Raises:
        DataError: no evaluation has been, or its checkpoint is not whole.
    """
    if not job.best:
        raise DataError(
            f"--export_from=best: {job.config.workdir} holds no checkpoint chosen by --keep_best={job.config.keep_best}: "
            "the run was made without that flag; give --export_from=last"
        )
    job.load(checkpoints.load(job.best["step"]).arrays)


def evaluate(job: Job, split: str, kind: str, journal: Journal, screen: Screen) -> Any:
    """Evaluates on one of the job's splits, writes a row, says it, and returns the `Outcome`."""
    outcome = job.evaluator(split).run(job.student, job.teachers)
    metrics = outcome.metrics()
    journal.add(kind, job.step, {"split": split} | metrics)
    if kind == "eval" and job.accelerator.chief and job.config.hp_metric in metrics:
        environment.report_metric(job.config.hp_metric, metrics[job.config.hp_metric], job.step)
    names = {"student_top1": "student", "teacher_top1": "teacher", "agreement_top1": "agreement"}
    told = ", ".join(f"{word} {100 * metrics[name]:.1f}%" for name, word in names.items() if name in metrics)
    screen.say(f"step {job.step}, {split} ({len(outcome.labels)} images): {told}")
    return outcome


def _mean(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    total = sum(steps for steps, _ in parts)
    return {name: sum(steps * values[name] for steps, values in parts) / total for name in parts[0][1]}


class _Meter:
    """Speed and time left; compilation, evaluation and saving do not count towards speed."""

    def __init__(self, job: Job) -> None:
        self._job, self._began, self._before = job, time.monotonic(), job.seconds
        self._mark, self._steps, self._seconds, self._warm = self._began, 0, 0.0, False

    def tick(self, steps: int, metrics: dict[str, float]) -> str:
        now = time.monotonic()
        if self._warm:
            self._steps, self._seconds = self._steps + steps, self._seconds + now - self._mark
        self._warm, self._mark = True, now
        self._job.seconds = self._before + now - self._began
        config, rate = self._job.config, self.images_per_second()
        left = (config.steps - self._job.step) * config.batch_size / rate if rate else 0.0
        speed = f", {rate:,.0f} images/s, {_clock(left)} left" if rate else ""
        return f"loss {metrics['loss']:.3f}, agreement {100 * metrics['agreement']:.0f}%{speed}"

    def skip(self) -> None:
        """Leaves the time since the last tick out."""
        self._mark = time.monotonic()

    def images_per_second(self) -> float:
        return self._steps * self._job.config.batch_size / self._seconds if self._seconds else 0.0

    def row(self) -> dict[str, float]:
        schedule = optim.schedule(self._job.config)
        return {
            "learning_rate": float(schedule(self._job.step - 1)),
            "images_per_second": self.images_per_second(),
            "wall_seconds": self._job.seconds,
        }


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def open_checkpoints(
    config: Config, identity: dict[str, Any], before_commit: Callable[[], None] = lambda: None
) -> Checkpoints:
    """The checkpoints of a run's workdir; `before_commit` raises where this process must not commit any more."""
    return Checkpoints(files.join(config.workdir, "checkpoints"), identity, config.keep_checkpoints, before_commit)


def open_run(job: Job, before_commit: Callable[[], None] = lambda: None) -> tuple[Journal, Checkpoints]:
    """The journal and the checkpoints of a job's workdir."""
    journal = Journal(job.config.workdir, job.config.tensorboard_dir, writes=job.accelerator.chief)
    return journal, open_checkpoints(job.config, job.identity, before_commit)
