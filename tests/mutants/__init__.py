"""Mutants: guards of the code, how each is broken, and the test that must fail then.
`tests/mutations.py` runs them.

A mutant names a definition by its qualified name and the change by a pattern of Python, which must
match once inside that definition. Both are compared as syntax trees: formatting, comments and moved
lines do not matter.

In a pattern `_` stands for any expression or name, `_1` .. `_9` for an expression that the
replacement can use again, and `...` for all remaining arguments of a call or for any body of a
block.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import pathlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
_WILDCARD = re.compile("_[1-9]?")


class Misfit(Exception):
    """A mutant does not fit the code: its definition is missing, or its pattern does not match
    exactly once.
    """


@dataclasses.dataclass(frozen=True)
class Replace:
    """Replaces an expression, or consecutive statements, by `new`."""

    old: str
    new: str

    def apply(self, definition: ast.AST) -> None:
        """Changes the syntax tree in place.

        Raises:
            Misfit: not exactly one place matches.
        """
        pattern, replacement = _parse(self.old), _parse(self.new)
        if isinstance(pattern, ast.expr) != isinstance(replacement, ast.expr):
            raise Misfit(f"{self.old!r} and {self.new!r} are not both expressions, or both statements")
        _check_names(definition, replacement)
        find = _expressions if isinstance(pattern, ast.expr) else _statements
        match = _only(find(definition, pattern), self.old)
        match.put(_fill(replacement, match.values))


@dataclasses.dataclass(frozen=True)
class Skip:
    """Replaces a statement by `pass`: the one given, or the one that calls or assigns the
    expression given.
    """

    old: str

    def apply(self, definition: ast.AST) -> None:
        """See `Replace.apply`."""
        pattern = _parse(self.old)
        if isinstance(pattern, ast.expr):
            matches = [m for m in _statements(definition, None) if _value_matches(pattern, m.node)]
        else:
            matches = list(_statements(definition, pattern))
        _only(matches, self.old).put([ast.Pass()])


@dataclasses.dataclass(frozen=True)
class Never:
    """Makes a condition always false."""

    condition: str

    def apply(self, definition: ast.AST) -> None:
        """See `Replace.apply`."""
        Replace(self.condition, "False").apply(definition)


@dataclasses.dataclass(frozen=True)
class Negate:
    """Makes a condition its opposite."""

    condition: str

    def apply(self, definition: ast.AST) -> None:
        """See `Replace.apply`."""
        match = _only(_expressions(definition, _parse(self.condition)), self.condition)
        match.put(ast.UnaryOp(ast.Not(), match.node))


@dataclasses.dataclass(frozen=True)
class Return:
    """Makes a function return `value` at once."""

    value: str

    def apply(self, definition: ast.AST) -> None:
        """See `Replace.apply`."""
        if not isinstance(definition, ast.FunctionDef):
            raise Misfit("it is no function")
        value = _parse(self.value)
        _check_names(definition, value)
        definition.body = [ast.Return(value)]


@dataclasses.dataclass(frozen=True)
class Constant:
    """Gives a module's constant another value."""

    value: str

    def apply(self, definition: ast.AST) -> None:
        """See `Replace.apply`."""
        if not isinstance(definition, (ast.Assign, ast.AnnAssign)):
            raise Misfit("it is no constant")
        definition.value = _parse(self.value)


Change = Replace | Skip | Never | Negate | Return | Constant


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A broken guard.

    Attributes:
        guard: what is broken, in words; unique.
        place: qualified name of a function, class, method or module constant:
            "trainer.method.optim.build".
        change: what happens to it.
        test: below tests/, as pytest takes it; it must fail.
    """

    guard: str
    place: str
    change: Change
    test: str

    @property
    def path(self) -> pathlib.PurePosixPath:
        """The module's file, below the root of the project."""
        return self._split()[0]

    def source(self, root: pathlib.Path) -> str:
        """The module of the project in `root` with this change.

        Raises:
            Misfit: the change does not fit.
        """
        path, names = self._split()
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        definition: ast.AST = tree
        for name in names:
            definition = _member(definition, name)
        self.change.apply(definition)
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"

    def misfit(self, root: pathlib.Path) -> str:
        """Why this mutant does not fit the project in `root`; empty if it does."""
        try:
            self.source(root)
        except Misfit as error:
            return str(error)
        file, _, test = self.test.partition("::")
        name = test.partition("[")[0].rpartition("::")[2]
        text = (root / "tests" / file).read_text(encoding="utf-8") if (root / "tests" / file).is_file() else ""
        return "" if (f"def {name}(" if name else "def test_") in text else f"there is no test {self.test}"

    def _split(self) -> tuple[pathlib.PurePosixPath, list[str]]:
        """The module's file, and the names that lead to the definition inside it."""
        parts = self.place.split(".")
        for count in range(len(parts), 0, -1):
            path = pathlib.PurePosixPath(*parts[:count]).with_suffix(".py")
            if (ROOT / path).is_file():
                return path, parts[count:]
        raise Misfit(f"no module holds {self.place}")


def load() -> list[Mutant]:
    """All mutants, in a fixed order."""
    modules = sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    return [mutant for module in modules for mutant in importlib.import_module(f"mutants.{module.name}").MUTANTS]


