"""Faults for a job in a forked process (tests/zygote.py): a signal at a chosen moment, a full disk,
a locked folder.

The functions here replace attributes of modules in the child process. The product knows none of
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import glob
import importlib
import itertools
import json
import os
import resource
import signal
import time
from typing import Any

from trainer import cli
from trainer.io import files


def job(argv: list[str], hooks: list[dict[str, Any]]) -> int:
    """Runs `funmatch ARGV` and returns its exit code.

    Args:
        argv: the verb and its flags.
        hooks: JSON values: "hook" names a function of this module, the rest are its arguments.
    """
    for hook in hooks:
        globals()[hook["hook"]](**{name: value for name, value in hook.items() if name != "hook"})
    return cli.main(argv)


def environment(**values: str) -> None:
    """Sets variables of this process; the clients of gs:// read them at their first request."""
    os.environ.update(values)


def shoot(number: str, times: int = 1) -> None:
    """Sends this process a real signal, `times` times. A handler of Python's runs before the next
    line does.
    """
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, number))


def call(where: str, then: dict[str, Any], count: int = 0, after: bool = True) -> None:
    """Acts around one call of a function.

    Args:
        where: "module:function" or "module:Class.function".
        then: see `act`.
        count: which call, from 0.
        after: right after the call; else right before it.
    """
    module, _, rest = where.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = rest.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == count
        if due and not after:
            act(then)
        result = real(*args, **kwargs)
        if due and after:
            act(then)
        return result

    setattr(owner, name, wrapped)


def renamed(path: str, then: dict[str, Any], after: bool = True) -> None:
    """Acts when a file gets its final name, as every file does that is written whole or not at all.

    Args:
        path: pattern of that name, as fnmatch takes it.
        then: see `act`.
        after: right after the rename; else right before it.
    """
    real = os.replace

    def replace(source: str, target: str) -> None:
        due = fnmatch.fnmatch(target, path)
        if due and not after:
            act(then)
        real(source, target)
        if due and after:
            act(then)

    os.replace = replace  # type: ignore[assignment]


def act(then: dict[str, Any]) -> None:
    """Does what a hook is for, in this order.

    Args:
        then: some of
            once: pattern of paths; waits until one exists,
            signal: name of a signal to send (`times`: how often),
            touch: file to create,
            fill: file to grow until the disk is full,
            clock: seconds by which the wall clock jumps,
            largest_file: bytes that a file of this process may have from now on (a limit of the
                kernel),
            sleep: seconds,
            chmod: modes by path.
    """
    deadline = time.monotonic() + 60
    while "once" in then and not glob.glob(then["once"]):
        assert time.monotonic() < deadline, f"{then['once']} did not appear"
        time.sleep(0.01)
    if "signal" in then:
        shoot(then["signal"], then.get("times", 1))
    if "touch" in then:
        with open(then["touch"], "w"):
            pass
    if "fill" in then:
        with contextlib.suppress(OSError), open(then["fill"], "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    if "clock" in then:
        real = time.time
        time.time = lambda: real() + then["clock"]
    if "largest_file" in then:
        resource.setrlimit(resource.RLIMIT_FSIZE, (then["largest_file"],) * 2)
    if "sleep" in then:
        time.sleep(then["sleep"])
    for path, mode in then.get("chmod", {}).items():
        os.chmod(path, mode)


def storage(kill_at: int | None = None, record: str = "") -> None:
    """Counts every step of every change on the disk, and sends SIGKILL right after one.

    A file is written in steps: it is made, half written, written, flushed, renamed, and its folder
    flushed.

    Args:
        kill_at: number of the step, from 0; None: none.
        record: file that gets a line of JSON, [step, path], for each step.
    """
    steps = itertools.count()

    def event(kind: str, path: str) -> None:
        if record:
            with open(record, "a") as file:
                file.write(json.dumps([kind, path]) + "\n")
        if next(steps) == kill_at:
            shoot("SIGKILL")

    paths: dict[int, str] = {}

    class HalfwayFile:
        """A file that writes its content in two halves."""

        def __init__(self, path: str, mode: str) -> None:
            self._path, self._file = path, open(path, mode)  # noqa: SIM115
            paths[self._file.fileno()] = path
            event("made", path)

        def write(self, content: bytes) -> None:
            half = len(content) // 2
            self._file.write(content[:half])
            self._file.flush()
            event("half", self._path)
            self._file.write(content[half:])
            self._file.flush()
            event("written", self._path)

        def __enter__(self) -> HalfwayFile:
            return self

        def __exit__(self, *_: object) -> None:
            paths.pop(self._file.fileno(), None)
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    class Os:
        """The module `os`, counting its steps."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def replace(self, source: str, target: str) -> None:
            os.replace(source, target)
            event("renamed", target)

        def fsync(self, handle: int) -> None:
            os.fsync(handle)
            event("flushed", paths.get(handle, "folder"))

    real = files.remove

    def remove(path: str) -> None:
        real(path)
        event("removed", path)

    files.open, files.os, files.remove = HalfwayFile, Os(), remove  # type: ignore[attr-defined, assignment]


def powerless() -> None:
    """Drops root's power over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), as an ordinary
    user's process has none.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # two of effective, permitted, inheritable
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for word in (0, 1, 2):
        sets[word] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
