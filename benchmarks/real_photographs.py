"""Distil a teacher with ImageNet weights on photographs, all 1,000 classes.

    python benchmarks/real_photographs.py            # hours on two cores
    python benchmarks/real_photographs.py --steps=N  # a shorter run
    python benchmarks/real_photographs.py --steps=0  # prints where photographs and teacher are

The photographs and the weights come from packages (`tests/photographs.py`,
`tests/imagenet_teacher.py`): EfficientNet-Lite0 at 128 px. They are split by photograph, and have
no labels. Everything is written to build/real_photographs; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDE = 128  # of the teacher's view in pixels
TILE, TILES = 160, 24  # side of a tile in pixels, and tiles of a photograph


def make_inputs(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Makes what is not there yet: the folder of photographs, and the teacher's file in `out`."""
    import imagenet_teacher
    import photographs

    out.mkdir(parents=True, exist_ok=True)
    teacher = out / "imagenet.keras"
    if not teacher.exists():
        imagenet_teacher.save(out, SIDE)
    return photographs.pictures(), teacher


def distil(out: pathlib.Path, steps: int) -> dict[str, Any]:
    """Distils the teacher into a BiT; the same call resumes.

    Args:
        out: folder for the data, the teacher and the run.
        steps: of 32 images.

    Returns:
        result.json: agreement and KL on photographs that training has not seen, and those of the
        best constant answer.
    """
    import photographs

    _, teacher = make_inputs(out)
    data, run = out / "data", out / f"run-{steps}"
    if not (data / "dataset.json").exists():
        _funmatch("prepare", f"--dataset=folder:{photographs.tiles(TILE, TILES)}", f"--out={data}")
    _funmatch(
        "task",
        f"--data={data}",
        f"--teacher=keras:{teacher}",
        "--teacher_range=0,255",
        "--student=bit-small",
        "--image_size=96",
        f"--store_size={TILE}",
        "--min_crop_area=0.3",  # a tile is a crop already
        f"--steps={steps}",
        "--batch_size=32",
        "--optimizer=muon",
        "--learning_rate=0.03",
        f"--warmup_steps={steps // 20}",
        "--temperature=2",
        f"--workdir={run}",
    )
    return json.loads((run / "result.json").read_text())


def _funmatch(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "trainer.cli", *arguments], cwd=ROOT, check=True)


def main(arguments: list[str] | None = None) -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "real_photographs", help="folder")
    parser.add_argument("--steps", type=int, default=50_000, help="of 32 images (default: 50,000)")
    options = parser.parse_args(arguments)
    if options.steps:
        print(json.dumps(distil(options.out, options.steps), indent=2))
    else:
        print("photographs {}\nteacher     {}".format(*make_inputs(options.out)))


if __name__ == "__main__":
    main()
