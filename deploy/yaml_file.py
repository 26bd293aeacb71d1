"""Reads job specs and studies with PyYAML, which a plain Python does not have."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from deploy.errors import UserError

try:
    import yaml  # type: ignore[import-untyped]
except ImportError:
    yaml = None


def load(path: pathlib.Path, name: str) -> Any:
    """The value that a YAML or JSON file holds. A JSON file needs no PyYAML.

    Args:
        path: the file.
        name: its name in messages.

    Raises:
        UserError: the file cannot be read, is neither YAML nor JSON, or has a key twice; or
            PyYAML is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _mapping(pairs, name))
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: is not JSON: {error}") from None
    if yaml is None:
        raise UserError(
            f"{name}: {sys.executable} has no PyYAML; run `python3 -m pip install pyyaml` or `pip install 'funmatch[deploy]'`"
        )
    return _load_yaml(text, name)


def _load_yaml(text: str, name: str) -> Any:
    class Loader(yaml.SafeLoader):
        pass

    def construct_mapping(loader: Loader, node: Any) -> dict[str, Any]:
        pairs = loader.construct_pairs(node, deep=True)
        return _mapping(pairs, f"{name}:{node.start_mark.line + 1}")

    Loader.add_constructor("tag:yaml.org,2002:map", construct_mapping)
    try:
        value = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line}: is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not YAML: {' '.join(str(error).split())}") from None
    if value is None:
        raise UserError(f"{name}: is empty")
    return value


def _mapping(pairs: Iterable[tuple[Any, Any]], place: str) -> dict[str, Any]:
    """The pairs of a mapping. PyYAML and json would keep the last of two values in silence.

    Raises:
        UserError: a key is not a string, or occurs twice.
    """
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise UserError(f"{place}: the key {key!r} is not a string; write it in quotes")
        if key in mapping:
            raise UserError(f"{place}: the key {key} occurs twice")
        mapping[key] = value
    return mapping
