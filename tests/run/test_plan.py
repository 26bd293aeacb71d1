"""The plan of a run: it is made once; rules about data and teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from conftest import RecordingConsole

from trainer import task
from trainer.core.config import Config, fingerprint
from trainer.core.errors import ConfigError, DataError
from trainer.data.dataset import Dataset
from trainer.data.store import ImageStore
from trainer.models import teachers
from trainer.run.plan import check_data, check_labels, make_plan


def test_plan_reads_each_dataset_and_teacher_once(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    checksum, load = teachers.checksum, Dataset.load

    def counted_checksum(config: Config, name: str) -> str:
        calls.append("checksum")
        return checksum(config, name)

    def counted_load(folder: str, flag: str = "data") -> Dataset:
        calls.append("load")
        return load(folder, flag)

    monkeypatch.setattr(teachers, "checksum", counted_checksum)
    monkeypatch.setattr(Dataset, "load", counted_load)
    task.run(make_config(dry_run=True), RecordingConsole())
    assert sorted(calls) == ["checksum", "load"]


def test_run_id_is_the_fingerprint_of_the_identity(make_config: Callable[..., Config]) -> None:
    plan = make_plan(make_config())
    assert plan.run_id == fingerprint(plan.identity)
    assert plan.config.eval_batch_size == 10
    assert plan.classes == len(plan.eval_set.classes) == 5
    assert make_plan(make_config(temperature=3.0)).run_id != plan.run_id


def test_classes_must_match_when_training_with_labels(data: str) -> None:
    train = Dataset.load(data)
    reordered = dataclasses.replace(train, classes=tuple(reversed(train.classes)))
    config = Config(data=(data,), distance="labels", steps=1)
    check_data(config, [train], train)
    with pytest.raises(DataError, match="same classes in the same order"):
        check_data(config, [train], reordered)


def test_only_training_with_labels_needs_classes(data: str) -> None:
    unlabelled = dataclasses.replace(Dataset.load(data), classes=())
    check_data(Config(data=(data,), steps=1), [unlabelled], unlabelled)
    with pytest.raises(DataError, match=r"--distance=labels needs labels, and .* has none"):
        check_data(Config(data=(data,), distance="labels", steps=1), [unlabelled], unlabelled)


def test_a_set_with_nothing_to_evaluate_on_says_how_to_split_it(data: str) -> None:
    dataset = Dataset.load(data)
    whole = dataclasses.replace(dataset, splits={"train": dataset.splits["train"]})
    message = (
        r"has only the split 'train'.*prepare it with --splits=train:0.8,validation:0.1,test:0.1, or give --eval_data"
    )
    with pytest.raises(DataError, match=message):
        check_data(Config(data=(data,), steps=1), [whole], whole)
    check_data(Config(data=(data,), eval_split="train", final_split="train", steps=1), [whole], whole)
    with pytest.raises(DataError, match="has no split 'dev'"):
        check_data(Config(data=(data,), eval_split="dev", steps=1), [dataset], dataset)


def test_an_accuracy_cannot_choose_without_labels(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, nothing = make_plan(make_config()), np.full(3, -1, np.int32)
    stores = [ImageStore()]
    stores[0].labels = nothing
    check_labels(plan, stores, nothing)
    best = make_plan(make_config(keep_best="student_top1"))
    with pytest.raises(
        ConfigError, match="--keep_best=student_top1, but validation has no labels: choose agreement_top1"
    ):
        check_labels(best, stores, nothing)
    check_labels(best, stores, np.array([-1, 0, -1], np.int32))
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "3")
    with pytest.raises(
        ConfigError, match="--hp_metric=student_top1, but validation has no labels: choose agreement_top1"
    ):
        check_labels(plan, stores, nothing)
    check_labels(make_plan(make_config(hp_metric="kl")), stores, nothing)


def test_missing_labels_are_an_error(make_config: Callable[..., Config]) -> None:
    from conftest import build_job

    from trainer.data import store

    class Unlabelled(store.MemoryStore):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            self.labels[:] = -1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.stores.MemoryStore", Unlabelled)
        with pytest.raises(ConfigError, match="--keep_best=student_top1, but validation has no labels"):
            build_job(make_config(keep_best="student_top1"))
        with pytest.raises(DataError, match="has images without labels"):
            build_job(make_config(distance="labels", teacher=()))
