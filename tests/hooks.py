"""What tests do to a job in a process of its own (tests/zygote.py): kill it at a chosen moment, spoil a number, lock a folder.

Nothing of this is in the product: the functions here replace attributes of its modules in the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import json
import os
import resource
import signal
import time
from typing import Any

from trainer import cli
from trainer.io import files


def job(argv: list[str], hooks: list[dict[str, Any]]) -> int:
    """`funmatch ARGV` with these hooks: each names a function of this module and holds its arguments."""
    for hook in hooks:
        globals()[hook["hook"]](**{name: value for name, value in hook.items() if name != "hook"})
    return cli.main(argv)


def environment(**values: str) -> None:
    """Sets variables of this process; TensorFlow's and Google's clients of gs:// look at them when they first ask for something."""
    os.environ.update(values)


def shoot(number: str, times: int = 1) -> None:
    """Sends this process a real signal. Of SIGKILL nothing returns; a handler of Python's runs before the next line does."""
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, number))


def call(where: str, then: dict[str, Any], count: int = 0, after: bool = True) -> None:
    """Does `then` around the `count`-th call of `module:Class.function` or `module:function`."""
    module, _, rest = where.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = rest.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), iter(range(10**9))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == count
        if due and not after:
            act(then)
        result = real(*args, **kwargs)
        if due and after:
            act(then)
        return result

    setattr(owner, name, wrapped)


def act(then: dict[str, Any]) -> None:
    """What a hook does when its moment has come.

    Args:
        then: some of: `once` (a pattern of paths: first wait until there is one), `signal` (a name; `times`: that often), `touch`
            (a file to make), `fill` (a file to grow until the disk is full), `clock` (seconds that the wall clock jumps by),
            `largest_file` (bytes that the kernel lets a file of this process have from now on), `sleep` (seconds), `chmod`
            (modes by path).
    """
    deadline = time.monotonic() + 60
    while "once" in then and not glob.glob(then["once"]):
        assert time.monotonic() < deadline, f"no {then['once']} came"
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
    """Counts every step of every change on the disk, and sends SIGKILL right after the chosen one.

    A file comes about in steps: it is made, half written, written, flushed, renamed, and its folder flushed.

    Args:
        kill_at: which, counted from 0; None: none.
        record: file that gets a line of JSON, [step, path], for each.
    """
    counted = iter(range(10**9))

    def event(kind: str, path: str) -> None:
        if record:
            with open(record, "a") as file:
                file.write(json.dumps([kind, path]) + "\n")
        if next(counted) == kill_at:
            shoot("SIGKILL")

    paths: dict[int, str] = {}

    class Written:
        """A file that is written in two halves."""

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

        def __enter__(self) -> Written:
            return self

        def __exit__(self, *_: object) -> None:
            paths.pop(self._file.fileno(), None)
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    class Os:
        """The module `os` with steps that are counted."""

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

    files.open, files.os, files.remove = Written, Os(), remove  # type: ignore[attr-defined, assignment]


def powerless() -> None:
    """Takes from this process root's power over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), as ordinary users are."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # two of effective, permitted, inheritable
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for word in (0, 1, 2):
        sets[word] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
