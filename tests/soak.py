"""Kills jobs at random moments and compares their results to the bit: `make soak`, `make soak
SOAK=20`.

Each try starts a job, kills it after a random time (SIGKILL, in a quarter of the cases SIGTERM) and
gives the same command again. In a third of the tries that job is killed too. The last one ends by
itself. The seed is printed; `--seed=N` repeats it.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import matrix
from zygote import Zygote, side_by_side


def main() -> int:
    """Returns exit code 0 if all results were equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Zygote(*matrix.PRELOAD) as zygote:
        return soak(zygote, pathlib.Path(folder), arguments.count, arguments.seed)


def soak(zygote: Zygote, folder: pathlib.Path, count: int, seed: int) -> int:
    """Makes `count` tries and prints what differed.

    Args:
        zygote: has `matrix.PRELOAD`.
        folder: for everything that the jobs write.
        count: number of tries.
        seed: of all choices.

    Returns:
        The exit code.
    """

    def call(output: str, *argv: str) -> None:
        code = zygote.start("hooks", "job", folder / output, argv=list(argv), hooks=[]).wait()
        assert code == 0, (folder / output).read_text()

    data, teacher, whole = folder / "data", folder / "teacher.keras", folder / "whole"
    call("prepare.txt", "prepare", "--dataset=synthetic", f"--out={data}", "--classes=5", "--size=32", "--pretrain=0",
         "--train=40", "--validation=15", "--test=23")  # fmt: skip
    call("teacher.txt", "teacher", f"--data={data}", "--model=bit-tiny", "--image_size=24", "--steps=4", "--batch_size=8",
         f"--out={teacher}")  # fmt: skip
    flags = matrix.flags(str(data), str(teacher), "bit-tiny")
    began = time.monotonic()
    call("whole.txt", *flags, f"--workdir={whole}")
    duration = time.monotonic() - began
    print(f"seed {seed}: {count} tries; an undisturbed run takes {duration:.1f} s", flush=True)
    began, signals_sent = time.monotonic(), []

    def run(number: int) -> str:
        """One try; returns what is wrong, or nothing."""
        rng, workdir = random.Random(f"{seed}/{number}"), folder / f"run-{number}"
        output = folder / f"run-{number}.txt"

        def run_job(kill: bool) -> int:
            child = zygote.start("hooks", "job", output, argv=[*flags, f"--workdir={workdir}"], hooks=[])
            if kill:
                time.sleep(rng.uniform(0, 1.2 * duration))
                chosen = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
                if not child.status.done():
                    signals_sent.append(chosen)
                child.send(chosen)
            return child.wait(600)

        for kill in (True, rng.random() < 1 / 3, False):
            code = run_job(kill)
            # SIGTERM before Python has set its handler, in the first milliseconds, ends the process
            # as it ends any other.
            if code not in ((0, 75, -signal.SIGKILL, -signal.SIGTERM) if kill else (0,)):
                return f"try {number} ended with {code}: {output.read_text()[-2000:]}"
        if parts := matrix.differences(whole, workdir):
            return f"try {number}: {', '.join(parts)} differ"
        shutil.rmtree(workdir)
        return ""

    problems = [text for text in side_by_side([lambda n=n: run(n) for n in range(count)]) if text]  # type: ignore[misc]
    for text in problems:
        print(text)
    minutes = (time.monotonic() - began) / 60
    print(f"{count} tries with {len(signals_sent)} kills, {len(problems)} differences, {minutes:.1f} min; seed {seed}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
