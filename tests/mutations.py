"""Breaks each guard in turn, in a copy, and shows that a test notices. `make mutations`; a mutant that lives is a failure.

First the tests that are to notice run in an unbroken copy and must pass there: a test that fails anyway notices nothing. Each
mutant is a process that is forked from one which has TensorFlow already (tests/zygote.py), as many side by side as there are
cores. `tests/mutations.py TEXT` tries those whose description holds the text.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import pathlib
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import fake_gcs
import mutants
from mutants import Mutant
from zygote import Zygote, side_by_side

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 150.0  # seconds that a mutant's tests may take; a guard whose loss makes them hang is noticed too
PRELOAD = (
    "tensorflow",
    "keras",
    "keras.src.trainers.trainer",
    "pytest",
    "hypothesis",
    "rich.console",
    "google.cloud.storage",
    "matplotlib.pyplot",
    "PIL.Image",
)

MUTANTS = [
    mutant
    for module in sorted(pkgutil.iter_modules(mutants.__path__), key=lambda found: found.name)
    for mutant in importlib.import_module(f"mutants.{module.name}").MUTANTS
]


def copy(folder: pathlib.Path) -> None:
    """The project as git knows it, changes included, with everything compiled once."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    compileall.compile_dir(folder / "trainer", quiet=2)
    compileall.compile_dir(folder / "tests", quiet=2)


def tests(folder: str, chosen: list[str]) -> int:
    """Runs tests of the project in `folder`, in this process; called in a child of the zygote."""
    os.chdir(folder)
    # Not ROOT's: neither its modules nor the place it would be found at.
    sys.path[:] = [folder, f"{folder}/tests", *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    ours = {"trainer", *(path.stem for path in (ROOT / "tests").iterdir())}
    for name in [name for name in sys.modules if name.split(".")[0] in ours - {"mutations"}]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = folder  # for the processes that tests start
    import pytest

    ids = [f"tests/{one}" for one in chosen]
    return int(
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *ids, "-m", "not slow and not kills"])
    )


def run(zygote: Zygote, folder: pathlib.Path, chosen: list[str], limit: float) -> tuple[int, str]:
    """The exit code of pytest, and the end of what it said."""
    told = folder / "told.txt"
    child = zygote.start("mutations", "tests", told, folder=str(folder), chosen=chosen)
    try:
        code = child.wait(limit)
    except TimeoutError:
        code = 1
    return code, told.read_text(errors="replace")[-700:]


def lives(zygote: Zygote, mutant: Mutant, pristine: pathlib.Path) -> str:
    """Runs a mutant's tests in a copy of the project; returns what they said if they pass, else nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        shutil.copytree(pristine, folder)
        path = folder / "trainer" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
        path.write_text(text.replace(mutant.old, mutant.new))
        code, told = run(zygote, folder, [mutant.tests], LIMIT)
    # 1 is a failed test. Anything else (no test found, a mutant that is no Python) shows nothing.
    return "" if code == 1 else f"pytest exited with {code}: {told}"


def main() -> int:
    """Exit code 0 if every mutant was noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default="")
    trust = "do not run the tests in an unbroken copy first: `make test` has just passed"
    parser.add_argument("--trust", action="store_true", help=trust)
    asked = parser.parse_args()
    wanted = [m for m in MUTANTS if asked.text in m.what]
    os.environ.update(
        fake_gcs.KNOBS
    )  # read once by TensorFlow's gs:// client, which the server imports before any conftest
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Zygote(*PRELOAD) as zygote:
        pristine = pathlib.Path(name) / "pristine"
        copy(pristine)
        if not asked.trust:
            if broken := sound(zygote, pristine, wanted):
                print(f"tests fail although nothing is broken:\n{broken}")
                return 1
            print(f"their tests pass unbroken ({time.monotonic() - began:.0f} s)", flush=True)

        def one(mutant: Mutant) -> bool:
            since = time.monotonic()
            alive = lives(zygote, mutant, pristine)
            verdict = f"LIVES  {mutant.what}: {alive}" if alive else f"caught {mutant.what}"
            print(f"{verdict} ({time.monotonic() - since:.0f} s)", flush=True)
            return bool(alive)

        failed = sum(side_by_side([lambda m=mutant: one(m) for mutant in wanted]))  # type: ignore[misc]
    minutes = (time.monotonic() - began) / 60
    print(f"{len(wanted) - failed} of {len(wanted)} broken guards were noticed, in {minutes:.1f} min")
    return 1 if failed else 0


def sound(zygote: Zygote, pristine: pathlib.Path, wanted: list[Mutant]) -> str:
    """What the mutants' tests say in an unbroken copy, if they do not pass; half of their modules in each of two processes."""
    modules: dict[str, set[str]] = {}
    for mutant in wanted:
        modules.setdefault(mutant.tests.partition("::")[0], set()).add(mutant.tests)
    halves = [[test for name in sorted(modules)[half::2] for test in sorted(modules[name])] for half in (0, 1)]

    def one(number: int) -> Any:
        folder = pristine.parent / f"sound-{number}"
        shutil.copytree(pristine, folder)
        return run(zygote, folder, halves[number], 1200)

    said = side_by_side([lambda n=n: one(n) for n in (0, 1) if halves[n]])  # type: ignore[misc]
    return "\n".join(told for code, told in said if code != 0)


if __name__ == "__main__":
    sys.exit(main())
