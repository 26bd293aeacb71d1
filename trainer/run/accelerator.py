"""The accelerator of a run: from a flag to a tf.distribute strategy.

No other module depends on the kind of hardware.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import time
import urllib.error
from typing import Any

import tensorflow as tf

from trainer.core import environment
from trainer.core.console import Console, SilentConsole
from trainer.core.errors import ConfigError, Stopped
from trainer.io import files

# Seconds between attempts to reach a TPU, which a previous container may still hold.
_PAUSES = (5.0, 15.0, 45.0)
_HEALTHY_SECONDS = 1200  # a new TPU node takes minutes
sleep = time.sleep

# Strategies of this process: initialising a TPU a second time would wipe the first one's variables.
strategies: dict[str, tf.distribute.Strategy] = {}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What the job runs on.

    Attributes:
        strategy: makes variables and runs steps.
        kind: "TPU", "GPU" or "CPU".
        steps_per_loop: default number of steps of one device loop; largest where the device would
            wait longest for its host.
        workers: processes of the strategy, each on a machine of its own.
        chief: whether this process is the one that writes.
    """

    strategy: tf.distribute.Strategy
    kind: str
    steps_per_loop: int
    workers: int = 1
    chief: bool = True

    @property
    def description(self) -> str:
        """Kind and number of replicas, for people."""
        count = self.strategy.num_replicas_in_sync
        machines = f" on {self.workers} machines" if self.workers > 1 else ""
        return f"{self.kind}, {count} replica{'s' if count > 1 else ''}{machines}"

    @property
    def image_bytes(self) -> int:
        """Limit of the decoded images on each device, in bytes; without a limit on a CPU.

        A v2 core has 8 GiB and a v5e chip 16 GiB. The paper's largest small data set, Food101 at
        256 pixels, takes 13 GiB.
        """
        return {"TPU": 2 << 30, "GPU": 4 << 30}.get(self.kind, 1 << 62)

    @property
    def reads_host_memory(self) -> bool:
        """Whether images in the host's memory need no transfer to the device."""
        return self.kind == "CPU"

    def jit_compile(self, flag: str) -> bool:
        """Whether to request XLA compilation: "on", "off" or "auto" as in `--jit_compile`.

        A TPU always compiles; small models on a CPU run faster without.
        """
        return flag == "on" or (flag == "auto" and self.kind == "GPU")

    @property
    def int8_convolutions(self) -> bool:
        """Whether XLA has fast int8 convolutions here; on a CPU it does not vectorise them."""
        return self.kind != "CPU"

    def check_batch(self, batch_size: int) -> None:
        """Checks the global batch size.

        Raises:
            ConfigError: it is not a multiple of the number of replicas.
        """
        count = self.strategy.num_replicas_in_sync
        if batch_size % count:
            raise ConfigError(
                f"--batch_size={batch_size} is not a multiple of the {count} replicas of this {self.kind}"
            )

    def hints(self, precision: str) -> list[str]:
        """Advice on a precision for this hardware; it is never changed automatically."""
        if self.kind == "TPU" and precision == "float32":
            return [
                "--precision=float32 on a TPU: products are bfloat16 anyway, but activations take twice the memory of "
                "--precision=mixed_bfloat16, which is the usual choice there"
            ]
        if self.kind == "CPU" and precision == "mixed_bfloat16":
            return ["--precision=mixed_bfloat16 is slow on most CPUs; float32 is the usual choice there"]
        return []

    def local_replicas(self) -> tuple[int, ...]:
        """Numbers of the replicas that this process feeds."""
        replicas: list[int] = []

        def collect(context: tf.distribute.ValueContext) -> tf.Tensor:
            replicas.append(context.replica_id_in_sync_group)
            return tf.constant(0)

        self.strategy.experimental_distribute_values_from_function(collect)
        return tuple(replicas)

    def any_worker(self, here: bool) -> bool:
        """Whether `here` is true on any machine; a collective that all machines must call."""
        return self._total(float(here)) > 0

    def same_on_all(self, value: int) -> bool:
        """Whether all machines have this value (below 2^53). A collective, as `any_worker`."""
        total = self._total(float(value))
        return not self.any_worker(total != float(value) * self.strategy.num_replicas_in_sync)

    def least_of_all(self, value: int) -> int:
        """The smallest of the machines' values, each 0 to 2^20. A collective, as `any_worker`."""
        if self.workers == 1:
            return value
        low, high = 0, 1 << 20
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.any_worker(value <= middle) else (middle + 1, high)
        return low

    def _total(self, value: float) -> float:
        """The sum of the replicas' values; with one machine it needs no device."""
        if self.workers == 1:
            return value * self.strategy.num_replicas_in_sync
        values = self.strategy.experimental_distribute_values_from_function(lambda _: tf.constant(value, tf.float64))
        return float(self.strategy.reduce(tf.distribute.ReduceOp.SUM, values, axis=None))


