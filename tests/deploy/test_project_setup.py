"""deploy/setup.sh."""

from __future__ import annotations

import pathlib

import pytest

from deploy import setup

pytest_plugins = ["deploy_fixtures"]


SETUP = [
    "--user=me@example.com",
    "--settings=/dev/null",
    "--set=project=my-project",
    "--set=region=r-r1",
    "--set=bucket=my-bucket",
]


def test_setup_creates_what_is_missing_and_stops_at_a_failure(
    fakes: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.main(SETUP) == 0
    calls = fakes.read_text().splitlines()
    assert "service_account = funmatch-job@my-project.iam.gserviceaccount.com" in capsys.readouterr().err
    # An account is created before its roles are granted. On the project, the job's account may
    # only write logs.
    (first,) = [n for n, call in enumerate(calls) if "service-accounts create funmatch-job" in call]
    granted = [n for n, call in enumerate(calls) if "--member=serviceAccount:funmatch-job@" in call]
    assert min(granted) > first
    roles = {(calls[n].split()[1], calls[n].partition("--role=")[2].split()[0]) for n in granted}
    assert roles == {
        ("storage", "roles/storage.objectUser"),
        ("storage", "roles/storage.legacyBucketReader"),
        ("projects", "roles/logging.logWriter"),
    }
    assert not any(role in call for call in calls for role in ("roles/owner", "roles/editor"))

    monkeypatch.setenv("FAIL", "storage buckets create gs://my-bucket*")
    monkeypatch.setenv("STDERR", "HTTPError 409: you already own it")
    fakes.unlink()
    assert setup.main(SETUP) == 0
    assert fakes.read_text().splitlines() == calls
    monkeypatch.setenv("STDERR", "HTTPError 409: The requested bucket name is not available, it already exists")
    fakes.unlink()
    assert setup.main(SETUP) == 1
    assert "not available" in capsys.readouterr().err
    assert len(fakes.read_text().splitlines()) == 2

    # A new account may not be known yet, so that is retried.
    monkeypatch.setattr(setup, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("FAIL", "projects *")
    monkeypatch.setenv("STDERR", "Service account funmatch-job@my-project.iam.gserviceaccount.com does not exist.")
    fakes.unlink()
    assert setup.main(SETUP) == 1
    assert sum(" projects " in call for call in fakes.read_text().splitlines()) == 3


def test_mistakes_in_setup(capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in [
        (["--user=me"], "must be an e-mail address"),
        (["--set=service_account=x@other.iam.gserviceaccount.com"], "is not in the project my-project"),
        (["--set=bucket="], "not set: bucket"),
    ]:
        assert setup.main([*SETUP, "--dry-run", *more]) == 2
        assert message in capsys.readouterr().err
