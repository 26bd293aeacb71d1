"""The exported `.keras` file loads in a process without funmatch."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
from conftest import opinionated

from trainer.models import bit
from trainer.output import export


def test_exported_keras_file_needs_nothing_of_ours(tmp_path: pathlib.Path) -> None:
    model = opinionated(bit.bit("tiny", 3, 24))
    x = np.linspace(-1, 1, 24 * 24 * 3, dtype=np.float32).reshape(1, 24, 24, 3)
    np.save(tmp_path / "x.npy", x)
    export.save_keras(export.single_device_copy(model), str(tmp_path / "m.keras"))
    code = (
        "import keras, numpy as np, sys\n"
        "m = keras.saving.load_model('m.keras')\n"
        "np.save('y.npy', np.asarray(m(np.load('x.npy'))))\n"
        "sys.exit('trainer' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert np.allclose(np.load(tmp_path / "y.npy"), np.asarray(model(x)), atol=1e-5)