@dataclasses.dataclass
class _Match:
    """A place that a pattern fits.

    Attributes:
        node: what is there; of several statements, the first.
        values: captures by name.
        owner, field: the node's parent, and the field of it that holds the node.
        start, count: position and number of the nodes, where the field is a list.
    """

    node: ast.AST
    values: dict[str, ast.AST]
    owner: ast.AST
    field: str
    start: int | None = None
    count: int = 1

    def put(self, replacement: Any) -> None:
        if self.start is None:
            setattr(self.owner, self.field, replacement)
        else:
            nodes = replacement if isinstance(replacement, list) else [replacement]
            getattr(self.owner, self.field)[self.start : self.start + self.count] = nodes


def _parse(text: str) -> Any:
    """A pattern: an expression if it is one, else a list of statements."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return ast.parse(text).body


def _check_names(definition: ast.AST, replacement: Any) -> None:
    """Raises `Misfit` if the replacement uses a name that the definition does not: it would kill
    any test, by NameError.
    """
    known = set(dir(builtins))
    for node in ast.walk(definition):
        known |= {node.id} if isinstance(node, ast.Name) else {node.arg} if isinstance(node, ast.arg) else set()
    for part in replacement if isinstance(replacement, list) else [replacement]:
        for node in ast.walk(part):
            if isinstance(node, ast.Name) and not _WILDCARD.fullmatch(node.id) and node.id not in known:
                raise Misfit(f"{node.id} is no name there")


def _member(owner: ast.AST, name: str) -> ast.AST:
    """The function, class or constant `name` directly in `owner`."""
    found = []
    for node in getattr(owner, "body", []):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if name in [*names, *(target.id for target in targets if isinstance(target, ast.Name))]:
            found.append(node)
    if len(found) != 1:
        raise Misfit(f"{name} is defined {len(found)} times")
    return found[0]


def _only(matches: Any, text: str) -> _Match:
    matches = list(matches)
    if len(matches) != 1:
        raise Misfit(f"{text!r} matches {len(matches)} times")
    return matches[0]


def _expressions(definition: ast.AST, pattern: ast.expr) -> Iterator[_Match]:
    for owner in ast.walk(definition):
        for field, value in ast.iter_fields(owner):
            for number, node in enumerate(value if isinstance(value, list) else [value]):
                values: dict[str, ast.AST] = {}
                if isinstance(node, ast.expr) and _matches(pattern, node, values):
                    yield _Match(node, values, owner, field, number if isinstance(value, list) else None)


def _statements(definition: ast.AST, pattern: list[ast.stmt] | None) -> Iterator[_Match]:
    """Where consecutive statements match; without a pattern, every statement."""
    count = len(pattern or [None])
    for owner in ast.walk(definition):
        for field, value in ast.iter_fields(owner):
            if not isinstance(value, list) or not value or not isinstance(value[0], ast.stmt):
                continue
            for start in range(len(value) - count + 1):
                values: dict[str, ast.AST] = {}
                if pattern is None or _matches(pattern, value[start : start + count], values):
                    yield _Match(value[start], values, owner, field, start, count)


def _value_matches(pattern: ast.expr, statement: ast.AST) -> bool:
    """Whether a statement calls or assigns what matches."""
    if not isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return False
    return statement.value is not None and _matches(pattern, statement.value, {})


def _is_ellipsis(node: Any) -> bool:
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Constant) and node.value is ...


def _matches(pattern: Any, node: Any, values: dict[str, ast.AST]) -> bool:
    """Whether a node (a field's value, a list) is what the pattern says; fills `values` with what
    was captured.
    """
    if isinstance(pattern, ast.Name) and _WILDCARD.fullmatch(pattern.id):
        if not isinstance(node, ast.expr):
            return False
        if pattern.id in values:
            return ast.unparse(values[pattern.id]) == ast.unparse(node)
        if pattern.id != "_":
            values[pattern.id] = node
        return True
    if isinstance(pattern, list):
        if len(pattern) == 1 and isinstance(pattern[0], ast.Expr) and _is_ellipsis(pattern[0]):
            return isinstance(node, list)
        return len(pattern) == len(node) and all(_matches(p, n, values) for p, n in zip(pattern, node, strict=True))
    if isinstance(pattern, ast.Call) and pattern.args and _is_ellipsis(pattern.args[-1]):
        given = pattern.args[:-1]
        return (
            isinstance(node, ast.Call)
            and _matches(pattern.func, node.func, values)
            and _matches(given, node.args[: len(given)], values)
            and all(any(_matches(keyword, k, values) for k in node.keywords) for keyword in pattern.keywords)
        )
    if isinstance(pattern, ast.AST):
        skipped = {"ctx", "kind", "type_comment"}
        return type(pattern) is type(node) and all(
            _matches(value, getattr(node, field), values)
            for field, value in ast.iter_fields(pattern)
            if field not in skipped
        )
    return bool(pattern == node and type(pattern) is type(node)) or (pattern == "_" and isinstance(node, str))


def _fill(replacement: Any, values: dict[str, ast.AST]) -> Any:
    """The replacement with the captures in place of their names."""

    class Filler(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return values.get(node.id, node)

    fill = Filler().visit
    return [fill(node) for node in replacement] if isinstance(replacement, list) else fill(replacement)
