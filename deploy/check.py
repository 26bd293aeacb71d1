"""Knows what a job spec may hold, and says what is wrong with one before a machine is paid for.

gcloud sends a mistyped key or a machine that does not exist as it stands (seen with 528). What is checked: names and types of
the fields (schema.json), hardware that fits together, fields that exclude or need each other, and the trainer's flags.
"""

from __future__ import annotations

import ast
import difflib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
SCHEMA: dict[str, Any] = json.loads((HERE / "schema.json").read_text(encoding="utf-8"))

# Machine type -> topologies (docs.cloud.google.com, Vertex AI custom training, "configure compute"). Those of one machine
# come first: replicaCount is 1 for the others too, but TensorFlow needs Google's own base image there.
TPU_MACHINES = {
    "ct5lp-hightpu-1t": ("1x1",),
    "ct5lp-hightpu-4t": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "ct5lp-hightpu-8t": ("2x4",),
}
# v6e and TPU7x exist, but Vertex AI runs no TensorFlow on them.
TPU_WITHOUT_TENSORFLOW = ("ct6e-", "tpu7x-")
# Zones of Cloud TPU v5e (docs.cloud.google.com/tpu/docs/regions-zones). Vertex AI's own list could not be read, so that
# another region is told and not refused.
TPU_V5E_REGIONS = ("us-central1", "us-south1", "us-west1", "us-west4")
# GPUs that come with their machine type, and the count that its name holds.
GPU_MACHINES = {
    r"g2-standard-(4|8|12|16|32)": ("NVIDIA_L4", 1),
    r"g2-standard-24": ("NVIDIA_L4", 2),
    r"g2-standard-48": ("NVIDIA_L4", 4),
    r"g2-standard-96": ("NVIDIA_L4", 8),
    r"a2-highgpu-(1|2|4|8)g": ("NVIDIA_TESLA_A100", 0),
    r"a2-megagpu-16g": ("NVIDIA_TESLA_A100", 16),
    r"a2-ultragpu-(1|2|4|8)g": ("NVIDIA_A100_80GB", 0),
    r"a3-highgpu-(1|2|4|8)g": ("NVIDIA_H100_80GB", 0),
    r"a3-megagpu-8g": ("NVIDIA_H100_MEGA_80GB", 8),
    r"a3-ultragpu-8g": ("NVIDIA_H200_141GB", 8),
    r"a4-highgpu-8g": ("NVIDIA_B200", 8),
}
GPU_FOR_N1 = ("NVIDIA_TESLA_T4", "NVIDIA_TESLA_P4", "NVIDIA_TESLA_P100", "NVIDIA_TESLA_V100")
MACHINE_FAMILIES = (
    *(
        "n1-",
        "n2-",
        "n2d-",
        "e2-",
        "c2-",
        "c2d-",
        "c3-",
        "c3d-",
        "c4-",
        "n4-",
        "m1-",
        "m3-",
        "g2-",
        "a2-",
        "a3-",
        "a4-",
    ),
    *("a4x-", "ct5lp-", "cloud-tpu"),
)
STRATEGIES = {"ON_DEMAND": "STANDARD", "LOW_COST": "STANDARD"}  # deprecated -> what to write
_CASTS: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "map": dict}
_IMAGE = re.compile(r"[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", re.ASCII)
_BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"


def near(word: str, known: Any) -> str:
    """`; did you mean X?`, or nothing."""
    found = difflib.get_close_matches(word, list(known), 1, 0.55)
    if not found:  # the nearest but for case and separators: tpu_topology, TPU-topology
        plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in known}
        found = [plain[p] for p in [re.sub(r"[^a-z0-9]", "", word.lower())] if p in plain]
    return f"; did you mean {found[0]}?" if found else ""


def custom_job(spec: Any, region: str) -> Iterator[str]:
    """What is wrong with a CustomJobSpec for this region, a line each."""
    wrong = list(_fields(spec, "CustomJobSpec", ""))
    yield from wrong
    if not wrong:  # the rules below rely on the types
        yield from _region(region)
        yield from _job(spec, region, "")


