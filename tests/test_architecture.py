"""The shape of the package: imports go one way, hardware is known in one place, flags are read in
one place.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import mutants
import pytest
from conftest import ROOT

# A package imports only from itself and from packages of lower rank. The verbs, directly in
# trainer/, are on top.
RANKS = {"core": 0, "io": 1, "data": 2, "ingest": 3, "models": 3, "method": 4, "run": 5, "output": 6, "": 7}


def modules() -> dict[str, str]:
    """Path of each module by its name below `trainer`."""
    return {
        ".".join(path.relative_to(ROOT / "trainer").with_suffix("").parts): str(path)
        for path in (ROOT / "trainer").rglob("*.py")
        if path.name != "__init__.py"
    }


def imports(path: str) -> set[str]:
    """Names below `trainer` of the modules that a file imports, anywhere in it."""
    names = set()
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trainer":
            inside = node.module.removeprefix("trainer").removeprefix(".")
            for alias in node.names:
                full = f"{inside}.{alias.name}" if inside else alias.name
                names |= {full} & modules().keys() or {inside} & modules().keys()
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("trainer.") for a in node.names if a.name.startswith("trainer.")}
    return names


def package(name: str) -> str:
    """The package of a module; "" for a verb."""
    return name.rpartition(".")[0]


def test_every_package_has_a_rank() -> None:
    assert {package(name) for name in modules()} == RANKS.keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name: str) -> None:
    own = package(name)
    wrong = [
        other for other in imports(modules()[name]) if package(other) != own and RANKS[package(other)] >= RANKS[own]
    ]
    assert not wrong, f"{name} imports {wrong}, of a package that is not below {own or 'the verbs'}"


def test_no_import_circle() -> None:
    """Also within a package: no module is reached from itself."""
    graph = {name: imports(path) for name, path in modules().items()}
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle


def test_only_accelerator_knows_hardware() -> None:
    for name, path in modules().items():
        with open(path, encoding="utf-8") as file:
            text = file.read()
        for word in (
            "TPUClusterResolver",
            "TPUStrategy",
            "list_physical_devices",
            "MirroredStrategy",
            "OneDeviceStrategy",
        ):
            assert word not in text or name == "run.accelerator", f"{name} mentions {word}"


@pytest.mark.parametrize("names", ["core", "verbs"])
def test_core_and_verbs_import_no_tensorflow(names: str) -> None:
    """So that `--help` and mistakes in flags answer at once."""
    wanted = [name for name in modules() if package(name) == names.replace("verbs", "")]
    code = "; ".join(
        ["import sys", *(f"import trainer.{name}" for name in wanted), "sys.exit('tensorflow' in sys.modules)"]
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_mutants_fit_the_code() -> None:
    """Each pattern matches once and each test exists: found here in a second, by `make mutations`
    after minutes.
    """
    wrong = [f"{mutant.guard}: {problem}" for mutant in mutants.load() if (problem := mutant.misfit(ROOT))]
    assert not wrong, "\n".join(wrong)


def test_guards_of_mutants_have_names_of_their_own() -> None:
    names = [mutant.guard for mutant in mutants.load()]
    assert len(names) == len(set(names))
