"""The images of loops: the same from memory and disk, for any number of readers, shards, replicas and hosts."""

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
from trainer.run import build

PARTNERS = {"roll": {}, "reverse": {"compat": ("mixup",)}, "": {"views": "same/ic"}}


@pytest.fixture(scope="module")
def train(data: str) -> MemoryStore:
    dataset = Dataset.load(data)
    return MemoryStore(dataset, dataset.splits["train"], SIDE, lambda *_: None)


def run(config: Config, replicas: int = 1, loops: tuple[int, ...] = (2, 2, 2)) -> tuple[list[dict], list[np.ndarray]]:
    """Metrics of some loops, and the weights after them."""
    job = build_job(config, replicas)
    found = [job.advance(steps) for steps in loops]
    return found, [w.copy() for w in job.student.get_weights()]


def same(one: tuple, other: tuple) -> None:
    assert one[0] == other[0]
    assert all((a == b).all() for a, b in zip(one[1], other[1], strict=True))


def settings(**changes: object) -> Config:
    return Config(image_size=IMAGE, store_size=SIDE, batch_size=8, **changes)  # type: ignore[arg-type]


class Watched(ImageStore):
    """A store that remembers what was asked of it."""

    def __init__(self, inner: ImageStore) -> None:
        self.labels, self.sizes, self.classes, self.shape = inner.labels, inner.sizes, inner.classes, inner.shape
        self._inner, self.asked = inner, []

    def take(self, ids: np.ndarray) -> np.ndarray:
        self.asked.append(ids.copy())
        return self._inner.take(ids)


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_reads_its_rows_and_their_partners_only(train: MemoryStore, partner: str, hosts: int) -> None:
    """Four replicas on one, two or four hosts: each replica is given the same, and no host decodes a row of another."""
    config, order, share = settings(**PARTNERS[partner]), ExampleSampler(3, TRAIN, 8), 2
    assert views.mixup_partner(config) == partner
    ids = order.batches(5, 3)
    whole = BatchPrefetcher(config, 4, (0, 1, 2, 3), train).take(5, 3, order)[1]
    for host in range(hosts):
        local = tuple(range(4))[host * 4 // hosts : (host + 1) * 4 // hosts]
        watched = Watched(train)
        given = BatchPrefetcher(config, 4, local, watched).take(5, 3, order)[1]
        for replica, mine in zip(local, given, strict=True):
            own = np.arange(replica * share, (replica + 1) * share)
            rows = {"roll": [own[0] - 1, *own], "reverse": [*own, *(7 - own)], "": own}[partner]
            assert (mine[0].numpy() == train.images[ids[:, rows]]).all()
            assert (mine[1].numpy() == train.sizes[ids[:, rows]]).all()
            assert (mine[2].numpy() == train.labels[ids[:, rows]]).all()
            assert all((a.numpy() == b.numpy()).all() for a, b in zip(mine, whole[replica], strict=True))
        first, last = local[0] * share, (local[-1] + 1) * share
        own = set(range(first, last))
        partners = {"roll": {(first - 1) % 8}, "reverse": {7 - row for row in own}, "": set()}[partner]
        assert sorted(watched.asked[0]) == sorted(ids[:, sorted(own | partners)].ravel())


def test_one_replica_reads_each_row_once(train: MemoryStore) -> None:
    watched, order = Watched(train), ExampleSampler(0, TRAIN, 8)
    given = BatchPrefetcher(settings(), 1, (0,), watched).take(0, 2, order)[1]
    assert (watched.asked[0] == order.batches(0, 2).ravel()).all()
    assert given[0][0].shape == (2, 8, SIDE, SIDE, 3)
    assert streamed_rows(0, 1, 8, "roll").tolist() == list(range(8))


def test_the_next_loop_is_made_while_this_one_is_used(train: MemoryStore) -> None:
    """And what is made ahead for another place than the one asked for is not used."""

    class Gated(Watched):
        gate = threading.Event()

        def take(self, ids: np.ndarray) -> np.ndarray:
            assert self.gate.wait(30)
            return super().take(ids)

    held, order = Gated(train), ExampleSampler(0, TRAIN, 8)
    feed = BatchPrefetcher(settings(), 1, (0,), held)
    feed.prefetch(2, 1, order)  # returns at once, with the gate closed
    held.gate.set()
    deadline = time.monotonic() + 30
    while not held.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(held.asked) == 1, "nothing was made ahead"
    assert (feed.take(2, 1, order)[1][0][2].numpy() == train.labels[order.batches(2, 1)]).all()
    assert len(held.asked) == 1
    feed.prefetch(3, 1, order)
    assert (feed.take(7, 2, order)[1][0][2].numpy() == train.labels[order.batches(7, 2)]).all()


def test_a_loop_fits_into_memory(train: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    step = 8 * SIDE * SIDE * 3
    for free, most in ((8 * 5 * step, 5), (step, 1)):
        monkeypatch.setattr("trainer.method.feed.free_memory", lambda free=free: free)
        assert BatchPrefetcher(settings(), 1, (0,), train).max_steps == most
    assert BatchPrefetcher(settings(), 1, (0,)).max_steps == 0


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
    """And a run that is stopped goes on as one that is not, though the host had made another loop ahead."""
    config = make_config(cache_dir=str(tmp_path / "cache"), steps=6, warmup_steps=0, **changes)
    expected = run(dataclasses.replace(config, store="device"))
    if changes:
        same(expected, run(dataclasses.replace(config, store="host")))
    stopped, going = (
        build_job(dataclasses.replace(config, store="disk")),
        build_job(dataclasses.replace(config, store="disk")),
    )
    found = [stopped.advance(2), stopped.advance(2)]
    going.load(stopped.state())
    going.step = stopped.step
    found.append(going.advance(2))
    same(expected, (found, going.student.get_weights()))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"compat": ("mixup",), "jit_compile": "on"}])