def tuning_job(job: Any, region: str) -> Iterator[str]:
    """What is wrong with a HyperparameterTuningJob, whose trials are CustomJobSpecs, for this region."""
    wrong = list(_fields(job, "HyperparameterTuningJob", ""))
    yield from wrong
    if wrong:
        return
    yield from _region(region)
    if "trialJobSpec" not in job:
        yield "trialJobSpec is missing"
    else:
        yield from _job(job["trialJobSpec"], region, "trialJobSpec.")
    study = job.get("studySpec", {})
    if len(study.get("metrics", [])) != 1:
        yield "studySpec.metrics: must hold one metric, which the trainer reports"
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


def _parameter(parameter: dict[str, Any], where: str) -> Iterator[str]:
    if not parameter.get("parameterId"):
        yield f"{where}.parameterId is missing: the name of a trainer flag"
    kinds = [key for key in parameter if key.endswith("ValueSpec")]
    if len(kinds) != 1:
        yield f"{where}: needs one of doubleValueSpec, integerValueSpec, categoricalValueSpec, discreteValueSpec, has {len(kinds)}"
        return
    values = parameter[kinds[0]]
    if kinds[0] in ("doubleValueSpec", "integerValueSpec"):
        low, high = values.get("minValue"), values.get("maxValue")
        if low is None or high is None or low > high:
            yield f"{where}.{kinds[0]}: needs minValue and a maxValue that is not below it"
        elif parameter.get("scaleType", "").endswith("LOG_SCALE") and low <= 0:
            yield f"{where}.{kinds[0]}.minValue: {low} must be above 0 on a logarithmic scale"
    elif not values.get("values"):
        yield f"{where}.{kinds[0]}.values: is empty"


