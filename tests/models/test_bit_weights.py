"""BiT's npz files: both published layouts, from a disk and over https; refused files."""

from __future__ import annotations

import datetime
import hashlib
import http.server
import io
import pathlib
import ssl
import threading
import zipfile
from collections.abc import Callable, Iterator

import fake_gcs
import keras
import numpy as np
import pytest
from conftest import CLASSES, IMAGE, here
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from samples import native_layout, parts, shaken

from trainer.core.config import Config
from trainer.core.errors import ConfigError, DataError
from trainer.io import download
from trainer.models import bit_weights, students, teachers


def transfer_layout(model: keras.Model, *, numbered: bool = False) -> dict[str, np.ndarray]:
    """As google-research/big_transfer writes it; in some of its files, layers carry numbers."""
    arrays = {}
    for n, (name, w) in enumerate(parts(model)):
        suffix = f"_{n}" if numbered and n else ""
        if name == "root_conv":
            arrays[f"resnet/root_block/standardized_conv2d{suffix}/kernel"] = w["kernel"]
        elif name == "final_norm":
            arrays |= {f"resnet/group_norm{suffix}/{k}": v for k, v in w.items()}
        elif name == "head":
            arrays[f"resnet/head/conv2d{suffix}/kernel"] = w["kernel"][None, None]
            arrays[f"resnet/head/conv2d{suffix}/bias"] = w["bias"]
        else:
            block, unit, part = name.split("_")[:3]
            where = f"resnet/{block}/{unit}/{'a/proj' if part == 'proj' else part}"
            if name.endswith("norm"):
                arrays |= {f"{where}/group_norm{suffix}/{k}": v for k, v in w.items()}
            else:
                arrays[f"{where}/standardized_conv2d{suffix}/kernel"] = w["kernel"]
    return arrays