def resolve(tpu: str, console: Console | None = None) -> Accelerator:
    """Finds and initialises the accelerator: once a process for a TPU or for several machines.

    Args:
        tpu: "none", or what TPUClusterResolver takes ("local", a name, "grpc://...", "" for the
            environment's).
        console: gets a line about each wait; None: nothing is printed.

    Raises:
        ConfigError: the TPU cannot be initialised, or the variables of the cluster are invalid.
    """
    console = console or SilentConsole()
    cluster, workers = environment.cluster()
    if tpu != "none":
        if workers > 1:
            raise ConfigError(
                f"--tpu={tpu}: {workers} machines are in TF_CONFIG, and a TPU job runs on one; choose a machine with "
                "more chips"
            )
        if tpu not in strategies:
            strategies[tpu] = _tpu(tpu, console)
        return Accelerator(strategies[tpu], "TPU", 100)
    gpus = tf.config.list_physical_devices("GPU")
    if workers > 1:
        return _many_machines(cluster, workers, "GPU" if gpus else "CPU", console)
    if gpus:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        names = [f"GPU:{i}" for i in range(len(gpus))]
        strategy = (
            tf.distribute.MirroredStrategy(names) if len(names) > 1 else tf.distribute.OneDeviceStrategy(names[0])
        )
        return Accelerator(strategy, "GPU", 50)
    return Accelerator(tf.distribute.OneDeviceStrategy("CPU:0"), "CPU", 10)


def _many_machines(cluster: dict[str, Any], workers: int, kind: str, console: Console) -> Accelerator:
    """One strategy over the machines of TF_CONFIG, each of which runs this same command."""
    chief = environment.is_chief()
    if "many" not in strategies:
        task = cluster["task"]
        console.info(f"{task['type']} {task['index']} of {workers} machines; waiting for the others")
        os.environ["TF_CONFIG"] = json.dumps(cluster)
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
        how = tf.distribute.experimental.CommunicationImplementation
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=how.NCCL if kind == "GPU" else how.RING
        )
        try:
            strategies["many"] = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            raise ConfigError(
                f"the {workers} machines of TF_CONFIG did not come together: {files.reason(error)}; see that each is up, "
                "runs the same command and can reach the others' ports"
            ) from error
    return Accelerator(strategies["many"], kind, 50 if kind == "GPU" else 10, workers, chief)


def _tpu(tpu: str, console: Console) -> tf.distribute.Strategy:
    """Connects to a TPU and initialises it; tries again after errors that may pass."""
    address = environment.tpu_address(tpu)
    if address not in ("", "local") and "://" not in address:
        _wait_until_healthy(address, console)
    for pause in (*_PAUSES, None):
        try:
            return connect(address)
        except (ValueError, RuntimeError, OSError, IndexError, tf.errors.OpError) as error:
            if pause is None or not _is_transient(error):
                raise ConfigError(f"--tpu={tpu}: no TPU could be initialised: {_advice(error)}") from error
            console.warning(f"the TPU is not available yet ({files.reason(error)}); trying again in {pause:.0f} s")
            sleep(pause)
    raise AssertionError("unreachable")


