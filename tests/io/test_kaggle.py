"""Teachers from Kaggle: the real client against a server that speaks its API; credentials, breaks,
hostile archives, offline.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import pathlib
import random
import socket
import time
import types
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, here
from fake_kaggle import SIGNATURE, Server
from samples import make_archive, native_layout, shaken

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError
from trainer.io import kaggle
from trainer.models import teachers

USER, KEY, TOKEN = "flora", "4d1eK3yThatNobodyMaySee", "KGAT_t0kenThatNobodyMaySee"
BASIC = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
NAME = "spsayakpaul/bitresnet101x3flowers102"


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With no credentials anywhere."""
    made = Server(tmp_path)
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name, value in (made.env | {"HOME": str(tmp_path / "home"), "FUNMATCH_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    yield made
    made.close()
    assert not [seen for seen in made.asked("storage.googleapis.com") if "Authorization" in seen.headers]


@pytest.fixture
def no_waiting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits up to a minute between tries."""
    del server
    client = importlib.import_module("kaggle.api.kaggle_api_extended")
    real = client.time
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=lambda _: None, mktime=real.mktime, time=real.time))


def npz() -> bytes:
    held = io.BytesIO()
    np.savez(held, **native_layout(shaken()))
    return held.getvalue()


def zipped(tmp_path: pathlib.Path, content: dict[str, bytes], kind: str = "zip") -> bytes:
    return make_archive(tmp_path / "made", content, kind).read_bytes()


def failure(text: str = NAME) -> str:
    """One line, without a secret."""
    with pytest.raises(DataError) as told:
        kaggle.fetch(text, "teacher")
    line = str(told.value)
    for secret in (KEY, TOKEN, SIGNATURE, BASIC):
        assert secret not in line
        assert secret not in repr(told.value.__context__)
    assert "\n" not in line
    assert told.value.__cause__ is None or KEY not in str(told.value.__cause__)
    return line


def kaggle_json(path: pathlib.Path, mode: int = 0o600) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"username": USER, "key": KEY}))
    path.chmod(mode)
    return path


def test_a_teacher_is_fetched_once_and_found_again_offline(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.archives[NAME] = zipped(tmp_path, {"weights/teacher.npz": npz(), "README.md": b"text"})
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    monkeypatch.setenv("VERBOSE", "1")  # the client then prints its headers
    server.key = BASIC
    config = Config(teacher=(f"kaggle:{NAME}",), image_size=IMAGE)
    views = tf.random.stateless_uniform([2, IMAGE, IMAGE, 3], [1, 2], -1, 1)
    (teacher,) = teachers.load(config, CLASSES)
    assert np.allclose(teacher.logits(views), np.asarray(shaken()(views)), atol=1e-4)
    first = teachers.checksum(config, config.teacher[0])
    assert len(server.asked("storage.googleapis.com")) == 1
    server.close()
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    assert teachers.checksum(config, config.teacher[0]) == first
    kept = tmp_path / "cache" / "kaggle" / NAME.replace("/", "--")
    assert sorted(p.name for p in pathlib.Path(f"{kept}--newest").iterdir()) == ["complete.json", "content", "lock"]
    printed = capfd.readouterr()
    assert not printed.out, "the client printed to the job's standard output"
    assert KEY not in printed.err
    assert BASIC not in printed.err


def test_savedmodels_and_keras_files_are_found(server: Server, tmp_path: pathlib.Path) -> None:
    server.archives[NAME] = zipped(
        tmp_path, {"T-r101x3-128/saved_model.pb": b"", "T-r101x3-128/variables/variables.index": b"1", "a.txt": b""}
    )
    kind, path = kaggle.fetch(NAME, "teacher")
    assert (kind, path.rsplit("/", 1)[1]) == ("saved_model", "T-r101x3-128")
    server.archives[f"{NAME}/3"] = zipped(tmp_path, {"a/x.keras": b"1", "a/y.npz": b"2", "b/saved_model.pb": b"3"})
    told = failure(f"{NAME}/3")
    assert "several models are in it" in told
    assert "a/x.keras" in told
    assert kaggle.fetch(f"{NAME}/3:a/x.keras", "teacher")[0] == "keras"
    assert kaggle.fetch(f"{NAME}/3:b", "teacher")[0] == "saved_model"
    kind, path = kaggle.fetch(f"{NAME}/3:a/y.npz", "teacher")
    assert kind == "bit"
    assert path.startswith("@/")
    assert "there is no c in it" in failure(f"{NAME}/3:c")
    assert len(server.asked("storage.googleapis.com")) == 2
    server.archives[f"{NAME}/4"] = zipped(tmp_path, {"notes.txt": b"1"})
    assert "no model is in it" in failure(f"{NAME}/4")
    assert "notes.txt" in failure(f"{NAME}/4")


def test_a_model_of_kaggle_comes_as_a_tar_in_its_newest_or_a_named_version(
    server: Server, tmp_path: pathlib.Path
) -> None:
    for version in (2, 4):
        server.archives[f"google/bit/MODEL_FRAMEWORK_TENSOR_FLOW_2/m-r101x3/{version}"] = zipped(
            tmp_path, {"saved_model.pb": b"x" * version}, "tar.gz"
        )
    for text, size in (("google/bit/tensorFlow2/m-r101x3", 4), ("google/bit/tensorFlow2/m-r101x3/2", 2)):
        kind, path = kaggle.fetch(text, "teacher")
        assert kind == "saved_model"
        assert os.path.getsize(os.path.join(path, "saved_model.pb")) == size
    assert "cannot be downloaded from Kaggle" in failure("google/bit/noSuchFramework/m-r101x3")


@pytest.mark.parametrize(
    "text",
    ["x", "a/b/c", "a/b/c/d/e", "../b", "a/..", "a/b/0", "a/b:../c", "a/b:/etc", "a//b", "a/b:c\\d", "a/b/c/d/1/2"],
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="--teacher=kaggle:"):
        kaggle.fetch(text, "teacher")


def test_credentials_from_the_environment_a_file_or_none(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public data sets need none; each way is seen by the server as what it is."""
    for version in range(1, 6):
        server.archives[f"o/d/{version}"] = zipped(tmp_path, {"x.npz": b"1"})

    def sent() -> str | None:
        return server.asked("api.kaggle.com", "DownloadDataset")[-1].headers.get("Authorization")

    kaggle.fetch("o/d/1", "teacher")
    assert sent() is None
    server.key = BASIC
    kaggle_json(tmp_path / "home" / ".config" / "kaggle" / "kaggle.json")
    kaggle.fetch("o/d/2", "teacher")
    kaggle_json(tmp_path / "elsewhere" / "kaggle.json")
    (tmp_path / "home" / ".config" / "kaggle" / "kaggle.json").unlink()
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "elsewhere"))
    kaggle.fetch("o/d/3", "teacher")
    assert os.environ["KAGGLE_CONFIG_DIR"] == str(tmp_path / "elsewhere")
    assert "KAGGLE_KEY" not in os.environ
    server.key, server.tokens = f"Bearer {TOKEN}", {TOKEN: USER}
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    kaggle.fetch("o/d/4", "teacher")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("KAGGLE_API_TOKEN", str(tmp_path / "token"))
    kaggle.fetch("o/d/5", "teacher")
    assert sent() == f"Bearer {TOKEN}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o660, 0o666])
