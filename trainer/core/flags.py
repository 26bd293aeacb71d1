"""Absl flags from the fields of `Config`, and a `Config` from parsed flags."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from trainer.core.config import GROUPS, Config
from trainer.core.errors import ConfigError


def define_flags(values: flags.FlagValues, *, skip: tuple[str, ...] = (), **defaults: Any) -> None:
    """Defines a flag in `values` for each field of `Config` but `skip`; `defaults` replace the fields' own."""
    groups = {field.name: group.group for group in GROUPS for field in dataclasses.fields(group)}
    for field in dataclasses.fields(Config):
        if field.name in skip:
            continue
        default = defaults.get(field.name, field.default)
        text, choices = field.metadata["help"], field.metadata["choices"]
        module = groups[field.name]
        kind: Any
        if isinstance(field.default, tuple):
            kind = {
                "teacher_image_size": flags.DEFINE_multi_integer,
                "boundaries": flags.DEFINE_multi_integer,
                "data_weights": flags.DEFINE_list,
            }.get(field.name, flags.DEFINE_multi_string)
            kind(field.name, list(default), text, flag_values=values, module_name=module)
        elif choices:
            flags.DEFINE_enum(field.name, default, choices, text, flag_values=values, module_name=module)
        else:
            kind = {
                bool: flags.DEFINE_boolean,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
            }.get(type(field.default), flags.DEFINE_string)
            kind(field.name, default, text, flag_values=values, module_name=module)


def from_flags(values: flags.FlagValues, recipe: dict[str, Any] | None = None, **fixed: Any) -> Config:
    """The configuration that parsed flags describe.

    Args:
        values: parsed.
        recipe: values of flags that were not given.
        fixed: fields that the verb does not offer.
    """
    given = {name for name in values if values[name].present}
    offered = dict(recipe or {})
    if given & {"steps", "epochs"}:  # a length beside a recipe replaces the recipe's, whichever way it is said
        offered = {name: value for name, value in offered.items() if name not in ("steps", "epochs", "schedule_steps")}
    chosen: dict[str, Any] = {name: value for name, value in offered.items() if name not in given} | fixed
    for field in dataclasses.fields(Config):
        if field.name in values and field.name not in chosen:
            value = values[field.name].value
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        chosen["data_weights"] = tuple(map(float, chosen.get("data_weights", ())))
    except ValueError as error:
        raise ConfigError(f"--data_weights={','.join(chosen['data_weights'])}: numbers such as 0.7,0.3") from error
    return Config(**chosen)


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
    """Defines those of the main job's flags that are named."""
    skipped = tuple(name for name in Config().to_dict() if name not in names)
    define_flags(values, skip=skipped, **defaults)
