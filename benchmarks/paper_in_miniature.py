"""Test the paper's claims on drawn flowers, on a CPU.

    python benchmarks/paper_in_miniature.py          # over an hour, into build/miniature
    python benchmarks/paper_in_miniature.py --quick  # one seed, two budgets

Does function matching win? Do fixed teachers overfit? Does long training pay? Every student is the
same network on the same few images. One thing differs at a time: the views of teacher and student
(the paper's eight modes), labels instead of a teacher, the teacher, the optimizer, the number of
steps.

The learning rate of each way is chosen on the validation split with a separate seed (0) at the
middle budget (--quick: none is chosen; weaker teachers use the strong one's learning rate). The
table is measured on the test split with other seeds (1, 2, 3). Runs that are in OUT/runs.jsonl are
not repeated: the same command resumes a stopped benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from trainer import teacher
from trainer.core import options
from trainer.core.config import Config
from trainer.core.console import SilentConsole
from trainer.data.order import ExampleSampler
from trainer.ingest.synthetic_source import write_synthetic_dataset
from trainer.run import accelerator, build
from trainer.run.plan import make_plan

CLASSES = 12
STORE_SIZE = 64  # side of the drawn images in pixels
IMAGE_SIZE = 32  # side of the models' input in pixels
BATCH = 32
PRETRAIN, TRAIN, HELD_OUT = 6000, 120, 1500  # images of the teacher, of the students, of each held-out split
TEACHERS = {"weak": 100, "middling": 300, "strong": 1200}  # steps of the teacher's own training
RATES = {"adamw": (0.003, 0.01, 0.03), "muon": (0.003, 0.01, 0.03)}
TEMPERATURE = 2.0
CROPS = 200  # of fix/ic_ens; the paper uses 1,000
# TensorFlow keeps every graph of a process: after 80 runs a run took twice the time. A new process
# continues.
RUNS_A_PROCESS = 16


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train the student: what differs from the others."""

    name: str
    views: str = "mix"
    distance: str = "kl"
    teacher: str = "strong"
    optimizer: str = "adamw"


