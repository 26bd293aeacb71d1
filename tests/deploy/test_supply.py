"""Locks, the bill of materials and the audit: what an image is made of is what was tested, and is said truly."""

from __future__ import annotations

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
# What install.sh calls the flavour's own.
OWN = re.compile(r"^(tensorflow|tensorflow-tpu|libtpu|nvidia-[a-z0-9-]+)$")


def blocks(lock: str) -> dict[str, str]:
    """What a lock says of each package: its version and hashes."""
    found: dict[str, str] = {}
    name = ""
    for line in (LOCKS / f"{lock}.txt").read_text().splitlines():
        if pin := re.match(r"^([a-z0-9.-]+)==", line):
            name = pin[1]
        if name and line.strip() and not line.lstrip().startswith("#"):
            found[name] = found.get(name, "") + line + "\n"
    return found


@pytest.mark.parametrize("flavour", ["tpu", "gpu", "dev"])
def test_flavours_differ_in_nothing_but_tensorflow(flavour: str) -> None:
    """The images share a layer that is installed from cpu.txt; and what the tests run on is what is deployed."""
    cpu, other = blocks("cpu"), blocks(flavour)
    common = {name: text for name, text in cpu.items() if not OWN.match(name)}
    assert len(common) > 80
    assert {name: other.get(name) for name in common} == common
    if flavour != "dev":
        assert all(OWN.match(name) for name in other.keys() - common.keys())


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


def test_the_installer_parts_a_lock_in_two(tmp_path: pathlib.Path) -> None:
    """The very awk program of install.sh: each package is in one of the two parts."""
    script = (LOCKS / "install.sh").read_text()
    (flavour,) = re.findall(r"flavour='(.+)'$", script, re.MULTILINE)
    assert flavour == OWN.pattern.removesuffix("$") + "=="
    parts = []
    for pattern in (f"keep = !/{flavour}/", f"keep = /{flavour}/"):
        (program,) = re.findall(r'awk "(.+)" "\$lock"', script)
        text = subprocess.check_output(
            ["awk", program.replace("$pattern", pattern), LOCKS / "tpu.txt"], text=True, cwd=tmp_path
        )
        parts.append(set(re.findall(r"^([a-z0-9.-]+)==", text, re.MULTILINE)))
    assert parts[0] | parts[1] == blocks("tpu").keys()
    assert not parts[0] & parts[1]
    assert parts[1] == {"tensorflow-tpu", "libtpu"}


def test_the_bill_of_materials_is_of_the_lock() -> None:
    made = [
        subprocess.check_output([sys.executable, LOCKS / "sbom.py", LOCKS / "build.txt", LOCKS / "tpu.txt"], text=True)
        for _ in range(2)
    ]
    assert made[0] == made[1]
    bill = json.loads(made[0])
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


def test_an_audit_that_could_not_look_is_not_clean() -> None:
    fine = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    assert audit.verdict([fine]) == (0, ["1 packages looked up, no known vulnerability"])
    assert audit.verdict([fine, bad]) == (1, ["b 2: PYSEC-1, mended in 3"])
    assert audit.verdict([fine, unknown]) == (3, ["NOT DONE for 1 of 2 packages: not found"])
    assert audit.verdict([bad, unknown])[0] == 1
    assert audit.verdict([])[0] == 3


def test_without_pip_audit_the_audit_says_so() -> None:
    """This environment has none."""
    command = [sys.executable, LOCKS / "audit.py", LOCKS / "build.txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.startswith("audit: NOT DONE")
    assert subprocess.run([*command, "--or-say-so"], capture_output=True, check=False).returncode == 0


def test_every_file_of_the_package_reaches_an_image() -> None:
    """What the build may see, and what setup.py installs, are lists: a new folder must be in both."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    setup = (ROOT / "setup.py").read_text()
    packages = setuptools.find_packages(str(ROOT), include=["trainer", "trainer.*"])
    assert 'find_packages(include=["trainer", "trainer.*"])' in setup
    for path in (ROOT / "trainer").rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(ROOT)
        assert any(name.match(one) and len(name.parts) == len(pathlib.PurePath(one).parts) for one in allowed), name
        assert ".".join(name.parts[:-1]) in packages, name
        assert path.suffix == ".py" or f'"{path.name}"' in setup, name
