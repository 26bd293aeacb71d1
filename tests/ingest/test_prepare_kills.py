"""`funmatch prepare`, killed by a real SIGKILL, resumes to the bytes of an undisturbed run.

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
class Runner:
    """What the tests share.

    Attributes:
        zygote: starts processes.
        source: folder of images.
        folder: for outputs.
        expected: files that an undisturbed run writes, by name.
        changes: its steps of writing as (step, path).
    """

    zygote: Zygote
    source: pathlib.Path
    folder: pathlib.Path
    expected: dict[str, bytes]
    changes: list[tuple[str, str]]

    def prepare(self, out: pathlib.Path, *flags: str, **hook: object) -> int:
        """Runs the command; returns its exit code, or minus the signal that killed it."""
        argv = ["prepare", f"--dataset=folder:{self.source}", f"--out={out}", "--workers=1", *flags]
        hooks = [{"hook": "storage", **hook}] if hook else []
        log = out.with_suffix(".txt")
        return self.zygote.start("hooks", "job", log, argv=argv, hooks=hooks).wait()

    def kill_and_resume(self, number: int) -> str:
        """Kills at a step, runs the command again, and returns what is wrong; empty: nothing."""
        out = self.folder / f"out-{number}"
        name = f"step {number}, {self.changes[number]}"
        if (code := self.prepare(out, kill_at=number)) != -signal.SIGKILL:
            return f"{name}: ended with {code}"
        if (out / "dataset.json").exists() and files.is_temporary(self.changes[number][1]):
            return f"{name}: dataset.json is there too early"
        # After the last step only an empty folder is left, which a second run cannot tell from a
        # complete data set.
        expected_code = 3 if number == len(self.changes) - 1 else 0
        if (code := self.prepare(out)) != expected_code:
            return f"{name}: the same command again ended with {code}: {out.with_suffix('.txt').read_text()[-500:]}"
        if (actual := tree(out)) != self.expected or (out / ".incomplete").exists():
            return f"{name}: {sorted(actual)} are there, or differ, or .incomplete is left"
        shutil.rmtree(out)
        return ""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("prepare")
    put(folder / "in", *[f"{split}/{name}/1.jpg" for split in SPLITS for name in "ab"])
    shutil.copyfile(folder / f"in/{SPLITS[0]}/a/1.jpg", folder / f"in/{SPLITS[1]}/a/1.jpg")  # dataset.json says so
    with Zygote("hooks", "trainer.prepare", "trainer.io.destination", "trainer.ingest.sources", root=ROOT) as zygote:
        runner = Runner(zygote, folder / "in", folder, {}, [])
        assert runner.prepare(folder / "whole", record=str(folder / "changes")) == 0
        runner.expected = tree(folder / "whole")
        runner.changes = [tuple(json.loads(line)) for line in (folder / "changes").read_text().splitlines()]
        yield runner


def first_step(runner: Runner, kind: str, part: str, after: str = "") -> int:
    """Returns the first step `kind` on a path with `part` in it, after one with `after`."""
    start = next(n for n, (_, path) in enumerate(runner.changes) if after in path)
    return next(n for n, change in enumerate(runner.changes) if n >= start and change[0] == kind and part in change[1])


def test_after_a_kill_the_same_command_writes_the_same_bytes(runner: Runner) -> None:
    """In a shard, after it, in its record, in dataset.json, after it, and in cleaning up."""
    assert sorted(runner.expected) == ["dataset.json", *(f"{split}-00000-of-00001.tfrecord" for split in SPLITS)]
    source = json.loads(runner.expected["dataset.json"])["source"]
    assert source == {"duplicates": {"validation": {"train": 1}}, "labels": {"train": [1, 1], "validation": [1, 1]}}
    points = {
        first_step(runner, "half", "train-00000"),
        first_step(runner, "renamed", "train-00000"),
        first_step(runner, "half", ".incomplete/train-00000"),
        first_step(runner, "written", "dataset.json"),
        first_step(runner, "renamed", "dataset.json"),
        first_step(runner, "removed", ".incomplete", after="dataset.json"),
        len(runner.changes) - 1,
    }
    assert len(points) == 7
    assert not [text for text in side_by_side([lambda n=n: runner.kill_and_resume(n) for n in sorted(points)]) if text]


@pytest.mark.slow
def test_killed_at_any_step_of_writing(runner: Runner) -> None:
    assert len(runner.changes) > 50
    problems = side_by_side([lambda n=n: runner.kill_and_resume(n) for n in range(len(runner.changes))])
    assert not [problem for problem in problems if problem]


def test_killed_from_outside_somewhere(runner: Runner) -> None:
    """By another process, without a hook, while it writes and twice while it resumes."""
    out = runner.folder / "outside"
    argv = ["prepare", f"--dataset=folder:{runner.source}", f"--out={out}", "--workers=1"]
    for pattern in ("train-*.tmp", "train-*.tfrecord", "validation-*.tfrecord*"):
        child = runner.zygote.start("hooks", "job", out.with_suffix(".txt"), argv=argv, hooks=[])
        wait_for(lambda pattern=pattern, child=child: bool(list(out.glob(pattern))) or child.status.done())
        child.send(signal.SIGKILL)
        assert child.wait() in (-signal.SIGKILL, 0)
    if not (out / "dataset.json").exists() or (out / ".incomplete").exists():
        assert runner.prepare(out) == 0
    assert tree(out) == runner.expected


def test_shards_of_killed_work_of_another_plan_are_removed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller shards, or for another data set: shards that are not part of it are deleted."""
    for name, flags in (("grown", ()), ("another", ("--overwrite", "--unlabelled"))):
        out = runner.folder / name
        assert runner.prepare(out, kill_at=first_step(runner, "renamed", "train-00000")) == -signal.SIGKILL
        assert (out / "train-00000-of-00001.tfrecord").exists()
        with monkeypatch.context() as patch:
            patch.setattr(writer, "SHARD_BYTES", 500)
            process = here("prepare", f"--dataset=folder:{runner.source}", f"--out={out}", *flags)
        assert process.returncode == 0, process.stderr
        splits = Dataset.load(str(out)).splits
        assert len(splits["train"].shards) > 1
        assert set(tree(out)) == {"dataset.json", *(shard.file for split in splits.values() for shard in split.shards)}


