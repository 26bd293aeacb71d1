"""A run that is killed or runs out of resources at any point resumes to the same result.

Weights, optimizer slots, metrics and result.json are compared. Each point is a process forked from
one with TensorFlow loaded (tests/zygote.py). A real signal stops it, and a second process gets the
same command. All points run once, one for each core at a time; each is a test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import matrix
import pytest
from conftest import ROOT, small_classifier
from matrix import Point
from zygote import Zygote, side_by_side, wait_for

KILLED = -signal.SIGKILL

# A call in each phase of a job: function, number of the call, and whether the signal comes after
# it.
PHASES = {
    "start": ("trainer.run.plan:make_plan", 0, True),
    "lock": ("trainer.io.lock:hold_workdir", 0, True),
    "teacher": ("trainer.models.teachers:load", 0, False),
    "data": ("trainer.data.store:decode_square", 20, True),
    "compile": ("trainer.method.views:training_views", 0, True),  # traced, not run: the step is being compiled
    "step": ("trainer.run.job:Job.run_steps", 5, True),
    "evaluate": ("trainer.run.evaluator:Evaluator.run", 0, True),
    "save": ("trainer.run.checkpoint:Checkpoints.save", 1, False),
    "final": ("trainer.run.evaluator:Evaluator.run", 2, True),
    "export": ("trainer.output.export:single_device_copy", 0, True),
    "report": ("trainer.output.report:render", 0, True),
}
# The calls after training at which SIGKILL is sent.
ENDINGS = {
    "after the final evaluation": ("trainer.run.evaluator:Evaluator.run", 2, True),
    "after the SavedModel": ("tensorflow:saved_model.save", 0, True),
    "in the SavedModel": ("tensorflow:saved_model.save", 0, False),
    "after the Keras model": ("trainer.output.export:save_keras", 0, True),
    "after the export": ("trainer.output.export:write", 0, True),
    "after the report": ("trainer.output.report:render", 0, True),
    "before the result": ("trainer.output.finish:write_json", 0, False),
}
# The steps of writing a file (the hook "storage" in tests/hooks.py).
WRITE_STEPS = ("made", "half", "written", "flushed", "renamed", "flushed")
SAVE = [*(f"{what} {step}" for what in ("metrics", "state", "commit") for step in range(len(WRITE_STEPS)))]


def at(phase: tuple[str, int, bool], number: str, times: int = 1) -> dict[str, Any]:
    where, count, after = phase
    return {"hook": "call", "where": where, "count": count, "after": after, "then": {"signal": number, "times": times}}


def step(count: int, number: str = "SIGKILL") -> dict[str, Any]:
    return at(("trainer.run.job:Job.run_steps", count, True), number)


def disk(kill_at: int) -> dict[str, Any]:
    return {"hook": "storage", "kill_at": kill_at}


# Right before the last file of the SavedModel gets its name in the workdir.
COPYING = {
    "hook": "renamed",
    "path": "*/export/saved_model/saved_model.pb",
    "after": False,
    "then": {"signal": "SIGKILL"},
}
POINTS = [
    *(Point(f"SIGKILL after step {n + 1}", (step(n),), (KILLED,)) for n in range(matrix.STEPS)),
    *(Point(f"SIGTERM in {name}", (at(phase, "SIGTERM"),), (75,)) for name, phase in PHASES.items()),
    *(Point(f"SIGTERM twice in {name}", (at(phase, "SIGTERM", 2),), (75,)) for name, phase in PHASES.items()),
    *(Point(f"SIGKILL {name}", (at(phase, "SIGKILL"),), (KILLED,)) for name, phase in ENDINGS.items()),
    Point("SIGKILL while the SavedModel is copied", (COPYING,), (KILLED,)),
    *(
        Point(f"SIGTERM in {name} of a recovery", (step(5), at(phase, "SIGTERM")), (KILLED, 75))
        for name, phase in {
            "start": PHASES["start"],
            "data": PHASES["data"],
            "step": ("trainer.run.job:Job.run_steps", 2, True),
            "save": ("trainer.run.checkpoint:Checkpoints.save", 0, False),
        }.items()
    ),
    Point("SIGKILL twice in one recovery", (step(5), step(0), step(1)), (KILLED,) * 3),
    Point("SIGKILL twice before a recovery began", (step(9), *(at(PHASES["data"], "SIGKILL"),) * 2), (KILLED,) * 3),
    Point("SIGKILL in the cleaning of a recovery", (step(9), at(("trainer.io.files:remove_temporary", 0, False), "SIGKILL")),
          (KILLED,) * 2),
]  # fmt: skip
# Two saves; the second one also deletes a checkpoint. `saves` finds their numbers in the first run.
SAVES = [f"save {n}: {what}" for n in (2, 3) for what in [*SAVE, *(["removed 0", "removed 1"] if n == 3 else [])]]
ALL = [*(point.name for point in POINTS), *SAVES]


@dataclasses.dataclass
class Run:
    """The uninterrupted run, and what all points need."""

    zygote: Zygote
    flags: list[str]
    folder: pathlib.Path
    whole: pathlib.Path
    changes: list[tuple[str, str]]


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The uninterrupted run; each of its changes on the disk is recorded."""
    folder = tmp_path_factory.mktemp("kills")
    for seed, name in enumerate(("teacher", "student")):
        small_classifier(seed).save(folder / f"{name}.keras")
    flags = matrix.flags(data, str(folder / "teacher.keras"), f"keras:{folder}/student.keras")
    whole, record = folder / "whole", folder / "changes.jsonl"
    with Zygote(*matrix.PRELOAD) as zygote:
        argv = [*flags, f"--workdir={whole}"]
        hooks = [{"hook": "storage", "record": str(record)}]
        code = zygote.start("hooks", "job", folder / "whole.txt", argv=argv, hooks=hooks).wait()
        assert code == 0, (folder / "whole.txt").read_text()
        changes = [tuple(json.loads(line)) for line in record.read_text().splitlines()]
        yield Run(zygote, flags, folder, whole, changes)


