"""Checkpoints are complete or not used: damage, crashes, other runs, non-finite values."""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
from collections.abc import Callable

import numpy as np
import pytest

from trainer.core.errors import DataError, Diverged
from trainer.io import files
from trainer.run.checkpoint import Background, Checkpoints

IDENTITY = {"seed": 0, "steps": 10}


def arrays(value: float) -> dict[str, np.ndarray]:
    return {
        "student/0000/conv/kernel": np.full((3, 2), value, np.float32),
        "optimizer/0000/iterations": np.array(7, np.int64),
    }


def write_checkpoints(folder: pathlib.Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(str(folder), IDENTITY, keep)
    for step in steps:
        checkpoints.save(step, arrays(step), {"seconds": step})
    return checkpoints


def test_round_trip_is_exact(tmp_path: pathlib.Path) -> None:
    odd = np.array([1e-45, -0.0, np.float32(1) / 3, 3e38], np.float32)
    Checkpoints(str(tmp_path), IDENTITY, 1).save(
        3, {"a/b": odd, "n": np.array(2**40)}, {"pending": [[2, {"loss": 0.1}]]}
    )
    restored = Checkpoints(str(tmp_path), IDENTITY, 1).restore()
    assert restored is not None
    assert restored.step == 3
    assert restored.arrays["a/b"].tobytes() == odd.tobytes()
    assert restored.arrays["n"] == 2**40
    assert restored.extra == {"pending": [[2, {"loss": 0.1}]]}


def test_empty_folder_restores_none(tmp_path: pathlib.Path) -> None:
    assert Checkpoints(str(tmp_path / "no"), IDENTITY, 1).restore() is None


def test_newest_is_restored_and_old_ones_are_deleted(tmp_path: pathlib.Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2, 3, 10)
    assert checkpoints.restore().step == 10  # type: ignore[union-attr]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-0000000003.json",
        "checkpoint-0000000010.json",
    ]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "commit"])
def test_damaged_checkpoint_is_passed_over(tmp_path: pathlib.Path, damage: str) -> None:
    write_checkpoints(tmp_path, 1, 2)
    (state,) = tmp_path.glob("state-0000000002-*")
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        state.write_bytes(bytes(content))
    elif damage == "cut":
        state.write_bytes(bytes(content[:-1]))
    elif damage == "gone":
        state.unlink()
    else:
        (tmp_path / "checkpoint-0000000002.json").write_text('{"format"')
    checkpoints = Checkpoints(str(tmp_path), IDENTITY, 2)
    assert checkpoints.restore().step == 1  # type: ignore[union-attr]
    assert len(checkpoints.passed_over) == 1
    assert "0000000002" in checkpoints.passed_over[0]


def test_only_damaged_checkpoints_are_an_error(tmp_path: pathlib.Path) -> None:
    write_checkpoints(tmp_path, 1)
    next(iter(tmp_path.glob("state-*"))).unlink()
    with pytest.raises(DataError, match="none of the 1 checkpoints"):
        Checkpoints(str(tmp_path), IDENTITY, 1).restore()


def test_checkpoint_of_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    write_checkpoints(tmp_path, 5)
    with pytest.raises(DataError, match=r"steps: 10 there, 11 here"):
        Checkpoints(str(tmp_path), {"seed": 0, "steps": 11}, 1).restore()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_state_is_not_committed(tmp_path: pathlib.Path, bad: float) -> None:
    checkpoints = write_checkpoints(tmp_path, 1)
    with pytest.raises(Diverged, match=r"step 2: student/0000/conv/kernel"):
        checkpoints.save(2, arrays(bad), {})
    assert checkpoints.restore().step == 1  # type: ignore[union-attr]
    assert len(list(tmp_path.iterdir())) == 2


