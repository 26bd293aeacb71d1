"""The shape of the package: imports go one way, hardware is known in one place, flags are read in one place."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys

import mutants
import pytest
from conftest import ROOT

# The data's way. A module imports only from earlier lines; the first line may be imported by all.
ORDER = [
    ["errors"],
    ["environment"],
    ["logs"],
    ["config", "signals", "storage"],
    ["cli"],
    ["recipes", "files", "headers", "synthetic", "page.words"],
    ["accelerator", "archives", "journal", "lock", "places", "records", "page.charts", "page.confusions"],
    ["cache", "pictures"],
    ["sources"],
    ["tfds_sets", "tfrecord_sets"],
    ["prepare", "store", "views"],
    ["models.bit"],
    ["models.cheap"],
    ["models.loading", "models.saved_models"],
    ["models.from_kaggle", "models.weights"],
    ["models.conversion"],
    ["models.students"],
    ["models.teachers"],
    ["optim", "feed"],
    ["distill"],
    ["agreement"],
    ["checkpoint", "measure"],
    ["loop"],
    ["check", "export", "report"],
    ["task", "evaluate"],
    ["appraise"],
    ["teacher"],
    ["smoke"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports(path: str) -> set[str]:
    """The modules of `trainer` that a file imports, anywhere in it."""
    found = set()
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trainer":
            inside = ".".join(node.module.split(".")[1:])
            for name in (alias.name for alias in node.names):
                full = f"{inside}.{name}" if inside else name
                found |= {full} & RANK.keys() or {inside} & RANK.keys()
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("trainer.") for a in node.names if a.name.startswith("trainer.")}
    return found


def modules() -> dict[str, str]:
    """Path by module name."""
    found = {}
    for folder, _, names in os.walk(ROOT / "trainer"):
        for name in names:
            if name.endswith(".py") and name != "__init__.py":
                path = os.path.join(folder, name)
                found[os.path.relpath(path, ROOT / "trainer")[:-3].replace(os.sep, ".")] = path
    return found


def test_every_module_has_its_place() -> None:
    assert modules().keys() == RANK.keys()


@pytest.mark.parametrize("name", sorted(RANK))
def test_imports_go_one_way(name: str) -> None:
    wrong = [other for other in imports(modules()[name]) if RANK[other] >= RANK[name]]
    assert not wrong, f"{name} imports {wrong}, which come later on the data's way"


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
            assert word not in text or name == "accelerator", f"{name} mentions {word}"


def test_light_modules_import_no_tensorflow() -> None:
    light = [
        "task",
        "teacher",
        "evaluate",
        "appraise",
        "prepare",
        "smoke",
        "recipes",
        "cli",
        "config",
        "environment",
        "logs",
        "synthetic",
        "report",
        "errors",
    ]
    code = (
        "import sys; "
        + "; ".join(f"import trainer.{name}" for name in light)
        + "; sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_entries_of_guards_fit_the_code() -> None:
    """Each text that `make mutations` breaks is there once, and so is its test: said here in a second, there after minutes."""
    wrong = []
    for module in pkgutil.iter_modules(mutants.__path__):
        for mutant in importlib.import_module(f"mutants.{module.name}").MUTANTS:
            times = (ROOT / "trainer" / mutant.file).read_text().count(mutant.old)
            file, _, test = mutant.tests.partition("::")
            name = test.partition("[")[0].rpartition("::")[2]
            if times != 1 or (f"def {name}(" if name else "def test_") not in (ROOT / "tests" / file).read_text():
                wrong.append(f"{module.name}: {mutant.what}: {times} times, {mutant.tests}")
    assert not wrong