MODES = [Way(mode, views=mode) for mode in options.VIEWS]
LABELS = [
    Way("labels, inception crops", views="same/ic", distance="labels"),
    Way("labels, crops and mixup", distance="labels"),
]
OTHERS = [Way("mix, weak teacher", teacher="weak"), Way("mix, middling teacher", teacher="middling")]
MUON = [Way("mix, Muon", optimizer="muon")]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run of the benchmark.

    Attributes:
        budgets: numbers of steps, ascending.
        choose_at: the budget at which learning rates are chosen; 0: none is chosen, the middle one
            is used.
        seeds: of the table.
    """

    budgets: tuple[int, ...]
    choose_at: int
    seeds: tuple[int, ...]


FULL = Plan((150, 600, 1800), 600, (1, 2, 3))
QUICK = Plan((100, 400), 0, (1,))


def make_data(out: pathlib.Path) -> pathlib.Path:
    """Draws the images, unless they are there: many for the teacher, few for the student, two
    held-out splits.
    """
    folder = out / "data"
    if not (folder / "dataset.json").exists():
        splits = {"pretrain": PRETRAIN, "train": TRAIN, "validation": HELD_OUT, "test": HELD_OUT}
        write_synthetic_dataset(str(folder), 0, CLASSES, STORE_SIZE, splits, lambda *_: None)
    return folder


def make_teachers(out: pathlib.Path, data: pathlib.Path) -> dict[str, pathlib.Path]:
    """Trains a teacher for each entry of `TEACHERS` from labels, unless it is there, and returns
    their files.
    """
    paths = {}
    for name, steps in TEACHERS.items():
        path = out / f"teacher_{name}.keras"
        if not path.exists():
            flags = {
                "data": data,
                "train_split": "pretrain",
                "model": "bit-small",
                "steps": steps,
                "image_size": IMAGE_SIZE,
                "store_size": STORE_SIZE,
                "batch_size": 128,
                "eval_batch_size": 250,
                "learning_rate": 0.003,
                "eval_every": steps,
                "out": path,
            }
            if code := teacher.main([f"--{flag}={value}" for flag, value in flags.items()]):
                raise SystemExit(code)
        paths[name] = path
    return paths


def train(
    way: Way, steps: int, seed: int, rate: float, data: pathlib.Path, teachers: dict[str, pathlib.Path]
) -> dict[str, Any]:
    """Trains and evaluates one student.

    Args:
        way: how.
        steps: updates.
        seed: of weights, order and views.
        rate: peak learning rate.
        data: the prepared data set.
        teachers: `.keras` file of each teacher of `TEACHERS`.

    Returns:
        A row of runs.jsonl: top-1 on both held-out splits in percent, and the mean KL to the
        targets over the loops of 50 steps that end in the last tenth of training (from labels: the
        cross-entropy).
    """
    keras.utils.clear_session()
    gc.collect()
    config = Config(
        data=str(data),
        teacher=() if way.distance == "labels" else (f"keras:{teachers[way.teacher]}",),
        student="bit-tiny",
        image_size=IMAGE_SIZE,
        store_size=STORE_SIZE,
        batch_size=BATCH,
        eval_batch_size=250,
        steps=steps,
        seed=seed,
        views=way.views,
        fixed_crops=CROPS,
        distance=way.distance,
        temperature=TEMPERATURE,
        optimizer=way.optimizer,
        learning_rate=rate,
        weight_decay=1e-4,
    )
    start = time.monotonic()
    job = build.build(make_plan(config), accelerator.resolve("none"), SilentConsole())
    sampler = ExampleSampler(seed, len(job.train_store), BATCH)
    last_kls: list[float] = []
    while job.step < steps:
        metrics = job.run_steps(min(50, steps - job.step), sampler)
        if job.step > 0.9 * steps:
            last_kls.append(metrics["kl"])
    row = {"way": way.name, "steps": steps, "seed": seed, "rate": rate, "train_kl": statistics.fmean(last_kls)}
    for split in ("validation", "test"):
        evaluated = job.evaluator(split).run(job.student, job.teachers).metrics()
        row[split] = 100 * evaluated["student_top1"]
        if "teacher_top1" in evaluated:
            row[f"teacher_{split}"] = 100 * evaluated["teacher_top1"]
    return row | {"seconds": round(time.monotonic() - start, 1)}


class Runs:
    """The rows of runs.jsonl. Each run is made once."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self._new_runs = 0

    def get(self, way: Way, steps: int, seed: int, rate: float, **files: Any) -> dict[str, Any]:
        """The row of a run, from the file or by training; see `train` for the arguments."""
        for row in self.rows:
            if (row["way"], row["steps"], row["seed"], row["rate"]) == (way.name, steps, seed, rate):
                return row
        if self._new_runs == RUNS_A_PROCESS:
            os.execv(sys.executable, [sys.executable, *sys.argv])
        self._new_runs += 1
        row = train(way, steps, seed, rate, **files)
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{len(self.rows):4}  {way.name:24} {steps:5} steps, seed {seed}, rate {rate:<6}: test {row['test']:5.1f} %, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
        return row


def require_same_settings(path: pathlib.Path, plan: Plan) -> None:
    """Writes the settings, or stops if the folder holds runs of other settings."""
    settings = {
        "CLASSES": CLASSES,
        "PICTURE": STORE_SIZE,
        "IMAGE": IMAGE_SIZE,
        "BATCH": BATCH,
        "PRETRAIN": PRETRAIN,
        "TRAIN": TRAIN,
        "HELD_OUT": HELD_OUT,
        "TEACHERS": TEACHERS,
        "TEMPERATURE": TEMPERATURE,
        "CROPS": CROPS,
        "budgets": list(plan.budgets),
    }
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} has other settings: give another --out, or delete that folder")
    path.write_text(json.dumps(settings, indent=1) + "\n")


