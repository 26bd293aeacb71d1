"""Every command that docs/deploy.md shows exists."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
from typing import Any

import pytest
from deploy_jobs import ACCOUNT, EXPECTED_JOBS, ROOT, SETTINGS

from deploy import build, gke, make_schema, setup, specs, submit, tpu_vm


def gcloud_tree() -> dict[str, Any]:
    """Commands and flags of the installed gcloud, from its file for shell completion."""
    path = make_schema.gcloud_root() / "data/cli/gcloud_completions.py"
    scope: dict[str, Any] = {}
    exec(path.read_text(), scope)  # noqa: S102  gcloud's own file, a single literal
    return scope["STATIC_COMPLETION_CLI_TREE"]


def gcloud_commands() -> list[list[str]]:
    """Every gcloud command that docs/deploy.md shows and that our scripts run or print."""
    text = (ROOT / "docs/deploy.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^ {4}(gcloud .*)$", text, re.MULTILINE)]
    settings = specs.resolve(
        specs.load("vertex-gpu"), [("test", SETTINGS | {"service_account": ACCOUNT, "spot": "true"})]
    )
    settings["build_account"] = ACCOUNT
    for kind in ("custom-jobs", "hp-tuning-jobs"):
        commands.append(submit.create(kind, settings, "JOB.json"))
        commands.append(submit.active(kind, settings))
        commands += [line for _, line in submit.followers(kind, settings, "JOB") if line[0] == "gcloud"]
    commands += setup.commands(settings, "me@example.com")
    commands += [line for cloud in (True, False) for line in build.commands("tpu", settings, cloud=cloud)]
    commands += [
        tpu_vm.create(settings, "z", "f"),
        *(tpu_vm.follow(action, settings, "z") for action in tpu_vm.ACTIONS[1:]),
    ]
    return [line for line in commands if line[0] == "gcloud"]


def test_every_documented_gcloud_command_exists() -> None:
    tree, commands = gcloud_tree(), gcloud_commands()
    for line in commands:
        node, flags_known = tree, set(tree["flags"])
        for word in line[1:]:
            if word in node["commands"]:
                node = node["commands"][word]
                flags_known |= set(node["flags"])
            elif word.startswith("--"):
                assert word.partition("=")[0] in flags_known, f"{shlex.join(line)}: {word}"
            else:
                assert not node["commands"], f"{shlex.join(line)}: {word}"
    assert len(commands) > 25


def test_every_documented_script_command_works(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every deploy/... command of docs/deploy.md, with --dry-run and the example's settings."""
    shutil.copy(ROOT / "deploy/settings.example", tmp_path / "settings.ini")
    (tmp_path / "my-job.yaml").write_text(json.dumps(EXPECTED_JOBS["GPU"][1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "SETTINGS_FILE", tmp_path / "settings.ini")
    text = (ROOT / "docs/deploy.md").read_text()
    shown = re.findall(r"(?:^ {4}|`)(deploy/(?:submit|setup|build|tpu_vm|gke)\.sh [^`\n]*)", text, re.MULTILINE)
    count = 0
    for line in (shlex.split(command.partition("|")[0], comments=True) for command in shown):
        if "..." in line or line[1].startswith("--help") or "cpu|tpu|gpu" in text.partition(line[0])[0][-1:]:
            continue
        if line[1] == "cpu":  # cpu|tpu|gpu
            line = ["deploy/build.sh", "cpu"]
        name = line[0].removeprefix("deploy/").removesuffix(".sh")
        module = {"submit": submit, "setup": setup, "build": build, "tpu_vm": tpu_vm, "gke": gke}[name]
        cut = line.index("--") if "--" in line else len(line)
        dry_run = [] if module is gke else ["--dry-run"]
        assert module.main([*line[1:cut], *dry_run, *line[cut:]]) == 0, (line, capsys.readouterr().err)
        count += 1
    assert count >= 8
