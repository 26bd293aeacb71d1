"""Writes deploy/schema.json: the fields of a custom job, as the installed gcloud's own message
classes have them.

    python3 -m deploy.make_schema > deploy/schema.json

gcloud sends unknown keys to the server unchanged, so the checker needs the names. This script
parses the source of the classes for names, types and enumerations. None of gcloud's code runs.
"""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import shutil
import sys
from typing import Any

PREFIX = "GoogleCloudAiplatformV1"
ROOTS = ("CustomJobSpec", "HyperparameterTuningJob")
_PLAIN = {
    "StringField": "string",
    "BytesField": "string",
    "IntegerField": "integer",
    "FloatField": "number",
    "BooleanField": "boolean",
}


def gcloud_root() -> pathlib.Path:
    """The folder of the gcloud that is first on PATH.

    Raises:
        SystemExit: there is none.
    """
    gcloud = shutil.which("gcloud")
    if not gcloud:
        raise SystemExit("gcloud is not on PATH: install the Google Cloud CLI (Debian: google-cloud-cli)")
    root = pathlib.Path(os.path.realpath(gcloud)).parent.parent
    if not (root / "VERSION").is_file():
        raise SystemExit(f"{root} holds no VERSION: is {gcloud} the Google Cloud CLI?")
    return root


def schema(root: pathlib.Path) -> dict[str, Any]:
    """What schema.json holds, of the gcloud in this folder."""
    library = root / "lib" / "googlecloudsdk"
    messages = library / "generated_clients/apis/aiplatform/v1/aiplatform_v1_messages.py"
    classes = {
        node.name: node
        for node in ast.parse(messages.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    types: dict[str, Any] = {}
    pending = list(ROOTS)
    while pending:
        name = pending.pop()
        if name in types:
            continue
        types[name] = _fields(classes[PREFIX + name])
        for kind in types[name].values():
            inner = kind[0] if isinstance(kind, list) else kind
            if isinstance(inner, str) and PREFIX + inner in classes:
                pending.append(inner)
    regions = ast.parse((library / "command_lib/ai/constants.py").read_text(encoding="utf-8"))
    supported = next(
        ast.literal_eval(node.value)
        for node in regions.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUPPORTED_TRAINING_REGIONS"
    )
    return {
        "gcloud": (root / "VERSION").read_text(encoding="utf-8").strip(),
        "regions": sorted(supported),
        "types": {name: types[name] for name in sorted(types)},
    }


def _fields(message: ast.ClassDef) -> dict[str, Any]:
    """The types of a message's fields, without the fields that only the server sets.

    A type is string, integer, number, boolean, map, the name of another message, or {"enum":
    values}; in a list if repeated.
    """
    nested = {node.name: node for node in message.body if isinstance(node, ast.ClassDef)}
    set_by_server = set(
        re.findall(r"^ +(\w+): Output only\.", ast.get_docstring(message, clean=False) or "", re.MULTILINE)
    )
    fields: dict[str, Any] = {}
    for node in message.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        field, call = ast.unparse(node.targets[0]), node.value
        kind = ast.unparse(call.func).rsplit(".", 1)[-1]
        if field in set_by_server:
            continue
        if kind in _PLAIN:
            value: Any = _PLAIN[kind]
        else:
            target = ast.literal_eval(call.args[0])
            if kind == "EnumField":
                value = {"enum": [ast.unparse(n.targets[0]) for n in nested[target].body if isinstance(n, ast.Assign)]}
            else:
                value = "map" if target in nested else target.replace(PREFIX, "")
        repeated = any(keyword.arg == "repeated" and ast.literal_eval(keyword.value) for keyword in call.keywords)
        fields[field] = [value] if repeated else value
    return {name: fields[name] for name in sorted(fields)}


if __name__ == "__main__":
    json.dump(schema(gcloud_root()), sys.stdout, indent=1)
    print()