def test_a_key_that_others_can_read_is_refused(server: Server, tmp_path: pathlib.Path, mode: int) -> None:
    path = kaggle_json(tmp_path / "home" / ".kaggle" / "kaggle.json", mode)
    told = failure()
    assert f"chmod 600 {path}" in told
    assert f"{mode:04o}" in told
    assert not server.seen
    for name in ("access_token", "credentials.json"):
        path.rename(path.with_name(name))
        path = path.with_name(name)
        assert f"chmod 600 {path}" in failure()


def test_broken_credentials(server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kaggle_json(tmp_path / "home" / ".kaggle" / "kaggle.json")
    for content in (f'{{"username": "{USER}", "kex": "{KEY}"}}', f'{{"{KEY}', "[1]", "null"):
        path.write_text(content)
        assert "does not hold a username and a key" in failure()
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert "KAGGLE_USERNAME is not" in failure()
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)  # not one of the server's
    monkeypatch.delenv("KAGGLE_KEY")
    assert "does not accept the credentials of KAGGLE_API_TOKEN" in failure()
    assert not server.asked("api.kaggle.com", "DownloadDataset")


@pytest.mark.parametrize(
    ("status", "known", "words"),
    [
        (401, True, "does not accept the credentials of KAGGLE_USERNAME"),
        (401, False, "needs credentials"),
        (403, False, "needs credentials"),
        (403, True, "accept its terms"),
        (404, True, "there is no data set"),
        (429, True, "answers 429"),
        (500, True, "answers 500"),
    ],
)
def test_refusals_of_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, known: bool, words: str
) -> None:
    """The server's text holds the key; ours does not."""
    server.status = status
    if known:
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert words in failure()


