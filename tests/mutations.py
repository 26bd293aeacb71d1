"""Breaks each guard in turn, in a copy, and shows that a test notices. `make mutations`; a mutant that lives is a failure.

Not a test module itself: a mutant takes as long as starting TensorFlow takes, so all of them take some minutes.
"""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
import shutil
import subprocess
import sys
import tempfile

import mutants
from mutants import Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent


MUTANTS = [
    mutant
    for module in sorted(pkgutil.iter_modules(mutants.__path__), key=lambda found: found.name)
    for mutant in importlib.import_module(f"mutants.{module.name}").MUTANTS
]


def lives(mutant: Mutant, folder: pathlib.Path) -> str:
    """Runs a mutant's tests in a copy of the project; returns what they said if they pass, else nothing."""
    for name in ("trainer", "tests", "deploy", "docs", "recipes", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    path = folder / "trainer" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/{mutant.tests}",
        "-m",
        "not slow and not kills",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    # 1 is a failed test. Anything else (no test found, a mutant that is no Python) shows nothing.
    return "" if done.returncode == 1 else f"pytest exited with {done.returncode}: {done.stdout[-500:]}"


def main() -> int:
    """Tries all, or those whose description holds the first argument."""
    wanted = [m for m in MUTANTS if len(sys.argv) < 2 or sys.argv[1] in m.what]
    failed = 0
    for mutant in wanted:
        with tempfile.TemporaryDirectory() as folder:
            alive = lives(mutant, pathlib.Path(folder))
        failed += bool(alive)
        print(f"{'LIVES ' if alive else 'caught'} {mutant.what}{': ' + alive if alive else ''}", flush=True)
    print(f"{len(wanted) - failed} of {len(wanted)} broken guards were noticed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
