"""A server that imports TensorFlow once and forks a child process for each call.

Importing TensorFlow takes seconds, and the kill matrix starts hundreds of jobs. The server runs no
operation of TensorFlow, so it has none of its threads, and a child behaves as a process that a
shell started: it has its own process id and dies of real signals. As a script this file is the
server; tests use the class `Zygote`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Child:
    """A call that runs in a process of its own."""

    pid: int
    status: concurrent.futures.Future[int]

    def send(self, number: int) -> None:
        """Sends a signal, if the process still runs."""
        if not self.status.done():
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code, or minus the signal that ended it.

        Raises:
            TimeoutError: it did not end in time, and was killed.
        """
        try:
            return self.status.result(timeout)
        except concurrent.futures.TimeoutError:
            self.send(signal.SIGKILL)
            raise


class Zygote:
    """A client of the server, which lives as long as the `with` block."""

    def __init__(self, *preload: str, root: pathlib.Path = ROOT, unset: Iterable[str] = ()) -> None:
        """
        Args:
            preload: modules that the server imports.
            root: the project; it and its `tests` are on the server's path.
            unset: environment variables that the server does not inherit.
        """
        command = [sys.executable, str(root / "tests" / "zygote.py"), *preload]
        inherited = {name: value for name, value in os.environ.items() if name not in set(unset)}
        environment = inherited | {"TF_CPP_MIN_LOG_LEVEL": "3", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self._server = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._started: dict[int, concurrent.futures.Future[int]] = {}
        self._ended: dict[int, concurrent.futures.Future[int]] = {}
        self._guard, self._number = threading.Lock(), 0
        self.threads = json.loads(self._read())["threads"]
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def start(self, module: str, function: str, output: pathlib.Path | str, **arguments: Any) -> Child:
        """Runs a function in a child process.

        Args:
            module: that holds the function.
            function: its name; it returns an exit code.
            output: file to which the child's stdout and stderr are appended.
            arguments: of the function; JSON values.
        """
        with self._guard:
            self._number += 1
            number, pid, status = self._number, concurrent.futures.Future(), concurrent.futures.Future()
            self._started[number], self._ended[number] = pid, status
            request = {"number": number, "call": [module, function, arguments], "output": str(output)}
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
        return Child(pid.result(60), status)

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def _listen(self) -> None:
        while line := self._read():
            event = json.loads(line)
            futures = self._started if "pid" in event else self._ended
            futures.pop(event["number"]).set_result(event.get("pid", event.get("status")))

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()  # the server ends with its input
        self._server.wait(60)
        self._reader.join()


def main() -> int:
    """The server: reads a line of JSON for each child, and writes one when the child starts and one
    when it has ended.
    """
    for name in sys.argv[1:]:
        importlib.import_module(name)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a module prints must not mix with the answers
    os.set_inheritable(answers, False)

    def answer(**event: Any) -> None:
        os.write(answers, (json.dumps(event) + "\n").encode())

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    children: dict[int, int] = {}
    answer(threads=len(os.listdir("/proc/self/task")))
    pending = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                answer(number=children.pop(pid), status=os.waitstatus_to_exitcode(status))
        if 0 not in ready:
            continue
        received = os.read(0, 65536)
        if not received:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return 0
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for handle in (woken, wake, answers):
                    os.close(handle)
                return child(request)
            children[pid] = request["number"]
            answer(number=request["number"], pid=pid)


def child(request: dict[str, Any]) -> int:
    """Makes the call in the forked process; returns its exit code."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for handle, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(handle, standard)
    module, function, arguments = request["call"]
    return getattr(importlib.import_module(module), function)(**arguments)


def side_by_side(calls: list[Callable[[], Any]], workers: int = os.cpu_count() or 1) -> list[Any]:
    """Results of functions that mostly wait for children; `workers` run at a time, in threads."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until `condition` returns true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds:.0f} s"
        time.sleep(0.02)


if __name__ == "__main__":
    sys.path[:0] = [os.getcwd(), str(pathlib.Path(__file__).resolve().parent)]
    sys.exit(main())