def choose_rates(runs: Runs, ways: Iterable[Way], plan: Plan, **files: Any) -> dict[str, float]:
    """Chooses learning rates on the validation split, with seed 0.

    Args:
        runs: made so far; receives the new ones.
        ways: for which to choose.
        plan: says at which budget; where it says 0, the middle learning rate is used.
        files: data and teachers, for `train`.

    Returns:
        The best learning rate by the name of the way.
    """
    rates = {}
    for way in ways:
        if not plan.choose_at:
            rates[way.name] = RATES[way.optimizer][1]
            continue
        rows = [runs.get(way, plan.choose_at, 0, rate, **files) for rate in RATES[way.optimizer]]
        rates[way.name] = max(rows, key=lambda row: row["validation"])["rate"]
    return rates


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation, as text."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results: dict[str, dict[int, list[dict]]], plan: Plan, rates: dict[str, float]) -> str:
    """Test top-1 by way and budget, and the KL to the targets in training, as a Markdown table.

    Args:
        results: rows by the name of the way and by steps, one for each seed.
        plan: budgets are the columns.
        rates: learning rate of each way.
    """
    budgets = " | ".join(f"{steps:,} steps" for steps in plan.budgets)
    lines = [
        f"| way | lr | {budgets} | KL in training, {plan.budgets[-1]:,} steps (nats) |",
        "|---|---|" + "---|" * (len(plan.budgets) + 1),
    ]
    for name, by_steps in results.items():
        cells = [
            spread([row["test"] for row in by_steps[steps]]) if steps in by_steps else "" for steps in plan.budgets
        ]
        longest = by_steps.get(plan.budgets[-1])
        from_labels = name in {way.name for way in LABELS}
        fit = f"{statistics.fmean(row['train_kl'] for row in longest):.3f}" if longest and not from_labels else ""
        lines.append(f"| {name} | {rates[name]:g} | {' | '.join(cells)} | {fit} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[int, list[dict]]], plan: Plan, teacher_top1: float, path: pathlib.Path) -> None:
    """Plots accuracy against steps: a line for each way, a point for each seed.

    Args:
        results: as for `table`.
        plan: its budgets are the ticks.
        teacher_top1: of the strong teacher on the test split, in percent.
        path: SVG file to write.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "funmatch"
    import matplotlib.pyplot as plt

    groups = {
        "views (AdamW, strong teacher)": [way.name for way in MODES],
        "function matching and others": ["mix", *(way.name for way in (*MUON, *OTHERS, *LABELS))],
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, (title, names) in zip(axes, groups.items(), strict=True):
        for number, name in enumerate(names):
            if name not in results:
                continue
            steps = sorted(results[name])
            means = [statistics.fmean(row["test"] for row in results[name][s]) for s in steps]
            line = axis.plot(steps, means, marker="o", markersize=4, label=name, color=f"C{number}", linewidth=1.4)[0]
            for s in steps:
                points = [row["test"] for row in results[name][s]]
                axis.plot([s] * len(points), points, ".", color=line.get_color(), markersize=3, alpha=0.6)
        axis.axhline(teacher_top1, color="black", linestyle=":", linewidth=1, label="strong teacher")
        axis.set(title=title, xlabel="steps", xscale="log", xticks=plan.budgets)
        axis.set_xticklabels([f"{steps:,}" for steps in plan.budgets])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("test top-1, %")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def processor() -> str:
    """The processor's name from /proc/cpuinfo, else its architecture."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Makes the missing runs and writes table.md and picture.svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for all files of the benchmark")
    parser.add_argument("--quick", action="store_true", help="one seed and two budgets")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    out = arguments.out or pathlib.Path("build") / ("miniature-quick" if arguments.quick else "miniature")
    out.mkdir(parents=True, exist_ok=True)
    require_same_settings(out / "settings.json", plan)
    data = make_data(out)
    files: dict[str, Any] = {"data": data, "teachers": make_teachers(out, data)}
    runs = Runs(out / "runs.jsonl")
    all_budgets = [*MODES, *LABELS, *MUON]
    rates = choose_rates(runs, all_budgets, plan, **files)
    rates |= {way.name: rates["mix"] for way in OTHERS}
    results: dict[str, dict[int, list[dict]]] = {}
    # Seed by seed, so that a stopped benchmark has compared all ways.
    for seed in plan.seeds:
        for way in (*all_budgets, *OTHERS):
            for steps in plan.budgets if way in all_budgets else plan.budgets[-1:]:
                row = runs.get(way, steps, seed, rates[way.name], **files)
                results.setdefault(way.name, {}).setdefault(steps, []).append(row)
    quality = {
        name: next(row["teacher_test"] for row in runs.rows if row["way"] == way)
        for name, way in (("weak", OTHERS[0].name), ("middling", OTHERS[1].name), ("strong", "mix"))
    }
    teacher_accuracies = ", ".join(f"{name} {top1:.1f} %" for name, top1 in quality.items())
    minutes = sum(row["seconds"] for row in runs.rows) / 60
    seeds = "1 seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds: mean ± standard deviation"
    notes = (
        f"\nTest top-1 in percent, {seeds}. Teachers: {teacher_accuracies}. {TRAIN} images of {CLASSES} species, "
        f"batches of {BATCH}, {IMAGE_SIZE} px, T = {TEMPERATURE:g}.\n{len(runs.rows)} runs, {minutes:.0f} minutes in "
        f"them; {processor()}, {os.cpu_count()} cores, TensorFlow {tf.__version__}, Python "
        f"{platform.python_version()}.\n"
    )
    text = table(results, plan, rates) + notes
    (out / "table.md").write_text(text)
    plot(results, plan, quality["strong"], out / "picture.svg")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