def test_the_job_says_it_in_one_line(
    server: Server, data: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    server.status = 404
    flags = ["task", f"--data={data}", f"--teacher=kaggle:{NAME}", "--student=bit-tiny", "--steps=2", "--batch_size=4"]
    told = here(*flags, f"--image_size={IMAGE}", f"--workdir={tmp_path}/run")
    assert told.returncode == 3
    assert f"--teacher=kaggle:{NAME}: there is no data set" in told.stderr
    assert KEY not in told.stderr


@pytest.mark.usefixtures("no_waiting")
def test_a_cut_download_goes_on_where_it_was(server: Server, tmp_path: pathlib.Path) -> None:
    """Within a process, and in the next one; an archive that changed in between is begun again."""
    content = random.Random(0).randbytes(3 << 20)
    server.archives[NAME] = zipped(tmp_path, {"x.npz": content}, "stored")
    server.cut = [1 << 20, 1 << 20]
    _, path = kaggle.fetch(NAME, "teacher")
    assert pathlib.Path(path[1:]).read_bytes() == content
    ranges = [seen.headers.get("Range") for seen in server.asked("storage.googleapis.com")]
    assert ranges == [None, f"bytes={1 << 20}-", f"bytes={2 << 20}-"]
    # Another process: six tries, all cut; the seventh request is of a new client.
    server.archives["o/d"] = server.archives[NAME]
    server.seen.clear()
    server.cut = [1 << 20, *[0] * 5]
    assert "the same command resumes the download" in failure("o/d")
    part = tmp_path / "cache" / "kaggle" / "o--d--newest" / "download" / "d.zip"
    assert part.stat().st_size == 1 << 20
    _, path = kaggle.fetch("o/d", "teacher")
    assert pathlib.Path(path[1:]).read_bytes() == content
    assert server.asked("storage.googleapis.com")[-1].headers.get("Range") == f"bytes={1 << 20}-"
    # And one whose archive is another by then.
    server.archives["o/e"] = server.archives[NAME]
    server.cut = [1 << 20, *[0] * 5]
    failure("o/e")
    other = random.Random(1).randbytes(2 << 20)
    server.archives["o/e"] = zipped(tmp_path, {"x.npz": other}, "stored")
    _, path = kaggle.fetch("o/e", "teacher")
    assert pathlib.Path(path[1:]).read_bytes() == other


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"../../../evil": b"1"}, "leads out"),
        ({"/evil": b"1"}, "absolute"),
        ({"a\\..\\evil": b"1"}, "a Windows path"),
        ({"zeros.npz": bytes(32 << 20)}, "out of proportion"),
    ],
)
def test_hostile_archives_leave_nothing(server: Server, tmp_path: pathlib.Path, content: dict, words: str) -> None:
    server.archives[NAME] = zipped(tmp_path, content)
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    assert words in failure()
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before
    left = {p.name for p in (tmp_path / "cache" / "kaggle").rglob("*") if p.is_file()}
    assert left == {"lock"}


def test_links_and_damage_and_what_a_killed_process_left(server: Server, tmp_path: pathlib.Path) -> None:
    linked = io.BytesIO()
    with zipfile.ZipFile(linked, "w") as archive:
        info = zipfile.ZipInfo("saved_model.pb")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    server.archives[NAME] = linked.getvalue()
    assert "a link" in failure()
    good = zipped(tmp_path, {"x.npz": b"12345"})
    server.archives[NAME] = good[: len(good) // 2]  # whole as a download, and no zip
    assert "damaged" in failure()
    server.archives[NAME] = good
    folder = tmp_path / "cache" / "kaggle" / (NAME.replace("/", "--") + "--newest")
    (folder / "content").mkdir()  # unpacked by half, and no record of it
    (folder / "content" / "x.keras").write_bytes(b"half")
    (folder / "content.0123.part").mkdir()
    kind, path = kaggle.fetch(NAME, "teacher")
    assert kind == "bit"
    assert pathlib.Path(path[1:]).read_bytes() == b"12345"
    assert sorted(p.name for p in folder.iterdir()) == ["complete.json", "content", "lock"]
    # Somebody cut a file of the cache: it is fetched again.
    pathlib.Path(path[1:]).write_bytes(b"1")
    kaggle.fetch(NAME, "teacher")
    assert pathlib.Path(path[1:]).read_bytes() == b"12345"


def test_a_line_that_says_nothing(server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself would wait for ever."""
    monkeypatch.setattr(kaggle, "STALL_SECONDS", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("https_proxy", os.environ["HTTPS_PROXY"])
    del server, tmp_path
    began = time.monotonic()
    assert "nothing has arrived" in failure()
    assert time.monotonic() - began < 10
    listener.close()


def test_nobody_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    del server
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert "cannot be downloaded from Kaggle (ProxyError)" in failure()
