"""Checkpoints: immutable objects first, one small commit object last, on a disk and on gs:// alike.

A checkpoint is `state-STEP-HASH.npz` (arrays only, read without pickle) and `checkpoint-STEP.json`,
which names it with its SHA-256. Without the second, the first is ignored and later deleted. Nothing
is renamed over or changed in place.

`Background` does the slow part of a save in a thread, while the device trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.errors import DataError, Diverged
from trainer.io import files

FORMAT = "funmatch-checkpoint/1"
_COMMIT = re.compile(r"checkpoint-(\d{10})\.json")
_STATE = re.compile(r"state-(\d{10})-[0-9a-f]{16}\.npz")
# Errors that leave a file's content unknown: bucket or disk did not answer or denied access.
_UNKNOWN = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError,
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A complete checkpoint: the step, its arrays by name, and the `extra` passed to `save`."""

    step: int
    arrays: dict[str, np.ndarray]
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(
        self,
        folder: str,
        identity: dict[str, Any],
        keep: int,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            folder: on a disk or gs://.
            identity: JSON value of all that decides the weights. A checkpoint with another is
                refused.
            keep: number of newest checkpoints that are kept, >= 1.
            before_commit: raises where this process must not commit any more.
        """
        self._folder, self._identity, self._keep, self._before_commit = folder, identity, keep, before_commit
        self.passed_over: list[str] = []  # why newer checkpoints were not used, a line each
        self.warnings: list[str] = []  # problems that do not stop the run; the loop prints and removes them

    def save(self, step: int, arrays: dict[str, np.ndarray], extra: dict[str, Any], best: int | None = None) -> None:
        """Commits a checkpoint, then deletes old ones and leftovers of crashes.

        Args:
            step: updates made. Checkpoints of later steps, which were passed over, are deleted.
            arrays: by name.
            extra: JSON value that `restore` returns.
            best: step of a checkpoint that is kept beside the newest; None: there is none.

        Raises:
            Diverged: an array holds a value that is not finite; nothing is written.
            DataError: it cannot be written.
        """
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise Diverged(
                    f"step {step}: {name} holds values that are not finite; no checkpoint of it is written. "
                    "Try a lower --learning_rate or a longer --warmup_steps"
                )
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        name = f"state-{step:010d}-{digest[:16]}.npz"
        files.write(files.join(self._folder, name), content, "a checkpoint")
        commit = {
            "format": FORMAT,
            "step": step,
            "state": name,
            "bytes": len(content),
            "sha256": digest,
            "identity": self._identity,
            "extra": extra,
        }
        text = json.dumps(commit, indent=1, sort_keys=True) + "\n"
        self._before_commit()
        files.write(
            files.join(self._folder, _name(step)),
            text.encode(),
            "a checkpoint's commit",
        )
        self._sweep({step} if best is None else {step, best}, step)

    def require_same_run(self) -> None:
        """Checks the newest readable commit only, before hours of work in a folder of another run.

        Raises:
            DataError: it belongs to another run (the differing fields are listed), or cannot be
                read now.
        """
        for step in sorted(self._commits(files.names(self._folder)), reverse=True):
            try:
                self._commit(step)
                return
            except (_ForeignRun, _NoAnswer) as error:
                raise DataError(str(error)) from None
            except (DataError, ValueError, KeyError, TypeError):
                continue  # `restore` reports it

    @classmethod
    def saved_identity(cls, folder: str) -> dict[str, Any]:
        """The identity of the run whose checkpoints are in a folder; empty: there is no readable
        commit.

        Raises:
            DataError: the folder or a commit cannot be read now.
        """
        reader = cls(folder, {}, 1)
        commits = cls._commits(files.names(folder))
        for step in sorted(commits, reverse=True):
            try:
                identity = json.loads(reader._read(files.join(folder, commits[step]), "a checkpoint's commit"))[
                    "identity"
                ]
                if isinstance(identity, dict):
                    return identity
            except _NoAnswer as error:
                raise DataError(str(error)) from None
            except (DataError, ValueError, KeyError, TypeError):
                continue  # `restore` reports it
        return {}

    def restore(self) -> Restored | None:
        """The newest complete checkpoint, or None; `passed_over` lists the damaged ones.

        Raises:
            DataError: the newest readable commit belongs to another run (the differing fields are
                listed) or to another version, the folder cannot be read now, or there are commits
                and none is complete.
        """
        commits = self._commits(files.names(self._folder))
        for step in sorted(commits, reverse=True):
            try:
                commit = self._commit(step)
                return Restored(commit["step"], self._arrays(commit), commit["extra"])
            except (_ForeignRun, _NoAnswer) as error:
                raise DataError(str(error)) from None
            except (DataError, ValueError, KeyError, TypeError) as error:
                path = files.join(self._folder, commits[step])
                self.passed_over.append(f"checkpoint {path} is not usable and was passed over: {files.reason(error)}")
        if commits:
            raise DataError(
                f"none of the {len(commits)} checkpoints in {self._folder} is whole ({self.passed_over[0]}); "
                "start in another --workdir, or delete that folder to start again"
            )
        return None

    def load(self, step: int) -> Restored:
        """The checkpoint of a step.

        Raises:
            DataError: it is missing, damaged or of another run.
        """
        try:
            commit = self._commit(step)
            return Restored(commit["step"], self._arrays(commit), commit["extra"])
        except (DataError, _ForeignRun, _NoAnswer, ValueError, KeyError, TypeError) as error:
            path = files.join(self._folder, _name(step))
            raise DataError(f"checkpoint {path} is not usable: {files.reason(error)}") from error

    def clean(self, step: int, best: int | None) -> None:
        """Deletes leftovers of a crash; called by the chief after `restore`.

        Args:
            step: of the restored checkpoint.
            best: step of the checkpoint that `save` keeps as the best; None: there is none.
        """
        self._sweep({step} if best is None else {step, best}, None)

    @staticmethod
    def _commits(present: list[str]) -> dict[int, str]:
        """Names of commits by step."""
        matches = ((name, _COMMIT.fullmatch(name)) for name in present)
        return {int(match.group(1)): name for name, match in matches if match}

    def _commit(self, step: int) -> dict[str, Any]:
        path = files.join(self._folder, _name(step))
        commit = json.loads(self._read(path, "a checkpoint's commit"))
        if commit["format"] != FORMAT:
            raise _ForeignRun(
                f"{path} has format {commit['format']!r}, and this version of funmatch reads {FORMAT!r}: resume with the "
                "version that began the run, or give another --workdir"
            )
        self._check_identity(path, commit["identity"])
        return commit

    def _read(self, path: str, what: str) -> bytes:
        try:
            return files.read(path, what)
        except DataError as error:
            if isinstance(error.__cause__, _UNKNOWN):
                raise _NoAnswer(str(error)) from error
            raise

    def _arrays(self, commit: dict[str, Any]) -> dict[str, np.ndarray]:
        path = files.join(self._folder, commit["state"])
        content = self._read(path, "a checkpoint")
        if len(content) != commit["bytes"] or hashlib.sha256(content).hexdigest() != commit["sha256"]:
            raise DataError(f"{path} does not have the content that was committed (SHA-256 differs)")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def _check_identity(self, path: str, saved: dict[str, Any]) -> None:
        # An option added after the checkpoint was made is left out of the identity at its default
        # (`options.option(omit_default=True)`), so it differs only if it was given.
        differing = [
            f"{key}: {saved.get(key)!r} there, {self._identity.get(key)!r} here"
            for key in sorted({*saved, *self._identity})
            if saved.get(key) != self._identity.get(key)
        ]
        if differing:
            raise _ForeignRun(
                f"{path} belongs to another run ({'; '.join(differing)}): give the flags of that run, or another "
                "--workdir"
            )

    def _sweep(self, protected: set[int], newest: int | None) -> None:
        """Deletes all checkpoint files but those of the newest commits and of `protected`.

        Args:
            protected: steps whose commits are kept.
            newest: commits of later steps are deleted too: they are damaged, else the run would
                have resumed from them. None: no step counts as later.
        """
        try:
            present = files.names(self._folder)
            commits = self._commits(present)
            steps = sorted(step for step in commits if newest is None or step <= newest)
            kept = {commits[step] for step in steps[-self._keep :]} | {commits[s] for s in protected if s in commits}
            states = {match.group(1) for name in kept if (match := _COMMIT.fullmatch(name))}
            # Commits are deleted before states, so that no commit names a deleted state.
            obsolete = [name for name in commits.values() if name not in kept]
            obsolete += [name for name in present if (m := _STATE.fullmatch(name)) and m.group(1) not in states]
            obsolete += [name for name in present if files.is_temporary(name)]
            for name in obsolete:
                files.remove(files.join(self._folder, name))
        except DataError as error:  # the new checkpoint is complete, and the next sweep tries again
            self.warnings.append(f"old checkpoints take up room: {error}")


class Background:
    """Runs the slow part of a save in a thread, one at a time; re-raises its error in the caller.

    A context manager, which waits for the current save at the end of the block.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the previous work and raises its error, else runs `work` in a thread."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="save")
        self._thread.start()

    def check(self) -> None:
        """Raises what the last work raised, if it has ended; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the work, and raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # the error of the block is reported, not the thread's


def _name(step: int) -> str:
    return f"checkpoint-{step:010d}.json"


class _ForeignRun(Exception):
    """The checkpoint is whole and belongs to another configuration or version."""


class _NoAnswer(Exception):
    """Whether the checkpoint is whole cannot be known."""