def connect(address: str) -> tf.distribute.Strategy:
    """Initialises the TPU, which clears its memory: call it before variables are created."""
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
    if resolver.master() not in ("", "local"):
        for host in {host for hosts in resolver.cluster_spec().as_dict().values() for host in hosts}:
            name, _, port = host.rpartition(":")
            # TensorFlow would wait for minutes on a machine that does not answer.
            if not environment.reachable(name, int(port), 10.0):
                raise ConnectionError(f"nothing answers at {host}")
        tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _wait_until_healthy(name: str, console: Console) -> None:
    """Waits for a named TPU with cloud-tpu-client, where that is installed.

    Raises:
        ConfigError: it did not become healthy, or its state cannot be read.
    """
    if importlib.util.find_spec("cloud_tpu_client") is None:
        return  # TensorFlow's own client checks once; `_advice` explains its error
    import cloud_tpu_client

    console.info(f"waiting for TPU {name} to be healthy, {_HEALTHY_SECONDS // 60} minutes at most")
    try:
        cloud_tpu_client.Client(tpu=name).wait_for_healthy(timeout_s=_HEALTHY_SECONDS)
    except Exception as error:  # errors of googleapiclient, oauth2client, urllib or the client itself
        raise ConfigError(f"--tpu={name}: the TPU did not become healthy: {_advice(error)}") from error


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, urllib.error.URLError):
        return False  # no metadata server: this machine is not in Google's cloud
    text = str(error)
    if "already in use" in text or "is not yet ready" in text:
        return True
    return isinstance(
        error, (ConnectionError, tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError)
    )


def _advice(error: Exception) -> str:
    """What to do about an error, by its text (TensorFlow 2.19 and 2.21)."""
    text = str(error)
    if "No OpKernel was registered" in text:
        return (
            "this TensorFlow has no TPU support; install tensorflow-tpu and libtpu (extra `tpu`) instead of tensorflow"
        )
    if "No matching devices found" in text:
        return (
            "libtpu is not loaded; unset TPU_LOAD_LIBRARY, and see that the package libtpu is installed, that no other "
            "process holds /tmp/libtpu_lockfile, and that NEXT_PLUGGABLE_DEVICE_USE_C_API is not set to false"
        )
    if "Please provide a TPU Name" in text:
        return "no TPU is named in the environment; give --tpu=local on a TPU VM or Vertex AI, or the TPU's name"
    if "already in use" in text:
        return "another process uses the TPU; end it (it holds /tmp/libtpu_lockfile)"
    if "device found" in text:
        return (
            "libtpu works but this machine has no TPU; without --tpu the job runs on the CPU. On a TPU VM, start the "
            "container with --privileged --net=host"
        )
    if "Missing runtime dependency" in text:
        return (
            "a named TPU is looked up with Google's API client, which is not installed; "
            "pip install 'funmatch[tpu-client]', or give --tpu=grpc://HOST:8470"
        )
    if "is not yet ready" in text:
        return f"{files.reason(error)}; pip install 'funmatch[tpu-client]' to have the job wait for it"
    if isinstance(error, urllib.error.URLError):
        return (
            f"Google's metadata server does not answer ({error.reason}), so this machine is not in Google Cloud; "
            "give --tpu=local on a TPU VM, or --tpu=grpc://HOST:8470"
        )
    if isinstance(error, IndexError):
        return "the TPU system was not initialised: it has no devices; see what was logged before this line"
    return files.reason(error)


def worker_lost(error: tf.errors.OpError) -> Stopped:
    """The error to raise when another machine of the job is lost in the middle of a step."""
    return Stopped(
        f"another machine of this job does not answer any more ({type(error).__name__}): start all of them again with "
        "the same command; they resume from the newest checkpoint"
    )
