"""Makes sure that training can decode image files, and converts those that it cannot.

JPEG files, and PNG, BMP and GIF files that TensorFlow decodes alike everywhere, keep their bytes.
Everything else (WebP, TIFF, transparency, more than 8 bits per channel, an animated GIF) becomes
an RGB PNG, with transparency on white.

Sizes come from headers. A JPEG is validated by decoding it at an eighth of its size, which reads
every byte and skips most of the arithmetic; other formats are decoded in full.

EXIF: cameras store an image as the sensor saw it and record the rotation in a tag. Training, the
exported model and TensorFlow's decoder ignore the tag, and so do the data sets of the paper.
`upright` applies it, at the price of new bytes (a PNG).
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from trainer.core.errors import DataError
from trainer.data import image_header
from trainer.data.records import ImageRecord, decode
from trainer.io import files

_ORIENTATION = 0x0112  # EXIF tag
# Modes that TensorFlow decodes to the pixels that Pillow gives.
_MODES = {"JPEG": ("L", "RGB", "CMYK"), "PNG": ("1", "L", "P", "RGB"), "GIF": ("L", "P", "RGB"), "BMP": ("RGB",)}


class UnusableImage(DataError):
    """An image that cannot be used; the message says which one."""


@dataclasses.dataclass(frozen=True)
class ValidatedImage:
    """An image that training can decode.

    Attributes:
        record: the record to write.
        rotation_ignored: its EXIF tag asks for a rotation or reflection that was not applied.
        converted: it was re-encoded as PNG.
    """

    record: ImageRecord
    rotation_ignored: bool = False
    converted: bool = False


def validate_image(encoded: bytes, label: int, name: str, location: str, upright: bool = False) -> ValidatedImage:
    """Checks that an image file can be decoded, and converts it if training could not decode it.

    Args:
        encoded: bytes of an image file.
        label: class number, or -1 for none.
        name: file name to store in the record.
        location: file, or file and record, for messages.
        upright: apply the EXIF rotation.

    Raises:
        UnusableImage: it is not an image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            # An MPO, made by some telephones, is a JPEG followed by a second one.
            file_format = "JPEG" if image.format == "MPO" else str(image.format)
            keep_bytes = (
                image.mode in _MODES.get(file_format, ())
                and "transparency" not in image.info
                and (file_format != "GIF" or not getattr(image, "is_animated", False))
                and _passes_training_check(encoded)
            )
            if image.width * image.height > image_header.MAX_PIXELS:
                raise ValueError(
                    f"{image.height:,} x {image.width:,} pixels, more than {image_header.MAX_PIXELS:,} in all"
                )
            rotated = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            if keep_bytes and not (rotated and upright):
                width, height = image.size
                _check_decodable(encoded, file_format, height, width)
                return ValidatedImage(ImageRecord(encoded, height, width, label, name), rotated)
            buffer = io.BytesIO()
            oriented = ImageOps.exif_transpose(image) if upright else image
            _to_rgb(oriented).save(buffer, "PNG")  # decodable, since Pillow just wrote it
            width, height = oriented.size
            record = ImageRecord(buffer.getvalue(), height, width, label, name)
            return ValidatedImage(record, rotated and not upright, converted=True)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, tf.errors.OpError) as error:
        raise UnusableImage(f"{location}: the image cannot be read ({files.reason(error)})") from error


def _passes_training_check(encoded: bytes) -> bool:
    """Whether training accepts these bytes as they are.

    A truncated file fails here and in Pillow's decoder.
    """
    try:
        image_header.parse_header(encoded)
    except image_header.InvalidImage:
        return False
    return True


def _check_decodable(encoded: bytes, file_format: str, height: int, width: int) -> None:
    """Raises if TensorFlow cannot decode `encoded`, or to another size than the header's."""
    if file_format == "JPEG":
        decoded = tf.io.decode_jpeg(encoded, channels=3, ratio=8).shape
        expected = (-(-height // 8), -(-width // 8))
    else:
        decoded, expected = decode(tf.constant(encoded)).shape, (height, width)
    if tuple(decoded[:2]) != expected:
        raise ValueError(f"its header says {height} x {width} pixels, but it decodes to another size")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, with transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        maximum = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values * 255.0 / maximum, 0, 255).round().astype(np.uint8))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
