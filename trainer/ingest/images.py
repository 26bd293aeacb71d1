"""Image files as people have them: what a header says, and proof that training can decode the rest.

JPEG files, and PNG, BMP and GIF files that TensorFlow decodes alike everywhere, keep their bytes. What it does not (WebP,
TIFF, transparency, more than 8 bits a channel, a moving GIF) becomes an RGB PNG, transparency laid on white.

Sizes come from headers. The proof decodes a JPEG at an eighth of its size, which reads every byte of it and leaves out
most of the arithmetic; other formats are decoded in full.

EXIF: cameras store a picture as the sensor lay and note how to turn it. Training and the exported model do not turn
pictures, TensorFlow's decoder does not, and neither do the sets of the paper. `upright` turns what has such a note, at
the price of new bytes (a PNG).
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import tensorflow as tf
from PIL import Image, ImageOps

from trainer.core.errors import DataError
from trainer.data import image_header
from trainer.data.records import ImageRecord, decode
from trainer.io import files

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_ORIENTATION = 0x0112
_MODES = {"JPEG": ("L", "RGB", "CMYK"), "PNG": ("1", "L", "P", "RGB"), "GIF": ("L", "P", "RGB"), "BMP": ("RGB",)}


class UnusableImage(DataError):
    """One picture that cannot be used; the text names it."""


@dataclasses.dataclass(frozen=True)
class ValidatedImage:
    """A picture that training can decode.

    Attributes:
        picture: as it goes into a record.
        turned: its EXIF note asks for a rotation or a mirror, and it was not obeyed.
        converted: its bytes are new.
    """

    picture: ImageRecord
    turned: bool = False
    converted: bool = False


def validate_image(encoded: bytes, label: int, name: str, where: str, upright: bool = False) -> ValidatedImage:
    """What `encoded` is, proved decodable.

    Args:
        encoded: the bytes of an image file.
        label: >= 0, or -1 for none.
        name: goes into the record.
        where: file, or file and record, for messages.
        upright: obey EXIF.

    Raises:
        Unusable: it is no image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            # An MPO is a JPEG with a second one behind it, as some telephones make them.
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            plain = image.mode in _MODES.get(kind, ()) and "transparency" not in image.info
            plain = plain and (kind != "GIF" or not getattr(image, "is_animated", False)) and _as_it_is(encoded)
            if image.width * image.height > image_header.MAX_PIXELS:
                raise ValueError(
                    f"{image.height:,} x {image.width:,} pixels, more than {image_header.MAX_PIXELS:,} in all"
                )
            turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            if plain and not (turned and upright):
                width, height = image.size
                _prove(encoded, kind, height, width)
                return ValidatedImage(ImageRecord(encoded, height, width, label, name), turned)
            buffer = io.BytesIO()
            straight = ImageOps.exif_transpose(image) if upright else image
            _opaque(straight).save(buffer, "PNG")
            width, height = straight.size
            # Pillow wrote it: there is nothing to prove.
            return ValidatedImage(
                ImageRecord(buffer.getvalue(), height, width, label, name), turned and not upright, True
            )
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, tf.errors.OpError) as error:
        raise UnusableImage(f"{where}: the image cannot be read ({files.reason(error)})") from error


def _as_it_is(encoded: bytes) -> bool:
    """Whether training takes these bytes. What is cut off is not healed by that: Pillow does not read it either."""
    try:
        image_header.parse_header(encoded)
    except image_header.InvalidImage:
        return False
    return True


def _prove(encoded: bytes, kind: str, height: int, width: int) -> None:
    """Raises if TensorFlow cannot decode `encoded`, or finds another size than the header's."""
    if kind == "JPEG":
        small = tf.io.decode_jpeg(encoded, channels=3, ratio=8).shape
        found, said = tuple(small[:2]), (-(-height // 8), -(-width // 8))
    else:
        found, said = tuple(decode(tf.constant(encoded)).shape[:2]), (height, width)
    if found != said:
        raise ValueError(f"its header says {height} x {width} pixels, and it holds others")


def _opaque(image: Any) -> Any:
    """RGB of any Pillow image: 16-bit grey scaled to 8 bits, transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values * 255.0 / top, 0, 255).round().astype(np.uint8))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
