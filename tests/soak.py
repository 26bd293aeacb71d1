"""Kills a job at random moments, again and again, and compares what comes out to the bit: `make soak`, `make soak SOAK=20`.

Each try starts a job, kills it from outside after a random time (SIGKILL, or now and then SIGTERM), gives the same command again,
kills that one too in a third of the cases, and lets the last one end. The seed is printed; `--seed=N` repeats a soak's choices.
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
    """Exit code 0 if no try differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Zygote(*matrix.PRELOAD) as zygote:
        return soak(zygote, pathlib.Path(folder), asked.count, asked.seed)


def soak(zygote: Zygote, folder: pathlib.Path, count: int, seed: int) -> int:
    """Tries `count` times; says what differed."""

    def call(told: str, *argv: str) -> None:
        code = zygote.start("hooks", "job", folder / told, argv=list(argv), hooks=[]).wait()
        assert code == 0, (folder / told).read_text()

    data, teacher, whole = folder / "data", folder / "teacher.keras", folder / "whole"
    call("prepare.txt", "prepare", "--dataset=synthetic", f"--out={data}", "--classes=5", "--size=32", "--pretrain=0",
         "--train=40", "--validation=15", "--test=23")  # fmt: skip
    call("teacher.txt", "teacher", f"--data={data}", "--model=bit-tiny", "--image_size=24", "--steps=4", "--batch_size=8",
         f"--out={teacher}")  # fmt: skip
    flags = matrix.flags(str(data), str(teacher), "bit-tiny")
    began = time.monotonic()
    call("whole.txt", *flags, f"--workdir={whole}")
    takes = time.monotonic() - began
    print(f"seed {seed}: {count} tries; a run that nobody stops takes {takes:.1f} s", flush=True)
    began, kills = time.monotonic(), []

    def one(number: int) -> str:
        chance, workdir = random.Random(f"{seed}/{number}"), folder / f"run-{number}"
        told = folder / f"run-{number}.txt"

        def start() -> tuple[int, bool]:
            child = zygote.start("hooks", "job", told, argv=[*flags, f"--workdir={workdir}"], hooks=[])
            if kill:
                time.sleep(chance.uniform(0, 1.2 * takes))
                sent = signal.SIGTERM if chance.random() < 0.25 else signal.SIGKILL
                if not child.status.done():
                    kills.append(sent)
                child.send(sent)
            return child.wait(600), kill

        for kill in (True, chance.random() < 1 / 3, False):  # noqa: B007 - start looks at it
            code, killed = start()
            # SIGTERM before Python has set its handler, in the first milliseconds, ends the process as it ends any other.
            if code not in ((0, 75, -signal.SIGKILL, -signal.SIGTERM) if killed else (0,)):
                return f"try {number} ended with {code}: {told.read_text()[-2000:]}"
        if found := matrix.differences(whole, workdir):
            return f"try {number}: {', '.join(found)} differ"
        shutil.rmtree(workdir)
        return ""

    wrong = [text for text in side_by_side([lambda n=n: one(n) for n in range(count)]) if text]  # type: ignore[misc]
    for text in wrong:
        print(text)
    minutes = (time.monotonic() - began) / 60
    print(f"{count} tries with {len(kills)} kills, {len(wrong)} differences, {minutes:.1f} min; seed {seed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
