"""Memory and processors that a process may use, and where that leaves room for images."""

from __future__ import annotations

import os

from trainer.data.dataset import Split

_SHARE_OF_MEMORY = 0.7  # that images may take; the rest is for models, encoded images and what is made ahead


def choose_stores(kind: str, device: int, memory: int, train: int, held_out: int) -> tuple[str, str]:
    """Where the training images and the evaluation images are kept.

    Args:
        kind: of --store: "device", "host", "disk", or "auto" for the first of these that has room.
        device: bytes that the accelerator has for images.
        memory: bytes that are free on the host.
        train, held_out: bytes of the decoded images.

    Returns:
        A kind for each; held-out images are on the "host" or the "disk".
    """
    room = int(_SHARE_OF_MEMORY * memory)
    if kind == "auto":
        # What goes to the device is held on the host too.
        kind = "device" if train <= device and 2 * train + held_out <= room else "host"
        if kind == "host" and train + held_out > room:
            return "disk", "host" if held_out <= room // 2 else "disk"
    return kind, "disk" if kind == "disk" else "host"


def decoded_bytes(split: Split, side: int) -> int:
    """Bytes of a split's squares."""
    return split.examples * side * side * 3


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container if that allows less."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as top, open(used) as now:
                free = min(free, int(top.read()) - int(now.read()))
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
    return max(0, free)
