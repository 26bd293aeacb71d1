"""Settings, and the specs that they fill in: `specs/NAME.yaml` and a few values make the job that
gcloud sends.

A spec holds `defaults` (values for settings) and `job`. `${name}` in a string is replaced by a
setting. If it is the whole string, the value keeps its type, and a field whose setting is empty
is left out. `${trainer}` in a list becomes the trainer's arguments. Values are put into the
parsed spec, never into its text, so no value can change its structure.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Union

from deploy import hardware, yaml_file
from deploy.errors import UserError
from deploy.hardware import near
from deploy.trainer_flags import flag_name

HERE = pathlib.Path(__file__).resolve().parent
Value = Union[str, int, bool, list[str]]
Settings = dict[str, Value]
_GS = r"gs://\S+"


class Setting(NamedTuple):
    """A value that specs use.

    Attributes:
        pattern: regular expression that its text must match; each word of it if it is a list.
        default: its value if it is not set, and its type: str, int, bool, or list (separated by
            spaces). None: a string that must be set.
        help: what it means.
    """

    pattern: str
    default: Any
    help: str


def _choices(values: Iterable[int]) -> str:
    """The numbers as text: `1, 4 or 8`."""
    *first, last = map(str, sorted(values))
    return f"{', '.join(first)} or {last}" if first else last


SETTINGS = {
    "project": Setting(r"([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", None, "project ID, not its number"),
    "region": Setting(r"[a-z]+-[a-z]+[0-9]+", None, "where to run; keep bucket, image and TensorBoard there too"),
    "bucket": Setting(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", None, "name of the bucket for runs"),
    "run": Setting(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", None, "name of this run; the same name resumes it"),
    "data": Setting(_GS, None, "gs:// folder written by trainer.prepare"),
    "teacher": Setting(r"\S+", [], "--teacher of the trainer; spaces between several"),
    "recipe": Setting(r"[a-z0-9_]+", "", "--recipe of the trainer: `python -m trainer.recipes` lists them"),
    "service_account": Setting(r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", "", "account that the job runs as"),
    "tensorboard": Setting(
        r"projects/[^/\s]+/locations/[^/\s]+/tensorboards/[^/\s]+",
        "",
        "Vertex AI TensorBoard that shows the run; needs service_account",
    ),
    "repository": Setting(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "funmatch", "Artifact Registry repository of the image"),
    "version": Setting(r"\w[\w.-]{0,100}", "latest", "version of the image: the end of its tag"),
    "image": Setting(r"\S+", "", "image; empty: REGION-docker.pkg.dev/PROJECT/REPOSITORY/funmatch:HARDWARE-VERSION"),
    "workdir": Setting(_GS, "", "--workdir of the trainer; empty: gs://BUCKET/runs/RUN"),
    "hours": Setting(r"[1-9][0-9]{0,3}", 24, "hours after which the job is stopped"),
    "spot": Setting(r"true|false", False, "use cheaper capacity that may be taken back at any time"),
    "chips": Setting(r"[1-9][0-9]?", 4, f"TPU v5e chips: {_choices(hardware.tpu_machines('v5e'))}"),
    "gpu": Setting(r"[A-Z0-9_]+", "NVIDIA_L4", "kind of GPU: NVIDIA_TESLA_T4, NVIDIA_L4, NVIDIA_TESLA_A100, ..."),
    "gpus": Setting(r"[1-9][0-9]?", 1, "GPUs on each machine"),
    "machines": Setting(r"[1-9][0-9]?", 2, "machines, with GPUs on each"),
    "build_account": Setting(
        r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", "", "account that Cloud Build runs as (deploy/build.sh --cloud)"
    ),
    "kubernetes_account": Setting(r"[a-z0-9-]+", "", "account of the cluster that the job runs as (deploy/gke.sh)"),
    "disk": Setting(r"[1-9][0-9]{2,4}", 200, "size of the boot disk in GB"),
}


def names() -> list[str]:
    """Names of the specs in deploy/specs."""
    return sorted(path.stem for path in (HERE / "specs").glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """A spec, `{"defaults": ..., "job": ...}`, by its name or from a file, which may also hold a
    plain CustomJobSpec.

    Raises:
        UserError: there is no such spec or file, or it has another form.
    """
    is_file = name.endswith((".yaml", ".yml", ".json")) or "/" in name
    path = pathlib.Path(name) if is_file else HERE / "specs" / f"{name}.yaml"
    if not path.is_file():
        problem = f"there is no file {name}" if is_file else f"there is no spec {name}{near(name, names())}"
        raise UserError(f"{problem}; there are {', '.join(names())}")
    spec = yaml_file.load(path, str(path) if is_file else f"specs/{path.name}")
    if isinstance(spec, dict) and "workerPoolSpecs" in spec:
        spec = {"job": spec}
    well_formed = (
        isinstance(spec, dict) and isinstance(spec.get("job"), dict) and isinstance(spec.get("defaults", {}), dict)
    )
    if not well_formed or set(spec) - {"defaults", "job"}:
        raise UserError(f"{path}: must hold a mapping `job`, and may hold a mapping `defaults`")
    return {"defaults": spec.get("defaults", {}), "job": spec["job"]}


def read_settings(text: str, name: str) -> dict[str, str]:
    """The values in a settings file: `name = value` lines, and comment lines that start with #.

    Raises:
        UserError: a line has another form, or a setting occurs twice.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise UserError(f"{name}:{number}: {line!r} must be `name = value`")
        if key in values:
            raise UserError(f"{name}:{number}: {key} occurs twice")
        values[key] = value
    return values


