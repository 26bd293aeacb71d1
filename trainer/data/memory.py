"""Memory and processors available to this process, and the choice of image stores that fit."""

from __future__ import annotations

import os

from trainer.data.dataset import Split

STORE_ORDER = ("device", "host", "disk")  # the fastest first
_IMAGE_SHARE = 0.7  # of free memory; the rest is for models, encoded images and prefetched batches


def choose_stores(
    kind: str, device_bytes: int, memory_bytes: int, train_bytes: int, eval_bytes: int
) -> tuple[str, str]:
    """Chooses where the training images and the evaluation images are kept.

    Args:
        kind: value of --store: "device", "host", "disk", or "auto" for the first of these with
            enough room.
        device_bytes: accelerator memory available for images.
        memory_bytes: free host memory.
        train_bytes: size of the decoded training images.
        eval_bytes: size of the decoded evaluation images.

    Returns:
        The kind of store for training images, and for evaluation images ("host" or "disk").
    """
    room = int(_IMAGE_SHARE * memory_bytes)
    if kind == "auto":
        # Images on the device are kept in host memory too.
        kind = "device" if train_bytes <= device_bytes and 2 * train_bytes + eval_bytes <= room else "host"
        if kind == "host" and train_bytes + eval_bytes > room:
            return "disk", "host" if eval_bytes <= room // 2 else "disk"
    return kind, "disk" if kind == "disk" else "host"


def decoded_bytes(split: Split, side: int) -> int:
    """Returns the bytes of a split's images, decoded and resized to `side` x `side` pixels."""
    return split.examples * side * side * 3


def cores() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Returns the bytes this process may still allocate on this machine and in its cgroup."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as limit_file, open(used) as used_file:
                free = min(free, int(limit_file.read()) - int(used_file.read()))
        except (OSError, ValueError):  # no such cgroup, or its limit is "max"
            continue
    return max(0, free)