def test_replicas_are_fed_their_own_rows(make_config: Callable[..., Config], changes: dict) -> None:
    """Two replicas with images that are streamed, and with images on the devices: the same to the bit."""
    config = make_config(steps=4, warmup_steps=0, **changes)
    same(
        run(dataclasses.replace(config, store="device"), 2, (2,)),
        run(dataclasses.replace(config, store="host"), 2, (2,)),
    )


def test_evaluation_reads_from_the_disk_too(make_config: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    outcomes = []
    for kind in ("device", "disk"):
        job = build_job(make_config(store=kind, cache_dir=str(tmp_path / "cache")))
        assert isinstance(job.stores["test"], DiskStore) == (kind == "disk")
        outcomes.append(job.evaluator("test").run(job.student, job.teachers))
    for one, other in zip(dataclasses.astuple(outcomes[0]), dataclasses.astuple(outcomes[1]), strict=True):
        assert (one == other).all()


def test_more_than_the_disk_is_refused_before_training_with_the_sizes(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("trainer.io.files.is_remote", lambda path: "/data" in path)
    monkeypatch.setattr("trainer.run.build.teachers.load", None)  # not reached
    config = make_config(store="disk", cache_dir=str(tmp_path / "cache"), cache_gb=1e-6)
    with pytest.raises(DataError) as error:
        build_job(config)
    told = str(error.value)
    assert "GiB decoded at 32 pixels" in told
    assert f"--cache_dir={tmp_path}/cache has room for 0.00 GiB: give a larger --cache_gb" in told
    assert "\n" not in told


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
    other = MemoryStore(dataset, dataset.splits["test"], SIDE, lambda *_: None)
    assert (both.take(ids) == np.concatenate([train.images, other.images])[ids]).all()
    assert (both.labels == np.concatenate([train.labels, other.labels])).all()
    assert len(both) == TRAIN + 23


def test_other_images_than_the_teachers(
    make_config: Callable[..., Config], data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set without classes and one with others are images without labels; what is measured is --eval_data alone."""
    made = Dataset.load(data)
    pictures = EncodedSplit(made, made.splits["train"])
    sets = []
    for name, classes, label in (("plain", (), -1), ("foreign", ("cat", "dog"), 1)):
        folder = str(tmp_path / name)
        several = [dataclasses.replace(pictures.record(k), label=label) for k in range(10 + 5 * len(classes))]
        split = dataset.Split("train", (records.write_shard(folder, "s", several),))
        Dataset(folder, name, classes, {"train": split}, {}).save()
        sets.append(folder)
    config = make_config(data=tuple(sets), eval_data=data, data_weights=(0.5, 1.5), steps=4, warmup_steps=0)
    job = build_job(config)
    assert (len(job.train), len(job.stores["test"])) == (30, 23)
    assert (job.train.labels == -1).all()
    assert (job.stores["test"].labels >= 0).all()
    assert f"the labels of {sets[1]} are not used" in capsys.readouterr().err
    assert job.student.output_shape[-1] == CLASSES
    assert np.isfinite(list(job.advance(2).values())).all()
    ids = job.order.batches(0, 200).ravel()
    assert 0.2 < (ids < 10).mean() < 0.3
    # Sets and shares are part of what a run is; another share is another run.
    identity = build.identify(config)[3]
    assert "weight 0.5; " in identity["data"]
    for change in ({"data_weights": (1.0, 1.0)}, {"data_weights": ()}, {"data": tuple(sets[::-1])}):
        assert build.identify(dataclasses.replace(config, **change))[3]["data"] != identity["data"]


def test_labels_of_other_classes_train_nobody(
    make_config: Callable[..., Config], data: str, tmp_path: pathlib.Path
) -> None:
    made = Dataset.load(data)
    shutil.copytree(data, tmp_path / "other")
    dataclasses.replace(made, folder=str(tmp_path / "other"), classes=made.classes[::-1]).save()
    config = make_config(data=str(tmp_path / "other"), eval_data=data, distance="labels", teacher=())
    with pytest.raises(DataError, match="or their names differ: both must name the same classes"):
        build.identify(config)
    dataclasses.replace(made, folder=str(tmp_path / "other"), classes=()).save()
    with pytest.raises(DataError, match="has no classes; evaluation needs labelled images: give --eval_data"):
        build.identify(make_config(data=str(tmp_path / "other")))
