"""The shape of the project: imports go one way, one module names hardware, public functions explain
their arguments, documents name files that exist.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator

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


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Public functions of a module and public methods of its public classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if isinstance(node, ast.FunctionDef):
                yield node
            else:
                yield from _public(node.body)


@pytest.mark.parametrize("name", sorted(modules()))
def test_functions_of_three_parameters_and_more_explain_them(name: str) -> None:
    """With a block `Args:`, or by reference to the method that they implement (``See `...` ``)."""
    with open(modules()[name], encoding="utf-8") as file:
        tree = ast.parse(file.read())
    missing = []
    for function in _public(tree.body):
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
        text = ast.get_docstring(function) or ""
        if count >= 3 and "Args:" not in text and not text.startswith("See `"):
            missing.append(function.name)
    assert not missing


@pytest.mark.parametrize(
    "document", sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_documents_name_files_that_exist(document: str) -> None:
    """Paths of the project after a backtick, but for patterns such as tests/PACKAGE."""
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:trainer|tests|deploy|docs|benchmarks|requirements|recipes)/[\w./-]+)", text)
    missing = [
        path for path in paths if not (ROOT / path.rstrip("/.")).exists() and not re.search("NAME|PACKAGE", path)
    ]
    assert not missing
