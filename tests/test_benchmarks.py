"""The benchmark's bookkeeping, and that it still runs: figures in documents come from it."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import CLASSES, ROOT
from PIL import Image


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return benchmark("paper_in_miniature", monkeypatch)


def test_rates_are_chosen_on_validation_with_a_seed_of_their_own(
    miniature: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test accuracy, which points to another rate, does not count; no run is made twice."""
    calls = []

    def train(way: object, steps: int, seed: int, rate: float, **_: object) -> dict:
        calls.append((steps, seed, rate))
        best = rate == 0.01
        return {
            "way": way.name,
            "steps": steps,
            "seed": seed,
            "rate": rate,
            "validation": best,
            "test": not best,
            "seconds": 0,
        }

    monkeypatch.setattr(miniature, "train", train)
    ways = miniature.MODES[:2]
    path = tmp_path / "runs.jsonl"
    for _ in range(2):
        runs = miniature.Runs(path)
        rates = miniature.choose_rates(runs, ways, miniature.FULL)
        assert rates == {way.name: 0.01 for way in ways}
    assert len(calls) == 2 * len(miniature.RATES["adamw"])
    assert {(steps, seed) for steps, seed, _ in calls} == {(miniature.FULL.choose_at, 0)}
    assert 0 not in miniature.FULL.seeds
    assert len(path.read_text().splitlines()) == len(calls)


def test_the_committed_table_is_of_the_committed_runs(miniature: types.ModuleType) -> None:
    """benchmarks/miniature holds what one full run wrote; its table follows from its rows."""
    folder = ROOT / "benchmarks" / "miniature"
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    plan = miniature.FULL
    results: dict = {}
    for seed in plan.seeds:
        for row in (row for row in rows if row["seed"] == seed):
            results.setdefault(row["way"], {}).setdefault(row["steps"], []).append(row)
    assert set(results) == {
        way.name for way in (*miniature.MODES, *miniature.LABELS, *miniature.MUON, *miniature.OTHERS)
    }
    rates = {name: next(iter(by_steps.values()))[0]["rate"] for name, by_steps in results.items()}
    text = (folder / "table.md").read_text()
    table = miniature.table(results, plan, rates)
    assert sorted(text.split("\n\n")[0].splitlines()) == sorted(table.strip().splitlines())
    for by_steps in results.values():
        assert all(len(found) == len(plan.seeds) for found in by_steps.values())


@pytest.mark.slow
def test_the_benchmark_runs(
    miniature: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A teacher of one step is near chance; with fewer than 30 images that is a warning.
    monkeypatch.setattr(miniature, "HELD_OUT", 24)
    monkeypatch.setattr(miniature, "CLASSES", 4)
    monkeypatch.setattr(miniature, "TRAIN", 16)
    monkeypatch.setattr(miniature, "PRETRAIN", 40)
    monkeypatch.setattr(miniature, "TEACHERS", {"weak": 1})
    monkeypatch.setattr(miniature, "QUICK", miniature.Plan((2,), 0, (1,)))
    monkeypatch.setattr(miniature, "MODES", [way for way in miniature.MODES if way.name in ("fix/ic_ens", "mix")])
    monkeypatch.setattr(miniature, "LABELS", miniature.LABELS[:1])
    monkeypatch.setattr(miniature, "CROPS", 2)
    monkeypatch.setattr(miniature, "RUNS_A_PROCESS", 100)  # a fresh process would not know of these settings
    monkeypatch.setattr(sys, "argv", ["paper_in_miniature", f"--out={tmp_path}", "--quick"])
    # One teacher is trained; the others are copies of it, which the benchmark finds there.
    teacher = miniature.make_teachers(tmp_path, miniature.make_data(tmp_path))["weak"]
    monkeypatch.setattr(miniature, "TEACHERS", dict.fromkeys(("weak", "middling", "strong"), 1))
    for name in ("middling", "strong"):
        shutil.copy(teacher, tmp_path / f"teacher_{name}.keras")
    miniature.main()
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in text for name in ("mix", "fix/ic_ens", "mix, Muon", "mix, weak teacher"))
    assert "<svg" in (tmp_path / "picture.svg").read_text()