LAYOUTS: dict[str, Callable[[keras.Model], dict[str, np.ndarray]]] = {
    "transfer": transfer_layout,
    "transfer, numbered": lambda model: transfer_layout(model, numbered=True),
    "native": native_layout,
    "native, params": lambda model: native_layout(model, "params/"),
    "native, first years": lambda model: (
        native_layout(model, "opt/target/") | {"opt/state/step": np.array(7), "extra/accum_train_time": np.array(1.5)}
    ),
    "native, today": lambda model: (
        native_layout(model, "params/") | native_layout(model, "opt/0/mu/") | {"chrono/accum_train_time": np.array(1.5)}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_logits(tmp_path: pathlib.Path, layout: str) -> None:
    model = shaken()
    path = tmp_path / "w.npz"
    np.savez(path, **LAYOUTS[layout](model))
    config = Config(teacher=(f"bit:tiny@{path}",), image_size=IMAGE)
    (teacher,) = teachers.load(config, CLASSES)
    view = np.random.default_rng(0).uniform(-1, 1, (3, IMAGE, IMAGE, 3)).astype(np.float32)
    assert np.allclose(teacher.logits(view).numpy(), np.asarray(model(view)), atol=1e-4)
    assert not teacher.model.trainable_variables


def test_root_pool_of_a_teacher(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "w.npz", **native_layout(shaken()))
    view = np.random.default_rng(0).uniform(-1, 1, (3, IMAGE, IMAGE, 3)).astype(np.float32)
    logits = {}
    for root_pool in ("zero", "inf"):
        config = Config(teacher=(f"bit:tiny@{tmp_path}/w.npz",), image_size=IMAGE, root_pool=root_pool)
        logits[root_pool] = teachers.load(config, CLASSES)[0].logits(view).numpy()
        expected = shaken(root_pool=root_pool)
        assert np.allclose(logits[root_pool], np.asarray(expected(view)), atol=1e-4)
    assert np.abs(logits["zero"] - logits["inf"]).max() > 1e-3


@pytest.mark.parametrize("classes", [CLASSES, 9])
def test_initial_weights_of_a_student(tmp_path: pathlib.Path, classes: int) -> None:
    """With the file's classifier where it fits, with a new one of zeros where it does not."""
    model = shaken(classes)
    np.savez(tmp_path / "w.npz", **transfer_layout(model))
    student = students.build("bit-tiny", CLASSES, IMAGE, initial_weights=f"bit:tiny@{tmp_path}/w.npz")
    for old, new in zip(model.layers, student.layers, strict=True):
        if old.name != "head" or classes == CLASSES:
            assert all((a == b).all() for a, b in zip(old.get_weights(), new.get_weights(), strict=True))
    if classes != CLASSES:
        assert not student.get_layer("head").get_weights()[0].any()
    for name, start in (("bit-r50x1", f"bit:tiny@{tmp_path}/w.npz"), ("bit-tiny", "saved_model:x")):
        with pytest.raises(ConfigError, match="--student_weights"):
            students.build(name, CLASSES, IMAGE, initial_weights=start)


def refused(arrays: dict[str, np.ndarray], tmp_path: pathlib.Path) -> str:
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(DataError) as error:
        bit_weights.load(f"tiny@{tmp_path}/w.npz", "teacher", IMAGE, "zero")
    return str(error.value)


def test_missing_left_over_and_strange_keys_are_listed(tmp_path: pathlib.Path) -> None:
    good = native_layout(shaken())
    message = refused({k: v for k, v in good.items() if k != "block2/unit01/conv2/kernel"}, tmp_path)
    assert "1 missing (block2_unit01_b/kernel)" in message
    assert "1 unexpected (block4_unit01_a/kernel)" in refused(
        good | {"block4/unit01/conv1/kernel": np.ones(3)}, tmp_path
    )
    assert "encoder/weights" in refused(good | {"encoder/weights": np.ones(3)}, tmp_path)
    assert "root_conv/kernel has shape" in refused(
        good | {"root_block/conv_root/kernel": np.ones((7, 7, 3, 4))}, tmp_path
    )
    assert "no head" in refused({k: v for k, v in good.items() if not k.startswith("head")}, tmp_path)
    message = refused({k: v.transpose(1, 0) if k == "head/kernel" else v for k, v in good.items()}, tmp_path)
    assert "head/kernel has shape" in message


def test_weights_of_another_architecture_are_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "w.npz", **native_layout(shaken()))
    with pytest.raises(DataError, match="another architecture"):
        bit_weights.load(f"small@{tmp_path}/w.npz", "teacher", IMAGE, "zero")


class Bomb:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (pathlib.Path.touch, (self.path,))


def test_pickles_and_shape_bombs_are_not_loaded(tmp_path: pathlib.Path) -> None:
    good = native_layout(shaken())
    witness = tmp_path / "executed"
    assert "nothing in it was executed" in refused(good | {"head/bias": np.array([Bomb(witness)], object)}, tmp_path)
    assert not witness.exists()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("head/bias.npy", header.getvalue())
    with pytest.raises(DataError, match=r"claims shape \(1048576, 1048576\)"):
        bit_weights.read(str(tmp_path / "bomb.npz"), "teacher")
    np.savez_compressed(tmp_path / "damaged.npz", **good)
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    for place in range(500, len(content) - 5000, 97):
        content[place] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(bytes(content))
    with pytest.raises(DataError):
        bit_weights.read(str(tmp_path / "damaged.npz"), "teacher")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="not an npz"):
        bit_weights.read(str(tmp_path / "text.npz"), "teacher")


def test_published_names() -> None:
    assert bit_weights.parse_source("R152x2_T_flowers128", "teacher") == bit_weights.WeightsSource(
        "R152x2", "https://storage.googleapis.com/bit_models/distill/R152x2_T_flowers128.npz", 128
    )
    assert bit_weights.parse_source("BiT-M-R101x3", "teacher").path.endswith("bit_models/BiT-M-R101x3.npz")
    assert bit_weights.PUBLISHED["R152x2_T_sun128"].classes == 397
    assert len(bit_weights.PUBLISHED) == 3 * 6 + 8
    for text, near in (("R152x2_T_flower128", "R152x2_T_flowers128"), ("R51x1@x.npz", "R50x1")):
        with pytest.raises(ConfigError, match=f"did you mean .*{near}"):
            bit_weights.parse_source(text, "teacher")


def test_published_names_are_checked_before_the_download() -> None:
    name = "bit:R152x2_T_flowers128"
    with pytest.raises(DataError, match="has 102 classes"):
        teachers.load(Config(teacher=(name,)), CLASSES)
    with pytest.raises(ConfigError, match="takes -1,1"):
        teachers.load(Config(teacher=(name,), teacher_range=("0,1",)), 102)


