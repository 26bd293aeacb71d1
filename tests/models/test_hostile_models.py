"""Hostile model files run no code, write nothing outside their folder, and are refused."""

from __future__ import annotations

import base64
import io
import json
import marshal
import os
import pathlib
import pickle
import stat
import zipfile
from collections.abc import Callable

import conftest
import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.models import bit_weights, keras_files
from trainer.models.saved_models import SavedClassifier


@pytest.fixture
def canary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The working directory and home of a test, in which nothing may change."""
    folder = tmp_path / "around/here"
    folder.mkdir(parents=True)
    (folder / "secret").write_text("secret")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "around"))
    return tmp_path / "around"


def everything(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of a valid `.keras` file."""
    inputs = keras.Input((24, 24, 3))
    hidden = keras.layers.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(conftest.CLASSES, name="head")(hidden))
    path = tmp_path_factory.mktemp("good") / "m.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


Members = dict[str, bytes]
Change = Callable[[Members, pathlib.Path], Members]


def layer(change: dict[str, object]) -> Change:
    """Replaces the pooling layer."""

    def change_config(members: Members, mark: pathlib.Path) -> Members:
        config = json.loads(members["config.json"])
        old = next(part for part in config["config"]["layers"] if part["class_name"] == "GlobalAveragePooling2D")
        text = json.dumps(change).replace("MARK", str(mark))
        old.update(json.loads(text))
        return members | {"config.json": json.dumps(config).encode()}

    return change_config


def lambda_layer() -> dict[str, object]:
    """A Lambda as Keras writes it; its code creates a file."""
    layer = keras.layers.Lambda(lambda x: (open("ran", "w").close(), x)[1])
    return keras.saving.serialize_keras_object(layer)


def h5(change: Callable[[h5py.File], None]) -> Change:
    def change_weights(members: Members, _: pathlib.Path) -> Members:
        buffer = io.BytesIO(members["model.weights.h5"])
        with h5py.File(buffer, "r+") as file:
            change(file)
        return members | {"model.weights.h5": buffer.getvalue()}

    return change_weights


def bomb(file: h5py.File) -> None:
    """8 PiB in no bytes, as in Keras's tests."""
    group = next(g for g in (file["layers"][name]["vars"] for name in file["layers"]) if len(g))
    del group["0"]
    group.create_dataset("0", shape=(1 << 50,), dtype="float64", chunks=(1 << 20,))


def outside(file: h5py.File) -> None:
    group = next(g for g in (file["layers"][name]["vars"] for name in file["layers"]) if len(g))
    del group["0"]
    group["0"] = h5py.ExternalLink("/etc/passwd", "/x")


FUNCTION = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
CHANGES: dict[str, Change] = {
    "Lambda": lambda m, mark: layer(lambda_layer())(m, mark),
    "a layer that is a function of os": layer(
        {"module": "os", "class_name": "system", "config": {"command": "touch MARK"}}
    ),
    "eval": layer({"module": "builtins", "class_name": "eval", "config": {"source": "open('MARK','w')"}}),
    "a download": layer(
        {"module": "keras.utils", "class_name": "get_file", "config": {"fname": "MARK", "origin": "file:///etc/passwd"}}
    ),
    "an unknown class": layer(
        {"module": "somewhere", "class_name": "Evil", "config": {}, "registered_name": "Custom>Evil"}
    ),
    "an activation of os": layer(
        {"module": "keras.layers", "class_name": "Activation", "config": {"activation": FUNCTION}}
    ),
    "a pickled torch module": layer(
        {"module": "keras.src.utils.torch_utils", "class_name": "TorchModuleWrapper", "config": {"module": "gASVHg=="}}
    ),
    "config.json that is no JSON": lambda m, _: m | {"config.json": b"{"},
    "config.json of a list": lambda m, _: m | {"config.json": b"[]"},
    "no weights": lambda m, _: {name: content for name, content in m.items() if not name.endswith(".h5")},
    "weights that are a pickle": lambda m, _: m | {"model.weights.h5": pickle.dumps({"a": 1})},
    "a shape bomb": h5(bomb),
    "weights from another file": h5(outside),
    "..": lambda m, _: m | {"../ran": b"x"},
    "../ in assets": lambda m, _: m | {"assets/../../../ran": b"x"},
    "a backslash": lambda m, _: m | {"..\\ran": b"x"},
    "an absolute path": lambda m, mark: m | {str(mark): b"x"},
}