def test_shards_of_a_set_whose_replacement_was_killed_are_removed(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the old dataset.json, which listed them, is gone."""
    out = runner.folder / "replaced"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 500)
        assert here("prepare", f"--dataset=folder:{runner.source}", f"--out={out}", "--unlabelled").returncode == 0
    before = set(tree(out)) - {"dataset.json"}
    assert len(before) > len(SPLITS)
    assert runner.prepare(out, "--overwrite", kill_at=first_step(runner, "renamed", "train-00000")) == -signal.SIGKILL
    assert runner.prepare(out) == 0
    assert tree(out) == runner.expected


def test_a_truncated_plan_does_not_block(runner: Runner) -> None:
    for length in (0, 5):
        out = runner.folder / f"cut-{length}"
        assert runner.prepare(out, kill_at=first_step(runner, "half", "train-00000")) == -signal.SIGKILL
        plan = out / ".incomplete" / "plan.json"
        plan.write_bytes(plan.read_bytes()[:length])
        assert runner.prepare(out) == 0
        assert tree(out) == runner.expected


HOLD = """
import sys, time
from trainer.io import destination
opened = destination.open_destination(sys.argv[1])
print("locked", flush=True)
time.sleep(120)
"""


def test_two_at_once_in_one_folder_are_refused(runner: Runner) -> None:
    """And the first one's unfinished files are not deleted.

    Its lock ends with the process, however that ends.
    """
    out = runner.folder / "locked"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        half = out / "train-00000-of-00001.tfrecord.01234567.tmp"
        half.write_bytes(b"half")
        process = here("prepare", f"--dataset=folder:{runner.source}", f"--out={out}")
        assert process.returncode == 3
        assert f"--out={out} is being written by another process" in process.stderr.strip().splitlines()[-1]
        assert half.exists()
    finally:
        holder.kill()
        holder.wait()
    assert runner.prepare(out) == 0
    assert tree(out) == runner.expected
