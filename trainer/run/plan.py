"""The plan of a run: its resolved configuration, data and identity, before anything is built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.core import environment
from trainer.core.config import Config, fingerprint
from trainer.core.errors import ConfigError, DataError
from trainer.data.dataset import Dataset
from trainer.data.store import ImageStore
from trainer.io import files
from trainer.method.distances import DISTANCES
from trainer.models import students, teachers
from trainer.models.teachers import Teacher
from trainer.run.checkpoint import Checkpoints

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A run before it is built.

    Attributes:
        config: resolved: nothing in it depends on the data any more.
        train_sets: data sets to train on, in the order of `--data`.
        eval_set: data set to evaluate on; its classes are the student's. Empty until
            `name_classes` if the data has none: the teacher then gives them.
        identity: JSON value of all that decides the weights: configuration, data, teachers'
            checksums.
        run_id: SHA-256 (hex) of `identity`; a checkpoint or result of another run is refused.
        store_size_from: what set `config.store_size`: "flags", an earlier "start" of this run, or
            the "default", which `stores.fit_store_size` may raise.
    """

    config: Config
    train_sets: tuple[Dataset, ...]
    eval_set: Dataset
    identity: dict[str, Any]
    run_id: str
    store_size_from: str

    def with_store_size(self, side: int) -> RunPlan:
        """The plan with images kept as squares of another side in pixels."""
        identity = self.identity | {"store_size": side}
        config = dataclasses.replace(self.config, store_size=side)
        return dataclasses.replace(self, config=config, identity=identity, run_id=fingerprint(identity))

    def record(self) -> None:
        """Writes config.json: all options and the identity, for people and for later starts.

        Raises:
            DataError: it cannot be written.
        """
        value = {"config": self.config.to_dict(), "identity": self.identity}
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        files.write(files.join(self.config.workdir, CONFIG_FILE), text.encode(), "the configuration")

    @property
    def classes(self) -> int:
        """Number of classes of the student; 0: as many as its teacher has, once that is loaded."""
        return len(self.eval_set.classes)

    def name_classes(self, count: int) -> RunPlan:
        """The plan with the teacher's classes, numbered from 0, where the data names none."""
        if self.eval_set.classes:
            return self
        names = tuple(f"class {number}" for number in range(count))
        return dataclasses.replace(self, eval_set=dataclasses.replace(self.eval_set, classes=names))


def make_plan(config: Config) -> RunPlan:
    """Reads the indices of the data sets and the bytes of the teachers' files; builds nothing.

    Args:
        config: as the user gave it.

    Raises:
        ConfigError: two flags do not fit together once the number of examples is known.
        DataError: a data set, split or teacher is missing, or breaks a rule of `check_data`.
    """
    train_sets = tuple(Dataset.load(folder) for folder in config.data)
    eval_set = Dataset.load(config.eval_data, "eval_data") if config.eval_data else train_sets[0]
    check_data(config, train_sets, eval_set)
    splits = [dataset.split(config.train_split, "train_split") for dataset in train_sets]
    given = config.store_size or config.resize_size
    config = config.resolve(sum(split.examples for split in splits))
    data = [f"{split.name}: {split.examples} examples, {split.crc32c}" for split in splits]
    if config.data_weights:
        data = [f"{text}, weight {weight:g}" for text, weight in zip(data, config.data_weights, strict=True)]
    identity = config.identity() | {
        # A file is identified by its checksum, not by its path.
        "student": "keras" if config.student.startswith("keras:") else config.student,
        "classes": len(eval_set.classes),
        "data": "; ".join(data),
        "teacher": [teachers.checksum(config, name) for name in config.teacher],
        "student_files": students.checksums(config.student, config.student_weights),
    }
    plan = RunPlan(config, train_sets, eval_set, identity, fingerprint(identity), "flags" if given else "default")
    side = 0 if given else _earlier_store_size(plan)
    return dataclasses.replace(plan.with_store_size(side), store_size_from="start") if side else plan


