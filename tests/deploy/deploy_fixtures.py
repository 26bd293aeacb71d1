"""Fixtures: the real gcloud against a stub of Google's services, and stand-ins for programs."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
from aiplatform_stub import Stub

from deploy import submit


@pytest.fixture(scope="module")
def service() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def vertex(service: Stub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub, which gcloud calls with an empty configuration and a dummy token."""
    assert shutil.which("gcloud"), "gcloud is missing: install the Google Cloud CLI (Debian: google-cloud-cli)"
    (tmp_path / "token").write_text("no-token")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDSDK_AUTH_ACCESS_TOKEN_FILE", str(tmp_path / "token"))
    for name in ("AIPLATFORM", "ARTIFACTREGISTRY", "CLOUDBUILD", "CONTAINERANALYSIS", "ONDEMANDSCANNING", "TPU"):
        monkeypatch.setenv(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}", service.url)
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", f"{service.url}storage/v1/")
    # No other traffic: no usage report, no check for updates or for a Google machine.
    monkeypatch.setenv("CLOUDSDK_CORE_DISABLE_USAGE_REPORTING", "1")
    monkeypatch.setenv("CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setenv("CLOUDSDK_CORE_CHECK_GCE_METADATA", "false")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    service.reset()
    return service


@pytest.fixture
def no_gcloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if gcloud is called."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("gcloud was called")

    monkeypatch.setattr(submit.subprocess, "run", refuse)


FAKE = """#!/bin/sh
# Stands in for a program: appends its arguments to $CALLS, and fails with the message $STDERR if
# they match $FAIL.
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in $FAIL) echo "ERROR: $STDERR" >&2; exit 1 ;; esac
case "$*" in *RepoDigests*) echo "host/p/funmatch@sha256:$(printf '0%.0s' $(seq 64))" ;; esac
"""


@pytest.fixture
def fakes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Replaces docker and gcloud by programs that append their arguments to this file."""
    for name in ("docker", "gcloud"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("FAIL", "nothing")
    monkeypatch.setenv("STDERR", "failed")
    return tmp_path / "calls"
