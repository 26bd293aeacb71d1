"""Reads the part of YAML that means the same to every reader, and refuses the rest.

Specs are YAML because people write and copy them; a laptop's Python has no YAML reader. This one takes block mappings and
lists, comments, plain and quoted text on one line, and JSON. What readers disagree on or pass over in silence it
refuses: keys given twice, tabs, anchors, tags, folded text, `yes` and `on`, octal numbers, dates. What it takes, it reads
as PyYAML and gcloud do (tests/test_deploy.py).
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_KEY = re.compile(
    r"""(?P<key>[A-Za-z_][\w./-]*|"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*:(?=\s|$)\s*(?P<rest>.*)""", re.ASCII
)
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?", re.ASCII)
# Plain text that some reader takes for a number, a date, a truth or nothing.
_AMBIGUOUS = re.compile(
    r"""[-+.]?[0-9][0-9_,.]*([eE][-+]?[0-9]*)? | [-+]?0[xob][0-9a-fA-F_]+ | [-+]?[0-9][0-9_]*(:[0-9_]+)+(\.[0-9_]*)?
    | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.* | [-+]?\.(inf|nan) | y|n|yes|no|on|off|true|false|null|~ | = | << """,
    re.VERBOSE | re.IGNORECASE,
)
_START = re.compile(r"""[A-Za-z0-9_./$(+-]""", re.ASCII)


class YamlError(ValueError):
    """What is wrong, and where."""


class _Line(NamedTuple):
    number: int
    indent: int
    text: str


def load(text: str, name: str = "YAML") -> Any:
    """The value that a document holds.

    Args:
        text: of one document; JSON is YAML too.
        name: of the file, for errors.

    Raises:
        YamlError: `name:line: what is wrong`.
    """
    if text.lstrip()[:1] in ("{", "["):
        return _json(text, f"{name}")
    reader = _Reader(text, name)
    if not reader.lines:
        raise YamlError(f"{name}: is empty")
    value = reader.block(reader.lines[0].indent)
    if reader.at < len(reader.lines):
        raise reader.error("is indented less or more than the lines that it belongs to")
    return value


def _json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key in found if sum(key == k for k, _ in pairs) > 1)
            raise YamlError(f"{where}: the key {twice} is given twice")
        return found

    def refuse(word: str) -> None:
        raise YamlError(f"{where}: {word} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise YamlError(f"{where}: is no JSON ({error}); write lists and mappings on lines of their own") from None


class _Reader:
    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.at = 0
        self.lines: list[_Line] = []
        for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
            here = _Line(number, 0, "")
            if bad := re.search(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd]|[\u2028\u2029]", raw):
                raise self.error(f"holds {bad[0]!a}: use spaces and plain characters", here)
            text = _without_comment(raw).rstrip(" ")
            if text == "---" and not self.lines:
                continue
            if text.strip(" "):
                indent = len(text) - len(text.lstrip(" "))
                self.lines.append(_Line(number, indent, text[indent:]))

    def error(self, what: str, line: _Line | None = None) -> YamlError:
        line = line or self.lines[min(self.at, len(self.lines) - 1)]
        shown = f" {line.text!r}" if line.text else ""
        return YamlError(f"{self.name}:{line.number}:{shown} {what}")

    def block(self, indent: int) -> Any:
        """The mapping or list whose lines start at this column."""
        text = self.lines[self.at].text
        if text == "-" or text.startswith("- "):
            return self.sequence(indent)
        if _KEY.fullmatch(text):
            return self.mapping(indent)
        value = self.scalar(self.lines[self.at], text)
        self.at += 1
        return value

    def here(self, indent: int) -> _Line | None:
        """The next line if it belongs to a block at this column."""
        if self.at == len(self.lines) or self.lines[self.at].indent < indent:
            return None
        if self.lines[self.at].indent > indent:
            raise self.error("is indented more than the lines that it belongs to")
        return self.lines[self.at]

    def sequence(self, indent: int) -> list[Any]:
        found: list[Any] = []
        while (line := self.here(indent)) and (line.text == "-" or line.text.startswith("- ")):
            rest = line.text[1:].lstrip(" ")
            if rest and (_KEY.fullmatch(rest) or rest == "-" or rest.startswith("- ")):
                # What follows the dash is the first line of a block of its own.
                column = indent + len(line.text) - len(rest)
                self.lines[self.at] = _Line(line.number, column, rest)
                found.append(self.block(column))
            elif rest:
                found.append(self.scalar(line, rest))
                self.at += 1
            else:
                self.at += 1
                found.append(self.nested(line, indent + 1))
        return found

    def mapping(self, indent: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while line := self.here(indent):
            match = _KEY.fullmatch(line.text)
            if not match:
                raise self.error("is no `key: value`")
            key = match["key"]
            key = str(self.scalar(line, key)) if key[0] in "\"'" else key
            if key is match["key"] and _AMBIGUOUS.fullmatch(key):
                raise self.error(f'has a key that readers take for something else: write "{key}"')
            if key in found:
                raise self.error(f"gives the key {key} a second time")
            self.at += 1
            found[key] = self.scalar(line, match["rest"]) if match["rest"] else self.nested(line, indent)
        return found

    def nested(self, parent: _Line, least: int) -> Any:
        """The block under a key or a dash. A list may stand at its key's own column."""
        if self.at < len(self.lines):
            below = self.lines[self.at]
            dash = below.text == "-" or below.text.startswith("- ")
            if (below.indent > parent.indent and below.indent >= least) or (
                dash and below.indent == parent.indent == least
            ):
                return self.block(below.indent)
        raise self.error("has no value", parent)

    def scalar(self, line: _Line, text: str) -> Any:
        if text[0] in "[{":
            return _json(text, f"{self.name}:{line.number}")
        if text[0] == '"':
            value = _json(text, f"{self.name}:{line.number}")
            if re.search(r"\\u[dD][89a-fA-F]|\\/", text):
                raise self.error("has an escape that readers disagree on", line)
            return value
        if text[0] == "'":
            if not re.fullmatch(r"'(?:[^']|'')*'", text):
                raise self.error("has a quote that does not end", line)
            return text[1:-1].replace("''", "'")
        if _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        if text in ("true", "false"):
            return text == "true"
        if _AMBIGUOUS.fullmatch(text):
            raise self.error(f'holds what readers take for different things: write "{text}"', line)
        if (
            not _START.match(text)
            or text == "-"
            or text.startswith(("- ", "---", "..."))
            or re.search(r":(\s|$)| #", text)
        ):
            raise self.error("holds text that must stand in quotes", line)
        return text


def _without_comment(line: str) -> str:
    """The line up to a # that starts a comment."""
    quote = ""
    escaped = False
    for at, letter in enumerate(line):
        if quote:
            if escaped:
                escaped = False
            elif letter == "\\" and quote == '"':
                escaped = True
            elif letter == quote:
                quote = ""
        elif letter in "\"'" and (at == 0 or line[at - 1] in " [{,:"):
            quote = letter
        elif letter == "#" and (at == 0 or line[at - 1] == " "):
            return line[:at]
    return line
