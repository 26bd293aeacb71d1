"""Measure what the size of stored images does to the training crops, on photographs.

    python benchmarks/view_fidelity.py --photographs=FOLDER --teacher=keras:TEACHER --classes=1000

Each photograph is reduced to a shorter side of 500 pixels, as in the paper's data sets. The same
inception crops are taken of this original and of a square of each store size, and the teacher sees
both. Its KL divergence between the two is the error that the store size makes. No training is
needed. The other columns are costs. Prints one line of JSON for each store size, then a table.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trainer.core.config import Config
from trainer.data.memory import cores
from trainer.data.store import decode_square
from trainer.method import counter_rng, crops, fidelity
from trainer.models import teachers

BATCH = 64
REPEATS = 12
QUALITY = 92  # of the reduced JPEGs

# Key and heading of each column, and how it is printed.
COLUMNS = [
    ("store_size", "pixels", "{:d}"),
    ("blurred", "blurrier crops", "{:.1%}"),
    ("kl", "KL", "{:.4f}"),
    ("agreement", "same top-1", "{:.1%}"),
    ("kib", "kiB an image", "{:.0f}"),
    ("view_us", "µs for a view", "{:.0f}"),
    ("decode_per_s", "decoded images/s", "{:.0f}"),
]


def reduced(path: pathlib.Path, side: int) -> bytes | None:
    """A JPEG of a photograph with this shorter side in pixels; None if it is smaller."""
    with Image.open(path) as image:
        if min(image.size) < side:
            return None
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        content = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=QUALITY)
        return content.getvalue()


def originals_view(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """A crop of the full-size image at whole pixels, resized bilinearly without antialiasing.

    Args:
        image: uint8 [height, width, 3].
        box: top, left, height and width as fractions.
        size: side of the view in pixels.

    Returns:
        float32 [size, size, 3] in [-1, 1].
    """
    height, width = image.shape[:2]
    top, left, rows, columns = np.rint(box * (height, width, height, width)).astype(int)
    crop = image[top : top + rows, left : left + columns]
    return tf.image.resize(crop, [size, size], method="bilinear").numpy() / 127.5 - 1.0


def batches(arrays: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of `BATCH` rows."""
    return (arrays[start : start + BATCH] for start in range(0, len(arrays), BATCH))


def kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL of the softmaxes of logits [n, classes], each [n] in nats."""
    first, second = (np.asarray(tf.nn.log_softmax(logits)) for logits in (reference, other))
    return np.sum(np.exp(first) * (first - second), axis=1)


def best_seconds(work: Callable[[], Any]) -> float:
    """The shortest of several runs of `work`, after one that compiles."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True, help="folder of image files")
    parser.add_argument("--teacher", required=True, help="as for funmatch task")
    parser.add_argument("--teacher_range", default="auto", help="as for funmatch task")
    parser.add_argument("--classes", type=int, required=True, help="number of the teacher's classes")
    parser.add_argument("--side", type=int, default=500, help="shorter side of the originals, in pixels")
    parser.add_argument("--crops", type=int, default=16, help="crops of each photograph")
    parser.add_argument("--factors", default="2,2.5,3,3.5,4,5", help="store sizes as multiples of the view's")
    options = parser.parse_args(arguments)
    config = Config(teacher=(options.teacher,), teacher_range=(options.teacher_range,))
    (teacher,) = teachers.load(config, options.classes)
    size = teacher.size
    found = (reduced(path, options.side) for path in sorted(pathlib.Path(options.photographs).iterdir()))
    encoded = [content for content in found if content]
    images = [tf.image.decode_jpeg(content).numpy() for content in encoded]
    print(f"{len(images)} photographs, {options.crops} crops of each, views of {size} pixels", file=sys.stderr)

    owner = np.repeat(np.arange(len(images)), options.crops)
    sizes = np.array([images[number].shape[:2] for number in owner], np.float32)
    draws = counter_rng.uniform(1, 0, tf.range(len(owner)), crops.DRAWS_PER_CROP)
    boxes = crops.inception_box(crops.inception_draws(draws), tf.constant(sizes)).numpy()
    sample = fidelity.CropSample(boxes[:, 2:], sizes)
    reference = [originals_view(images[number], box, size) for number, box in zip(owner, boxes, strict=True)]
    logits = tf.function(teacher.logits)

    def outputs(views: Iterator[Any]) -> np.ndarray:
        return np.concatenate([logits(tf.constant(view)).numpy() for view in views])

    expected = outputs(batches(np.array(reference)))
    rows = []
    for factor in (float(text) for text in options.factors.split(",")):
        side = round(factor * size)
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:

            def decode(content: bytes, side: int = side) -> np.ndarray:
                return decode_square(tf.constant(content), tf.constant(side)).numpy()

            squares = np.stack(list(pool.map(decode, encoded)))
            decoding = best_seconds(lambda: list(pool.map(decode, encoded)))
        render = tf.function(lambda image, box: crops.render(image, box, None, size))
        parts = zip(batches(owner), batches(boxes), strict=True)
        seen = outputs(render(tf.constant(squares[number]), tf.constant(box)) for number, box in parts)
        one = tf.constant(squares[owner[:BATCH]]), tf.constant(boxes[:BATCH])
        rows.append(
            {
                "store_size": side,
                "blurred": fidelity.blurred_share(sample, side, size),
                "kl": float(kl(expected, seen).mean()),
                "agreement": float((expected.argmax(1) == seen.argmax(1)).mean()),
                "kib": side * side * 3 / 1024,
                "view_us": best_seconds(lambda: render(*one).numpy()) / len(one[1]) * 1e6,  # noqa: B023 - the same
                "decode_per_s": len(encoded) / decoding,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    view = tf.constant(np.array(reference[:BATCH]))
    forward = best_seconds(lambda: logits(view).numpy()) / len(view) * 1e6
    height, width = np.median(sizes, axis=0).astype(int)
    print(f"\noriginals of {height} x {width} pixels (medians); the teacher takes {forward:,.0f} µs for a view\n")
    print("| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(form.format(row[key]) for key, _, form in COLUMNS) + " |")


if __name__ == "__main__":
    main()
