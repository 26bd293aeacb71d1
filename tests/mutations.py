"""Breaks each guard (tests/mutants/) in a copy of the project and runs the test that must fail
then: `make mutations`.

A mutant that survives its test is a failure. First the tests run in an unchanged copy, where they
must pass. Each mutant runs in a process that is forked from one which has imported TensorFlow
(tests/zygote.py), as many at a time as there are cores. `tests/mutations.py TEXT` runs the mutants
whose guard contains the text.
"""

from __future__ import annotations

import argparse
import compileall
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import fake_gcs
import mutants
from mutants import ROOT, Mutant
from zygote import Zygote, side_by_side

LIMIT = 150.0  # seconds for a mutant's tests; a mutant that makes them hang is killed too
PRELOAD = (
    "tensorflow",
    "keras",
    "keras.src.trainers.trainer",
    "pytest",
    "rich.console",
    "google.cloud.storage",
    "matplotlib.pyplot",
    "PIL.Image",
    "scipy.stats",
)


def copy_project(folder: pathlib.Path) -> None:
    """Copies what git tracks or would track, with uncommitted changes, and compiles it once."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    compileall.compile_dir(folder / "trainer", quiet=2)
    compileall.compile_dir(folder / "tests", quiet=2)


def run_pytest(folder: str, tests: list[str]) -> int:
    """Runs tests of the copy in `folder`, in this process, which is a child of the zygote; returns
    pytest's exit code.
    """
    os.chdir(folder)
    # Neither modules nor paths of ROOT may be left: the copy's are imported instead.
    sys.path[:] = [folder, f"{folder}/tests", *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    top_level = {"trainer", *(path.stem for path in (ROOT / "tests").iterdir())} - {"mutations"}
    for name in [name for name in sys.modules if name.split(".")[0] in top_level]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = folder  # for the processes that tests start
    import pytest

    ids = [f"tests/{test}" for test in tests]
    return int(
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *ids, "-m", "not slow and not kills"])
    )


def run_tests(zygote: Zygote, folder: pathlib.Path, tests: list[str], limit: float) -> tuple[int, str]:
    """Runs tests of the copy in `folder` for at most `limit` seconds: pytest's exit code and the
    end of its output.
    """
    output = folder / "output.txt"
    child = zygote.start("mutations", "run_pytest", output, folder=str(folder), tests=tests)
    try:
        code = child.wait(limit)
    except TimeoutError:
        code = 1
    return code, output.read_text(errors="replace")[-1500:]


def try_mutant(zygote: Zygote, mutant: Mutant, pristine: pathlib.Path) -> tuple[bool, str]:
    """Runs a mutant's test in a copy of the project.

    Returns:
        Whether it was killed, and what shows that: the line on the failed test; else why it counts
            as a survivor.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "copy"
        shutil.copytree(pristine, folder)
        try:
            (folder / mutant.path).write_text(mutant.source(pristine), encoding="utf-8")
        except mutants.Misfit as error:
            return False, str(error)
        code, output = run_tests(zygote, folder, [mutant.test], LIMIT)
    # 1: a test failed. Any other code (no test found, code that cannot be imported) proves nothing.
    if code != 1:
        return False, f"pytest exited with {code}: {output}"
    failed = re.search(r"^(?:FAILED|ERROR) (.*)", output, re.MULTILINE)
    return True, failed[1] if failed else f"no answer in {LIMIT:.0f} s"


def check_unchanged(zygote: Zygote, pristine: pathlib.Path, chosen: list[Mutant]) -> str:
    """Runs the mutants' tests in unchanged copies, in two processes; returns pytest's output if one
    fails.
    """
    modules: dict[str, set[str]] = {}
    for mutant in chosen:
        modules.setdefault(mutant.test.partition("::")[0], set()).add(mutant.test)
    halves = [[test for name in sorted(modules)[half::2] for test in sorted(modules[name])] for half in (0, 1)]

    def run_half(number: int) -> tuple[int, str]:
        folder = pristine.parent / f"unchanged-{number}"
        shutil.copytree(pristine, folder)
        return run_tests(zygote, folder, halves[number], 1200)

    results = side_by_side([lambda n=n: run_half(n) for n in (0, 1) if halves[n]])  # type: ignore[misc]
    return "\n".join(output for code, output in results if code != 0)


def main() -> int:
    """Returns exit code 0 if every mutant was killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default="")
    trust = "do not run the tests in an unchanged copy first: `make test` has just passed"
    parser.add_argument("--trust", action="store_true", help=trust)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in mutants.load() if arguments.text in mutant.guard]
    if not chosen:
        parser.error(f"no mutant's guard contains {arguments.text!r}")
    # TensorFlow's gs:// client reads these once, when the zygote imports it, which is before any
    # conftest.py.
    os.environ.update(fake_gcs.KNOBS)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Zygote(*PRELOAD) as zygote:
        pristine = pathlib.Path(name) / "pristine"
        copy_project(pristine)
        if not arguments.trust:
            if output := check_unchanged(zygote, pristine, chosen):
                print(f"tests fail in an unchanged copy:\n{output}")
                return 1
            print(f"tests pass in an unchanged copy ({time.monotonic() - start:.0f} s)", flush=True)

        def run(mutant: Mutant) -> bool:
            began = time.monotonic()
            killed, evidence = try_mutant(zygote, mutant, pristine)
            seconds = time.monotonic() - began
            print(f"{'killed' if killed else 'SURVIVED'} {mutant.guard} ({seconds:.0f} s): {evidence}", flush=True)
            return killed

        survivors = len(chosen) - sum(side_by_side([lambda m=mutant: run(m) for mutant in chosen]))  # type: ignore[misc]
    minutes = (time.monotonic() - start) / 60
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants were killed, in {minutes:.1f} min")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