def _fields(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Names and types."""
    at = where or "the spec"
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{at}: must be a list, is {_shown(value)}"
            return
        for number, item in enumerate(value):
            yield from _fields(item, kind[0], f"{where}[{number}]")
    elif isinstance(kind, dict):
        allowed = [name for name in kind["enum"] if not name.endswith("_UNSPECIFIED")]
        if value not in allowed:
            yield f"{at}: {_shown(value)} is none of {', '.join(allowed)}{near(str(value), allowed)}"
    elif kind in _CASTS:
        if not isinstance(value, _CASTS[kind]) or (isinstance(value, bool) and kind != "boolean"):
            hint = f': write "{value}"' if kind == "string" and isinstance(value, (int, float)) else ""
            yield f"{at}: must be a {kind}, is {_shown(value)}{hint}"
        elif value == "":
            yield f"{at}: is empty"
    elif not isinstance(value, dict):
        yield f"{at}: must be a mapping ({kind}), is {_shown(value)}"
    else:
        fields = SCHEMA["types"][kind]
        for name, inner in value.items():
            path = f"{where}.{name}" if where else name
            if name not in fields:
                yield f"{path}: {kind} has no such field{near(name, fields)}"
            else:
                yield from _fields(inner, fields[name], path)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _region(region: str) -> Iterator[str]:
    if region not in SCHEMA["regions"]:
        yield f"region: {region} is none where Vertex AI trains{near(region, SCHEMA['regions'])}"


def _job(spec: dict[str, Any], region: str, where: str) -> Iterator[str]:
    pools = spec.get("workerPoolSpecs", [])
    if not pools:
        yield f"{where}workerPoolSpecs: is missing or empty"
    tpu = False
    for number, pool in enumerate(pools):
        at = f"{where}workerPoolSpecs[{number}]"
        tpu |= _is_tpu(pool.get("machineSpec", {}))
        yield from _pool(pool, at, first=number == 0)
    if tpu and len(pools) > 1:
        yield f"{where}workerPoolSpecs: a TPU job has one pool, this has {len(pools)}"
    if tpu and any(pool.get("replicaCount", 1) != 1 for pool in pools):
        yield f"{where}workerPoolSpecs[0].replicaCount: must be 1 on a TPU; the topology says how many machines there are"
    if pools and pools[0].get("replicaCount", 1) != 1 and not tpu:
        yield f"{where}workerPoolSpecs[0].replicaCount: must be 1, the primary; further machines go into a second pool"
    yield from _scheduling(spec.get("scheduling", {}), f"{where}scheduling", tpu)
    prefix = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "")
    if "baseOutputDirectory" in spec and not re.fullmatch(_BUCKET + r"(/.*)?", prefix):
        yield f"{where}baseOutputDirectory.outputUriPrefix: {prefix!r} must start with gs://BUCKET"
    if board := spec.get("tensorboard"):
        match = re.fullmatch(r"projects/[^/]+/locations/([^/]+)/tensorboards/[^/]+", board)
        if not match:
            yield f"{where}tensorboard: {board} must be projects/NUMBER/locations/REGION/tensorboards/ID"
        elif match[1] != region:
            yield f"{where}tensorboard: is in {match[1]}, the job in {region}: they must be in one region"
        if not spec.get("serviceAccount"):
            yield f"{where}serviceAccount: is needed beside tensorboard"
        if not prefix:
            yield f"{where}baseOutputDirectory: is needed beside tensorboard"
    account = spec.get("serviceAccount", "")
    if account and not re.fullmatch(r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", account):
        yield f"{where}serviceAccount: {account} must be NAME@PROJECT.iam.gserviceaccount.com"


def _is_tpu(machine: dict[str, Any]) -> bool:
    kind = machine.get("machineType", "")
    return kind.startswith(("ct5lp-", "ct6e-", "tpu7x-", "cloud-tpu")) or "tpuTopology" in machine


def _pool(pool: dict[str, Any], at: str, *, first: bool) -> Iterator[str]:
    if pool.get("replicaCount", 1) < 1:
        yield f"{at}.replicaCount: {pool['replicaCount']} must be at least 1"
    containers = [name for name in ("containerSpec", "pythonPackageSpec") if name in pool]
    if len(containers) != 1:
        yield f"{at}: needs one of containerSpec and pythonPackageSpec, has {' and '.join(containers) or 'none'}"
    container = pool.get("containerSpec", {})
    if "containerSpec" in pool and not container.get("imageUri"):
        yield f"{at}.containerSpec.imageUri: is missing"
    elif (image := container.get("imageUri")) and not _IMAGE.fullmatch(image):
        yield f"{at}.containerSpec.imageUri: {image} is no HOST/PATH:TAG or HOST/PATH@sha256:DIGEST"
    names = [variable.get("name", "") for variable in container.get("env", [])]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            yield f"{at}.containerSpec.env: {name!r} is no name of a variable"
        elif names.count(name) > 1:
            yield f"{at}.containerSpec.env: {name} is given twice"
        elif name.startswith("AIP_") or name in ("CLUSTER_SPEC", "TF_CONFIG"):
            yield f"{at}.containerSpec.env: {name} is set by Vertex AI"
    if "machineSpec" not in pool:
        if first:
            yield f"{at}.machineSpec: is missing"
        return
    yield from _machine(pool["machineSpec"], f"{at}.machineSpec")


def _machine(machine: dict[str, Any], at: str) -> Iterator[str]:
    kind, accelerator = machine.get("machineType", ""), machine.get("acceleratorType", "")
    count, topology = machine.get("acceleratorCount"), machine.get("tpuTopology")
    if not kind:
        yield f"{at}.machineType: is missing"
        return
    if kind.startswith(TPU_WITHOUT_TENSORFLOW):
        yield f"{at}.machineType: Vertex AI runs no TensorFlow on {kind}; take {', '.join(TPU_MACHINES)}"
    elif kind in TPU_MACHINES:
        if accelerator or count is not None:
            yield f"{at}: {kind} takes tpuTopology, not acceleratorType and acceleratorCount"
        if topology not in TPU_MACHINES[kind]:
            allowed = TPU_MACHINES[kind]
            yield f"{at}.tpuTopology: {kind} is {' or '.join(allowed)}, not {topology}"
        elif kind == "ct5lp-hightpu-4t" and topology != "2x2":
            yield (
                f"{at}.tpuTopology: {topology} is several machines, on which funmatch's image does not run; "
                "take 2x2, or ct5lp-hightpu-8t with 2x4"
            )
    elif kind == "cloud-tpu":
        if topology:
            yield f"{at}.tpuTopology: cloud-tpu takes acceleratorType and acceleratorCount instead"
        if accelerator not in ("TPU_V2", "TPU_V3"):
            yield f"{at}.acceleratorType: cloud-tpu is TPU_V2 or TPU_V3, not {accelerator or 'nothing'}"
        if count != 8:
            yield f"{at}.acceleratorCount: cloud-tpu has 8 cores on one machine, which is what funmatch runs on, not {count}"
    elif kind.startswith("ct5lp-"):
        yield f"{at}.machineType: there is no {kind}{near(kind, TPU_MACHINES)}"
    elif not kind.startswith(MACHINE_FAMILIES):
        known = [*TPU_MACHINES, "cloud-tpu", "n1-standard-8", "g2-standard-12", "a2-highgpu-1g", "a3-highgpu-8g"]
        yield f"{at}.machineType: {kind} is of no family known here{near(kind, known)}"
    else:
        yield from _gpu(kind, accelerator, count, at)
        if topology:
            yield f"{at}.tpuTopology: {kind} has no TPU"


def _gpu(kind: str, accelerator: str, count: int | None, at: str) -> Iterator[str]:
    if accelerator.startswith("TPU_"):
        yield f"{at}.acceleratorType: {accelerator} belongs to the machine type cloud-tpu, not to {kind}"
        return
    if bool(accelerator) != (count is not None):
        yield f"{at}: acceleratorType and acceleratorCount come together"
        return
    for pattern, (gpu, fixed) in GPU_MACHINES.items():
        if match := re.fullmatch(pattern, kind):
            fixed = fixed or int(match[1])
            if accelerator != gpu or count != fixed:
                yield f"{at}: {kind} has {fixed} x {gpu}, not {f'{count} x {accelerator}' if accelerator else 'nothing'}"
            return
    if kind.startswith(("g2-", "a2-", "a3-", "a4-")):
        yield f"{at}.machineType: there is no {kind}{near(kind, _gpu_names())}"
    elif accelerator and not kind.startswith("n1-"):
        yield f"{at}: {kind} takes no GPU; n1 machines do, or those that bring theirs (g2, a2, a3)"
    elif accelerator and accelerator not in GPU_FOR_N1:
        yield f"{at}.acceleratorType: an n1 machine takes {', '.join(GPU_FOR_N1)}, not {accelerator}"
    elif accelerator and count not in (1, 2, 4, 8):
        yield f"{at}.acceleratorCount: {count} must be 1, 2, 4 or 8"


def _gpu_names() -> list[str]:
    found = []
    for pattern in GPU_MACHINES:
        match = re.search(r"\(([\d|]+)\)", pattern)
        found += [pattern.replace(match[0], n) for n in match[1].split("|")] if match else [pattern]
    return found


def _scheduling(scheduling: dict[str, Any], at: str, tpu: bool) -> Iterator[str]:
    for name in ("timeout", "maxWaitDuration"):
        if name in scheduling and not re.fullmatch(r"[0-9]+(\.[0-9]+)?s", scheduling[name]):
            yield f"{at}.{name}: {scheduling[name]} must be seconds with an s, such as 86400s"
    strategy = scheduling.get("strategy", "STANDARD")
    if strategy in STRATEGIES:
        yield f"{at}.strategy: {strategy} is an old name; write {STRATEGIES[strategy]}"
    if "maxWaitDuration" in scheduling and strategy != "FLEX_START":
        yield f"{at}.maxWaitDuration: goes with strategy FLEX_START only, not with {strategy}"
    if strategy == "FLEX_START" and tpu:
        yield f"{at}.strategy: FLEX_START is documented for GPUs; take STANDARD or SPOT on a TPU"
    if scheduling.get("disableRetries") and scheduling.get("restartJobOnWorkerRestart"):
        yield f"{at}: disableRetries makes restartJobOnWorkerRestart void; give one of them"


class Flag(NamedTuple):
    """A flag of the trainer: its type (tuple: it may be given again), and the values that it takes if they are listed."""

    kind: type
    choices: tuple[str, ...]


# Of every verb, so it stands in trainer/cli.py.
EVERY_VERBS = {"log_format": Flag(str, ("auto", "text", "json"))}


def trainer_flags(source: pathlib.Path = HERE.parent / "trainer" / "core" / "options.py") -> dict[str, Flag]:
    """The flags of trainer.task, read from its source: a laptop need not have what the trainer imports."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    values: dict[str, tuple[str, ...]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            values[ast.unparse(node.targets[0])] = _texts(node.value, values)
    groups = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Options")]
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    found = {}
    for node in (field for group in groups for field in group):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            continue
        kind = kinds.get(ast.unparse(node.annotation), tuple)
        choices = next((_texts(k.value, values) for k in node.value.keywords if k.arg == "choices"), ())
        found[ast.unparse(node.target)] = Flag(kind, choices)
    return found


def _texts(node: ast.expr, names: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The tuple of texts that an expression of texts, names and *names makes; of any other, none: then all values pass here."""
    if isinstance(node, ast.Name):
        return names.get(node.id, ())
    found: tuple[str, ...] = ()
    for part in node.elts if isinstance(node, ast.Tuple) else []:
        if isinstance(part, ast.Starred):
            found += _texts(part.value, names)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found += (part.value,)
    return found


def arguments(args: list[str], *, cloud: bool = True) -> Iterator[str]:
    """What is wrong with the trainer's arguments.

    Args:
        args: `--name=value`, or `--name` and `--noname` for what is true or false.
        cloud: paths must be gs:// or https://, because the machine that reads them is another one.
    """
    known = trainer_flags() | EVERY_VERBS
    given = {text.lstrip("-").partition("=")[0] for text in args}
    if not given & {"steps", "epochs", "recipe", "flagfile"}:
        yield "trainer flag --recipe, --steps or --epochs is missing: how long to train"
    if not given & {"teacher", "flagfile"} and "--distance=labels" not in args:
        yield "trainer flag --teacher is missing: --set teacher=... (or -- --distance=labels)"
    for text in args:
        match = re.fullmatch(r"--?([\w]+)(?:=(.*))?", text, re.ASCII | re.DOTALL)
        if not match:
            yield f"trainer argument {text!r}: must be --name=value"
            continue
        name, value = match[1], match[2]
        if name in ("flagfile", "undefok"):
            if name == "flagfile" and cloud and value and not value.startswith("recipes/"):
                yield f"trainer flag {text}: the image holds recipes/*.flags only; write the flags out"
            continue
        if value is None and name.startswith("no") and known.get(name[2:], Flag(str, ())).kind is bool:
            continue
        if name not in known:
            yield f"trainer flag --{name}: trainer.task has no such flag{near(name, known)}"
        elif value is None and known[name].kind is not bool:
            yield f"trainer flag --{name}: needs a value, --{name}=..."
        elif value is not None:
            yield from _value(name, known[name], value, cloud)


def _value(name: str, flag: Flag, value: str, cloud: bool) -> Iterator[str]:
    if flag.choices and value not in flag.choices:
        yield f"trainer flag --{name}={value}: must be one of {', '.join(flag.choices)}{near(value, flag.choices)}"
    if flag.kind in (int, float):
        try:
            flag.kind(value)
        except ValueError:
            yield f"trainer flag --{name}={value}: must be {'an integer' if flag.kind is int else 'a number'}"
    if cloud and _is_local(name, value):
        yield f"trainer flag --{name}={value}: the cloud cannot read a path of this machine; copy it to gs:// first"


def _is_local(name: str, value: str) -> bool:
    """Whether a flag's value is a path that only this machine has. Vertex AI mounts buckets under /gcs/, to read from."""
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


def study_flags(study: dict[str, Any], args: list[str]) -> Iterator[str]:
    """What is wrong between a study's parameters and the trainer's flags: each parameter arrives as `--parameterId=value`."""
    known = trainer_flags() | EVERY_VERBS
    given = {text.lstrip("-").partition("=")[0] for text in args}
    for parameter in study["parameters"]:
        name = parameter["parameterId"]
        if name not in known:
            yield f"study parameter {name}: trainer.task has no such flag{near(name, known)}"
            continue
        if name in given:
            yield f"study parameter {name}: --{name} is among the trainer's arguments too; drop one"
        if known[name].kind is int and "integerValueSpec" not in parameter:
            yield f"study parameter {name}: is a whole number; give integerValueSpec"
        if known[name].kind not in (int, float) and "categoricalValueSpec" not in parameter:
            yield f"study parameter {name}: is no number; give categoricalValueSpec"
        for value in parameter.get("categoricalValueSpec", {}).get("values", []):
            yield from _value(name, known[name], value, cloud=True)


def _ends(study: dict[str, Any]) -> Iterator[list[str]]:
    """Arguments of a study's corners: every parameter at its least, and at its most; of no study, none."""
    for end in (0, -1):
        found = []
        for parameter in study.get("parameters", []):
            values = next(value for key, value in parameter.items() if key.endswith("ValueSpec"))
            listed = values["values"] if "values" in values else [values["minValue"], values["maxValue"]]
            found.append(f"--{parameter['parameterId']}={listed[end]}")
        yield found


def configuration(args: list[str], study: dict[str, Any]) -> Iterator[str]:
    """What the trainer itself says against its arguments, where its flags can be parsed here (absl is installed)."""
    try:
        from absl import flags

        from trainer import recipes
        from trainer.core.errors import FunmatchError
        from trainer.core.flags import define_flags, from_flags
    except ImportError:
        return
    for corner in _ends(study):
        values = flags.FlagValues()
        define_flags(values)
        try:
            own = [text for text in args if text.lstrip("-").partition("=")[0] not in EVERY_VERBS]
            rest = values(["trainer.task", *own, *corner])[1:]
            if rest:
                raise flags.Error(f"unexpected argument {rest[0]!r}")
            from_flags(values, recipes.find(values.recipe)).require_complete()
        except (flags.Error, FunmatchError, OSError) as error:
            at = f" (with {' '.join(corner)})" if corner else ""
            yield f"trainer: {' '.join(str(error).split())}{at}"
            return


def notes(spec: dict[str, Any], region: str) -> Iterator[str]:
    """What is not wrong but should be known, a line each."""
    for pool in spec.get("workerPoolSpecs", []):
        machine = pool.get("machineSpec", {}).get("machineType", "")
        if machine.startswith("ct5lp-") and region not in TPU_V5E_REGIONS:
            yield f"{region} is none of the regions where Cloud TPU v5e is listed ({', '.join(TPU_V5E_REGIONS)})"
        image = pool.get("containerSpec", {}).get("imageUri", "")
        if image and "@sha256:" not in image:
            yield f"{image} is a tag, which may move between restarts; deploy/build.sh prints the digest to give instead"
    if not spec.get("serviceAccount"):
        yield "no service_account: the job runs as Vertex AI's own agent, which may do more than it needs (docs/deploy.md)"