@pytest.fixture
def data_path(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return benchmark("data_path", monkeypatch)


def test_each_part_of_the_data_path_is_measured(
    data_path: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sets of a hundredth of the size; every part gives what its table needs, and the sets are
    what they are said to be.
    """
    allowed: list[list[int]] = []
    monkeypatch.setattr(data_path.os, "sched_setaffinity", lambda _, cores: allowed.append(cores))
    monkeypatch.setattr(data_path, "SHARD", 50)
    monkeypatch.setattr(data_path, "LARGE_SHARD", 20)
    rows = {
        "by_cores": [data_path.by_cores(str(tmp_path / "a"), 1, 32, 128)],
        "by_kind": data_path.by_kind(str(tmp_path / "b"), 32, 128),
        "by_size": data_path.by_size(str(tmp_path / "c"), [100, 200], 80),
        "by_place": data_path.by_place(6400),
        "by_order": [data_path.by_order(5000)],
        "by_reading": data_path.by_reading(str(tmp_path / "d"), 5, [0, 1]),
    }
    assert [len(cores) for cores in allowed] == [1]
    assert [row["store"] for row in rows["by_kind"]] == ["device", "host", "disk"]
    assert [(row["records"], row["shards"]) for row in rows["by_size"]] == [(100, 2), (200, 4)]
    assert [row["batch"] for row in rows["by_place"]] == [0, 24, 49, 74, 99, 100, 99_000]
    assert [row["epoch"] for row in rows["by_place"]] == [0, 0, 0, 0, 0, 1, 990]
    assert rows["by_reading"][1]["shards read from"] == 5
    assert rows["by_reading"][1]["GB read"] == pytest.approx(64 * 131.5e-6, rel=0.05)
    text = data_path.markdown({"command": "c", "machine": "m", "rows": rows})
    assert text.count("| --- |") >= len(rows) == len(data_path.TITLES)
    assert all(row[name] > 0 for row in rows["by_size"] for name in row)


def test_a_part_that_fails_is_told_and_leaves_nothing(data_path: types.ModuleType, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=r"by_order\(-1,\) failed"):
        data_path.apart("by_order", str(tmp_path), -1)
    assert not list(tmp_path.iterdir())


def test_the_data_paths_tables_are_of_its_results(data_path: types.ModuleType) -> None:
    """The committed ones, and those in the documentation."""
    folder = ROOT / "benchmarks" / "data_path"
    text = (folder / "table.md").read_text()
    result = json.loads((folder / "results.json").read_text())
    assert text == data_path.markdown(result)
    document = (ROOT / "docs" / "data.md").read_text()
    for part, rows in result["rows"].items():
        assert data_path.table(rows) in document, part


def test_saving_holds_the_loop_no_longer_than_the_copy(tmp_path: pathlib.Path) -> None:
    """For a state of 60 MB. The thread's part (hash, checksum, write) is most of a save."""
    spec = importlib.util.spec_from_file_location("checkpoint_stall", ROOT / "benchmarks" / "checkpoint_stall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.measure(60, 3, str(tmp_path))
    assert found["state_mb"] > 55
    assert found["in_the_background_s"] < 0.6 * found["in_the_loop_s"]
    assert found["in_the_background_s"] < found["until_committed_s"]


def test_view_fidelity_finds_larger_squares_more_faithful(
    teacher_file: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Squares as large as the originals give the originals' views, but for resampling twice."""
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    Image.fromarray(noise).save(tmp_path / "small.png")
    program = benchmark("view_fidelity", monkeypatch)
    monkeypatch.setattr(program, "REPEATS", 1)
    inputs = f"--photographs={tmp_path}", f"--teacher=keras:{teacher_file}", f"--classes={CLASSES}"
    program.main([*inputs, "--side=120", "--crops=8", "--factors=2,5,7"])
    printed = capsys.readouterr()
    assert printed.err.startswith("3 photographs, 8 crops of each, views of 24 pixels")
    small, large, whole = map(json.loads, printed.out.splitlines()[:3])
    assert [row["store_size"] for row in (small, large, whole)] == [48, 120, 168]
    assert small["blurred"] > 0.3 > 0.1 > large["blurred"] >= whole["blurred"] == 0
    assert small["kl"] > 4 * large["kl"]
    assert "| 168 | 0.0% |" in printed.out
