"""Progress and messages of a run on the terminal: a bar, or a line now and then."""

from __future__ import annotations

import sys
import time

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from trainer.core import logs


class Console:
    """Progress on a terminal as a bar, elsewhere as a line now and then (JSON in a cloud); everything goes to standard error."""

    def __init__(self, quiet_seconds: float = 20.0) -> None:
        self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = sys.stderr.isatty() and not logs.as_json()
        self._quiet = quiet_seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def info(self, text: str) -> None:
        """Prints a line, or several."""
        if logs.as_json():
            for line in filter(str.strip, text.splitlines()):
                logs.write("INFO", line)
        else:
            self._console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Prints a line that begins with `warning: `, or an entry of that severity where lines are JSON."""
        if logs.as_json():
            logs.write("WARNING", text)
        else:
            self._console.print(f"warning: {text}", markup=False)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """How far `what` is: `done` of `total`. Off a terminal, at most a line each `quiet_seconds` and one at the end."""
        if not self._live:
            now = time.monotonic()
            if now - self._last >= self._quiet or done >= total:
                self._last = now
                self.info(f"{what} {done}/{total} {note}".rstrip())
            return
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, note=note)
        assert self._task is not None
        self._bar.update(self._task, description=what, completed=done, total=total, note=note)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


class SilentConsole(Console):
    """Shows nothing: for callers that run a job as a library."""

    def info(self, text: str) -> None:
        """Drops the line."""

    def warning(self, text: str) -> None:
        """Drops the line."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Shows no progress."""
