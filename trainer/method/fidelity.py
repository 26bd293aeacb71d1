"""How many training crops are blurred because images are stored as small squares.

The paper crops the full-size file. A crop of a square that was made smaller first has fewer pixels
than its view where it covers a small part of the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf

from trainer.core.config import Config
from trainer.method import views
from trainer.method.counter_rng import uniform
from trainer.method.crops import DRAWS_PER_CROP

_CROPS = 8192  # sampled; the standard error of a share is at most 0.6 %
NEGLIGIBLE = 0.02  # as many crops of a file of 500 x 667 pixels have fewer than 128 pixels there
VIEW_SHARE = 0.25  # of the models' operations, which resampling the views may take


@dataclasses.dataclass(frozen=True)
class CropSample:
    """A sample of the training crops.

    Attributes:
        extents: float32 [n, 2], height and width of each crop as fractions of its image.
        sizes: float32 [n, 2], height and width of the originals in pixels.
    """

    extents: np.ndarray
    sizes: np.ndarray


def sample_crops(config: Config, sizes: np.ndarray) -> CropSample | None:
    """Samples the student's crops; the same arguments give the same sample.

    Args:
        config: what describes the crops.
        sizes: float32 [k, 2], height and width of originals in pixels; each is used equally often.

    Returns:
        None if there are no sizes, or if the recipe itself crops a resized square
        (`--resize_size`, `--compat=crop`) and so never reads the original's pixels.
    """
    crop = views.find_crop(config, views.mode(config).student)
    if not crop.crop_first or not len(sizes):
        return None
    chosen = sizes[np.linspace(0, len(sizes), _CROPS, endpoint=False).astype(int)]
    draws = uniform(0, 0, tf.range(_CROPS), DRAWS_PER_CROP) if crop.random else None
    return CropSample(crop.box(config, tf.constant(chosen), draws).numpy()[:, 2:], chosen)


def blurred_share(crops: CropSample, side: int, view_size: int) -> float:
    """Share of crops, in [0, 1], that are blurrier than the same crops of the originals.

    Such a crop has fewer stored pixels than its view along an axis on which the original has more
    than were stored.

    Args:
        crops: the sample.
        side: of the stored squares, in pixels.
        view_size: side of the view that a crop is resized to, in pixels.
    """
    too_few = crops.extents * side < view_size
    return float((too_few & (side < crops.sizes)).any(axis=1).mean())


def view_macs(side: int, view_sizes: Iterable[int]) -> int:
    """Multiplications and additions (pairs) of resampling one image: two products of matrices for
    each size of view.

    Args:
        side: of the stored squares, in pixels.
        view_sizes: sides of the views, in pixels; equal ones are made once.
    """
    return sum(3 * size * side * (side + size) for size in set(view_sizes))


def useful_sides(crops: CropSample, smallest: int, view_size: int) -> Iterator[int]:
    """Sides of stored squares in pixels: `smallest`, then larger ones in steps of half a view, up
    to the first that blurs no more than `NEGLIGIBLE` of the crops.

    Args:
        crops: the sample.
        smallest: the first side, in pixels.
        view_size: side of the views in pixels.
    """
    yield (side := smallest)
    while blurred_share(crops, side, view_size) > NEGLIGIBLE:
        yield (side := side + max(1, view_size // 2))