def test_crash_at_any_write_keeps_the_last_checkpoint(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call that changes the folder fails in turn during a save; then the save is repeated."""

    class Crash(Exception):
        pass

    for point in range(4):
        folder = tmp_path / str(point)
        checkpoints = write_checkpoints(folder, 1, 2)
        calls = iter(range(100))

        def guard(function):
            def wrapped(*args):
                if next(calls) == point:  # noqa: B023
                    raise Crash
                return function(*args)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(files, "write", guard(files.write))
            patch.setattr(files, "remove", guard(files.remove))
            with pytest.raises(Crash):
                checkpoints.save(3, arrays(3), {})
        again = Checkpoints(str(folder), IDENTITY, 2)
        assert again.restore().step == (2 if point < 2 else 3)  # type: ignore[union-attr]
        again.save(3, arrays(3), {})
        again.save(4, arrays(4), {})
        assert again.restore().step == 4  # type: ignore[union-attr]
        assert len(list(folder.iterdir())) == 4, "files of the crashed save are still there"


def test_pickles_are_not_loaded(tmp_path: pathlib.Path) -> None:
    write_checkpoints(tmp_path, 1)
    commit = json.loads((tmp_path / "checkpoint-0000000001.json").read_text())
    import hashlib
    import io

    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{}], object))
    (tmp_path / commit["state"]).write_bytes(buffer.getvalue())
    commit |= {
        "bytes": len(buffer.getvalue()),
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }
    (tmp_path / "checkpoint-0000000001.json").write_text(json.dumps(commit))
    with pytest.raises(DataError, match="whole"):
        Checkpoints(str(tmp_path), IDENTITY, 1).restore()


def test_best_checkpoint_is_kept(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), IDENTITY, 2)
    for step in range(1, 7):
        checkpoints.save(step, arrays(step), {}, best=2 if step >= 2 else None)
    assert sorted(int(p.stem[-10:]) for p in tmp_path.glob("checkpoint-*")) == [2, 5, 6]
    assert checkpoints.load(2).arrays["student/0000/conv/kernel"][0, 0] == 2.0
    with pytest.raises(DataError, match=r"checkpoint .*0000000003\.json is not usable"):
        checkpoints.load(3)


def test_damaged_checkpoint_does_not_displace_a_complete_one(tmp_path: pathlib.Path) -> None:
    """With --keep_checkpoints=1, a damaged newer checkpoint must not be the one that is kept."""
    write_checkpoints(tmp_path, 1, 9, keep=2)
    (state,) = tmp_path.glob("state-0000000009-*")
    state.write_bytes(b"")
    checkpoints = Checkpoints(str(tmp_path), IDENTITY, 1)
    assert checkpoints.restore().step == 1  # type: ignore[union-attr]
    checkpoints.save(3, arrays(3), {})
    assert Checkpoints(str(tmp_path), IDENTITY, 1).restore().step == 3  # type: ignore[union-attr]
    assert len(list(tmp_path.iterdir())) == 2


def test_orphans_are_deleted_on_resume(tmp_path: pathlib.Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2)
    (tmp_path / "state-0000000003-0123456789abcdef.npz").write_bytes(b"no commit names it")
    (tmp_path / "checkpoint-0000000003.json.01234567.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"not ours")
    checkpoints.clean(2, None)
    assert len(list(tmp_path.iterdir())) == 5
    assert (tmp_path / "mine.tmp").exists()


def test_repeated_crashes_leave_a_bounded_number_of_objects(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run resumes from the newest checkpoint and crashes after 0 to 4 changes of its save."""

    class Crash(Exception):
        pass

    real = {"write": files.write, "remove": files.remove}
    for crash in range(20):
        checkpoints = Checkpoints(str(tmp_path), IDENTITY, 2)
        restored = checkpoints.restore()
        step = restored.step if restored else 0
        checkpoints.clean(step, None)
        calls = iter(range(1, 100))

        def dying(name: str, *args: object, at: int = crash % 5, calls: object = calls) -> None:
            if next(calls) > at:  # type: ignore[call-overload]
                raise Crash
            real[name](*args)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(files, "write", lambda *args, dying=dying: dying("write", *args))
            patch.setattr(files, "remove", lambda *args, dying=dying: dying("remove", *args))
            with contextlib.suppress(Crash):
                checkpoints.save(step + 1, arrays(crash), {})
        assert len(list(tmp_path.iterdir())) <= 2 * 3 + 2
    assert Checkpoints(str(tmp_path), IDENTITY, 2).restore().step > 5  # type: ignore[union-attr]


def test_failed_delete_is_a_warning(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2)

    def refuse(path: str) -> None:
        raise DataError(f"cannot delete {path}: denied")

    monkeypatch.setattr(files, "remove", refuse)
    checkpoints.save(3, arrays(3), {})
    assert checkpoints.restore().step == 3  # type: ignore[union-attr]
    assert [w.partition(":")[0] for w in checkpoints.warnings] == ["old checkpoints take up room"]


def test_another_format_is_an_error(tmp_path: pathlib.Path) -> None:
    write_checkpoints(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-0000000002.json"
    path.write_text(path.read_text().replace("funmatch-checkpoint/1", "funmatch-checkpoint/9"))
    for method in (Checkpoints.restore, Checkpoints.require_same_run):
        with pytest.raises(DataError, match=r"format 'funmatch-checkpoint/9'.*version that began the run"):
            method(Checkpoints(str(tmp_path), IDENTITY, 1))


def test_unreadable_folder_is_not_damage(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passing over a checkpoint for a temporary error would discard hours of work."""
    import tensorflow as tf

    write_checkpoints(tmp_path, 1, 2)
    real = files.read

    def read(path: str, what: str) -> bytes:
        if "0000000002" in path:
            cause = tf.errors.UnavailableError(None, None, "503")
            raise DataError(f"cannot read {what} {path}: 503") from cause
        return real(path, what)

    monkeypatch.setattr(files, "read", read)
    for method in (Checkpoints.restore, Checkpoints.require_same_run):
        with pytest.raises(DataError, match=r"0000000002\.json: 503"):
            method(Checkpoints(str(tmp_path), IDENTITY, 2))


def test_no_commit_without_the_lock(tmp_path: pathlib.Path) -> None:
    def lost() -> None:
        raise DataError("taken over")

    write_checkpoints(tmp_path, 1)
    with pytest.raises(DataError, match="taken over"):
        Checkpoints(str(tmp_path), IDENTITY, 2, lost).save(2, arrays(2), {})
    assert Checkpoints(str(tmp_path), IDENTITY, 2).restore().step == 1  # type: ignore[union-attr]


def slow(gate: threading.Event, done: list[int], number: int) -> Callable[[], None]:
    def work() -> None:
        assert gate.wait(30)
        done.append(number)

    return work


def test_background_runs_one_job_at_a_time() -> None:
    gate, done = threading.Event(), []
    with Background() as saving:
        saving.start(slow(gate, done, 1))
        saving.check()  # does not wait
        assert not done
        threading.Timer(0.1, gate.set).start()
        saving.start(slow(gate, done, 2))
        assert done[0] == 1
    assert done == [1, 2]


def test_background_error_is_raised_at_the_next_check() -> None:
    def full() -> None:
        raise DataError("No space left on device")

    for method in ("check", "wait", "start", "end"):
        saving = Background()
        saving.start(full)
        assert saving._thread is not None
        saving._thread.join()
        with pytest.raises(DataError, match="No space"):
            {
                "check": saving.check,
                "wait": saving.wait,
                "start": lambda: saving.start(full),  # noqa: B023
                "end": lambda: saving.__exit__(None, None, None),  # noqa: B023
            }[method]()
        saving.check()  # it is raised only once


def test_first_error_is_raised_and_the_save_completes() -> None:
    gate, done = threading.Event(), []

    def diverge() -> None:
        with Background() as saving:
            saving.start(slow(gate, done, 1))
            threading.Timer(0.1, gate.set).start()
            raise Diverged("nan")

    with pytest.raises(Diverged):
        diverge()
    assert done == [1]
