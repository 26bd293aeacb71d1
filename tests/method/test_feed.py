"""The inputs of loops: the same from device, memory and disk, for any number of replicas and
hosts.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import CLASSES, IMAGE, SIDE, TRAIN, build_job

from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.data import dataset, records
from trainer.data.cache import Cache
from trainer.data.dataset import Dataset
from trainer.data.memory import choose_stores
from trainer.data.order import ExampleSampler
from trainer.data.records import EncodedSplit
from trainer.data.store import ConcatenatedStore, DiskStore, ImageStore, MemoryStore
from trainer.method import views
from trainer.method.feed import BatchPrefetcher, streamed_rows
from trainer.run.plan import make_plan

CHANGES_BY_PARTNER = {"roll": {}, "reverse": {"compat": ("mixup",)}, "": {"views": "same/ic"}}


@pytest.fixture(scope="module")
def train(data: str) -> MemoryStore:
    dataset = Dataset.load(data)
    return MemoryStore(dataset, dataset.splits["train"], SIDE, lambda *_: None)


def run(config: Config, replicas: int = 1, loops: tuple[int, ...] = (2, 2, 2)) -> tuple[list[dict], list[np.ndarray]]:
    """Metrics of some loops, and the weights after them."""
    job = build_job(config, replicas)
    metrics = [job.run_steps(steps) for steps in loops]
    return metrics, [w.copy() for w in job.student.get_weights()]


def assert_same(actual: tuple, expected: tuple) -> None:
    """Compares what `run` returns."""
    assert actual[0] == expected[0]
    assert all((a == b).all() for a, b in zip(actual[1], expected[1], strict=True))


def small_config(**changes: object) -> Config:
    return Config(image_size=IMAGE, store_size=SIDE, batch_size=8, **changes)  # type: ignore[arg-type]


class RecordingStore(ImageStore):
    """Keeps the ids of each `take`."""

    def __init__(self, inner: ImageStore) -> None:
        self.labels, self.sizes, self.classes, self.shape = inner.labels, inner.sizes, inner.classes, inner.shape
        self._inner, self.taken = inner, []

    def take(self, ids: np.ndarray) -> np.ndarray:
        self.taken.append(ids.copy())
        return self._inner.take(ids)


@pytest.mark.parametrize("partner", CHANGES_BY_PARTNER)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_reads_its_rows_and_their_partners_only(train: MemoryStore, partner: str, hosts: int) -> None:
    """Four replicas on one, two or four hosts: each gets the same, and no host decodes more."""
    config, sampler = small_config(**CHANGES_BY_PARTNER[partner]), ExampleSampler(3, TRAIN, 8)
    assert views.mixup_partner(config) == partner
    ids = sampler.batches(5, 3)
    one_host = BatchPrefetcher(config, 4, (0, 1, 2, 3), train).take(5, 3, sampler)[1]
    for host in range(hosts):
        local_replicas = tuple(range(4))[host * 4 // hosts : (host + 1) * 4 // hosts]
        store = RecordingStore(train)
        streamed = BatchPrefetcher(config, 4, local_replicas, store).take(5, 3, sampler)[1]
        for replica, tables in zip(local_replicas, streamed, strict=True):
            own = np.arange(replica * 2, (replica + 1) * 2)
            rows = {"roll": [own[0] - 1, *own], "reverse": [*own, *(7 - own)], "": own}[partner]
            assert (tables[0].numpy() == train.images[ids[:, rows]]).all()
            assert (tables[1].numpy() == train.sizes[ids[:, rows]]).all()
            assert (tables[2].numpy() == train.labels[ids[:, rows]]).all()
            assert all((a.numpy() == b.numpy()).all() for a, b in zip(tables, one_host[replica], strict=True))
        first, last = local_replicas[0] * 2, (local_replicas[-1] + 1) * 2
        own_rows = set(range(first, last))
        partners = {"roll": {(first - 1) % 8}, "reverse": {7 - row for row in own_rows}, "": set()}[partner]
        assert sorted(store.taken[0]) == sorted(ids[:, sorted(own_rows | partners)].ravel())


def test_one_replica_reads_each_row_once(train: MemoryStore) -> None:
    store, sampler = RecordingStore(train), ExampleSampler(0, TRAIN, 8)
    streamed = BatchPrefetcher(small_config(), 1, (0,), store).take(0, 2, sampler)[1]
    assert (store.taken[0] == sampler.batches(0, 2).ravel()).all()
    assert streamed[0][0].shape == (2, 8, SIDE, SIDE, 3)
    assert streamed_rows(0, 1, 8, "roll").tolist() == list(range(8))


def test_the_next_loop_is_loaded_while_this_one_runs(train: MemoryStore) -> None:
    """And what was prefetched for other steps than those taken is dropped."""

    class GatedStore(RecordingStore):
        gate = threading.Event()

        def take(self, ids: np.ndarray) -> np.ndarray:
            assert self.gate.wait(30)
            return super().take(ids)

    store, sampler = GatedStore(train), ExampleSampler(0, TRAIN, 8)
    feed = BatchPrefetcher(small_config(), 1, (0,), store)
    feed.prefetch(2, 1, sampler)  # returns at once, with the gate closed
    store.gate.set()
    deadline = time.monotonic() + 30
    while not store.taken and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(store.taken) == 1, "nothing was prefetched"
    assert (feed.take(2, 1, sampler)[1][0][2].numpy() == train.labels[sampler.batches(2, 1)]).all()
    assert len(store.taken) == 1
    feed.prefetch(3, 1, sampler)
    assert (feed.take(7, 2, sampler)[1][0][2].numpy() == train.labels[sampler.batches(7, 2)]).all()


def test_a_loop_fits_into_memory(train: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    step_bytes = 8 * SIDE * SIDE * 3
    for free, max_steps in ((8 * 5 * step_bytes, 5), (step_bytes, 1)):
        monkeypatch.setattr("trainer.method.feed.free_memory", lambda free=free: free)
        assert BatchPrefetcher(small_config(), 1, (0,), train).max_steps == max_steps
    assert BatchPrefetcher(small_config(), 1, (0,)).max_steps == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"compat": ("keras_example",)}, marks=pytest.mark.slow),
        pytest.param({"views": "fix/ic_ens", "fixed_crops": 3}, marks=pytest.mark.slow),
        pytest.param({"distance": "labels", "teacher": ()}, marks=pytest.mark.slow),
        pytest.param({"jit_compile": "on"}, marks=pytest.mark.slow),
    ],
)
def test_all_stores_give_the_same_weights_to_the_bit(
    make_config: Callable[..., Config], tmp_path: pathlib.Path, changes: dict
) -> None:
    """And a run that stops and resumes ends as one that does not, despite the prefetched loop."""
    config = make_config(cache_dir=str(tmp_path / "cache"), steps=6, warmup_steps=0, **changes)
    expected = run(dataclasses.replace(config, store="device"))
    if changes:
        assert_same(expected, run(dataclasses.replace(config, store="host")))
    config = dataclasses.replace(config, store="disk")
    stopped, resumed = build_job(config), build_job(config)
    metrics = [stopped.run_steps(2), stopped.run_steps(2)]
    resumed.load(stopped.state())
    resumed.step = stopped.step
    metrics.append(resumed.run_steps(2))
    assert_same((metrics, resumed.student.get_weights()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"compat": ("mixup",), "jit_compile": "on"}])
def test_streamed_rows_give_the_same_weights_as_resident_ones(
    make_config: Callable[..., Config], changes: dict
) -> None:
    """On two replicas, to the bit."""
    config = make_config(steps=4, warmup_steps=0, **changes)
    assert_same(
        run(dataclasses.replace(config, store="device"), 2, (2,)),
        run(dataclasses.replace(config, store="host"), 2, (2,)),
    )


def test_evaluation_reads_from_the_disk_too(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    results = []
    for kind in ("device", "disk"):
        job = build_job(make_config(store=kind, cache_dir=str(tmp_path / "cache")))
        assert isinstance(job.eval_stores["test"], DiskStore) == (kind == "disk")
        results.append(job.evaluator("test").run(job.student, job.teachers))
    for name in ("labels", "student_logits", "teacher_logits"):
        assert (getattr(results[0], name) == getattr(results[1], name)).all(), name


def test_data_larger_than_the_disk_is_refused_before_training(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("trainer.io.files.is_remote", lambda path: "/data" in path)
    monkeypatch.setattr("trainer.run.build.teachers.load", None)  # not reached
    config = make_config(store="disk", cache_dir=str(tmp_path / "cache"), cache_gb=1e-6)
    with pytest.raises(DataError) as error:
        build_job(config)
    message = str(error.value)
    assert "GiB decoded at 32 pixels" in message
    assert f"--cache_dir={tmp_path}/cache has room for 0.00 GiB: give a larger --cache_gb" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "device", "memory", "train", "held_out", "expected"),
    [
        ("auto", 100, 1000, 100, 50, ("device", "host")),
        ("auto", 99, 1000, 100, 50, ("host", "host")),
        ("auto", 1 << 60, 350, 100, 50, ("host", "host")),  # on the device it would be in memory twice
        ("auto", 1 << 60, 200, 100, 50, ("disk", "host")),
        ("auto", 1 << 60, 130, 100, 50, ("disk", "disk")),
        ("device", 0, 0, 100, 50, ("device", "host")),
        ("host", 1 << 60, 0, 100, 50, ("host", "host")),
        ("disk", 1 << 60, 1 << 60, 100, 50, ("disk", "disk")),
    ],
)
def test_the_first_store_with_room_is_chosen(
    kind: str, device: int, memory: int, train: int, held_out: int, expected: tuple
) -> None:
    assert choose_stores(kind, device, memory, train, held_out) == expected


def test_several_sets_are_one_after_the_other(train: MemoryStore, data: str, tmp_path: pathlib.Path) -> None:
    dataset = Dataset.load(data)
    disk = DiskStore(dataset, dataset.splits["test"], SIDE, Cache(str(tmp_path)), lambda *_: None)
    both = ConcatenatedStore([train, disk])
    ids = np.random.default_rng(0).permutation(TRAIN + 23)
    test = MemoryStore(dataset, dataset.splits["test"], SIDE, lambda *_: None)
    assert (both.take(ids) == np.concatenate([train.images, test.images])[ids]).all()
    assert (both.labels == np.concatenate([train.labels, test.labels])).all()
    assert len(both) == TRAIN + 23


def test_sets_with_other_classes_or_none_train_without_labels(
    make_config: Callable[..., Config], data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their labels are not used; evaluation uses --eval_data alone."""
    source = Dataset.load(data)
    encoded = EncodedSplit(source, source.splits["train"])
    sets = []
    for name, classes, label in (("plain", (), -1), ("foreign", ("cat", "dog"), 1)):
        folder = str(tmp_path / name)
        images = [dataclasses.replace(encoded.record(k), label=label) for k in range(10 + 5 * len(classes))]
        split = dataset.Split("train", (records.write_shard(folder, "s", images),))
        Dataset(folder, name, classes, {"train": split}, {}).save()
        sets.append(folder)
    config = make_config(data=tuple(sets), eval_data=data, data_weights=(0.5, 1.5), steps=4, warmup_steps=0)
    job = build_job(config)
    assert (len(job.train_store), len(job.eval_stores["test"])) == (30, 23)
    assert (job.train_store.labels == -1).all()
    assert (job.eval_stores["test"].labels >= 0).all()
    assert f"the labels of {sets[1]} are not used" in capsys.readouterr().err
    assert job.student.output_shape[-1] == CLASSES
    assert np.isfinite(list(job.run_steps(2).values())).all()
    ids = job.sampler.batches(0, 200).ravel()
    assert 0.2 < (ids < 10).mean() < 0.3
    # Sets and their weights are part of the identity: other weights are another run.
    identity = make_plan(config).identity
    assert "weight 0.5; " in identity["data"]
    for change in ({"data_weights": (1.0, 1.0)}, {"data_weights": ()}, {"data": tuple(sets[::-1])}):
        assert make_plan(dataclasses.replace(config, **change)).identity["data"] != identity["data"]


def test_distance_to_labels_refuses_a_set_with_other_classes(
    make_config: Callable[..., Config], data: str, tmp_path: pathlib.Path
) -> None:
    source = Dataset.load(data)
    shutil.copytree(data, tmp_path / "other")
    dataclasses.replace(source, folder=str(tmp_path / "other"), classes=source.classes[::-1]).save()
    config = make_config(data=str(tmp_path / "other"), eval_data=data, distance="labels", teacher=())
    with pytest.raises(DataError, match="or their names differ: both must name the same classes"):
        make_plan(config)
    dataclasses.replace(source, folder=str(tmp_path / "other"), classes=()).save()
    with pytest.raises(DataError, match=r"--distance=labels needs labels, and .*other has none"):
        make_plan(config)
