"""What a run tells while it runs: metrics.jsonl, TensorBoard, and a line or a bar on the terminal."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainer.core import logs
from trainer.core.errors import DataError
from trainer.io import files


class MetricWriter:
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