def _earlier_store_size(plan: RunPlan) -> int:
    """The store size that an earlier start of this run chose; 0: there was none.

    The choice depends on the memory that was free then, so it is read and never made again. A
    checkpoint decides, whatever the other flags, so that only the flags that differ are reported.
    Without a checkpoint config.json decides, if it is of this very run.

    Raises:
        DataError: the workdir cannot be read now.
    """
    workdir = plan.config.workdir
    if not workdir:
        return 0
    saved = Checkpoints.saved_identity(files.join(workdir, "checkpoints"))
    path = files.join(workdir, CONFIG_FILE)
    if not saved and files.exists(path):
        try:
            saved = json.loads(files.read(path, "the configuration"))["identity"]
        except (ValueError, KeyError, TypeError):  # it is written again
            return 0
        if not isinstance(saved, dict) or saved != plan.identity | {"store_size": saved.get("store_size")}:
            return 0
    side = saved.get("store_size")
    return side if isinstance(side, int) and side > 0 else 0


def check_data(config: Config, train_sets: Sequence[Dataset], eval_set: Dataset) -> None:
    """Checks the data sets against the configuration and each other, by their indices alone.

    Args:
        config: as the user gave it.
        train_sets: data sets to train on.
        eval_set: data set to evaluate on.

    Raises:
        DataError: a split is missing or empty, or the data sets of `--distance=labels` name no
            classes, or not the same.
    """
    for dataset in train_sets:
        dataset.split(config.train_split, "train_split")
    if set(eval_set.splits) == {config.train_split} and config.train_split not in (
        config.eval_split,
        config.final_split,
    ):
        raise DataError(
            f"{eval_set.folder} has only the split {config.train_split!r}, and no images to evaluate on "
            f"(--eval_split={config.eval_split}, --final_split={config.final_split}): prepare it with "
            "--splits=train:0.8,validation:0.1,test:0.1, or give --eval_data"
        )
    for flag in ("eval_split", "final_split"):
        eval_set.split(getattr(config, flag), flag)
    if DISTANCES[config.distance].needs_teacher:
        return
    for dataset in (eval_set, *train_sets):
        if not dataset.classes:
            raise DataError(
                f"--distance={config.distance} needs labels, and {dataset.folder} has none: prepare it with labels, "
                "or distil with a --teacher, which needs none"
            )
    for dataset in train_sets:
        if dataset.classes != eval_set.classes:
            raise DataError(
                f"--distance={config.distance}: {eval_set.folder} has {len(eval_set.classes)} classes and "
                f"--data={dataset.folder} has {len(dataset.classes)}, or their names differ: "
                "both must name the same classes in the same order"
            )


def check_labels(plan: RunPlan, train_stores: Sequence[ImageStore], eval_labels: np.ndarray) -> None:
    """Checks the labels that the configuration needs, once the records have been read.

    Args:
        plan: of the run.
        train_stores: images of each training set, in the order of `--data`.
        eval_labels: int32 [examples] of `--eval_split`, -1 where there is none.

    Raises:
        DataError: `--distance=labels`, and an image has no label.
        ConfigError: no image of `--eval_split` has a label, and `--keep_best` or, in a
            hyperparameter study, `--hp_metric` is an accuracy.
    """
    config = plan.config
    for dataset, store in zip(plan.train_sets, train_stores, strict=True):
        if not DISTANCES[config.distance].needs_teacher and (store.labels < 0).any():
            raise DataError(
                f"--distance={config.distance}, but {config.train_split} of {dataset.folder} has images without labels"
            )
    if (eval_labels >= 0).any():
        return
    for flag, needed in (("keep_best", True), ("hp_metric", environment.reports_metrics())):
        value = getattr(config, flag)
        if needed and value.startswith("student_"):
            raise ConfigError(f"--{flag}={value}, but {config.eval_split} has no labels: choose agreement_top1 or kl")


def check_teachers(plan: RunPlan, loaded: Sequence[Teacher]) -> None:
    """Checks that the teachers' outputs fit the distance.

    Args:
        plan: of the run.
        loaded: its teachers.

    Raises:
        ConfigError: the distance compares logits, and a teacher gives probabilities.
    """
    distance = plan.config.distance
    if DISTANCES[distance].compares_logits and any(teacher.probabilities for teacher in loaded):
        raise ConfigError(
            f"--distance={distance} compares logits, and a teacher gives probabilities, which fix logits "
            "only up to a constant"
        )
