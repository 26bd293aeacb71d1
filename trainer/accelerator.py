"""The only file that knows hardware: from a flag to a tf.distribute strategy, and what to run how on it."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from trainer import files
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What the job runs on.

    Attributes:
        strategy: makes variables and runs steps.
        kind: "TPU", "GPU" or "CPU".
        steps_per_loop: a good number of steps between looks of the host.
    """

    strategy: tf.distribute.Strategy
    kind: str
    steps_per_loop: int

    @property
    def description(self) -> str:
        """Kind and number of replicas, for people."""
        count = self.strategy.num_replicas_in_sync
        return f"{self.kind}, {count} replica{'s' if count > 1 else ''}"

    def jit_compile(self, flag: str) -> bool:
        """Whether to ask XLA for compilation. A TPU does it by itself; small models on a CPU run faster without."""
        return flag == "on" or (flag == "auto" and self.kind == "GPU")

    @property
    def int8_convolutions(self) -> bool:
        """Whether XLA has fast convolutions of int8 numbers here. On a CPU it computes them a number at a time."""
        return self.kind != "CPU"

    def check_batch(self, batch_size: int) -> None:
        """
        Raises:
            ConfigError: the global batch does not divide evenly.
        """
        count = self.strategy.num_replicas_in_sync
        if batch_size % count:
            raise ConfigError(
                f"--batch_size={batch_size} is not a multiple of the {count} replicas of this {self.kind}"
            )


def resolve(tpu: str) -> Accelerator:
    """Finds and initialises the accelerator.

    Args:
        tpu: "none", or what TPUClusterResolver takes ("local", a name, "grpc://...", "" for the environment's).

    Raises:
        ConfigError: a TPU was asked for and cannot be had.
    """
    if tpu != "none":
        return Accelerator(_tpu(tpu), "TPU", 100)
    if gpus := tf.config.list_physical_devices("GPU"):
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        names = [f"GPU:{i}" for i in range(len(gpus))]
        strategy = (
            tf.distribute.MirroredStrategy(names) if len(names) > 1 else tf.distribute.OneDeviceStrategy(names[0])
        )
        return Accelerator(strategy, "GPU", 50)
    return Accelerator(tf.distribute.OneDeviceStrategy("CPU:0"), "CPU", 10)


def _tpu(tpu: str) -> tf.distribute.Strategy:
    """Connects and initialises once, before any variable is made: initialising wipes the TPU's memory."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if resolver.master() not in ("", "local"):
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise ConfigError(f"--tpu={tpu!r}: no TPU could be initialised: {_advice(error)}") from error


def _advice(error: Exception) -> str:
    text = str(error)
    if "No OpKernel was registered" in text:
        return (
            "this TensorFlow has no TPU support; install tensorflow-tpu and libtpu (extra `tpu`) instead of tensorflow"
        )
    if "No matching devices found" in text:
        return "libtpu is not loaded; check TPU_LOAD_LIBRARY and the PJRT variables of the image"
    if "Please provide a TPU Name" in text:
        return "no TPU is named in the environment; give --tpu=local on a TPU VM, or the TPU's name"
    if "device found" in text:
        return "libtpu works but this machine has no TPU"
    return files.reason(error)
