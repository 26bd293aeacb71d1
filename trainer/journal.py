"""What a run tells while it runs: metrics.jsonl, TensorBoard, and a line or a bar on the terminal."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from trainer import files, logs
from trainer.errors import DataError


class Journal:
    """Rows of metrics.jsonl and their copies in TensorBoard.

    The file is written whole by `write`, before each checkpoint commits: a resumed run cuts the rows after its checkpoint
    off and writes the same ones again, so there are no gaps and no repeats. TensorBoard's files are a convenience: where they
    cannot be written, that is said and the run goes on. For a bucket they are made on this machine and sent when the rows are
    written: TensorFlow's own writer sends them from the training thread, and waits for a silent bucket for minutes at its end.
    """

    def __init__(self, workdir: str, boards: str = "", *, writes: bool = True) -> None:
        """
        Args:
            workdir: of the run.
            boards: folder of TensorBoard's files; empty: one in the workdir.
            writes: whether this process writes at all; of several machines one does.
        """
        self.warnings: list[str] = []  # whoever says them takes them out
        self._path = files.join(workdir, "metrics.jsonl")
        self._boards = boards or files.join(workdir, "tensorboard")
        self._writes = writes
        self._writer: Any = None
        self._local: tempfile.TemporaryDirectory[str] | None = None  # where TensorBoard's files for a bucket are made
        self._broken = False
        self.rows: list[dict[str, Any]] = []

    def rewind(self, step: int) -> None:
        """Takes up the training and evaluation rows of an earlier process up to `step` updates; others are dropped."""
        self.rows = []
        if files.exists(self._path):
            for line in files.read(self._path, "the metrics").decode().splitlines():
                row = json.loads(line)
                if row["step"] <= step and row["kind"] != "final":
                    self.rows.append(row)

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row; numbers go to TensorBoard too, and to the log where that is JSON."""
        self.rows.append({"kind": kind, "step": step} | values)
        if not self._writes:
            return
        if logs.as_json():
            logs.write("INFO", f"{kind} at step {step}", kind=kind, step=step, metrics=values)

        def work() -> None:
            if self._writer is None:
                if files.is_remote(self._boards):
                    self._local = tempfile.TemporaryDirectory()
                self._writer = tf.summary.create_file_writer(self._local.name if self._local else self._boards)
            with self._writer.as_default(step=step):
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        tf.summary.scalar(f"{kind}/{name}", value)

        self._optional(work)

    def text(self) -> bytes:
        """The rows so far, as the file holds them."""
        return "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows).encode()

    def write(self, text: bytes) -> None:
        """Makes rows durable; in another thread too."""
        if not self._writes:
            return
        files.write(self._path, text, "the metrics")
        self._optional(self._publish)

    def flush(self) -> None:
        """Makes the rows so far durable."""
        self.write(self.text())

    def _publish(self) -> None:
        """Makes TensorBoard's files durable."""
        if self._writer is not None:
            self._writer.flush()
        if self._local is not None:
            for name in os.listdir(self._local.name):
                content = files.read(os.path.join(self._local.name, name), "TensorBoard's file")
                files.write(files.join(self._boards, name), content, "TensorBoard's file")

    def _optional(self, work: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            work()
        except (tf.errors.OpError, DataError) as error:
            self._broken = True
            cause = error.__cause__ or error  # of what is sent, what the bucket said
            self.warnings.append(f"nothing more goes to {self._boards}: {files.reason(cause, self._boards)}")


class Screen:
    """Progress on a terminal as a bar, elsewhere as a line now and then (JSON in a cloud); everything goes to standard error."""

    def __init__(self, quiet_seconds: float = 20.0) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = sys.stderr.isatty() and not logs.as_json()
        self._quiet = quiet_seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def say(self, text: str) -> None:
        """A line of its own."""
        if logs.as_json():
            logs.tell(text)
        else:
            self._console.print(text, markup=False)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """How far `what` is: `done` of `total`. Off a terminal, at most a line each `quiet_seconds` and one at the end."""
        if not self._live:
            now = time.monotonic()
            if now - self._last >= self._quiet or done >= total:
                self._last = now
                self.say(f"{what} {done}/{total} {note}".rstrip())
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
