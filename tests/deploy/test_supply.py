"""Locks, bill of materials and audit: an image holds what was tested, and its bill lists it."""

from __future__ import annotations

import fnmatch
import json
import pathlib
import re
import subprocess
import sys

import pytest
import setuptools
from conftest import ROOT

sys.path.insert(0, str(ROOT / "requirements"))
import audit
import sbom

LOCKS = ROOT / "requirements"
# Packages that differ between flavours. An image installs them after all others.
FLAVOUR_PACKAGE = re.compile(r"^(tensorflow|tensorflow-tpu|libtpu|nvidia-[a-z0-9-]+)$")


def requirements(text: str) -> dict[str, str]:
    """The version and hashes of each package in the text of a lock."""
    packages: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if pin := re.match(r"^([a-z0-9.-]+)==", line):
            name = pin[1]
        if name and line.strip() and not line.lstrip().startswith("#"):
            packages[name] = packages.get(name, "") + line + "\n"
    return packages


def blocks(lock: str) -> dict[str, str]:
    """The version and hashes of each package in a lock."""
    return requirements((LOCKS / f"{lock}.txt").read_text())


@pytest.mark.parametrize("flavour", ["tpu", "gpu", "dev"])
def test_flavours_differ_in_nothing_but_tensorflow(flavour: str) -> None:
    """The images share a layer installed from cpu.txt, and the tests run on the same packages."""
    cpu, other = blocks("cpu"), blocks(flavour)
    common = {name: text for name, text in cpu.items() if not FLAVOUR_PACKAGE.match(name)}
    assert len(common) > 80
    assert {name: other.get(name) for name in common} == common
    if flavour != "dev":
        assert all(FLAVOUR_PACKAGE.match(name) for name in other.keys() - common.keys())


def test_each_flavour_has_its_tensorflow() -> None:
    versions = {
        lock: {n: t.split("==")[1].split()[0] for n, t in blocks(lock).items()} for lock in ("cpu", "tpu", "gpu")
    }
    assert (
        versions["cpu"]["tensorflow"] == versions["gpu"]["tensorflow"] == versions["tpu"]["tensorflow-tpu"] == "2.19.1"
    )
    assert versions["tpu"]["libtpu"] == "0.0.10"
    assert "tensorflow" not in versions["tpu"]
    assert not {"tensorflow-tpu", "libtpu"} & (versions["cpu"].keys() | versions["gpu"].keys())
    assert {"nvidia-cudnn-cu12", "nvidia-nccl-cu12"} <= versions["gpu"].keys()


def test_every_pin_has_a_hash() -> None:
    for lock in LOCKS.glob("*.txt"):
        for name, text in blocks(lock.stem).items():
            assert "--hash=sha256:" in text, f"{lock.name}: {name}"


def selected(part: str, lock: str) -> str:
    """The requirements of a lock that install.sh installs for a part of an image."""
    command = ["sh", LOCKS / "install.sh", "select", part, LOCKS / f"{lock}.txt"]
    return subprocess.check_output(command, text=True)


@pytest.mark.parametrize("flavour", ["cpu", "tpu", "gpu"])
def test_the_installer_splits_a_lock_in_two(flavour: str) -> None:
    """Each package is in one part, with its hashes: TensorFlow and its libraries, or the rest."""
    parts = [requirements(selected(part, flavour)) for part in ("common", "flavour")]
    assert parts[0] | parts[1] == blocks(flavour)
    assert not parts[0].keys() & parts[1].keys()
    assert parts[1].keys() == {name for name in blocks(flavour) if FLAVOUR_PACKAGE.match(name)}
    assert parts[0] == requirements(selected("common", "cpu"))


def test_the_installer_refuses_an_unknown_part() -> None:
    for arguments in (["tensorflow", "cpu.txt"], ["common"], []):
        command = ["sh", LOCKS / "install.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: install.sh")


def test_the_bill_of_materials_is_of_the_lock() -> None:
    outputs = [
        subprocess.check_output([sys.executable, LOCKS / "sbom.py", LOCKS / "build.txt", LOCKS / "tpu.txt"], text=True)
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    bill = json.loads(outputs[0])
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    listed = {part["name"]: part for part in bill["components"]}
    assert listed.keys() == blocks("tpu").keys() | blocks("build").keys()
    assert listed["libtpu"]["purl"] == "pkg:pypi/libtpu@0.0.10"
    hashes = {entry["value"] for entry in listed["libtpu"]["properties"]}
    assert hashes == set(re.findall(r"sha256:([0-9a-f]{64})", blocks("tpu")["libtpu"]))
    other = sbom.bill([(LOCKS / "cpu.txt").read_text()])
    assert other["serialNumber"] != bill["serialNumber"]


def test_a_bill_of_nothing_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for arguments in ([], [tmp_path / "empty.txt"]):
        done = subprocess.run([sys.executable, LOCKS / "sbom.py", *arguments], capture_output=True, check=False)
        assert done.returncode == 1


def test_an_audit_that_could_not_look_packages_up_is_not_clean() -> None:
    fine = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    assert audit.verdict([fine]) == (0, ["1 packages looked up, no known vulnerability"])
    assert audit.verdict([fine, bad]) == (1, ["b 2: PYSEC-1, fixed in 3"])
    assert audit.verdict([fine, unknown]) == (3, ["NOT DONE for 1 of 2 packages: not found"])
    assert audit.verdict([bad, unknown])[0] == 1
    assert audit.verdict([])[0] == 3


def test_without_pip_audit_the_audit_is_not_done() -> None:
    """pip-audit is not in the environment of the tests."""
    command = [sys.executable, LOCKS / "audit.py", LOCKS / "build.txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.startswith("audit: NOT DONE")
    assert subprocess.run([*command, "--or-say-so"], capture_output=True, check=False).returncode == 0


def test_every_file_of_the_package_reaches_an_image() -> None:
    """A new folder must be in the build's allowlist and among the packages of setup.py."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    setup = (ROOT / "setup.py").read_text()
    packages = setuptools.find_packages(str(ROOT), include=["trainer", "trainer.*"])
    assert 'find_packages(include=["trainer", "trainer.*"])' in setup
    for path in (ROOT / "trainer").rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(ROOT)
        # Docker enters an excluded folder only if a line begins with its name, without wildcards.
        folder = [pathlib.PurePath(line).name for line in allowed if pathlib.PurePath(line).parent == name.parent]
        assert any(fnmatch.fnmatch(name.name, pattern) for pattern in folder), name
        assert ".".join(name.parts[:-1]) in packages, name
        assert path.suffix == ".py" or f'"{path.name}"' in setup, name