def saves(changes: list[tuple[str, str]]) -> dict[str, int]:
    """The index of each change that a save makes, by its name in `SAVES`."""
    begins = [i for i, (kind, path) in enumerate(changes) if kind == "made" and "metrics.jsonl" in path]
    numbers = {}
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(changes)], strict=True), 1):
        counts = {"metrics": 0, "state-": 0, "checkpoint-": 0, "removed": 0}
        current = "metrics"
        for i in range(begin, end):
            kind, path = changes[i]
            if kind == "removed":
                current = "removed"
            elif kind == "made":
                current = next((w for w in ("metrics", "state-", "checkpoint-") if w in path.rsplit("/", 1)[-1]), "")
            if current in counts:
                what = {"state-": "state", "checkpoint-": "commit"}.get(current, current)
                numbers[f"save {number}: {what} {counts[current]}"] = i
                counts[current] += 1
    return numbers


@pytest.fixture(scope="module")
def outcomes(run: Run, request: pytest.FixtureRequest) -> dict[str, str]:
    """The problem of each selected point; empty if there is none."""
    selected_names = {item.callspec.params["name"] for item in request.session.items if "outcomes" in item.fixturenames}  # type: ignore[attr-defined]
    numbers = saves(run.changes)
    points = [*POINTS, *(Point(name, (disk(numbers[name]),), (KILLED,)) for name in SAVES)]
    selected = [point for point in points if point.name in selected_names]

    def one(number: int, point: Point) -> str:
        return matrix.go(run.zygote, run.flags, run.folder / f"point-{number}", point, run.whole)

    problems = side_by_side([lambda n=n, p=p: one(n, p) for n, p in enumerate(selected)])  # type: ignore[misc]
    return dict(zip((point.name for point in selected), problems, strict=True))


