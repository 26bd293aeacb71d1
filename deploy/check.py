"""Checks a job spec before a machine is paid for.

gcloud sends a mistyped key or a machine that does not exist unchanged (tried with 528). This
module checks names and types of the fields (schema.json), hardware that does not fit together
(deploy/hardware.py), and fields that exclude or need each other. The trainer's arguments are
checked in deploy/trainer_flags.py.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from deploy import hardware
from deploy.hardware import near

HERE = pathlib.Path(__file__).resolve().parent
SCHEMA: dict[str, Any] = json.loads((HERE / "schema.json").read_text(encoding="utf-8"))

STRATEGIES = {"ON_DEMAND": "STANDARD", "LOW_COST": "STANDARD"}  # deprecated name: its replacement
_CASTS: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "map": dict}
_IMAGE = re.compile(r"[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", re.ASCII)
_BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"


def custom_job(spec: Any, region: str) -> Iterator[str]:
    """The mistakes in a CustomJobSpec for this region, a line each."""
    errors = list(_fields(spec, "CustomJobSpec", ""))
    yield from errors
    if not errors:  # the rules below rely on the types
        yield from _region(region)
        yield from _job(spec, region, "")


def tuning_job(job: Any, region: str) -> Iterator[str]:
    """The mistakes in a HyperparameterTuningJob for this region, a line each."""
    errors = list(_fields(job, "HyperparameterTuningJob", ""))
    yield from errors
    if errors:
        return
    yield from _region(region)
    if "trialJobSpec" not in job:
        yield "trialJobSpec is missing"
    else:
        yield from _job(job["trialJobSpec"], region, "trialJobSpec.")
    study = job.get("studySpec", {})
    if len(study.get("metrics", [])) != 1:
        yield "studySpec.metrics: must hold one metric, the one that the trainer reports"
    for number, metric in enumerate(study.get("metrics", [])):
        if not metric.get("metricId") or metric.get("goal") not in ("MAXIMIZE", "MINIMIZE"):
            yield f"studySpec.metrics[{number}]: needs a metricId and a goal, MAXIMIZE or MINIMIZE"
    if not study.get("parameters"):
        yield "studySpec.parameters: is empty, there is nothing to search"
    for number, parameter in enumerate(study.get("parameters", [])):
        yield from _parameter(parameter, f"studySpec.parameters[{number}]")
    trials, parallel = job.get("maxTrialCount", 1), job.get("parallelTrialCount", 1)
    if not 1 <= parallel <= trials:
        yield f"parallelTrialCount: {parallel} must be from 1 to maxTrialCount, {trials}"


def _parameter(parameter: dict[str, Any], path: str) -> Iterator[str]:
    if not parameter.get("parameterId"):
        yield f"{path}.parameterId is missing: the name of a trainer flag"
    kinds = [key for key in parameter if key.endswith("ValueSpec")]
    if len(kinds) != 1:
        yield f"{path}: needs one of doubleValueSpec, integerValueSpec, categoricalValueSpec, discreteValueSpec, has {len(kinds)}"
        return
    values = parameter[kinds[0]]
    if kinds[0] in ("doubleValueSpec", "integerValueSpec"):
        low, high = values.get("minValue"), values.get("maxValue")
        if low is None or high is None or low > high:
            yield f"{path}.{kinds[0]}: needs minValue and a maxValue that is not below it"
        elif parameter.get("scaleType", "").endswith("LOG_SCALE") and low <= 0:
            yield f"{path}.{kinds[0]}.minValue: {low} must be above 0 on a logarithmic scale"
    elif not values.get("values"):
        yield f"{path}.{kinds[0]}.values: is empty"


def _fields(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Mistakes in the names and types of a value's fields.

    Args:
        value: a part of a spec.
        kind: its type, as deploy/make_schema.py writes it.
        path: where it stands in the spec; empty for the whole.
    """
    place = path or "the spec"
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{place}: must be a list, is {_shown(value)}"
            return
        for number, item in enumerate(value):
            yield from _fields(item, kind[0], f"{path}[{number}]")
    elif isinstance(kind, dict):
        allowed = [name for name in kind["enum"] if not name.endswith("_UNSPECIFIED")]
        if value not in allowed:
            yield f"{place}: {_shown(value)} is none of {', '.join(allowed)}{near(str(value), allowed)}"
    elif kind in _CASTS:
        if not isinstance(value, _CASTS[kind]) or (isinstance(value, bool) and kind != "boolean"):
            hint = f': write "{value}"' if kind == "string" and isinstance(value, (int, float)) else ""
            yield f"{place}: must be {'an' if kind == 'integer' else 'a'} {kind}, is {_shown(value)}{hint}"
        elif value == "":
            yield f"{place}: is empty"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{place}: must be a finite number, is {value}"
    elif not isinstance(value, dict):
        yield f"{place}: must be a mapping ({kind}), is {_shown(value)}"
    else:
        fields = SCHEMA["types"][kind]
        for name, inner in value.items():
            inner_path = f"{path}.{name}" if path else name
            if name not in fields:
                yield f"{inner_path}: {kind} has no such field{near(name, fields)}"
            else:
                yield from _fields(inner, fields[name], inner_path)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)  # YAML has dates, JSON has none
    return text if len(text) < 60 else text[:57] + "..."


def _region(region: str) -> Iterator[str]:
    if region not in SCHEMA["regions"]:
        yield f"region: {region} is not a region of Vertex AI training{near(region, SCHEMA['regions'])}"