def resolve(
    spec: dict[str, Any],
    sources: list[tuple[str, dict[str, str]]],
    required: Iterable[str] = ("project", "region", "run"),
) -> Settings:
    """The checked value of every setting, and of what follows from them.

    Args:
        spec: as `load` returns it. Its defaults have the lowest priority.
        sources: (name of the source, its values), later ones override earlier ones. An empty text
            leaves a setting unset.
        required: settings that must be set although the spec does not use them.

    Raises:
        UserError: names the setting and the source of its value.
    """
    defaults = dict(spec["defaults"])
    # The spec's machine decides these two, so users cannot set them.
    hardware_values = {
        name: str(defaults.pop(name, fallback)) for name, fallback in (("hardware", "tpu"), ("tpu", "v5e"))
    }
    settings: Settings = dict(hardware_values)
    spec_values = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in defaults.items()}
    texts = {
        name: (text, source)
        for source, values in [("the spec", spec_values), *sources]
        for name, text in values.items()
    }
    for name, (text, source) in texts.items():
        if name not in SETTINGS:
            raise UserError(f"{source}: there is no setting {name}{near(name, SETTINGS)}")
        if text:
            settings[name] = _parse(name, text.removeprefix("gs://") if name == "bucket" else text, source)
    used = set(_used(spec["job"]))
    needed = used | set(required)
    if "image" in used and "image" not in settings:
        needed |= {"project", "region"}
    if "output" in used or ("trainer" in used and "workdir" not in settings):
        needed |= {"bucket", "run"}
    if "trainer" in used:
        needed |= {"data"}
    missing = [name for name, s in SETTINGS.items() if s.default is None and name in needed and name not in settings]
    if missing:
        meanings = "; ".join(f"{name} ({SETTINGS[name].help})" for name in missing)
        raise UserError(f"not set: {meanings}. Use --set {missing[0]}=..., or deploy/settings.ini")
    settings = {name: s.default for name, s in SETTINGS.items() if s.default is not None} | settings
    return settings | _derived(settings, used)


def _parse(name: str, text: str, source: str) -> Value:
    setting = SETTINGS[name]
    parts = text.split() if isinstance(setting.default, list) else [text]
    for part in parts:
        if not re.fullmatch(setting.pattern, part):
            raise UserError(f"{source}: {name} = {text}: must be the {setting.help}, and match {setting.pattern}")
    if isinstance(setting.default, list):
        return parts
    if isinstance(setting.default, bool):
        return text == "true"
    return int(text) if isinstance(setting.default, int) else text


def _derived(settings: Settings, used: set[str]) -> Settings:
    """The values that specs use and users cannot set, as far as the settings determine them."""
    values: Settings = {
        "strategy": "SPOT" if settings["spot"] else "STANDARD",
        "timeout": f"{int(str(settings['hours'])) * 3600}s",
        "others": int(str(settings["machines"])) - 1,
    }
    if {"bucket", "run"} <= settings.keys():
        values["output"] = f"gs://{settings['bucket']}/runs/{settings['run']}"
        values["workdir"] = settings["workdir"] or values["output"]
    if "spot_label" in used:
        values["spot_label"] = "true" if settings["spot"] else ""
    if not settings["image"] and {"project", "region"} <= settings.keys():
        project = str(settings["project"]).replace(":", "/")
        values["image"] = (
            f"{settings['region']}-docker.pkg.dev/{project}/{settings['repository']}/"
            f"funmatch:{settings['hardware']}-{settings['version']}"
        )
    if used & {"tpu_machine", "topology", "gke_accelerator"}:
        values |= _tpu_values(str(settings["tpu"]), int(str(settings["chips"])))
    if "gpu_machine" in used:
        values["gpu_machine"] = _gpu_machine(str(settings["gpu"]), int(str(settings["gpus"])))
    if "others" in used and int(str(settings["machines"])) < 2:
        raise UserError(f"machines = {settings['machines']}: must be at least 2; vertex-gpu is for one")
    return values


