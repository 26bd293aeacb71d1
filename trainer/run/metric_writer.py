"""Metrics of a run: rows of metrics.jsonl, and their copies in TensorBoard."""

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

    `write` writes the whole file before each checkpoint commits. A resumed run drops the rows after
    its checkpoint and writes them again, so there are no gaps and no repeats.

    TensorBoard's files are a convenience: where they cannot be written, a warning says so and the
    run continues. For a bucket they are made on this machine and uploaded when the rows are
    written: TensorFlow's own writer uploads from the training thread, and at its end waits minutes
    for a bucket that does not answer.

    Attributes:
        rows: all rows so far, with `kind` ("train", "eval", "final"), `step` and the metrics.
        warnings: lines to print; whoever prints them removes them.
    """

    def __init__(self, workdir: str, tensorboard_dir: str = "", *, writes: bool = True) -> None:
        """
        Args:
            workdir: of the run.
            tensorboard_dir: folder of TensorBoard's files; empty: one in the workdir.
            writes: whether this process writes at all; of several machines one does.
        """
        self.warnings: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._path = files.join(workdir, "metrics.jsonl")
        self._tensorboard_dir = tensorboard_dir or files.join(workdir, "tensorboard")
        self._writes = writes
        self._summary_writer: tf.summary.SummaryWriter | None = None
        self._local: tempfile.TemporaryDirectory[str] | None = None  # TensorBoard's files for a bucket
        self._broken = False

    def rewind(self, step: int) -> None:
        """Reads the training and evaluation rows of an earlier process up to `step`."""
        self.rows = []
        if files.exists(self._path):
            for line in files.read(self._path, "the metrics").decode().splitlines():
                row = json.loads(line)
                if row["step"] <= step and row["kind"] != "final":
                    self.rows.append(row)

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds a row; numbers go to TensorBoard too, and to the log where that is JSON.

        Args:
            kind: "train", "eval" or "final".
            step: updates made.
            values: metrics by name.
        """
        self.rows.append({"kind": kind, "step": step} | values)
        if not self._writes:
            return
        if logs.as_json():
            logs.write("INFO", f"{kind} at step {step}", kind=kind, step=step, metrics=values)

        def write_scalars() -> None:
            if self._summary_writer is None:
                if files.is_remote(self._tensorboard_dir):
                    self._local = tempfile.TemporaryDirectory()
                folder = self._local.name if self._local else self._tensorboard_dir
                self._summary_writer = tf.summary.create_file_writer(folder)
            with self._summary_writer.as_default(step=step):
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        tf.summary.scalar(f"{kind}/{name}", value)

        self._try_tensorboard(write_scalars)

    def text(self) -> bytes:
        """The rows so far, as the file holds them."""
        return "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows).encode()

    def write(self, text: bytes) -> None:
        """Makes rows durable; may be called from another thread."""
        if not self._writes:
            return
        files.write(self._path, text, "the metrics")
        self._try_tensorboard(self._upload)

    def flush(self) -> None:
        """Makes the rows so far durable."""
        self.write(self.text())

    def _upload(self) -> None:
        """Makes TensorBoard's files durable."""
        if self._summary_writer is not None:
            self._summary_writer.flush()
        if self._local is not None:
            for name in os.listdir(self._local.name):
                content = files.read(os.path.join(self._local.name, name), "TensorBoard's file")
                files.write(files.join(self._tensorboard_dir, name), content, "TensorBoard's file")

    def _try_tensorboard(self, work: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            work()
        except (tf.errors.OpError, DataError) as error:
            self._broken = True
            cause = error.__cause__ or error  # of an upload: the bucket's answer
            self.warnings.append(
                f"nothing more is written to {self._tensorboard_dir}: {files.reason(cause, self._tensorboard_dir)}"
            )
