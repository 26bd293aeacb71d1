"""Asks whether what the locks name has known vulnerabilities: python requirements/audit.py [--or-say-so] LOCK...

pip-audit looks each package up at the index's advisory service, and calls a run in which it could look nothing up a clean one.
This calls it what it is. Exit codes: 0 all were looked up and none has a known vulnerability; 1 some have; 3 some could not be
looked up, which `--or-say-so` turns into 0 and a line that says so. Needs pip-audit (`make audit` installs it, locked).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code, and the lines to print, for what pip-audit's JSON says of the packages."""
    lines = [
        f"{one['name']} {one['version']}: {bad['id']}"
        + (f", mended in {', '.join(bad['fix_versions'])}" if bad.get("fix_versions") else "")
        for one in dependencies
        for bad in one.get("vulns", [])
    ]
    skipped = [one for one in dependencies if "skip_reason" in one]
    code = VULNERABLE if lines else CLEAN
    if skipped or not dependencies:
        why = f": {skipped[0]['skip_reason']}" if skipped else ""
        lines.append(f"NOT DONE for {len(skipped)} of {len(dependencies)} packages{why}")
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
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        code, lines = UNKNOWN, [f"NOT DONE, pip-audit ended with {done.returncode}: {said[-1]}"]
    for line in lines:
        print(f"audit: {line}")
    return CLEAN if code == UNKNOWN and "--or-say-so" in sys.argv else code


if __name__ == "__main__":
    sys.exit(main())