def _tpu_values(generation: str, chips: int) -> Settings:
    """One machine of a TPU generation, as Vertex AI and GKE name it."""
    machines = hardware.tpu_machines(generation)
    if not machines:
        known = {row.tpu for row in hardware.TPU_MACHINES.values()}
        raise UserError(f"tpu = {generation}: deploy/hardware.py has no machine of it{near(generation, sorted(known))}")
    if chips not in machines:
        raise UserError(f"chips = {chips}: one TPU {generation} machine has {_choices(machines)}")
    return {
        "tpu_machine": machines[chips].machine_type,
        "topology": hardware.one_machine_topology(machines[chips]),
        "gke_accelerator": hardware.TPUS[generation].gke_accelerator,
    }


def _gpu_machine(gpu: str, count: int) -> str:
    machines = hardware.machines_by_gpu()
    if gpu not in machines:
        raise UserError(f"gpu = {gpu}: must be one of {', '.join(machines)}{near(gpu, machines)}")
    if count not in machines[gpu]:
        raise UserError(f"gpus = {count}: a machine has {_choices(machines[gpu])} of {gpu}")
    return machines[gpu][count]


def _used(node: Any) -> list[str]:
    """The names in ${...} in a spec."""
    if isinstance(node, dict):
        return [name for value in node.values() for name in _used(value)]
    if isinstance(node, list):
        return [name for value in node for name in _used(value)]
    return re.findall(r"\$\{(\w+)\}", node) if isinstance(node, str) else []


def trainer_arguments(settings: Settings, extra: list[str], fixed: list[str]) -> list[str]:
    """The trainer's command line from the settings and the user. The caller puts the spec's own
    arguments before it.

    Args:
        settings: as `resolve` returns them.
        extra: the user's arguments, after `--` on the command line. They override those of the
            settings.
        fixed: the arguments beside `${trainer}` in the spec. They override those of the settings
            too.
    """
    overridden = {flag_name(argument) for argument in [*extra, *fixed]}
    teachers = settings["teacher"] if isinstance(settings["teacher"], list) else []
    values = [
        ("recipe", settings["recipe"]),
        ("data", settings.get("data", "")),
        *(("teacher", teacher) for teacher in teachers),
        ("workdir", settings["workdir"]),
    ]
    return [f"--{name}={value}" for name, value in values if value and name not in overridden] + extra


def render(spec: dict[str, Any], settings: Settings, extra: list[str]) -> dict[str, Any]:
    """The job, with every setting filled in.

    Args:
        spec: as `load` returns it.
        settings: as `resolve` returns them.
        extra: further arguments of the trainer.

    Raises:
        UserError: the spec uses a setting that does not exist.
    """
    job = _fill(spec["job"], settings, extra)
    assert isinstance(job, dict)
    return job


_ABSENT = object()


def _fill(node: Any, settings: Settings, extra: list[str]) -> Any:
    if isinstance(node, dict):
        pairs = {key: _fill(value, settings, extra) for key, value in node.items()}
        return {key: value for key, value in pairs.items() if value is not _ABSENT}
    if isinstance(node, list):
        return _fill_list(node, settings, extra)
    if not isinstance(node, str):
        return node
    for name in _used(node):
        if name not in settings:
            raise UserError(f"the spec uses ${{{name}}}, which is not a setting{near(name, settings)}")
    if whole := re.fullmatch(r"\$\{(\w+)\}", node):
        value = settings[whole[1]]
        return _ABSENT if value in ("", []) else value
    return re.sub(r"\$\{(\w+)\}", lambda match: str(settings[match[1]]), node)


def _fill_list(nodes: list[Any], settings: Settings, extra: list[str]) -> list[Any]:
    items: list[Any] = []
    for node in nodes:
        if node == "${trainer}":
            fixed = [argument for argument in nodes if isinstance(argument, str) and argument != node]
            overridden = {flag_name(argument) for argument in extra}
            items = [item for item in items if flag_name(item) not in overridden]
            items += trainer_arguments(settings, extra, fixed)
        else:
            value = _fill(node, settings, extra)
            if value is not _ABSENT:
                items.append(value)
    return items
