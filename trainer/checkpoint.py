"""Checkpoints: immutable objects first, one small commit object last, on a disk and on gs:// alike.

A checkpoint is `state-STEP-HASH.npz` (arrays only, read without pickle) and `checkpoint-STEP.json`, which names it with its
SHA-256. Without the second the first does not exist for anyone. Nothing is ever renamed over or changed in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from typing import Any

import numpy as np

from trainer import files
from trainer.errors import DataError, Diverged

FORMAT = "funmatch-checkpoint/1"
_COMMIT = re.compile(r"checkpoint-(\d{10})\.json")
_STATE = re.compile(r"state-(\d{10})-[0-9a-f]{16}\.npz")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read whole: the step, its arrays by name, and `extra` as it was given to `save`."""

    step: int
    arrays: dict[str, np.ndarray]
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: str, identity: dict[str, Any], keep: int) -> None:
        """
        Args:
            folder: on a disk or gs://.
            identity: JSON value; what decides which weights come out. A checkpoint with another is refused.
            keep: newest checkpoints that are kept, >= 1.
        """
        self._folder, self._identity, self._keep = folder, identity, keep
        self.passed_over: list[str] = []  # why newer checkpoints were not used, a line each

    def save(self, step: int, arrays: dict[str, np.ndarray], extra: dict[str, Any]) -> None:
        """Commits a checkpoint, then deletes what is older than the newest `keep` and what crashes left behind.

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
        files.write(
            files.join(self._folder, f"checkpoint-{step:010d}.json"),
            text.encode(),
            "a checkpoint's commit",
        )
        self._sweep()

    def require_ours(self) -> None:
        """Looks at the newest readable commit alone: before hours of work in a folder that belongs to another run.

        Raises:
            DataError: it does; the differing fields are listed.
        """
        for name in sorted((n for n in files.names(self._folder) if _COMMIT.fullmatch(n)), reverse=True):
            path = files.join(self._folder, name)
            try:
                self._check_identity(path, json.loads(files.read(path, "a checkpoint's commit"))["identity"])
                return
            except _ForeignRun as error:
                raise DataError(str(error)) from None
            except (DataError, ValueError, KeyError, TypeError):
                continue  # `restore` says what is wrong with it

    def restore(self) -> Restored | None:
        """The newest whole checkpoint; None where there is none. Damaged ones are named in `passed_over`.

        Raises:
            DataError: the newest readable commit belongs to another run (the differing fields are listed), or there are
                commits and none is whole.
        """
        commits = sorted((n for n in files.names(self._folder) if _COMMIT.fullmatch(n)), reverse=True)
        for name in commits:
            path = files.join(self._folder, name)
            try:
                commit = json.loads(files.read(path, "a checkpoint's commit"))
                if commit["format"] != FORMAT:
                    raise DataError(f"{path} has format {commit['format']!r}; this version reads {FORMAT!r}")
                self._check_identity(path, commit["identity"])
                return Restored(commit["step"], self._arrays(commit), commit["extra"])
            except _ForeignRun as error:
                raise DataError(str(error)) from None
            except (DataError, ValueError, KeyError, TypeError) as error:
                self.passed_over.append(f"checkpoint {path} is not usable and was passed over: {files.reason(error)}")
        if commits:
            raise DataError(
                f"none of the {len(commits)} checkpoints in {self._folder} is whole ({self.passed_over[0]}); "
                "start in another --workdir, or delete that folder to begin anew"
            )
        return None

    def _arrays(self, commit: dict[str, Any]) -> dict[str, np.ndarray]:
        path = files.join(self._folder, commit["state"])
        content = files.read(path, "a checkpoint")
        if len(content) != commit["bytes"] or hashlib.sha256(content).hexdigest() != commit["sha256"]:
            raise DataError(f"{path} does not have the content that was committed (SHA-256 differs)")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def _check_identity(self, path: str, theirs: dict[str, Any]) -> None:
        ours = self._identity
        differing = [
            f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
            for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key)
        ]
        if differing:
            raise _ForeignRun(
                f"{path} belongs to another run ({'; '.join(differing)}): give the flags of that run, or another --workdir"
            )

    def _sweep(self) -> None:
        """Keeps the newest commits and their states; everything else of ours in the folder goes."""
        present = files.names(self._folder)
        commits = sorted(name for name in present if _COMMIT.fullmatch(name))
        kept = commits[-self._keep :]
        steps = {match.group(1) for name in kept if (match := _COMMIT.fullmatch(name))}
        # Commits go before states: a commit never names what is gone.
        gone = [name for name in commits if name not in kept]
        gone += [name for name in present if (m := _STATE.fullmatch(name)) and m.group(1) not in steps]
        gone += [name for name in present if name.endswith(".tmp")]
        for name in gone:
            files.remove(files.join(self._folder, name))


class _ForeignRun(Exception):
    """The checkpoint is whole and belongs to another configuration."""