def test_a_pinned_digest_must_be_the_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, **native_layout(shaken()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = {"teacher": (f"bit:tiny@{path}",), "image_size": IMAGE}
    teachers.load(Config(**config, teacher_sha256=(digest.upper(),)), CLASSES)
    with pytest.raises(DataError, match=digest):
        teachers.load(Config(**config, teacher_sha256=("0" * 64,)), CLASSES)
    assert teachers.checksum(Config(**config), config["teacher"][0]) == digest


def self_signed(path: pathlib.Path) -> pathlib.Path:
    """A key and a certificate for localhost, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*plain) + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict]]:
    """An https server of `tmp_path/www` that this process trusts; its state counts and cuts
    downloads.
    """
    certificate = self_signed(tmp_path / "cert.pem")
    (tmp_path / "www").mkdir()
    state: dict = {"gets": 0, "cut": False}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "www"))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            state["gets"] += 1
            if not state["cut"]:
                return super().do_GET()
            content = (tmp_path / "www" / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return None

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    yield f"https://localhost:{server.server_port}", state
    server.shutdown()


def test_files_over_https_are_fetched_once_and_whole(tmp_path: pathlib.Path, server: tuple[str, dict]) -> None:
    address, state = server
    path = tmp_path / "www" / "w.npz"
    np.savez(path, **native_layout(shaken()))
    text = f"bit:tiny@{address}/w.npz"
    state["cut"] = True
    with pytest.raises(DataError, match="bytes arrived"):
        teachers.load(Config(teacher=(text,), image_size=IMAGE), CLASSES)
    assert list((tmp_path / "cache").iterdir()) == []
    state["cut"] = False
    state["gets"] = 0
    for _ in range(2):
        teachers.load(Config(teacher=(text,), image_size=IMAGE), CLASSES)
    assert state["gets"] == 1
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == path.read_bytes()
    # Another version under the same address is another file.
    np.savez(path, **transfer_layout(shaken(), numbered=True))
    teachers.load(Config(teacher=(text,), image_size=IMAGE), CLASSES)
    assert state["gets"] == 2
    with pytest.raises(DataError, match="File not found"):
        download.local_copy(f"{address}/none.npz", "teacher")


def test_weights_in_a_bucket(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, gcs_here: fake_gcs.Server
) -> None:
    """By TensorFlow's own client; weights are fetched once."""
    np.savez(tmp_path / "w.npz", **native_layout(shaken()))
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    view = np.random.default_rng(0).uniform(-1, 1, (3, IMAGE, IMAGE, 3)).astype(np.float32)
    gcs_here.put("bucket", "t/w.npz", (tmp_path / "w.npz").read_bytes())
    for teacher in ("bit:tiny@gs://bucket/t/w.npz", "bit:@gs://bucket/t/w.npz"):
        (loaded,) = teachers.load(Config(teacher=(teacher,), image_size=IMAGE), CLASSES)
        assert np.allclose(loaded.logits(view), np.asarray(shaken()(view)), atol=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_http_is_refused() -> None:
    with pytest.raises(DataError, match="is not encrypted"):
        download.local_copy("http://localhost/w.npz", "teacher")


def test_a_job_with_weights_of_teacher_and_student(data: str, tmp_path: pathlib.Path) -> None:
    for name in ("t", "s"):
        np.savez(tmp_path / f"{name}.npz", **transfer_layout(shaken()))
    flags = [
        "task",
        f"--data={data}",
        f"--teacher=bit:tiny@{tmp_path}/t.npz",
        f"--student_weights=bit:tiny@{tmp_path}/s.npz",
        "--student=bit-tiny",
        f"--image_size={IMAGE}",
        "--steps=2",
        "--batch_size=4",
        f"--workdir={tmp_path}/run",
    ]
    assert here(*flags).returncode == 0
    for name in ("t", "s"):
        path = tmp_path / f"{name}.npz"
        before = path.read_bytes()
        np.savez(path, **transfer_layout(shaken(), numbered=True))
        done = here(*flags)
        assert done.returncode == 3
        assert "another configuration" in done.stderr
        path.write_bytes(before)
    assert here(*flags).returncode == 0
    done = here(*[f for f in flags if "student_weights" not in f], "--student_weights=saved_model:x")
    assert done.returncode == 2
    assert "--student_weights=saved_model:x does not fit --student=bit-tiny" in done.stderr
