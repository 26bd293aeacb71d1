"""Looks up known vulnerabilities of the packages in the locks: python requirements/audit.py
[--or-say-so] LOCK...

pip-audit looks each package up at the index's advisory service, and reports success even if it
could look none up. This script reports that as not done. Exit codes: 0 all were looked up and
none has a known vulnerability; 1 some have; 3 some could not be looked up, which `--or-say-so`
turns into 0 and a line of output. Needs pip-audit (`make audit` installs it, locked).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code and the lines to print.

    Args:
        dependencies: the packages in pip-audit's JSON.
    """
    lines = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        + (f", fixed in {', '.join(vulnerability['fix_versions'])}" if vulnerability.get("fix_versions") else "")
        for package in dependencies
        for vulnerability in package.get("vulns", [])
    ]
    skipped = [package for package in dependencies if "skip_reason" in package]
    code = VULNERABLE if lines else CLEAN
    if skipped or not dependencies:
        reason = f": {skipped[0]['skip_reason']}" if skipped else ""
        lines.append(f"NOT DONE for {len(skipped)} of {len(dependencies)} packages{reason}")
        code = code or UNKNOWN
    if code == CLEAN:
        lines.append(f"{len(dependencies)} packages looked up, no known vulnerability")
    return code, lines


def main() -> int:
    """Runs pip-audit over the locks that the arguments name."""
    locks = [argument for argument in sys.argv[1:] if argument != "--or-say-so"]
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--no-deps",
        "--disable-pip",
        "--format=json",
        "--progress-spinner=off",
    ]
    done = subprocess.run(
        [*command, *(f"--requirement={lock}" for lock in locks)], capture_output=True, text=True, check=False
    )
    try:
        code, lines = verdict(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError):
        output = done.stderr.strip().splitlines() or ["no output"]
        code, lines = UNKNOWN, [f"NOT DONE, pip-audit ended with {done.returncode}: {output[-1]}"]
    for line in lines:
        print(f"audit: {line}")
    return CLEAN if code == UNKNOWN and "--or-say-so" in sys.argv else code


if __name__ == "__main__":
    sys.exit(main())