def pack(path: pathlib.Path, members: Members, compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def refused(path: str, canary: pathlib.Path) -> str:
    before = everything(canary)
    with pytest.raises(DataError) as caught:
        keras_files.load_keras(path, "teacher")
    assert everything(canary) == before, "something was written"
    assert "\n" not in str(caught.value)
    assert f"--teacher=keras:{path}" in str(caught.value)
    return str(caught.value)


def test_the_unchanged_file_loads(good: Members, tmp_path: pathlib.Path) -> None:
    model, _ = keras_files.load_keras(pack(tmp_path / "m.keras", good), "teacher")
    assert model.output_shape == (None, conftest.CLASSES)


@pytest.mark.parametrize("what", CHANGES)
def test_a_hostile_keras_file(what: str, good: Members, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    mark = canary / "here/ran"
    refused(pack(tmp_path / "evil.keras", CHANGES[what](dict(good), mark)), canary)
    assert not mark.exists()


def in_config(change: dict[str, object]) -> Callable[[h5py.File], None]:
    """Changes the entry of the pooling layer in an `.h5` file."""

    def apply(file: h5py.File) -> None:
        config = json.loads(file.attrs["model_config"])
        entry = next(x for x in config["config"]["layers"] if x["class_name"] == "GlobalAveragePooling2D")
        entry |= change
        file.attrs["model_config"] = json.dumps(config)

    return apply


def old_lambda(mark: str) -> dict[str, object]:
    """A Lambda as Keras 2 writes it: code, defaults, closure."""

    def write(x: tf.Tensor) -> tf.Tensor:
        open("MARK", "w").close()
        return x

    code = write.__code__.replace(co_consts=tuple(mark if c == "MARK" else c for c in write.__code__.co_consts))
    text = base64.b64encode(marshal.dumps(code)).decode()
    return {"class_name": "Lambda", "config": {"name": "x", "function": [text, None, None], "function_type": "lambda"}}


def linked(file: h5py.File) -> None:
    group = file["model_weights/head/head"]
    del group["kernel"]
    group["kernel"] = h5py.ExternalLink("/etc/passwd", "/x")


def enormous(file: h5py.File) -> None:
    group = file["model_weights/head/head"]
    del group["kernel"]
    group.create_dataset("kernel", shape=(1 << 50,), dtype="float64", chunks=(1 << 20,))


H5_CHANGES: dict[str, Callable[[str], Callable[[h5py.File], None]]] = {
    "Lambda": lambda mark: in_config(old_lambda(mark)),
    "a function of keras.layers": lambda _: in_config({"class_name": "deserialize", "config": {"config": {}}}),
    "a SavedModel elsewhere": lambda mark: in_config({"class_name": "TFSMLayer", "config": {"filepath": mark}}),
    "a pickled torch module": lambda _: in_config(
        {"class_name": "TorchModuleWrapper", "config": {"module": "gASVHg=="}}
    ),
    "weights from another file": lambda _: linked,
    "a shape bomb": lambda _: enormous,
}


@pytest.mark.parametrize("what", H5_CHANGES)
def test_a_hostile_h5_file(what: str, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    inputs = keras.Input((24, 24, 3))
    hidden = keras.layers.GlobalAveragePooling2D()(inputs)
    path = tmp_path / "evil.h5"
    keras.Model(inputs, keras.layers.Dense(conftest.CLASSES, name="head")(hidden)).save(path)
    mark = canary / "here/ran"
    keras_files.load_keras(str(path), "teacher")
    with h5py.File(path, "r+") as file:
        H5_CHANGES[what](str(mark))(file)
    message = refused(str(path), canary)
    assert not mark.exists()
    # Layers that are programs are found before Keras reads the file.
    assert ("does not load: it has a" in message) == (what not in ("weights from another file", "a shape bomb"))


def test_a_link_in_a_keras_file(good: Members, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = pack(tmp_path / "evil.keras", good)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("assets")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(canary))
    assert "is a link or a device" in refused(path, canary)


def test_two_members_with_one_name(good: Members, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = pack(tmp_path / "evil.keras", good)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("config.json", b"{}")
    assert "members have the same name" in refused(path, canary)


def test_a_zip_bomb(good: Members, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = pack(tmp_path / "evil.keras", good | {"assets/zeros": bytes(1 << 27)}, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 1 << 20
    assert "claim to hold" in refused(path, canary)


class Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.mark, "w")


def npz_refused(path: pathlib.Path, canary: pathlib.Path) -> str:
    before = everything(canary)
    with pytest.raises(DataError) as caught:
        bit_weights.read(str(path), "teacher")
    assert everything(canary) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hostile_npz_files(canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    mark = str(canary / "here/ran")
    path = tmp_path / "evil.npz"
    np.savez(path, **{"head/kernel": np.array([Evil(mark)], object)})
    assert "not floats" in npz_refused(path, canary)
    path.write_bytes(pickle.dumps(Evil(mark)))
    assert "is not an npz file" in npz_refused(path, canary)
    header = np.lib.format.magic(1, 0)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1125899906842624,), }\n"
    content = header + len(text).to_bytes(2, "little") + text
    assert "claims shape" in npz_refused(pathlib.Path(pack(path, {"head/kernel.npy": content})), canary)
    assert "no BiT has" in npz_refused(pathlib.Path(pack(path, {"../../ran.npy": content})), canary)
    pack(path, {"head/kernel.npy": content})
    # A member whose header claims more than any model has: nothing of it is read.
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"PK\x01\x02") + 24
    raw[place : place + 4] = (0xFFFFFFFE).to_bytes(4, "little")
    path.write_bytes(bytes(raw))
    npz_refused(path, canary)
    assert not os.path.exists(mark)


def test_an_npz_larger_than_any_bit(
    canary: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bit_weights, "MAX_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", **{"head/kernel": np.zeros(1 << 20, np.float32)})
    assert "more than any BiT" in npz_refused(tmp_path / "bomb.npz", canary)


def saved_model(folder: pathlib.Path, work: Callable[[tf.Tensor], tf.Tensor]) -> str:
    module = tf.Module()
    module.call = tf.function(  # type: ignore[attr-defined]
        work, input_signature=[tf.TensorSpec([None, 24, 24, 3], tf.float32)]
    )
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.call})  # type: ignore[attr-defined]
    return str(folder)


@pytest.mark.parametrize("kind", ["writes", "reads", "lists"])
def test_a_saved_model_that_touches_files(kind: str, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    mark = str(canary / "here/ran")

    def work(images: tf.Tensor) -> tf.Tensor:
        if kind == "writes":
            tf.io.write_file(mark, "x")
        elif kind == "reads":
            images += tf.cast(tf.strings.length(tf.io.read_file(str(canary / "here/secret"))), tf.float32)
        else:
            images += tf.cast(tf.size(tf.io.matching_files(str(canary / "*"))), tf.float32)
        return tf.reduce_mean(images, [1, 2])

    path = saved_model(tmp_path / "model", work)
    before = everything(canary)
    with pytest.raises(DataError, match=r"refused$") as caught:
        SavedClassifier(path, "teacher")
    assert "\n" not in str(caught.value)
    assert everything(canary) == before


def test_a_job_with_a_hostile_teacher_exits_with_3(
    good: Members, data: str, canary: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = pack(tmp_path / "evil.keras", CHANGES["Lambda"](dict(good), canary / "here/ran"))
    done = conftest.here("task", f"--data={data}", f"--teacher=keras:{path}", "--student=bit-tiny", "--image_size=24",
                         "--steps=1", "--batch_size=4", f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "evil.keras" in line
    assert "Traceback" not in done.stderr
    assert not (canary / "here/ran").exists()
