"""Absl flags from the fields of `Config`, and a `Config` from parsed flags."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from trainer.core.config import GROUPS, Config
from trainer.core.errors import ConfigError


class _AutoIntegerParser(flags.IntegerParser):
    """Parses an integer, or "auto" as 0."""

    syntactic_help = "an integer or auto"

    def parse(self, argument: Any) -> int:
        """See the base class."""
        return 0 if argument == "auto" else super().parse(argument)


def define_flags(values: flags.FlagValues, *, skip: tuple[str, ...] = (), **defaults: Any) -> None:
    """Defines a flag for each field of `Config`.

    Args:
        values: where the flags are defined.
        skip: fields that get no flag.
        **defaults: defaults that replace those of the fields.
    """
    groups = {field.name: group.group for group in GROUPS for field in dataclasses.fields(group)}
    for field in dataclasses.fields(Config):
        if field.name in skip:
            continue
        default = defaults.get(field.name, field.default)
        help_text, choices = field.metadata["help"], field.metadata["choices"]
        module = groups[field.name]
        define: Any
        if isinstance(field.default, tuple):
            define = {
                "teacher_image_size": flags.DEFINE_multi_integer,
                "boundaries": flags.DEFINE_multi_integer,
                "data_weights": flags.DEFINE_list,
            }.get(field.name, flags.DEFINE_multi_string)
            define(field.name, list(default), help_text, flag_values=values, module_name=module)
        elif choices:
            flags.DEFINE_enum(field.name, default, choices, help_text, flag_values=values, module_name=module)
        elif field.metadata["auto"]:
            serializer: flags.ArgumentSerializer[int] = flags.ArgumentSerializer()
            flags.DEFINE(_AutoIntegerParser(), field.name, default, help_text, values, serializer, module)
        else:
            define = {
                bool: flags.DEFINE_boolean,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
            }.get(type(field.default), flags.DEFINE_string)
            define(field.name, default, help_text, flag_values=values, module_name=module)


def from_flags(values: flags.FlagValues, recipe: dict[str, Any] | None = None, **fixed: Any) -> Config:
    """Makes a `Config` of parsed flags.

    Args:
        values: parsed flags.
        recipe: values for fields whose flag was not given.
        **fixed: values for fields whose flag the verb does not define.

    Raises:
        ConfigError: a value is invalid; names the flag.
    """
    given = {name for name in values if values[name].present}
    preset = dict(recipe or {})
    if given & {"steps", "epochs"}:  # either one replaces the recipe's length
        preset = {name: value for name, value in preset.items() if name not in ("steps", "epochs", "schedule_steps")}
    options: dict[str, Any] = {name: value for name, value in preset.items() if name not in given} | fixed
    for field in dataclasses.fields(Config):
        if field.name in values and field.name not in options:
            value = values[field.name].value
            options[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        options["data_weights"] = tuple(map(float, options.get("data_weights", ())))
    except ValueError as error:
        raise ConfigError(
            f"--data_weights={','.join(options['data_weights'])}: give numbers such as 0.7,0.3"
        ) from error
    return Config(**options)


SHARED = (
    "data",
    "teacher",
    "teacher_image_size",
    "teacher_range",
    "teacher_outputs",
    "teacher_sha256",
    "ensemble",
    "root_pool",
    "central_fraction",
    "compat",
    "batch_size",
    "store_size",
    "tpu",
    "jit_compile",
)


def shared_flags(values: flags.FlagValues, *names: str, **defaults: Any) -> None:
    """Defines some of the main job's flags for another verb.

    Args:
        values: where the flags are defined.
        *names: fields of `Config`.
        **defaults: defaults that replace those of the fields.
    """
    skipped = tuple(name for name in Config().to_dict() if name not in names)
    define_flags(values, skip=skipped, **defaults)
