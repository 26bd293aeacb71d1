"""Settings, and the specs that they fill in: `specs/NAME.yaml` and a few values make the job that gcloud sends.

A spec holds `defaults` (settings of its own) and `job`. `${name}` in a text stands for a setting. Where it is the whole
text, the setting's own type is put there, a field whose setting is empty is left out, and `${trainer}` in a list becomes
the trainer's arguments. Values are put into the parsed spec, never into its text: no value can change its structure.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Union

from deploy import check, plainyaml

HERE = pathlib.Path(__file__).resolve().parent
Value = Union[str, int, bool, list[str]]
Settings = dict[str, Value]
_GS = r"gs://\S+"


class SettingError(ValueError):
    """A setting that is missing, unknown or of the wrong form."""


class Setting(NamedTuple):
    """A value that specs ask for: what a text of it must match, what it is if not given, and what it means.

    A default of another type than text is the setting's type: a whole number, true or false, or a list (spaces part).
    `None` means that it must be given.
    """

    pattern: str
    default: Any
    help: str


SETTINGS = {
    "project": Setting(r"([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", None, "project ID, not its number"),
    "region": Setting(r"[a-z]+-[a-z]+[0-9]+", None, "where to run; bucket, image and TensorBoard belong there too"),
    "bucket": Setting(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", None, "name of the bucket that runs are kept in"),
    "run": Setting(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", None, "name of this run; the same name goes on with it"),
    "data": Setting(_GS, None, "gs:// folder that trainer.prepare wrote"),
    "teacher": Setting(r"\S+", [], "--teacher of the trainer; spaces between several"),
    "recipe": Setting(r"[a-z0-9_]+", "", "--recipe of the trainer: `python -m trainer.recipes` lists them"),
    "service_account": Setting(r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", "", "account that the job runs as"),
    "tensorboard": Setting(
        r"projects/[^/\s]+/locations/[^/\s]+/tensorboards/[^/\s]+",
        "",
        "Vertex AI TensorBoard to show the run in; needs service_account",
    ),
    "repository": Setting(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "funmatch", "Artifact Registry repository of the image"),
    "version": Setting(r"\w[\w.-]{0,100}", "latest", "version of the image, the end of its tag"),
    "image": Setting(r"\S+", "", "image; empty: REGION-docker.pkg.dev/PROJECT/REPOSITORY/funmatch:HARDWARE-VERSION"),
    "workdir": Setting(_GS, "", "--workdir of the trainer; empty: gs://BUCKET/runs/RUN"),
    "hours": Setting(r"[1-9][0-9]{0,3}", 24, "the job is stopped after so many hours"),
    "spot": Setting(r"true|false", False, "take capacity that may be taken back at any time, for less"),
    "chips": Setting(r"[1-9][0-9]?", 4, "TPU v5e chips: 1, 4 or 8"),
    "gpu": Setting(r"[A-Z0-9_]+", "NVIDIA_L4", "kind of GPU: NVIDIA_TESLA_T4, NVIDIA_L4, NVIDIA_TESLA_A100, ..."),
    "gpus": Setting(r"[1-9][0-9]?", 1, "GPUs on each machine"),
    "machines": Setting(r"[1-9][0-9]?", 2, "machines, with GPUs on each"),
    "build_account": Setting(
        r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", "", "account that Cloud Build runs as (deploy/build.sh --cloud)"
    ),
    "kubernetes_account": Setting(r"[a-z0-9-]+", "", "account of the cluster that the job runs as (deploy/gke.sh)"),
    "disk": Setting(r"[1-9][0-9]{2,4}", 200, "size of the boot disk in GB"),
}
# What `chips` and `gpu` x `gpus` mean.
_TOPOLOGY = {1: "1x1", 4: "2x2", 8: "2x4"}
_GPU_MACHINE = {
    "NVIDIA_TESLA_T4": {1: "n1-standard-8", 2: "n1-standard-16", 4: "n1-standard-32"},
    "NVIDIA_L4": {1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"},
    "NVIDIA_TESLA_A100": {n: f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)},
    "NVIDIA_A100_80GB": {n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
    "NVIDIA_H100_80GB": {n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
}


def names() -> list[str]:
    """The specs that there are."""
    return sorted(path.stem for path in (HERE / "specs").glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """A spec, by name or as a file of one's own: `{"defaults": ..., "job": ...}`.

    A file of one's own may also be a plain CustomJobSpec.

    Raises:
        SettingError: there is none, or it is none.
        YamlError: see deploy.plainyaml.
    """
    own = name.endswith((".yaml", ".yml", ".json")) or "/" in name
    path = pathlib.Path(name) if own else HERE / "specs" / f"{name}.yaml"
    if not path.is_file():
        where = f"there is no file {name}" if own else f"there is no spec {name}{check.near(name, names())}"
        raise SettingError(f"{where}; there are {', '.join(names())}")
    spec = plainyaml.load(path.read_text(encoding="utf-8"), str(path) if own else f"specs/{path.name}")
    if isinstance(spec, dict) and "workerPoolSpecs" in spec:
        spec = {"job": spec}
    well_formed = (
        isinstance(spec, dict) and isinstance(spec.get("job"), dict) and isinstance(spec.get("defaults", {}), dict)
    )
    if not well_formed or set(spec) - {"defaults", "job"}:
        raise SettingError(f"{path}: must hold job, a mapping, and may hold defaults, another")
    return {"defaults": spec.get("defaults", {}), "job": spec["job"]}


def read_settings(text: str, name: str) -> dict[str, str]:
    """`name = value` lines of a settings file; # starts a comment line.

    Raises:
        SettingError: a line is none.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise SettingError(f"{name}:{number}: {line!r} is no `name = value`")
        if key in found:
            raise SettingError(f"{name}:{number}: {key} is given a second time")
        found[key] = value
    return found


