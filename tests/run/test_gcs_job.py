"""The whole job on gs:// gives the result of a job on a disk, to the bit.

Data, teacher and student are read from a bucket by TensorFlow's client and google-cloud-storage;
checkpoints, metrics, TensorBoard, exports and the lease are written there. Jobs are forked
(tests/zygote.py). Each has its own bucket and server, which can fail requests and kill the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import fake_gcs
import matrix
import pytest
from conftest import CLASSES, SIDE, TRAIN, small_classifier
from zygote import Child, Zygote, side_by_side, wait_for

KILLED = -signal.SIGKILL
LEASE = 5.0  # seconds, of jobs that are killed
PRELOAD = ("google.cloud.storage", *matrix.PRELOAD)
PREPARE = [
    "prepare", "--dataset=synthetic", f"--classes={CLASSES}", f"--size={SIDE}", f"--train={TRAIN}", "--validation=15",
    "--test=23", "--pretrain=0",
]  # fmt: skip


@dataclasses.dataclass
class World:
    """The zygote, the files that all jobs read, and the same run on a disk."""

    zygote: Zygote
    folder: pathlib.Path
    whole: pathlib.Path


@dataclasses.dataclass
class Bucket:
    """A bucket with data, teacher and student, and the job that reads and writes it."""

    world: World
    server: fake_gcs.Server
    folder: pathlib.Path

    def start(self, argv: list[str], *hooks: dict[str, Any], zygote: Zygote | None = None) -> Child:
        there = {"hook": "environment", **self.server.route, "FUNMATCH_CACHE": str(self.folder / "cache")}
        self.output.touch()
        return (zygote or self.world.zygote).start("hooks", "job", self.output, argv=argv, hooks=[there, *hooks])

    def begin(self, *hooks: dict[str, Any], lease: float = 60.0, zygote: Zygote | None = None) -> Child:
        """Starts the job."""
        argv = matrix.flags("gs://bucket/data", "gs://bucket/teacher.keras", "keras:gs://bucket/student.keras")
        flags = ["--workdir=gs://bucket/run", f"--lease_seconds={lease:g}"]
        return self.start([*argv, *flags], *hooks, zygote=zygote)

    @property
    def output(self) -> pathlib.Path:
        return self.folder / "output.txt"

    def wait(self, child: Child) -> tuple[int, str]:
        """A job's exit code, and the output of all jobs so far."""
        code = child.wait()
        return code, self.output.read_text()

    def differences(self) -> list[str]:
        """The differences of the finished run from the one on a disk."""
        here = self.folder / "run"
        self.server.get_tree("bucket", "run", here)
        if differences := matrix.differences(self.world.whole, here):
            odd = set(matrix.names(here)) ^ set(matrix.names(self.world.whole))
            return [*differences, *sorted(odd)]
        return []


def error_line(output: str) -> str:
    """The only error line of the output."""
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def after(count: int, **then: Any) -> dict[str, Any]:
    """A hook after `count` + 1 calls of `Job.run_steps`."""
    return {"hook": "call", "where": "trainer.run.job:Job.run_steps", "count": count, "then": then}


