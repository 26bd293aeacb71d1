"""`funmatch prepare` is killed by a real SIGKILL; the same command again ends in the bytes of a run that was left alone.

Forked processes (tests/zygote.py) are killed at chosen steps of their writing (tests/hooks.py).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT, here
from samples import put, tree
from zygote import Zygote, side_by_side, wait_for

from trainer.data.dataset import Dataset
from trainer.ingest import writer
from trainer.io import files

SPLITS = ("train", "validation")  # a shard each


@dataclasses.dataclass
class Run:
    """What the points share."""

    zygote: Zygote
    source: pathlib.Path
    folder: pathlib.Path
    whole: dict[str, bytes]
    changes: list[tuple[str, str]]

    def prepare(self, out: pathlib.Path, *flags: str, **hook: object) -> int:
        """The exit code, or minus the signal."""
        argv = ["prepare", f"--dataset=folder:{self.source}", f"--out={out}", "--workers=1", *flags]
        hooks = [{"hook": "storage", **hook}] if hook else []
        told = out.with_suffix(".txt")
        return self.zygote.start("hooks", "job", told, argv=argv, hooks=hooks).wait()

    def try_at(self, number: int) -> str:
        """Kills at a step, gives the command again, and says what is wrong; empty: nothing."""
        out = self.folder / f"out-{number}"
        name = f"step {number}, {self.changes[number]}"
        if (code := self.prepare(out, kill_at=number)) != -signal.SIGKILL:
            return f"{name}: ended with {code}"
        if (out / "dataset.json").exists() and files.is_temporary(self.changes[number][1]):
            return f"{name}: dataset.json is there too early"
        # Of the folder of notes only its name was left: that is no different from a run that was left alone.
        ended = 3 if number == len(self.changes) - 1 else 0
        if (code := self.prepare(out)) != ended:
            return f"{name}: the same command again ended with {code}: {out.with_suffix('.txt').read_text()[-500:]}"
        if (found := tree(out)) != self.whole or (out / ".making").exists():
            return f"{name}: {sorted(found)} are there, or differ, or notes were left"
        shutil.rmtree(out)
        return ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("prepare")
    put(folder / "in", *[f"{split}/{name}/1.jpg" for split in SPLITS for name in "ab"])
    with Zygote("hooks", "trainer.prepare", "trainer.io.destination", "trainer.ingest.sources", root=ROOT) as zygote:
        made = Run(zygote, folder / "in", folder, {}, [])
        assert made.prepare(folder / "whole", record=str(folder / "changes")) == 0
        made.whole = tree(folder / "whole")
        made.changes = [tuple(json.loads(line)) for line in (folder / "changes").read_text().splitlines()]
        yield made


def first(run: Run, kind: str, part: str, after: str = "") -> int:
    """The number of the first change of a kind to a path that has `part` in it, after one with `after` in it."""
    start = next(n for n, (_, path) in enumerate(run.changes) if after in path)
    return next(n for n, found in enumerate(run.changes) if n >= start and found[0] == kind and part in found[1])


def test_killed_once_the_same_command_ends_in_the_same_bytes(run: Run) -> None:
    """In a shard, after it, in its note, in the index, after the index, and in clearing up."""
    assert sorted(run.whole) == ["dataset.json", *(f"{split}-00000-of-00001.tfrecord" for split in SPLITS)]
    points = {
        first(run, "half", "train-00000"),
        first(run, "renamed", "train-00000"),
        first(run, "half", ".making/train-00000"),
        first(run, "written", "dataset.json"),
        first(run, "renamed", "dataset.json"),
        first(run, "removed", ".making", after="dataset.json"),
        len(run.changes) - 1,
    }
    assert len(points) == 7
    assert not [text for text in side_by_side([lambda n=n: run.try_at(n) for n in sorted(points)]) if text]


@pytest.mark.slow
def test_killed_at_any_step_of_writing(run: Run) -> None:
    assert len(run.changes) > 50
    found = side_by_side([lambda n=n: run.try_at(n) for n in range(len(run.changes))])
    assert not [text for text in found if text]


def test_killed_from_outside_somewhere(run: Run) -> None:
    """By another process, without a hook, once the first shard is there; and twice in one recovery."""
    out = run.folder / "outside"
    argv = ["prepare", f"--dataset=folder:{run.source}", f"--out={out}", "--workers=1"]
    for wanted in ("train-*.tmp", "train-*.tfrecord", "validation-*.tfrecord*"):
        child = run.zygote.start("hooks", "job", out.with_suffix(".txt"), argv=argv, hooks=[])
        wait_for(lambda pattern=wanted, child=child: bool(list(out.glob(pattern))) or child.status.done())
        child.send(signal.SIGKILL)
        assert child.wait() in (-signal.SIGKILL, 0)
    if not (out / "dataset.json").exists() or (out / ".making").exists():
        assert run.prepare(out) == 0
    assert tree(out) == run.whole


def test_shards_of_killed_work_of_another_shape_are_removed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture was added, or the set was given up for another: what was made and is no part of the set goes."""
    for name, flags in (("grown", ()), ("another", ("--overwrite", "--unlabelled"))):
        out = run.folder / name
        assert run.prepare(out, kill_at=first(run, "renamed", "train-00000")) == -signal.SIGKILL
        assert (out / "train-00000-of-00001.tfrecord").exists()
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_SHARD_BYTES", 500)
            done = here("prepare", f"--dataset=folder:{run.source}", f"--out={out}", *flags)
        assert done.returncode == 0, done.stderr
        splits = Dataset.load(str(out)).splits
        assert len(splits["train"].shards) > 1
        assert set(tree(out)) == {"dataset.json", *(shard.file for split in splits.values() for shard in split.shards)}


def test_shards_of_a_set_whose_replacement_was_killed_are_removed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows them any more when the old index is gone."""
    out = run.folder / "replaced"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_SHARD_BYTES", 500)
        assert here("prepare", f"--dataset=folder:{run.source}", f"--out={out}", "--unlabelled").returncode == 0
    before = set(tree(out)) - {"dataset.json"}
    assert len(before) > len(SPLITS)
    assert run.prepare(out, "--overwrite", kill_at=first(run, "renamed", "train-00000")) == -signal.SIGKILL
    assert run.prepare(out) == 0
    assert tree(out) == run.whole


def test_a_plan_that_was_cut_off_holds_nobody_up(run: Run) -> None:
    for length in (0, 5):
        out = run.folder / f"cut-{length}"
        assert run.prepare(out, kill_at=first(run, "half", "train-00000")) == -signal.SIGKILL
        plan = out / ".making" / "plan.json"
        plan.write_bytes(plan.read_bytes()[:length])
        assert run.prepare(out) == 0
        assert tree(out) == run.whole


HOLD = """
import sys, time
from trainer.io import destination
place = destination.open_destination(sys.argv[1])
print("held", flush=True)
time.sleep(120)
"""


def test_two_at_once_in_one_folder_are_refused(run: Run) -> None:
    """And the first one's unfinished files are not taken for leftovers. Its lock ends with it, however it ends."""
    out = run.folder / "held"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        half = out / "train-00000-of-00001.tfrecord.01234567.tmp"
        half.write_bytes(b"half")
        done = here("prepare", f"--dataset=folder:{run.source}", f"--out={out}")
        assert done.returncode == 3
        assert f"--out={out} is being written by another process" in done.stderr.strip().splitlines()[-1]
        assert half.exists()
    finally:
        holder.kill()
        holder.wait()
    assert run.prepare(out) == 0
    assert tree(out) == run.whole