def settle(
    spec: dict[str, Any], given: list[tuple[str, dict[str, str]]], needed: Iterable[str] = ("project", "region", "run")
) -> Settings:
    """The value of every setting, the given ones checked.

    Args:
        spec: its defaults come first.
        given: (where from, texts), the later over the earlier. An empty text is as good as none.
        needed: settings that must be given although the spec does not mention them.

    Raises:
        SettingError: names the setting and where its value came from.
    """
    own = dict(spec["defaults"])
    # Which of the images a spec needs is not for the user to set.
    settings: Settings = {"hardware": str(own.pop("hardware", "tpu"))}
    own = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in own.items()}
    texts = {name: (value, where) for where, values in [("the spec", own), *given] for name, value in values.items()}
    for name, (text, where) in texts.items():
        if name not in SETTINGS:
            raise SettingError(f"{where}: there is no setting {name}{check.near(name, SETTINGS)}")
        if text:
            settings[name] = _value(name, text.removeprefix("gs://") if name == "bucket" else text, where)
    used = set(_used(spec["job"]))
    needed = used | set(needed)
    if "image" in used and "image" not in settings:
        needed |= {"project", "region"}
    if "output" in used or ("trainer" in used and "workdir" not in settings):
        needed |= {"bucket", "run"}
    if "trainer" in used:
        needed |= {"data"}
    missing = [name for name in SETTINGS if SETTINGS[name].default is None and name not in settings]
    missing = [name for name in missing if name in needed]
    if missing:
        told = "; ".join(f"{name} ({SETTINGS[name].help})" for name in missing)
        raise SettingError(f"not given: {told}. Use --set {missing[0]}=..., or deploy/settings.ini")
    settings = {name: s.default for name, s in SETTINGS.items() if s.default is not None} | settings
    return settings | _derived(settings, used)


def _value(name: str, text: str, where: str) -> Value:
    setting = SETTINGS[name]
    parts = text.split() if isinstance(setting.default, list) else [text]
    for part in parts:
        if not re.fullmatch(setting.pattern, part):
            raise SettingError(f"{where}: {name} = {text}: must be the {setting.help}, and match {setting.pattern}")
    if isinstance(setting.default, list):
        return parts
    if isinstance(setting.default, bool):
        return text == "true"
    return int(text) if isinstance(setting.default, int) else text


