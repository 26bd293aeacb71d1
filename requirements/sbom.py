"""A bill of materials (CycloneDX 1.5, JSON) from locks: python requirements/sbom.py
requirements/tpu.txt > sbom.cdx.json

A lock names every Python package of an image, with its hashes, so the bill is complete for those.
It does not list the base image's own packages: an image scanner does. Standard library only.
"""

from __future__ import annotations

import json
import re
import sys
import uuid

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\;]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def components(text: str) -> dict[str, dict[str, object]]:
    """The components that a lock pins, by package URL.

    A lock names the hashes of all files (wheels of other systems, sources) that pip would accept.
    CycloneDX's `hashes` are of one file, so these are properties.
    """
    parts: dict[str, dict[str, object]] = {}
    accepted: list[dict[str, str]] = []
    for line in text.splitlines():
        if pin := _PIN.match(line):
            name = re.sub(r"[-_.]+", "-", pin[1]).lower()
            purl = f"pkg:pypi/{name}@{pin[2]}"
            accepted = []
            parts[purl] = {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": pin[2],
                "purl": purl,
                "properties": accepted,
            }
        accepted += [{"name": "funmatch:accepted-sha256", "value": digest} for digest in _HASH.findall(line)]
    return parts


def bill(texts: list[str]) -> dict[str, object]:
    """The bill of several locks together. The same locks give the same bill, to the byte."""
    merged: dict[str, dict[str, object]] = {}
    for text in texts:
        merged |= components(text)
    listed = [merged[purl] for purl in sorted(merged)]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(listed, sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "funmatch", "name": "funmatch"}},
        "components": listed,
    }


def main() -> None:
    """Prints the bill of the locks that the arguments name."""
    texts = []
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            texts.append(file.read())
    if not texts or not all("==" in text for text in texts):
        sys.exit("error: name one lock or more, as requirements/tpu.txt")
    print(json.dumps(bill(texts), indent=1))


if __name__ == "__main__":
    main()
