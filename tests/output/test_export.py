"""Exports are written file by file, whole, and nothing of a crash stays beside them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import fake_gcs
import keras
import pytest
from conftest import CLASSES, IMAGE

from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.output import export

NAMES = tuple(f"species {n}" for n in range(CLASSES))


def model() -> keras.Model:
    return keras.Sequential(
        [keras.Input((IMAGE, IMAGE, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(CLASSES)]
    )


def test_a_bucket_gets_whole_objects_and_refusals_that_pass_are_not_felt(
    gcs_here: fake_gcs.Server, make_config: Callable[..., Config]
) -> None:
    """TensorFlow itself would write under other names, rename, and give up at the first refusal."""
    faults = [
        gcs_here.fail("403", "start", match=f"export/{name}") for name in ("saved_model/variables", "model.keras")
    ]
    export.write("gs://bucket/run/export", model(), NAMES, make_config(), {})
    assert [fault.consumed for fault in faults] == [1, 1]
    assert gcs_here.requests("rewrite") == gcs_here.requests("delete") == []
    written = [request.object for request in gcs_here.requests("chunk")]
    assert sorted(written) == gcs_here.names("bucket")
    saved = [name for name in written if "/saved_model/" in name]
    assert len(saved) == 4
    assert saved[-1] == "run/export/saved_model/saved_model.pb"  # once it is there, all is
    gcs_here.fail("403", "start", match="saved_model", times=None)
    with pytest.raises(
        DataError, match=r"^cannot write the exported model gs://bucket/run/export/saved_model/.*HTTP 403"
    ):
        export.write("gs://bucket/run/export", model(), NAMES, make_config(), {})


def test_what_a_crash_left_on_a_disk_goes(tmp_path: pathlib.Path, make_config: Callable[..., Config]) -> None:
    export.write(str(tmp_path), model(), NAMES, make_config(), {})
    whole = sorted(tmp_path.rglob("*"))
    for name in ("model.keras", "saved_model/saved_model.pb", "saved_model/variables/variables.index"):
        (tmp_path / f"{name}.0123abcd.tmp").write_bytes(b"half")
    export.clean(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == whole