def _derived(settings: Settings, used: set[str]) -> Settings:
    """What follows from the settings."""
    found: Settings = {
        "strategy": "SPOT" if settings["spot"] else "STANDARD",
        "timeout": f"{int(str(settings['hours'])) * 3600}s",
        "others": int(str(settings["machines"])) - 1,
    }
    if {"bucket", "run"} <= settings.keys():
        found["output"] = f"gs://{settings['bucket']}/runs/{settings['run']}"
        found["workdir"] = settings["workdir"] or found["output"]
    if "spot_label" in used:
        found["spot_label"] = "true" if settings["spot"] else ""
    if not settings["image"] and {"project", "region"} <= settings.keys():
        project = str(settings["project"]).replace(":", "/")
        found["image"] = (
            f"{settings['region']}-docker.pkg.dev/{project}/{settings['repository']}/"
            f"funmatch:{settings['hardware']}-{settings['version']}"
        )
    if "topology" in used:
        if settings["chips"] not in _TOPOLOGY:
            raise SettingError(f"chips = {settings['chips']}: one TPU v5e machine has 1, 4 or 8")
        found["topology"] = _TOPOLOGY[int(str(settings["chips"]))]
    if "gpu_machine" in used:
        gpu, count = str(settings["gpu"]), int(str(settings["gpus"]))
        if gpu not in _GPU_MACHINE:
            raise SettingError(f"gpu = {gpu}: must be one of {', '.join(_GPU_MACHINE)}{check.near(gpu, _GPU_MACHINE)}")
        if count not in _GPU_MACHINE[gpu]:
            raise SettingError(f"gpus = {count}: {gpu} comes in {', '.join(map(str, _GPU_MACHINE[gpu]))} a machine")
        found["gpu_machine"] = _GPU_MACHINE[gpu][count]
    if "others" in used and int(str(settings["machines"])) < 2:
        raise SettingError(f"machines = {settings['machines']}: at least 2; take vertex-gpu for one")
    return found


def _used(node: Any) -> list[str]:
    """The names in ${...} in a spec."""
    if isinstance(node, dict):
        return [name for value in node.values() for name in _used(value)]
    if isinstance(node, list):
        return [name for value in node for name in _used(value)]
    return re.findall(r"\$\{(\w+)\}", node) if isinstance(node, str) else []


def trainer_arguments(settings: Settings, extra: list[str], fixed: list[str]) -> list[str]:
    """The trainer's command line: the spec's own arguments, those of the settings, then the user's, which win.

    Args:
        settings: all of them.
        extra: after `--` on the command line.
        fixed: beside `${trainer}` in the spec.
    """
    own = {_name(text) for text in [*extra, *fixed]}
    found = []
    for flag, value in (("recipe", settings["recipe"]), ("data", settings.get("data", ""))):
        if value and flag not in own:
            found.append(f"--{flag}={value}")
    teachers = settings["teacher"]
    if "teacher" not in own and isinstance(teachers, list):
        found += [f"--teacher={teacher}" for teacher in teachers]
    if "workdir" not in own:
        found.append(f"--workdir={settings['workdir']}")
    return found + extra


def _name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def render(spec: dict[str, Any], settings: Settings, extra: list[str]) -> dict[str, Any]:
    """The job, with every setting put in.

    Args:
        spec: of `load`.
        settings: of `settle`.
        extra: more arguments for the trainer.

    Raises:
        SettingError: the spec asks for a setting that there is not.
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
        found: list[Any] = []
        for item in node:
            if item == "${trainer}":
                fixed = [other for other in node if isinstance(other, str) and other != item]
                own = {_name(text) for text in extra}
                found = [text for text in found if _name(text) not in own]
                found += trainer_arguments(settings, extra, fixed)
            else:
                value = _fill(item, settings, extra)
                if value is not _ABSENT:
                    found.append(value)
        return found
    if not isinstance(node, str):
        return node
    for name in _used(node):
        if name not in settings:
            raise SettingError(f"the spec asks for ${{{name}}}, which is no setting{check.near(name, settings)}")
    if whole := re.fullmatch(r"\$\{(\w+)\}", node):
        value = settings[whole[1]]
        return _ABSENT if value in ("", []) else value
    return re.sub(r"\$\{(\w+)\}", lambda match: str(settings[match[1]]), node)
