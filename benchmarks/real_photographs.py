"""Measure on photographs, with a teacher that has ImageNet weights.

    python benchmarks/real_photographs.py views             # minutes
    python benchmarks/real_photographs.py distil            # hours on two cores
    python benchmarks/real_photographs.py distil --steps=N  # a shorter run

`views` measures how far squares as they are stored change what the teacher sees. `distil` trains a
student on all 1,000 classes. The photographs and the weights come from packages
(`tests/photographs.py`, `tests/imagenet_teacher.py`): EfficientNet-Lite0 at 128 px.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDE = 128  # of the teacher's view and of the student's, in pixels
STORED = (2, 3, 4)  # sides of stored squares, in views
CROPS = 8  # of each photograph
SHORTER = 500  # larger photographs are reduced to this shorter side in pixels, as data sets have it
TILE, TILES = 160, 24  # side of a tile in pixels, and tiles of a photograph


def views(limit: int | None) -> list[dict[str, float]]:
    """For each side of stored squares: what it costs, and the teacher's answer to crops of it
    compared with its answer to the same crops of the files.

    Args:
        limit: photographs to use; None: all.
    """
    import imagenet_teacher
    import photographs
    import tensorflow as tf

    from trainer.core.config import Config
    from trainer.data import store
    from trainer.method import fidelity
    from trainer.method import views as method_views
    from trainer.method.counter_rng import uniform
    from trainer.method.crops import DRAWS_PER_CROP

    teacher = imagenet_teacher.efficientnet_lite0(SIDE)
    config = Config(image_size=SIDE)
    crop = method_views.find_crop(config, "inception")
    sides = [times * SIDE for times in STORED]
    answers: dict[int, list[np.ndarray]] = {side: [] for side in (0, *sides)}
    kept: dict[int, list[np.ndarray]] = {side: [] for side in sides}
    blurred: dict[int, list[np.ndarray]] = {side: [] for side in sides}
    sizes, decoding = [], dict.fromkeys(sides, 0.0)
    for number, path in enumerate(sorted(photographs.pictures().iterdir())[:limit]):
        original = _original(path)
        size = tf.constant([original.shape[:2]] * CROPS, tf.float32)
        draws = uniform(0, 0, tf.range(number * CROPS, (number + 1) * CROPS), DRAWS_PER_CROP)
        boxes = crop.box(config, size, draws).numpy()
        sizes.append(original.shape[:2])
        cut = [_cut(original, box, bool(draw[-1] < 0.5)) for box, draw in zip(boxes, draws.numpy(), strict=True)]
        answers[0].append(teacher(tf.stack(cut)).numpy())
        for side in sides:
            start = time.perf_counter()
            square = store.squash(original, side)
            decoding[side] += time.perf_counter() - start
            kept[side].append(square.numpy())
            seen = method_views.crop_views(config, crop, tf.stack([square] * CROPS), size, draws, (SIDE,))[SIDE]
            answers[side].append(teacher((seen + 1) * 127.5).numpy())
            blurred[side].append(((boxes[:, 2:] * side < SIDE) & (side < size.numpy())).any(axis=1))
    drawn = fidelity.sample_crops(config, np.array(sizes, np.float32))
    assert drawn is not None
    reference = np.concatenate(answers[0]).astype(np.float64)
    rows = []
    for side in sides:
        found, blurry = np.concatenate(answers[side]).astype(np.float64), np.concatenate(blurred[side])
        kl = (reference * (np.log(reference + 1e-12) - np.log(found + 1e-12))).sum(1)
        same = reference.argmax(1) == found.argmax(1)
        rows.append(
            {
                "stored side": side,
                "kB an image": side * side * 3 / 1000,
                "crops/s": _crops_per_second(np.stack(kept[side][:64])),
                "ms to shrink a file": 1000 * decoding[side] / len(sizes),
                "blurrier crops": fidelity.blurred_share(drawn, side, SIDE),
                "KL, all crops": kl.mean(),
                "KL, blurrier crops": kl[blurry].mean(),
                "KL, other crops": kl[~blurry].mean(),
                "same top-1": same.mean(),
            }
        )
    return rows


def _original(path: pathlib.Path) -> object:
    """The pixels of a photograph, uint8 [height, width, 3]."""
    import tensorflow as tf
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    if (factor := SHORTER / min(picture.size)) < 1:
        picture = picture.resize([round(factor * length) for length in picture.size], Image.Resampling.LANCZOS)
    return tf.constant(np.asarray(picture))


def _cut(original: object, box: np.ndarray, flip: bool) -> object:
    """A crop of the file's pixels resized by TensorFlow, float32 [SIDE, SIDE, 3] in 0..255: what
    big_vision does.
    """
    import tensorflow as tf

    height, width = original.shape[:2]  # type: ignore[attr-defined]
    top, left, tall, wide = (round(float(part) * length) for part, length in zip(box, (height, width) * 2, strict=True))
    cut = tf.image.resize(original[top : top + tall, left : left + wide], (SIDE, SIDE))  # type: ignore[index]
    return tf.image.flip_left_right(cut) if flip else cut


def _crops_per_second(images: np.ndarray) -> float:
    """Speed of the step's crop of a batch of stored squares."""
    import tensorflow as tf

    from trainer.core.config import Config
    from trainer.method import views as method_views
    from trainer.method.counter_rng import uniform
    from trainer.method.crops import DRAWS_PER_CROP

    config = Config(image_size=SIDE)
    crop = method_views.find_crop(config, "inception")
    batch, sizes = tf.constant(images), tf.fill((len(images), 2), 500.0)

    @tf.function(autograph=False)
    def run(step: tf.Tensor) -> tf.Tensor:
        draws = uniform(0, step, tf.range(len(images)), DRAWS_PER_CROP)
        return method_views.crop_views(config, crop, batch, sizes, draws, (SIDE,))[SIDE]

    run(tf.constant(0))
    start = time.perf_counter()
    for step in range(1, 6):
        run(tf.constant(step)).numpy()
    return 5 * len(images) / (time.perf_counter() - start)


def distil(out: pathlib.Path, steps: int) -> dict[str, float]:
    """Distils all 1,000 classes into a BiT; its result on photographs that training has not seen.

    Args:
        out: folder for the data, the teacher and the run; the same call resumes.
        steps: of 32 images.
    """
    import imagenet_teacher
    import photographs

    out.mkdir(parents=True, exist_ok=True)
    teacher = out / "imagenet.keras"
    if not teacher.exists():
        imagenet_teacher.save(out, SIDE)
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
        "--min_crop_area=0.25",  # a tile is a crop already
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


def table(rows: list[dict[str, float]]) -> str:
    """A Markdown table of rows with the same columns."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        cells = (f"{100 * v:.1f} %" if k.startswith(("same", "blurr")) else f"{v:,.3g}" for k, v in row.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["views", "distil"])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "real_photographs")
    parser.add_argument("--steps", type=int, default=50_000, help="of distil (default: 50,000)")
    arguments = parser.parse_args()
    if arguments.part == "views":
        print(table(views(None)))
    else:
        print(json.dumps(distil(arguments.out, arguments.steps), indent=2))


if __name__ == "__main__":
    main()
