"""Progress and messages of a run, on standard error."""

from __future__ import annotations

import sys
import time

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from trainer.core import logs


class Console:
    """Messages, and progress as a bar on a terminal or as occasional lines elsewhere.

    Lines are JSON if `logs.as_json()`.
    """

    def __init__(self, quiet_seconds: float = 20.0) -> None:
        """
        Args:
            quiet_seconds: least time between two lines of progress off a terminal.
        """
        self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._show_bar = sys.stderr.isatty() and not logs.as_json()
        self._quiet_seconds = quiet_seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def info(self, text: str) -> None:
        """Prints one or several lines."""
        if logs.as_json():
            for line in filter(str.strip, text.splitlines()):
                logs.write("INFO", line)
        else:
            self._console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Prints a line that begins with `warning: `, or a JSON entry of severity WARNING."""
        if logs.as_json():
            logs.write("WARNING", text)
        else:
            self._console.print(f"warning: {text}", markup=False)

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        """Shows the progress of one task.

        Off a terminal this prints a line at most every `quiet_seconds`, and one at the end.

        Args:
            task: what is being done, such as "train".
            done: units done, 0..total.
            total: units in all.
            note: shown after the numbers, such as a loss.
        """
        if not self._show_bar:
            now = time.monotonic()
            if now - self._last_line >= self._quiet_seconds or done >= total:
                self._last_line = now
                self.info(f"{task} {done}/{total} {note}".rstrip())
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
            self._task = self._bar.add_task(task, total=total, note=note)
        assert self._task is not None
        self._bar.update(self._task, description=task, completed=done, total=total, note=note)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Removes the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


class SilentConsole(Console):
    """Prints nothing; for callers that run a job as a library."""

    def info(self, text: str) -> None:
        """Prints nothing."""

    def warning(self, text: str) -> None:
        """Prints nothing."""

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        """See `Console.progress`."""
