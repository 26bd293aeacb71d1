"""The automatic size of stored images: chosen once for a run, by what its crops need and memory."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import shutil
import threading
from collections.abc import Callable

import numpy as np
import pytest
from conftest import CLASSES, IMAGE, RecordingConsole, silent, strategy

from trainer import task
from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.ingest.synthetic_source import write_synthetic_dataset
from trainer.method import fidelity
from trainer.run import stores
from trainer.run.accelerator import Accelerator
from trainer.run.build import open_checkpoints
from trainer.run.plan import RunPlan, make_plan

PHOTO = 160  # pixels; a crop of 5 % has 36, and a square of 48 pixels keeps 11 of them
DEVICE = ("device", "host")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set whose images have many more pixels than a square of twice the view."""
    out = str(tmp_path_factory.mktemp("data") / "photographs")
    write_synthetic_dataset(out, 0, CLASSES, PHOTO, {"train": 16, "validation": 5, "test": 5}, silent)
    return out


@pytest.fixture
def automatic(make_config: Callable[..., Config], photographs: str) -> Callable[..., Config]:
    """`make_config` with these photographs and the automatic size."""

    def make(**changes: object) -> Config:
        return make_config(**({"data": photographs, "store_size": 0, "steps": 4, "eval_every": 4} | changes))

    return make


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that a run finds free, in bytes."""

    def give(size: int) -> None:
        monkeypatch.setattr(stores, "free_memory", lambda: size)

    give(1 << 40)
    return give


def fit(
    plan: RunPlan, kinds: tuple[str, str] = DEVICE, view: int = IMAGE, kind: str = "CPU", macs: float = math.inf
) -> int:
    """The size that a run takes."""
    accelerator = Accelerator(strategy(1), kind, 10)
    return stores.fit_store_size(plan, kinds, [view], accelerator, lambda: macs).config.store_size


def needed(side: int) -> int:
    """Free memory in which the device's and the host's copy of the images have room."""
    return int((2 * 16 + 10) * side * side * 3 / 0.7) + 1


def test_a_new_run_takes_what_its_crops_need(automatic: Callable[..., Config]) -> None:
    plan = make_plan(automatic(workdir=""))
    assert (plan.config.store_size, plan.store_size_from) == (2 * IMAGE, "default")
    whole = fit(plan)
    assert whole % (IMAGE // 2) == 0
    assert 4 * IMAGE < whole < PHOTO
    assert fit(plan, view=IMAGE // 2) < whole  # no teacher, and no student, looks closer
    for changes in ({"views": "fix/rs"}, {"compat": ("keras_example",)}, {"min_crop_area": 1.0}):
        assert fit(make_plan(automatic(workdir="", **changes))) == 2 * IMAGE, changes


def test_memory_limits_the_size(automatic: Callable[..., Config], free: Callable[[int], None]) -> None:
    plan = make_plan(automatic(workdir=""))
    for side in (48, 60, 84):
        free(needed(side))
        assert fit(plan) == side
        free(needed(side) - 2)
        assert fit(plan) == max(48, side - 12)


def test_the_models_operations_limit_the_size(automatic: Callable[..., Config]) -> None:
    """Views are two products of matrices: [24, 60] x [60, 60 x 3], then [24, 60] x [60, 24 x 3]."""
    plan = make_plan(automatic(workdir=""))
    views = 24 * 60 * 60 * 3 + 24 * 60 * 24 * 3
    assert fidelity.view_macs(60, [24, 24]) == views
    assert fit(plan, macs=4 * views) == 60
    assert fit(plan, macs=4 * views - 1) == 2 * IMAGE
    assert fit(plan, macs=0) == 2 * IMAGE


def test_images_that_are_sent_or_decoded_at_each_step_stay_small(
    automatic: Callable[..., Config], free: Callable[[int], None]
) -> None:
    plan = make_plan(automatic(workdir=""))
    assert fit(plan, ("disk", "host")) == fit(plan, ("disk", "disk")) == 2 * IMAGE
    assert fit(plan, ("host", "host"), kind="GPU") == 2 * IMAGE
    assert fit(plan, ("host", "host")) == fit(plan, DEVICE, kind="GPU") == fit(plan)
    # A store that the user chose does not outgrow the memory either.
    free(needed(60))
    assert fit(make_plan(automatic(workdir="", store="device"))) == 60


def test_a_given_size_is_taken_as_it_is(automatic: Callable[..., Config]) -> None:
    for changes in ({"store_size": 40}, {"resize_size": 40}):
        plan = make_plan(automatic(workdir="", **changes))
        assert (plan.store_size_from, fit(plan)) == ("flags", 40)


def test_a_run_keeps_its_size(
    automatic: Callable[..., Config], free: Callable[[int], None], tmp_path: pathlib.Path
) -> None:
    """Whatever memory is free later: else only the first machine could resume it."""
    config, workdir = automatic(steps=1), tmp_path / "run"
    free(needed(60))
    console = RecordingConsole()
    result = task.run(config, console)
    assert any(line.startswith("images are kept at 60 x 60 pixels: ") for line in console.lines), console.lines
    free(1 << 40)
    assert task.run(config, RecordingConsole()) == result  # finished
    shutil.copytree(workdir, tmp_path / "copy")
    (workdir / "config.json").unlink()
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    for folder in ("run", "copy"):  # with the checkpoints alone, and with config.json alone
        plan = make_plan(automatic(steps=1, workdir=str(tmp_path / folder)))
        assert (plan.store_size_from, plan.config.store_size, fit(plan)) == ("start", 60, 60)
        assert plan.run_id == result["fingerprint"]
    # Only the flags that differ are reported.
    with pytest.raises(DataError, match=r"another run \(seed: 0 there, 1 here\)"):
        open_checkpoints(make_plan(automatic(steps=1, seed=1))).require_same_run()


def test_a_start_without_a_checkpoint_decides_too(
    automatic: Callable[..., Config], free: Callable[[int], None], tmp_path: pathlib.Path
) -> None:
    """Targets of a thousand fixed crops are saved for hours before the first checkpoint."""
    config, path = automatic(), tmp_path / "run" / "config.json"
    free(needed(60))
    assert fit(make_plan(dataclasses.replace(config, dry_run=True))) == 60
    assert not path.exists()
    assert fit(make_plan(config)) == 60
    free(1 << 40)
    plan = make_plan(config)
    assert (plan.store_size_from, plan.config.store_size, fit(plan)) == ("start", 60, 60)
    # The file of another run, or what is left of one, decides nothing.
    assert make_plan(automatic(seed=1)).store_size_from == "default"
    for text in ("{", "[]", '{"identity": 3}', '{"identity": {}}'):
        path.write_text(text)
        assert make_plan(config).store_size_from == "default", text


def test_a_run_of_twice_the_view_resumes(automatic: Callable[..., Config]) -> None:
    """Runs of version 0.1, whose default was that."""
    old = make_plan(automatic(store_size=2 * IMAGE))
    open_checkpoints(old).save(2, {}, {})
    plan = make_plan(automatic())
    assert plan.identity == old.identity
    assert fit(plan) == 2 * IMAGE
    restored = open_checkpoints(plan).restore()
    assert restored is not None
    assert restored.step == 2


def test_a_damaged_commit_does_not_hide_an_older_one(automatic: Callable[..., Config], tmp_path: pathlib.Path) -> None:
    checkpoints = open_checkpoints(make_plan(automatic(store_size=60)))
    for step in (2, 4):
        checkpoints.save(step, {}, {})
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-0000000004.json"
    for text in ("{", "[]", "{}", '{"identity": 3}'):
        newest.write_text(text)
        assert make_plan(automatic()).config.store_size == 60, text


def test_the_share_of_blurred_crops_is_printed(automatic: Callable[..., Config]) -> None:
    sizes = np.full((16, 2), PHOTO, np.float32)

    def printed(kinds: tuple[str, str] = DEVICE, **changes: object) -> list[str]:
        console = RecordingConsole()
        stores.print_fidelity(make_plan(automatic(workdir="", **changes)), kinds, sizes, IMAGE, console)
        return console.lines

    (line,) = printed(store_size=2 * IMAGE)
    assert re.fullmatch(
        r"images are kept at 48 x 48 pixels: 4\d% of training crops are blurrier than from the full-size images; "
        r"--store_size=120 makes it [01]%, needs 0.00 GiB decoded",
        line,
    ), line
    assert printed(store_size=PHOTO) == []
    (line,) = printed(("disk", "disk"), store_size=2 * IMAGE)
    assert line.endswith("needs 6.2 times the pixels for each image that is decoded")
    (line,) = printed(store_size=108)
    assert re.search(r"pixels: \d% of .* --store_size=120 makes", line), line


def test_a_run_takes_what_all_machines_have_room_for(automatic: Callable[..., Config]) -> None:
    class Pair(Accelerator):
        """Two machines, the other with less memory."""

        def least_of_all(self, value: int) -> int:
            return min(value, 60)

    plan = stores.fit_store_size(make_plan(automatic()), DEVICE, [IMAGE], Pair(strategy(1), "CPU", 10))
    assert plan.config.store_size == plan.identity["store_size"] == 60
    assert plan.run_id == make_plan(automatic(store_size=60)).run_id


def test_machines_agree_on_the_least() -> None:
    values, barrier, answers = [384, 640, 256], threading.Barrier(3), {}
    votes = [False] * 3

    class Machine(Accelerator):
        """One of three machines, which meet at each vote."""

        def any_worker(self, here: bool) -> bool:
            votes[numbers[threading.get_ident()]] = here
            barrier.wait(10)
            result = any(votes)
            barrier.wait(10)
            return result

    numbers: dict[int, int] = {}

    def run(number: int) -> None:
        numbers[threading.get_ident()] = number
        answers[number] = Machine(strategy(1), "CPU", 10, workers=3).least_of_all(values[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == dict.fromkeys(range(3), 256)