def _job(spec: dict[str, Any], region: str, path: str) -> Iterator[str]:
    pools = spec.get("workerPoolSpecs", [])
    if not pools:
        yield f"{path}workerPoolSpecs: is missing or empty"
    tpu = False
    for number, pool in enumerate(pools):
        tpu |= hardware.is_tpu(pool.get("machineSpec", {}))
        yield from _pool(pool, f"{path}workerPoolSpecs[{number}]", first=number == 0)
    if tpu and len(pools) > 1:
        yield f"{path}workerPoolSpecs: a TPU job has one pool, this has {len(pools)}"
    if tpu and any(pool.get("replicaCount", 1) != 1 for pool in pools):
        yield f"{path}workerPoolSpecs[0].replicaCount: must be 1 on a TPU; the topology sets the number of machines"
    if pools and pools[0].get("replicaCount", 1) != 1 and not tpu:
        yield f"{path}workerPoolSpecs[0].replicaCount: must be 1, the primary; further machines go into a second pool"
    yield from _scheduling(spec.get("scheduling", {}), f"{path}scheduling", tpu)
    prefix = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "")
    if "baseOutputDirectory" in spec and not re.fullmatch(_BUCKET + r"(/.*)?", prefix):
        yield f"{path}baseOutputDirectory.outputUriPrefix: {prefix!r} must start with gs://BUCKET"
    if board := spec.get("tensorboard"):
        match = re.fullmatch(r"projects/[^/]+/locations/([^/]+)/tensorboards/[^/]+", board)
        if not match:
            yield f"{path}tensorboard: {board} must be projects/NUMBER/locations/REGION/tensorboards/ID"
        elif match[1] != region:
            yield f"{path}tensorboard: is in {match[1]}, the job in {region}: they must be in one region"
        if not spec.get("serviceAccount"):
            yield f"{path}serviceAccount: is needed beside tensorboard"
        if not prefix:
            yield f"{path}baseOutputDirectory: is needed beside tensorboard"
    account = spec.get("serviceAccount", "")
    if account and not re.fullmatch(r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", account):
        yield f"{path}serviceAccount: {account} must be NAME@PROJECT.iam.gserviceaccount.com"


def _pool(pool: dict[str, Any], path: str, *, first: bool) -> Iterator[str]:
    if pool.get("replicaCount", 1) < 1:
        yield f"{path}.replicaCount: {pool['replicaCount']} must be at least 1"
    containers = [name for name in ("containerSpec", "pythonPackageSpec") if name in pool]
    if len(containers) != 1:
        yield f"{path}: needs one of containerSpec and pythonPackageSpec, has {' and '.join(containers) or 'none'}"
    container = pool.get("containerSpec", {})
    if "containerSpec" in pool and not container.get("imageUri"):
        yield f"{path}.containerSpec.imageUri: is missing"
    elif (image := container.get("imageUri")) and not _IMAGE.fullmatch(image):
        yield f"{path}.containerSpec.imageUri: {image} must be HOST/PATH:TAG or HOST/PATH@sha256:DIGEST"
    names = [variable.get("name", "") for variable in container.get("env", [])]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            yield f"{path}.containerSpec.env: {name!r} is not a variable name"
        elif names.count(name) > 1:
            yield f"{path}.containerSpec.env: {name} is given twice"
        elif name.startswith("AIP_") or name in ("CLUSTER_SPEC", "TF_CONFIG"):
            yield f"{path}.containerSpec.env: {name} is set by Vertex AI"
    if "machineSpec" not in pool:
        if first:
            yield f"{path}.machineSpec: is missing"
        return
    yield from hardware.machine_errors(pool["machineSpec"], f"{path}.machineSpec")


def _scheduling(scheduling: dict[str, Any], path: str, tpu: bool) -> Iterator[str]:
    for name in ("timeout", "maxWaitDuration"):
        if name in scheduling and not re.fullmatch(r"[0-9]+(\.[0-9]+)?s", scheduling[name]):
            yield f"{path}.{name}: {scheduling[name]} must be seconds with an s, such as 86400s"
    strategy = scheduling.get("strategy", "STANDARD")
    if strategy in STRATEGIES:
        yield f"{path}.strategy: {strategy} is an old name; write {STRATEGIES[strategy]}"
    if "maxWaitDuration" in scheduling and strategy != "FLEX_START":
        yield f"{path}.maxWaitDuration: needs strategy FLEX_START, not {strategy}"
    if strategy == "FLEX_START" and tpu:
        yield f"{path}.strategy: FLEX_START is documented for GPUs only; use STANDARD or SPOT on a TPU"
    if scheduling.get("disableRetries") and scheduling.get("restartJobOnWorkerRestart"):
        yield f"{path}: disableRetries overrides restartJobOnWorkerRestart; set one of them"


def notes(spec: dict[str, Any], region: str) -> Iterator[str]:
    """Notes on a valid CustomJobSpec, a line each. None of them refuses the job."""
    lines: list[str] = []
    for pool in spec.get("workerPoolSpecs", []):
        lines += hardware.machine_notes(pool.get("machineSpec", {}), region)
        image = pool.get("containerSpec", {}).get("imageUri", "")
        if image and "@sha256:" not in image:
            lines.append(
                f"{image} is a tag, which may move between restarts; deploy/build.sh prints the digest to use instead"
            )
    if not spec.get("serviceAccount"):
        lines.append(
            "no service_account: the job runs as Vertex AI's own agent, with more rights than it needs (docs/deploy.md)"
        )
    yield from dict.fromkeys(lines)  # pools that are alike have the same notes
