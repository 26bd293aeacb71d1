"""The two errors of the commands in deploy/: a line on standard error, and an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a setting, a flag, a spec or this machine's setup. Exit code 2."""


class CloudError(Exception):
    """Google Cloud refused, or gcloud failed. Exit code 1."""