def test_zygote_has_one_thread(run: Run) -> None:
    assert run.zygote.threads == 1, "a process with threads must not be forked"


def test_uninterrupted_run_has_every_row_once(run: Run) -> None:
    steps = [(row["kind"], row["step"]) for row in matrix.rows(run.whole)]
    assert steps == [(k, s) for s in (3, 6, 9, 12) for k in ("train", "eval") if k == "train" or s % 6 == 0] + [
        ("final", 12)
    ]


def test_every_step_of_a_save_is_a_kill_point(run: Run) -> None:
    """A save writes metrics, state and commit in this order, then deletes."""
    numbers = saves(run.changes)
    assert set(SAVES) <= numbers.keys()
    assert [numbers[name] for name in SAVES] == sorted(numbers[name] for name in SAVES)
    for n in (2, 3):
        kinds = [
            run.changes[numbers[f"save {n}: {what} {i}"]][0]
            for what in ("metrics", "state", "commit")
            for i in range(6)
        ]
        assert kinds == list(WRITE_STEPS) * 3
    assert len(ALL) >= 65


@pytest.mark.kills
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ALL)
def test_same_command_resumes_to_the_bit(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name]


def run_job(
    run: Run, name: str, *hooks: dict[str, Any], flags: list[str] | None = None, **moved: str
) -> tuple[int, str]:
    """Runs the job in a folder of this name with hooks; returns its exit code and its output."""
    log = run.folder / f"{name}.txt"
    begin = log.stat().st_size if log.exists() else 0
    workdir = moved.get("workdir", str(run.folder / name))
    argv = [*(flags or run.flags), f"--workdir={workdir}"]
    code = run.zygote.start("hooks", "job", log, argv=argv, hooks=list(hooks)).wait()
    return code, log.read_text()[begin:]


def error_line(output: str) -> str:
    """The only error line of the output."""
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def newest(workdir: pathlib.Path) -> int:
    """The step that the same command would resume from, whose checkpoint must be complete."""
    commit = json.loads(max((workdir / "checkpoints").glob("checkpoint-*.json")).read_text())
    content = (workdir / "checkpoints" / commit["state"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == commit["sha256"]
    return commit["step"]


def after(count: int, **then: Any) -> dict[str, Any]:
    """A hook after a step. `once=saved(workdir)` first waits for the background save of step 4."""
    return {"hook": "call", "where": "trainer.run.job:Job.run_steps", "count": count, "then": then}


def saved(workdir: pathlib.Path) -> str:
    return str(workdir / "checkpoints" / "checkpoint-*.json")


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A file system of 8 MB; None if this process may not mount one."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", mount_point], capture_output=True, check=False
    )
    yield mount_point if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", mount_point], check=True)


@pytest.mark.kills
def test_full_disk_is_one_line_and_the_run_resumes(run: Run, small_disk: pathlib.Path | None) -> None:
    """If no file system can be mounted, a limit of the file size stands in for a full disk."""
    workdir = small_disk / "run" if small_disk else run.folder / "full"
    then: dict[str, Any] = {"fill": str(small_disk / "filling")} if small_disk else {"largest_file": 100}
    code, output = run_job(run, "full", after(5, once=saved(workdir), **then), workdir=str(workdir))
    assert code == 3, output
    assert ("No space left on device" if small_disk else "File too large") in error_line(output)
    assert newest(workdir) == 4
    if small_disk:
        (small_disk / "filling").unlink()
    code, output = run_job(run, "full", workdir=str(workdir))
    assert code == 0, output
    assert "resumed at step 4 of 12" in output
    assert matrix.differences(run.whole, workdir) == []


@pytest.mark.kills
def test_unwritable_workdir_is_one_line(run: Run) -> None:
    """Without root's capabilities, which allow writing anywhere."""
    workdir = run.folder / "closed"
    workdir.mkdir(mode=0o555)
    code, output = run_job(run, "closed", {"hook": "powerless"})
    assert code == 3, output
    assert f"--workdir {workdir} is not writable: Permission denied" in error_line(output)
    assert list(workdir.iterdir()) == []


