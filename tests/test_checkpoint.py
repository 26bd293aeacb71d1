"""What a checkpoint commits is whole; what is not whole, not finite or not ours is never used."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from trainer import files
from trainer.checkpoint import Checkpoints
from trainer.errors import DataError, Diverged

IDENTITY = {"seed": 0, "steps": 10}


def arrays(value: float) -> dict[str, np.ndarray]:
    return {
        "student/0000/conv/kernel": np.full((3, 2), value, np.float32),
        "optimizer/0000/iterations": np.array(7, np.int64),
    }


def filled(folder: pathlib.Path, *steps: int, keep: int = 2) -> Checkpoints:
    made = Checkpoints(str(folder), IDENTITY, keep)
    for step in steps:
        made.save(step, arrays(step), {"seconds": step})
    return made


def test_round_trip_is_exact(tmp_path: pathlib.Path) -> None:
    odd = np.array([1e-45, -0.0, np.float32(1) / 3, 3e38], np.float32)
    Checkpoints(str(tmp_path), IDENTITY, 1).save(
        3, {"a/b": odd, "n": np.array(2**40)}, {"pending": [[2, {"loss": 0.1}]]}
    )
    found = Checkpoints(str(tmp_path), IDENTITY, 1).restore()
    assert found is not None
    assert found.step == 3
    assert found.arrays["a/b"].tobytes() == odd.tobytes()
    assert found.arrays["n"] == 2**40
    assert found.extra == {"pending": [[2, {"loss": 0.1}]]}


def test_nothing_there_is_none(tmp_path: pathlib.Path) -> None:
    assert Checkpoints(str(tmp_path / "no"), IDENTITY, 1).restore() is None


def test_newest_wins_and_old_ones_go(tmp_path: pathlib.Path) -> None:
    made = filled(tmp_path, 1, 2, 3, 10)
    assert made.restore().step == 10  # type: ignore[union-attr]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-0000000003.json",
        "checkpoint-0000000010.json",
    ]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "commit"])
def test_a_damaged_one_is_named_and_passed_over(tmp_path: pathlib.Path, damage: str) -> None:
    filled(tmp_path, 1, 2)
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
    made = Checkpoints(str(tmp_path), IDENTITY, 2)
    assert made.restore().step == 1  # type: ignore[union-attr]
    assert len(made.passed_over) == 1
    assert "0000000002" in made.passed_over[0]


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: pathlib.Path) -> None:
    filled(tmp_path, 1)
    next(iter(tmp_path.glob("state-*"))).unlink()
    with pytest.raises(DataError, match="none of the 1 checkpoints"):
        Checkpoints(str(tmp_path), IDENTITY, 1).restore()


def test_another_runs_checkpoint_is_refused_with_the_fields(tmp_path: pathlib.Path) -> None:
    filled(tmp_path, 5)
    with pytest.raises(DataError, match=r"steps: 10 there, 11 here"):
        Checkpoints(str(tmp_path), {"seed": 0, "steps": 11}, 1).restore()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_that_is_not_finite_is_committed(tmp_path: pathlib.Path, bad: float) -> None:
    made = filled(tmp_path, 1)
    with pytest.raises(Diverged, match=r"step 2: student/0000/conv/kernel"):
        made.save(2, arrays(bad), {})
    assert made.restore().step == 1  # type: ignore[union-attr]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_at_any_write_leaves_the_last_one_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the folder fails in turn, during a save; then the same save goes through."""

    class Crash(Exception):
        pass

    for point in range(4):
        folder = tmp_path / str(point)
        made = filled(folder, 1, 2)
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
                made.save(3, arrays(3), {})
        again = Checkpoints(str(folder), IDENTITY, 2)
        assert again.restore().step == (2 if point < 2 else 3)  # type: ignore[union-attr]
        again.save(3, arrays(3), {})
        again.save(4, arrays(4), {})
        assert again.restore().step == 4  # type: ignore[union-attr]
        assert len(list(folder.iterdir())) == 4, "what the crash left behind is still there"


def test_pickles_are_not_read(tmp_path: pathlib.Path) -> None:
    filled(tmp_path, 1)
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
