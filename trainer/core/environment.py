"""What the process finds around it, and what TensorFlow must find when it is imported. This module imports no TensorFlow.

Vertex AI tells a container where things go by variables (AIP_...), which machines work together (CLUSTER_SPEC, TF_CONFIG) and
which trial of a study it is. TensorFlow's TPU wheel decides by variables, at its import, whether it loads libtpu and how.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import posixpath
import socket
import time
from collections import deque
from typing import Any

from trainer.core.errors import ConfigError, DataError

_CLOUD = (
    "AIP_CHECKPOINT_DIR",
    "AIP_MODEL_DIR",
    "AIP_TENSORBOARD_LOG_DIR",
    "CLOUD_ML_JOB_ID",
    "CLOUD_ML_PROJECT_ID",
    "CLUSTER_SPEC",
    "KUBERNETES_SERVICE_HOST",
)
# Of Google (PCI vendor 0x1ae0): TPU v2 or v3, v4, v5p, v5e, v6e, 7x. Its network cards have the same vendor.
_TPU_DEVICES = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
_LOCKFILE = "/tmp/libtpu_lockfile"
_REPORTED = 100  # metrics that Vertex's own library keeps in its file


def in_cloud() -> bool:
    """Whether a variable says that this is a container of Vertex AI or Kubernetes."""
    return any(name in os.environ for name in _CLOUD)


def tpu_address(tpu: str) -> str:
    """Where the TPU is: "none", "local", "grpc://...", a name, or "" where neither flag nor environment says it."""
    named = os.environ.get("KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS") or os.environ.get("TPU_NAME", "")
    # TensorFlow asks the metadata server about a TPU that the environment calls local.
    return "local" if tpu == "" and named == "local" else tpu


def for_tensorflow(tpu: str) -> None:
    """Sets what TensorFlow's TPU wheel reads when it is imported. A variable that the user has set stays as it is.

    A TPU of this machine needs the PJRT interface of libtpu. Without a TPU libtpu must not be loaded: it would ask Google's
    metadata server, which is not there, for more than a minute, and it would lock the TPU against another process.

    Args:
        tpu: the flag; "none" for a verb that has none.

    Raises:
        ConfigError: a lock of libtpu is in the way, of which TensorFlow's import would die.
    """
    if importlib.util.find_spec("libtpu") is None:
        return
    if tpu_address(tpu) != "local":
        os.environ.setdefault("TPU_LOAD_LIBRARY", "0")
        return
    if os.path.exists(_LOCKFILE) and not os.access(_LOCKFILE, os.R_OK | os.W_OK):
        raise ConfigError(
            f"--tpu={tpu}: {_LOCKFILE} belongs to another user, and libtpu dies of that: end the process that uses the TPU, "
            "then delete the file"
        )
    import libtpu

    os.environ.setdefault("PJRT_DEVICE", "TPU")
    os.environ.setdefault("NEXT_PLUGGABLE_DEVICE_USE_C_API", "true")
    os.environ.setdefault("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", libtpu.get_library_path())
    if not has_tpu() and not _metadata_answers():
        # No device and no metadata server: libtpu shall say so at once, not ask until it gives up.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def has_tpu() -> bool:
    """Whether this machine shows a TPU: its device files, or its chips on the PCI bus."""
    if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    for device in glob.glob("/sys/bus/pci/devices/*"):
        try:
            with open(f"{device}/vendor") as vendor, open(f"{device}/device") as kind:
                if vendor.read().strip() == "0x1ae0" and kind.read().strip() in _TPU_DEVICES:
                    return True
        except OSError:
            continue
    return False


def _metadata_answers() -> bool:
    host = os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_IP") or "169.254.169.254"
    name, _, port = host.partition(":")
    return reachable(name, int(port or 80), 2.0)


def reachable(host: str, port: int, seconds: float) -> bool:
    """Whether something accepts a connection there."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False