@pytest.mark.kills
def test_lost_permission_is_one_line_and_the_run_resumes(run: Run) -> None:
    workdir = run.folder / "lost"
    closed = {str(workdir): 0o555, str(workdir / "checkpoints"): 0o555}
    code, output = run_job(run, "lost", {"hook": "powerless"}, after(5, once=saved(workdir), chmod=closed))
    assert code == 3, output
    assert "Permission denied" in error_line(output)
    assert newest(workdir) == 4
    for path in closed:
        pathlib.Path(path).chmod(0o755)
    code, output = run_job(run, "lost", {"hook": "powerless"})
    assert code == 0, output
    assert matrix.differences(run.whole, workdir) == []


@pytest.mark.kills
@pytest.mark.parametrize("seconds", [-86400.0, 86400.0])
def test_clock_jumps_do_not_change_the_run(run: Run, seconds: float) -> None:
    name = f"clock{seconds:.0f}"
    code, output = run_job(run, name, after(5, clock=seconds))
    assert code == 0, output
    assert matrix.differences(run.whole, run.folder / name) == []
    final_result = json.loads((run.folder / name / "result.json").read_text())
    assert 0 < final_result["wall_seconds"] < 3600


def test_wall_clock_is_used_only_in_messages() -> None:
    """It may say when a lock was taken or a line was logged."""
    for path in (ROOT / "trainer").rglob("*.py"):
        text = path.read_text()
        allowed = path.name in ("lock.py", "environment.py")
        assert allowed or ("time.time()" not in text and "datetime.now(" not in text), path


@pytest.mark.kills
def test_changed_teacher_is_one_line_and_the_run_resumes(run: Run) -> None:
    original, teacher = run.folder / "teacher.keras", run.folder / "other.keras"
    teacher.write_bytes(original.read_bytes())
    flags = [f"--teacher=keras:{teacher}" if flag.startswith("--teacher=") else flag for flag in run.flags]
    killed = after(5, once=saved(run.folder / "teacher"), signal="SIGKILL")
    code, output = run_job(run, "teacher", killed, flags=flags)
    assert code == KILLED, output
    teacher.write_bytes((run.folder / "student.keras").read_bytes())
    before = set((run.folder / "teacher").rglob("*"))
    code, output = run_job(run, "teacher", flags=flags)
    assert code == 3, output
    assert "belongs to another run (teacher: [" in error_line(output)
    # The refused job took over the lock of the killed one, and deleted it at its end.
    assert before - set((run.folder / "teacher").rglob("*")) == {run.folder / "teacher/.lock"}
    teacher.write_bytes(original.read_bytes())
    assert run_job(run, "teacher", flags=flags)[0] == 0
    assert matrix.differences(run.whole, run.folder / "teacher") == []
    assert original.exists()


@pytest.mark.kills
def test_second_job_on_a_workdir_is_refused(run: Run) -> None:
    """The first job waits until the second is refused, is then killed, and a third takes over."""
    reached, workdir = run.folder / "reached", run.folder / "two"
    argv = [*run.flags, f"--workdir={workdir}"]
    hook = after(1, touch=str(reached), sleep=600)
    first = run.zygote.start("hooks", "job", run.folder / "first.txt", argv=argv, hooks=[hook])
    wait_for(reached.exists, 120)
    code, output = run_job(run, "two")
    assert code == 3, output
    assert f"--workdir={workdir} is in use by process {first.pid} on" in error_line(output)
    first.send(signal.SIGKILL)
    assert first.wait() == KILLED
    code, output = run_job(run, "two")
    assert code == 0, output
    assert matrix.differences(run.whole, workdir) == []


@pytest.mark.kills
def test_two_fresh_runs_are_equal_to_the_bit(run: Run) -> None:
    assert run_job(run, "fresh")[0] == 0
    assert matrix.differences(run.whole, run.folder / "fresh") == []
