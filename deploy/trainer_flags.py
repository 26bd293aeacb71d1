"""Checks the trainer's command line before a job is submitted.

Names, types and choices come from the source of trainer/core/options.py, so a laptop without the
trainer's requirements can check them. Where absl is installed, `configuration_errors` also runs
the trainer's own checks.
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from deploy.hardware import near

OPTIONS = pathlib.Path(__file__).resolve().parent.parent / "trainer" / "core" / "options.py"
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


class Flag(NamedTuple):
    """A flag of the trainer.

    Attributes:
        type: type of its value; tuple for a flag that may be repeated.
        choices: the values that it takes; empty if they are not listed.
        auto: whether it also takes the text "auto".
    """

    type: type
    choices: tuple[str, ...]
    auto: bool = False


# Flags of every verb, defined in trainer/cli.py.
COMMON_FLAGS = {"log_format": Flag(str, ("auto", "text", "json"))}


def task_flags(source: pathlib.Path = OPTIONS) -> dict[str, Flag]:
    """The flags of trainer.task: the fields of the `...Options` classes in a source file."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    constants: dict[str, tuple[str, ...]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            constants[ast.unparse(node.targets[0])] = _strings(node.value, constants)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Options")]
    flags = {}
    for field in (field for options in classes for field in options.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
            choices = next((_strings(k.value, constants) for k in field.value.keywords if k.arg == "choices"), ())
            auto = any(k.arg == "auto" and ast.literal_eval(k.value) for k in field.value.keywords)
            flags[ast.unparse(field.target)] = Flag(_TYPES.get(ast.unparse(field.annotation), tuple), choices, auto)
    return flags


def _strings(node: ast.expr, constants: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The strings in a tuple of strings and *NAMES, or in a NAME; none for another expression."""
    if isinstance(node, ast.Name):
        return constants.get(node.id, ())
    strings: tuple[str, ...] = ()
    for part in node.elts if isinstance(node, ast.Tuple) else []:
        if isinstance(part, ast.Starred):
            strings += _strings(part.value, constants)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            strings += (part.value,)
    return strings


def flag_name(argument: str) -> str:
    """The name in `--name=value`."""
    return argument.lstrip("-").partition("=")[0]


def argument_errors(arguments: list[str]) -> Iterator[str]:
    """The mistakes in the trainer's command line, a line each.

    Args:
        arguments: `--name=value`, or `--name` and `--noname` for a boolean. Paths must be gs://
            or https://, because another machine reads them.
    """
    flags = task_flags() | COMMON_FLAGS
    names = {flag_name(argument) for argument in arguments}
    if not names & {"steps", "epochs", "recipe", "flagfile"}:
        yield "trainer flag --recipe, --steps or --epochs is missing: how long to train"
    if not names & {"teacher", "flagfile"} and "--distance=labels" not in arguments:
        yield "trainer flag --teacher is missing: --set teacher=... (or -- --distance=labels)"
    for argument in arguments:
        match = re.fullmatch(r"--?([\w]+)(?:=(.*))?", argument, re.ASCII | re.DOTALL)
        if not match:
            yield f"trainer argument {argument!r}: must be --name=value"
            continue
        name, value = match[1], match[2]
        if name in ("flagfile", "undefok"):
            if name == "flagfile" and value and not value.startswith("recipes/"):
                yield f"trainer flag {argument}: the image holds recipes/*.flags only; write the flags out"
            continue
        if value is None and name.startswith("no") and flags.get(name[2:], Flag(str, ())).type is bool:
            continue
        if name not in flags:
            yield f"trainer flag --{name}: trainer.task has no such flag{near(name, flags)}"
        elif value is None and flags[name].type is not bool:
            yield f"trainer flag --{name}: needs a value, --{name}=..."
        elif value is not None:
            yield from _value_errors(name, flags[name], value)


def _value_errors(name: str, flag: Flag, value: str) -> Iterator[str]:
    if flag.choices and value not in flag.choices:
        yield f"trainer flag --{name}={value}: must be one of {', '.join(flag.choices)}{near(value, flag.choices)}"
    if flag.type in (int, float) and not (flag.auto and value == "auto"):
        try:
            flag.type(value)
        except ValueError:
            yield f"trainer flag --{name}={value}: must be {'an integer' if flag.type is int else 'a number'}"
    if _is_local(name, value):
        yield f"trainer flag --{name}={value}: the cloud cannot read a path of this machine; copy it to gs:// first"


def _is_local(name: str, value: str) -> bool:
    """Whether a flag's value is a path on this machine. Vertex AI mounts buckets under /gcs/."""
    if name in ("data", "eval_data"):
        return not value.startswith(("gs://", "/gcs/"))
    if name == "workdir":
        return not value.startswith("gs://")
    kind, _, path = value.partition(":")
    if name not in ("teacher", "student", "student_weights") or kind not in ("keras", "saved_model", "bit"):
        return False
    if kind == "bit":
        path = path.partition("@")[2]
    return bool(path) and not path.startswith(("gs://", "https://", "/gcs/"))


def study_errors(study: dict[str, Any], arguments: list[str]) -> Iterator[str]:
    """Contradictions between a study's parameters and the trainer's flags, a line each.

    Vertex AI passes a parameter as `--parameterId=value`.
    """
    flags = task_flags() | COMMON_FLAGS
    names = {flag_name(argument) for argument in arguments}
    for parameter in study["parameters"]:
        name = parameter["parameterId"]
        if name not in flags:
            yield f"study parameter {name}: trainer.task has no such flag{near(name, flags)}"
            continue
        if name in names:
            yield f"study parameter {name}: --{name} is among the trainer's arguments too; drop one"
        if flags[name].type is int and "integerValueSpec" not in parameter:
            yield f"study parameter {name}: is an integer; give integerValueSpec"
        if flags[name].type not in (int, float) and "categoricalValueSpec" not in parameter:
            yield f"study parameter {name}: is not a number; give categoricalValueSpec"
        for value in parameter.get("categoricalValueSpec", {}).get("values", []):
            yield from _value_errors(name, flags[name], value)


def _corners(study: dict[str, Any]) -> Iterator[list[str]]:
    """The arguments with every parameter at its least value, then at its greatest."""
    for end in (0, -1):
        arguments = []
        for parameter in study.get("parameters", []):
            spec = next(value for key, value in parameter.items() if key.endswith("ValueSpec"))
            values = spec["values"] if "values" in spec else [spec["minValue"], spec["maxValue"]]
            arguments.append(f"--{parameter['parameterId']}={values[end]}")
        yield arguments


def configuration_errors(arguments: list[str], study: dict[str, Any]) -> Iterator[str]:
    """The first error of the trainer's own checks. Nothing where absl is not installed.

    Args:
        arguments: the trainer's command line.
        study: a StudySpec, whose two extreme corners are tried; empty for a job without one.
    """
    try:
        from absl import flags

        from trainer import recipes
        from trainer.core.errors import FunmatchError
        from trainer.core.flags import define_flags, from_flags
    except ImportError:
        return
    for corner in _corners(study):
        values = flags.FlagValues()
        define_flags(values)
        try:
            task_arguments = [argument for argument in arguments if flag_name(argument) not in COMMON_FLAGS]
            rest = values(["trainer.task", *task_arguments, *corner])[1:]
            if rest:
                raise flags.Error(f"unexpected argument {rest[0]!r}")
            from_flags(values, recipes.find(values.recipe)).require_complete()
        except (flags.Error, FunmatchError, OSError) as error:
            source = f" (with {' '.join(corner)})" if corner else ""
            yield f"trainer: {' '.join(str(error).split())}{source}"
            return


def errors(arguments: list[str], study: dict[str, Any] | None = None) -> list[str]:
    """All mistakes in a job's trainer arguments, those of the trainer's own checks only if there
    is no other.

    Args:
        arguments: the trainer's command line.
        study: the StudySpec whose trials add their parameters to it; None for a job without one.
    """
    lines = list(argument_errors(arguments))
    if study is not None:
        lines += study_errors(study, arguments)
    return lines or list(configuration_errors(arguments, study or {}))
