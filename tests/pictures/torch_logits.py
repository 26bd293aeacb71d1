"""Writes what torch computes with the weights of EfficientNet-Lite0.

    torch_logits.py WHEEL_OF_THE_WEIGHTS WHEEL_OF_SCIKIT_IMAGE OUT.npz

Run by hand, in an environment of its own with `torch`, `pillow` and, installed with `--no-deps`,
`efficientnet-lite-pytorch==0.1.0`: torch is too large for a test to install. The committed file was
written by torch 2.13.0 on a CPU. The pictures are cuts of a PNG file of scikit-image, so that
neither a decoder nor a filter makes a difference.
"""

from __future__ import annotations

import io
import sys
import zipfile

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

CUTS = ((224, 40, 120), (128, 60, 150))  # side, first row and first column of each


def main(weights: str, photographs: str, out: str) -> None:
    with zipfile.ZipFile(weights) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        state = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    with zipfile.ZipFile(photographs) as archive:
        pixels = np.asarray(Image.open(io.BytesIO(archive.read("skimage/data/chelsea.png"))))
    found = {}
    for side, top, left in CUTS:
        model = EfficientNet.from_name("efficientnet-lite0", image_size=side).eval()
        model.load_state_dict(state)
        cut = pixels[top : top + side, left : left + side].astype(np.float32)
        with torch.no_grad():
            logits = model(torch.from_numpy((cut - 127) / 128).permute(2, 0, 1)[None])
        found[f"{side}_{top}_{left}"] = logits.numpy()[0]
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