@pytest.fixture(scope="module")
def world(data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("gcs")
    for seed, name in enumerate(("teacher", "student")):
        small_classifier(seed).save(folder / f"{name}.keras")
    whole, output = folder / "whole", folder / "whole.txt"
    argv = matrix.flags(data, str(folder / "teacher.keras"), f"keras:{folder}/student.keras")
    with Zygote(*PRELOAD) as zygote:
        assert zygote.threads == 1, "a process with threads must not be forked"
        code = zygote.start("hooks", "job", output, argv=[*argv, f"--workdir={whole}"], hooks=[]).wait()
        assert code == 0, output.read_text()
        (folder / "data").symlink_to(data)
        yield World(zygote, folder, whole)


@contextlib.contextmanager
def bucket(world: World, name: str) -> Iterator[Bucket]:
    folder = world.folder / name
    folder.mkdir()
    with fake_gcs.Server("bucket") as server:
        server.put_tree(world.folder / "data", "bucket", "data")
        for file in ("teacher.keras", "student.keras"):
            server.put("bucket", file, (world.folder / file).read_bytes())
        yield Bucket(world, server, folder)


def committed(server: fake_gcs.Server) -> list[int]:
    """Steps of the checkpoints, whose states must be complete."""
    steps = []
    for name in server.names("bucket", "run/checkpoints/checkpoint-"):
        commit = json.loads(server.get("bucket", name))
        assert len(server.get("bucket", f"run/checkpoints/{commit['state']}")) == commit["bytes"]
        steps.append(commit["step"])
    return steps


def test_stopped_run_in_a_bucket_resumes_to_the_bit(world: World) -> None:
    with bucket(world, "stopped") as here:
        prepared = {name: here.server.get("bucket", name) for name in here.server.names("bucket", "data/")}
        here.server.reset("bucket")
        for file in ("teacher.keras", "student.keras"):
            here.server.put("bucket", file, (world.folder / file).read_bytes())
        code, output = here.wait(here.start([*PREPARE, "--out=gs://bucket/data"]))
        assert code == 0, output
        assert prepared == {name: here.server.get("bucket", name) for name in here.server.names("bucket", "data/")}
        code, output = here.wait(here.begin(after(5, signal="SIGTERM")))
        assert code == 75, output
        assert "at step 6 of 12; saved: the same command resumes" in output
        assert here.server.names("bucket", "run/.lock") == []
        code, output = here.wait(here.begin())
        assert code == 0, output
        assert "resumed at step 6 of 12" in output
        assert here.differences() == []
        assert [name for name in here.server.names("bucket", "run/tensorboard/") if "tfevents" in name]
        assert (here.folder / "run/report.html").stat().st_size > 10_000
        code, output = here.wait(here.begin())
        assert code == 0, output
        assert "gs://bucket/run is finished: nothing to do" in output


# Requests after which a job is killed, before the response: kind, part of the object's name, count.
KILLS = {
    "the probe was begun": ("start", "run/.write-probe-", 1),
    "the probe was written": ("chunk", "run/.write-probe-", 1),
    "the lease was taken": ("upload", "run/.lock", 1),
    "the lease was renewed": ("upload", "run/.lock", 2),
    "the configuration was written": ("chunk", "run/config.json", 1),
    "TensorBoard's file was written": ("chunk", "run/tensorboard/", 3),
    "metrics were begun": ("start", "run/metrics.jsonl", 2),
    "metrics were written": ("chunk", "run/metrics.jsonl", 2),
    "the state was begun": ("start", "run/checkpoints/state-", 2),
    "the state was written": ("chunk", "run/checkpoints/state-", 2),
    "the commit was begun": ("start", "run/checkpoints/checkpoint-", 2),
    "the commit was written": ("chunk", "run/checkpoints/checkpoint-", 2),
    "an old commit was deleted": ("delete", "run/checkpoints/checkpoint-", 1),
    "an old state was deleted": ("delete", "run/checkpoints/state-", 1),
    "the export was begun": ("start", "run/export/", 1),
    "half of the export was written": ("chunk", "run/export/", 2),
    "the SavedModel was begun": ("start", "run/export/saved_model/saved_model.pb", 1),
    "the SavedModel was written": ("chunk", "run/export/saved_model/saved_model.pb", 1),
    "the Keras model was written": ("chunk", "run/export/model.keras", 1),
    "the report was written": ("chunk", "run/report.html", 1),
    "the result was begun": ("start", "run/result.json", 1),
    "the result was written": ("chunk", "run/result.json", 1),
    "the lease was given back": ("delete", "run/.lock", 1),
}


@pytest.fixture(scope="module")
def killed(world: World, request: pytest.FixtureRequest) -> dict[str, str]:
    """The problem of each selected point; empty if there is none."""

    def one(number: int, name: str) -> str:
        kind, match, count = KILLS[name]
        with bucket(world, f"kill-{number}") as here:
            # Time for a renewal, which is due every quarter of a lease.
            hooks = [after(1, sleep=LEASE / 2)] if kind == "upload" and count > 1 else []
            first = here.begin(*hooks, lease=LEASE)
            here.server.kill_after(count, first.pid, kind, match)
            code, output = here.wait(first)
            if code != KILLED or here.server.killed != [first.pid]:
                return f"ended with {code} where it was to be killed: {output[-1500:]}"
            there = here.server.names("bucket", "run/.lock")
            code, output = here.wait(here.begin(lease=LEASE))
            if code:
                return f"the same command again ended with {code}: {output[-1500:]}"
            if "Traceback" in output:
                return f"showed a traceback: {output[-1500:]}"
            waited = "waiting 5 s to see whether its owner is alive" in output
            if waited != bool(there and "finished: nothing to do" not in output):
                return f"a lease was {'' if there else 'not '}there, and {'' if waited else 'not '}waited for"
            if name == "the result was written":  # a finished run is not written to, so its lease stays
                here.server.take("bucket", "run/.lock")
            return ", ".join(here.differences())

    selected = {item.callspec.params["point"] for item in request.session.items if "killed" in item.fixturenames}  # type: ignore[attr-defined]
    names = [name for name in KILLS if name in selected]
    # More workers than cores: half of the time is spent waiting for a lease.
    wrong = side_by_side([lambda n=n, name=name: one(n, name) for n, name in enumerate(names)], workers=4)  # type: ignore[misc]
    return dict(zip(names, wrong, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", KILLS)
def test_run_killed_at_a_request_resumes_to_the_bit(point: str, killed: dict[str, str]) -> None:
    assert not killed[point]


@pytest.mark.slow
def test_lease_of_a_killed_job_expires(world: World) -> None:
    """A second job is refused while the owner lives; later it waits and takes over the lease."""
    with bucket(world, "lease") as here:
        reached = here.folder / "reached"
        first = here.begin(after(5, touch=str(reached), sleep=600), lease=LEASE)
        wait_for(reached.exists, 120)
        code, output = here.wait(here.begin(lease=LEASE))
        assert code == 3, output
        assert f"--workdir=gs://bucket/run is in use by process {first.pid} on" in error_line(output)
        first.send(signal.SIGKILL)
        assert first.wait() == KILLED
        before = [request.number for request in here.server.log][-1]
        began = time.monotonic()
        second = here.begin(lease=LEASE)
        wait_for(lambda: "waiting 5 s to see whether its owner is alive" in here.output.read_text()[len(output) :], 60)
        assert not second.status.done(), "it ended instead of waiting"
        code, output = here.wait(second)
        assert code == 0, output
        assert time.monotonic() - began > LEASE
        assert "resumed at step 4 of 12" in output
        mine = [r for r in here.server.log if r.number > before and r.kind in fake_gcs.MUTATING]
        taken = next(i for i, request in enumerate(mine) if request.object == "run/.lock")
        assert all("/.write-probe-" in request.object for request in mine[:taken]), (
            "an object was changed before the lease was taken"
        )
        assert here.differences() == []


PASSING = ("503", "429", "500", "reset", "broken")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_transient_faults_do_not_change_the_result(world: World) -> None:
    """A random fifth of all requests fails, in a run that is stopped half-way and resumed."""

    def one(seed: int) -> list[tuple[str, str]]:
        with bucket(world, f"passing-{seed}") as here:
            here.server.fail(
                PASSING[seed], "status"
            )  # else they come after broken pieces alone, and are spared as neighbours
            here.server.sprinkle(seed, 0.2, PASSING)
            code, output = here.wait(here.begin(after(5, signal="SIGTERM")))
            assert code == 75, output
            code, output = here.wait(here.begin())
            assert code == 0, output
            assert "resumed at step 6 of 12" in output
            assert "passed over" not in output
            assert here.differences() == []
            return [(request.kind, request.fault) for request in here.server.log]

    selected = [pair for pairs in side_by_side([lambda seed=seed: one(seed) for seed in range(3)]) for pair in pairs]  # type: ignore[misc]
    failed = [(kind, fault) for kind, fault in selected if fault]
    assert len(failed) > 0.15 * len(selected), f"{len(failed)} of {len(selected)} requests went wrong"
    # Nothing of a job renames in a bucket, so there is no rewrite.
    assert {kind for kind, _ in failed} >= {"stat", "list", "read", "start", "chunk", "status", "upload", "delete"}
    assert {fault for _, fault in failed} == set(PASSING)


# Lasting faults: requests (kind, part of the object's name, how many succeed first), the failure,
# and a pattern of the error line.
LASTING = {
    "403 to the second state": (
        [("start", "run/checkpoints/state-", 1)],
        "403",
        r"cannot write a checkpoint gs://bucket/run/checkpoints/state-0000000008.*HTTP 403.*roles/storage\.objectAdmin",
    ),
    "403 to the second commit": (
        [("start", "run/checkpoints/checkpoint-", 1)],
        "403",
        r"cannot write a checkpoint's commit gs://bucket/run/checkpoints/checkpoint-0000000008\.json.*HTTP 403",
    ),
    "503 to the second state's pieces": (
        [("chunk", "run/checkpoints/state-", 1), ("status", "run/checkpoints/state-", 0)],
        "503",
        r"cannot write a checkpoint gs://bucket/run/checkpoints/state-0000000008.*HTTP 503.*does not answer",
    ),
    "resets of the second metrics": (
        [("start", "run/metrics.jsonl", 1)],
        "reset",
        r"cannot write the metrics gs://bucket/run/metrics\.jsonl.*does not answer",
    ),
    "silence to the second state": (
        [("start", "run/checkpoints/state-", 1)],
        "stall",
        r"cannot write a checkpoint gs://bucket/run/checkpoints/state-0000000008.*does not answer",
    ),
    "403 to the export": (
        [("start", "run/export/", 0)],
        "403",
        r"cannot write the exported model gs://bucket/run/export/saved_model/.*HTTP 403",
    ),
    "silence to everything": (
        [("", "", 0)],
        "stall",
        r"gs://bucket.*does not answer",
    ),
    "403 to all changes": (
        [(kind, "", 0) for kind in ("start", "chunk", "upload", "delete")],
        "403",
        r"cannot write .*gs://bucket/run/.*HTTP 403",
    ),
}


@pytest.fixture(scope="module")
def lasted(world: World, request: pytest.FixtureRequest) -> dict[str, str]:
    """The problem of each selected fault, with the client's default settings; empty if none."""
    selected = {item.callspec.params["fault"] for item in request.session.items if "lasted" in item.fixturenames}  # type: ignore[attr-defined]
    names = [name for name in LASTING if name in selected]

    def one(number: int, name: str, zygote: Zygote) -> str:
        requests, failure, line = LASTING[name]
        with bucket(world, f"lasting-{number}") as here:
            here.server.stall_seconds = 300
            reached, output = here.folder / "reached", here.output
            from_the_middle = name.endswith((" all changes", " everything"))
            hooks = [after(5, touch=str(reached), sleep=5.0)] if from_the_middle else []
            job = here.begin(*hooks, zygote=zygote)
            if from_the_middle:
                wait_for(lambda: reached.exists() and committed(here.server) == [4], 120)
                # The save of step 4 then deletes old checkpoints, where a failure is only a
                # warning.
                time.sleep(2)
            faults = [here.server.fail(failure, kind, match=match, after=n, times=None) for kind, match, n in requests]
            wait_for(lambda: any(fault.consumed for fault in faults), 120)
            began = time.monotonic()
            code = job.wait()
            seconds = time.monotonic() - began
            print(f"{name}: ended after {seconds:.1f} s")
            if code != 3:
                return f"ended with {code}: {output.read_text()[-1500:]}"
            if not re.search(line, error_line(output.read_text())):
                return f"unexpected message: {error_line(output.read_text())}"
            if seconds > 60:
                return f"ended after {seconds:.0f} s"
            here.server.heal()
            last = max(committed(here.server))
            before = len(output.read_text())
            job = here.begin(zygote=zygote, lease=LEASE)
            if code := job.wait():
                return f"the same command again ended with {code}: {output.read_text()[before:]}"
            again = output.read_text()[before:]
            if f"resumed at step {last} of 12" not in again or "passed over" in again:
                return f"did not resume from step {last}: {again}"
            return ", ".join(here.differences())

    with Zygote(*PRELOAD, unset=fake_gcs.KNOBS) as zygote:
        wrong = side_by_side([lambda n=n, name=name: one(n, name, zygote) for n, name in enumerate(names)], workers=4)  # type: ignore[misc]
    return dict(zip(names, wrong, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", LASTING)
def test_lasting_fault_is_one_line_and_the_run_resumes(fault: str, lasted: dict[str, str]) -> None:
    """The job ends within a minute of the first failure; afterwards the same command resumes."""
    assert not lasted[fault]