def _variable(name: str) -> dict[str, Any]:
    """A variable that holds a JSON object.

    Raises:
        ConfigError: it holds something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return {}
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ConfigError(f"the variable {name} is not JSON as Vertex AI writes it: {error}") from None
    return value


def trial() -> str:
    """The trial of a hyperparameter study that this process is, else an empty text."""
    if number := os.environ.get("CLOUD_ML_TRIAL_ID", ""):
        return number
    try:
        return str(_variable("CLUSTER_SPEC").get("task", {}).get("trial", "") or "")
    except ConfigError:
        return ""


def cluster() -> tuple[dict[str, Any], int]:
    """The machines that work together, as TF_CONFIG holds them, and how many there are; ({}, 1) for one alone.

    TF_CONFIG decides. Vertex AI sets it for jobs of several machines; where it has set CLUSTER_SPEC alone, its worker pools 0 and
    1 are chief and workers.

    Raises:
        ConfigError: the variables are not readable, or ask for a parameter server or evaluator, which this job has not.
    """
    found = _variable("TF_CONFIG")
    if not found:
        spec = _variable("CLUSTER_SPEC")
        roles = {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": "evaluator"}
        task = spec.get("task", {})
        found = {
            "cluster": {roles.get(pool, pool): hosts for pool, hosts in spec.get("cluster", {}).items()},
            "task": {"type": roles.get(task.get("type", ""), ""), "index": task.get("index", 0)},
        }
    hosts = {role: list(names) for role, names in found.get("cluster", {}).items() if names}
    count = sum(map(len, hosts.values()))
    if count <= 1:
        return {}, 1
    if odd := sorted(set(hosts) - {"chief", "worker"}):
        raise ConfigError(
            f"TF_CONFIG (or CLUSTER_SPEC) has {' and '.join(odd)}: this job takes a chief and workers that are alike"
        )
    task = found.get("task", {})
    role, index = task.get("type", ""), int(task.get("index", 0))
    if not 0 <= index < len(hosts.get(role, [])):
        raise ConfigError(f"TF_CONFIG names this process {role!r} {index}, which its cluster does not have")
    return {"cluster": hosts, "task": {"type": role, "index": index}}, count


def is_chief() -> bool:
    """Whether this process is the one that writes: the chief, or the first worker where there is none."""
    found, count = cluster()
    if count == 1:
        return True
    role, index = found["task"]["type"], found["task"]["index"]
    return index == 0 and (role == "chief" or "chief" not in found["cluster"])


def workdir(given: str) -> str:
    """The run's folder.

    Vertex AI's AIP_CHECKPOINT_DIR is BASE/checkpoints/ (BASE/TRIAL/checkpoints/ in a study), and so are a workdir's
    checkpoints: without the flag the workdir is BASE (or BASE/TRIAL). A workdir that was given gets a folder for each trial,
    because the trials of a study share their command line.
    """
    if given:
        number, parts = trial(), given.rstrip("/").split("/")
        return given if not number or f"trial-{number}" in parts else posixpath.join(given, f"trial-{number}")
    folder = os.environ.get("AIP_CHECKPOINT_DIR", "").rstrip("/")
    base, _, last = folder.rpartition("/")
    return base if last == "checkpoints" and base else folder


def model_dir(given: str) -> str:
    """Where Vertex AI looks for the trained model: the flag, else AIP_MODEL_DIR, else nowhere."""
    return (given or os.environ.get("AIP_MODEL_DIR", "")).rstrip("/")


def tensorboard_dir(given: str) -> str:
    """Where Vertex AI's TensorBoard looks: the flag, else AIP_TENSORBOARD_LOG_DIR, else the workdir's own."""
    return (given or os.environ.get("AIP_TENSORBOARD_LOG_DIR", "")).rstrip("/")


_metrics: deque[dict[str, str | float]] = deque(maxlen=_REPORTED)


def report_metric(name: str, value: float, step: int) -> None:
    """Tells Vertex AI a trial's metric, in the file and the format of its own `cloudml-hypertune` 0.1.0.dev6.

    The file (CLOUD_ML_HP_METRIC_FILE, else /tmp/hypertune/output.metrics) holds the newest 100 metrics as lines of JSON, and is
    written whole each time. Outside of a study it does nothing.

    Raises:
        DataError: the file cannot be written, without which the study would end with nothing.
    """
    path = os.environ.get("CLOUD_ML_HP_METRIC_FILE", "")
    if not path:
        if not trial():
            return
        path = "/tmp/hypertune/output.metrics"
    number = os.environ.get("CLOUD_ML_TRIAL_ID", "") or trial() or "0"
    _metrics.append(
        {
            "timestamp": time.time(),
            "trial": number,
            name: str(float(value)),
            "global_step": str(step),
            "checkpoint_path": "",
        }
    )
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in _metrics)
    except OSError as error:
        raise DataError(
            f"cannot tell the study its metric in {path}: {error.strerror}; mount a writable /tmp or set CLOUD_ML_HP_METRIC_FILE"
        ) from error
