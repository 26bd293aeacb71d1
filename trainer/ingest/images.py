"""Makes sure that training can decode image files, and converts those that it cannot.

JPEG files, and PNG, BMP and GIF files that TensorFlow decodes alike everywhere, keep their bytes.
Everything else (WebP, AVIF, TIFF, transparency, more than 8 bits per channel, an animated GIF)
becomes an RGB PNG, with transparency on white. HEIC and JPEG XL need the extra `images`.

Sizes come from headers. Every image is decoded once, and what the decoder only warns about makes
it unusable (`strict_decode`).

Values become 8 bits by the kind of number that a file stores, never by the values that happen to be
in it: 16-bit integers from 0 to 65535 become 0 to 255, and so do floats from 0 to 1. Where the kind
does not tell (32 bits, floats up to a little more than 1, or beyond 255), the image is refused.

EXIF: cameras store an image as the sensor saw it and record the rotation in a tag. Training, the
exported model and TensorFlow's decoder ignore the tag, and so do the data sets of the paper.
`upright` applies it, at the price of new bytes (a PNG).
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import struct
import threading
import zlib

import google_crc32c
import numpy as np
from PIL import Image, ImageOps

from trainer.core.errors import DataError
from trainer.data import image_header, strict_decode
from trainer.data.records import ImageRecord
from trainer.io import files

NO_DIGEST = bytes(8)
_ORIENTATION = 0x0112  # EXIF tag
# Modes that TensorFlow decodes to the pixels that Pillow gives.
_MODES = {"JPEG": ("L", "RGB", "CMYK"), "PNG": ("1", "L", "P", "RGB"), "GIF": ("L", "P", "RGB"), "BMP": ("RGB",)}
_NAMES = {"WEBP": "WebP", "HEIF": "HEIC", "JXL": "JPEG XL", "JPEG2000": "JPEG 2000"}  # where Pillow's differ
_TWELVE_BITS = 4096
_LEAST_WHITE = 16  # floats above 1 but below it are more likely 0 to 1 and beyond than 0 to 255
# What reads a format: package and module. Both bring libraries under the GPL, so they are an extra.
_PACKAGES = {"HEIC": ("pillow-heif", "pillow_heif"), "JPEG XL": ("pillow-jxl-plugin", "pillow_jxl")}
# What a file holds that is no image, by how it begins (in lower case).
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer: git lfs pull brings the file"),
    (b"<!doctype html", "an HTML page, such as a sign-in or an error: download the file again"),
    (b"<html", "an HTML page, such as a sign-in or an error: download the file again"),
    (b"<svg", "an SVG drawing: export it as PNG"),
    (b"<?xml", "XML: export a drawing as PNG, or download the file again"),
    (b"{", "JSON, such as an error of a server: download the file again"),
    (b"%pdf", "a PDF: export its pages as images"),
    (b"pk\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "a gzip file: unpack it"),
    (b"\x00\x05\x16\x07", "notes of macOS about a file (AppleDouble): delete it"),
)
# What decoders raise on damaged files; RuntimeError: those of optional packages.
_ERRORS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)

_lock = threading.Lock()


class UnusableImage(DataError):
    """An image that cannot be used.

    Attributes:
        location: which one.
        reason: why, without the location.
        needs_decoder: an installation of the extra `images` would change that.
    """

    def __init__(self, location: str, reason: str, *, needs_decoder: bool = False) -> None:
        """
        Args:
            location: file, or file and record.
            reason: why it cannot be used.
            needs_decoder: the extra `images` reads it.
        """
        super().__init__(f"{location}: {reason}")
        self.location, self.reason, self.needs_decoder = location, reason, needs_decoder


class _MissingDecoder(ValueError):
    """The format needs a package that is not installed."""


@dataclasses.dataclass(frozen=True)
class ValidatedImage:
    """An image that training can decode.

    Attributes:
        record: the record to write.
        rotation_ignored: its EXIF tag asks for a rotation or reflection that was not applied.
        converted: the kind of file that was re-encoded as PNG, such as "WebP"; empty: it kept its
            bytes.
        first_of_several: the kind of file that holds more images, of which the first was taken,
            such as "TIFF"; empty: it holds one.
        dark: it has 16 bits per channel, and no value reaches 4096, as if 12 bits were stored.
        digest: 8 bytes, equal for images with equal pixels; `NO_DIGEST`: not known. JPEG files are
            compared with each other, at an eighth of their size, and all others with each other.
    """

    record: ImageRecord
    rotation_ignored: bool = False
    converted: str = ""
    first_of_several: str = ""
    dark: bool = False
    digest: bytes = NO_DIGEST


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
        with _open(encoded) as image:
            return _validate(image, encoded, label, name, upright)
    except _MissingDecoder as error:
        raise UnusableImage(location, str(error), needs_decoder=True) from error
    except _ERRORS as error:
        why = foreign(encoded) or files.reason(error)
        raise UnusableImage(location, f"the image cannot be read ({why})") from error


def _open(encoded: bytes) -> Image.Image:
    kind = image_header.sniff(encoded[: image_header.SNIFF_BYTES])
    if kind in _PACKAGES:
        package, module = _PACKAGES[kind]
        if not _register(module):
            raise _MissingDecoder(
                f"a {kind} image, which needs {package}: pip install 'funmatch[images]', then run this again"
            )
    try:
        return Image.open(io.BytesIO(encoded))
    except Image.UnidentifiedImageError:
        raise ValueError(_what(encoded, kind)) from None


def _register(module: str) -> bool:
    """Makes Pillow read a format of an optional package; returns whether it is installed."""
    with _lock:
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            return False
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
        return True


def _what(encoded: bytes, kind: str) -> str:
    """Says what bytes are that Pillow cannot open, as far as it can be seen.

    Args:
        encoded: bytes of a file.
        kind: format that its first bytes mean; empty: none.
    """
    if kind == "AVIF" and "AVIF" not in Image.OPEN:
        return "an AVIF image, which this Pillow does not read: pip install 'pillow>=11.3'"
    if kind:
        try:
            image_header.parse_header(encoded)
        except image_header.InvalidImage as error:
            if kind in _MODES:
                return str(error)
        return f"a damaged {kind} of {len(encoded):,} bytes"
    if encoded[4:8] == b"ftyp":
        return f"a film, or an image of the kind {encoded[8:12].decode('ascii', 'replace')!r}, which is not read"
    if encoded[:1] == b"\x08" and encoded[2:3] == b"\x12":
        return "a serialized tensor: store an encoded image instead, as tf.io.encode_png makes it"
    if not encoded.strip(b"\0"):
        return f"{len(encoded):,} zeros, as a failed disk or download leaves them: restore the file"
    side = round((len(encoded) / 3) ** 0.5)
    if side * side * 3 == len(encoded):
        return (
            f"{len(encoded):,} bytes that begin as no known format, perhaps {side} x {side} raw pixels: store an encoded image "
            "instead, as tf.io.encode_png makes it"
        )
    return f"{len(encoded):,} bytes that begin as no known format: {encoded[:8]!r}"


def foreign(encoded: bytes) -> str:
    """Says what a file is that is no image but often has an image's name.

    Args:
        encoded: its bytes, at least the first 64.

    Returns:
        What it is and what to do; "": not known.
    """
    if not encoded:
        return "an empty file"
    start = encoded[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for magic, what in _FOREIGN if start.startswith(magic)), "")


def _validate(image: Image.Image, encoded: bytes, label: int, name: str, upright: bool) -> ValidatedImage:
    # An MPO, made by some telephones, is a JPEG followed by a second one.
    file_format = "JPEG" if image.format == "MPO" else str(image.format)
    if image.width * image.height > image_header.MAX_PIXELS:
        raise ValueError(f"{image.height:,} x {image.width:,} pixels, more than {image_header.MAX_PIXELS:,} in all")
    frames = getattr(image, "n_frames", 1) if file_format != "JPEG" else 1
    several = _NAMES.get(file_format, file_format) if frames > 1 else ""
    keep_bytes = (
        image.mode in _MODES.get(file_format, ())
        and "transparency" not in image.info
        and (file_format != "GIF" or frames == 1)
        and _passes_training_check(encoded)
    )
    rotated = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    width, height = image.size
    if file_format == "JPEG":  # also where it is converted: Pillow is silent about holes
        pixels = strict_decode.decode_strictly(encoded, file_format, height, width)
    if keep_bytes and not (rotated and upright):
        if file_format != "JPEG":
            pixels = strict_decode.decode_strictly(encoded, file_format, height, width)
        record = ImageRecord(encoded, height, width, label, name)
        return ValidatedImage(record, rotated, first_of_several=several, digest=_digest(pixels, height, width))
    if file_format == "PNG":
        strict_decode.check_png(encoded)
    kind = _kind(image, encoded, file_format, frames)
    dark = image.mode.startswith("I;16") and int(np.asarray(image).max()) < _TWELVE_BITS
    oriented = _to_rgb(ImageOps.exif_transpose(image) if upright else image, file_format)
    buffer = io.BytesIO()
    oriented.save(buffer, "PNG")  # decodable, since Pillow just wrote it
    width, height = oriented.size
    return ValidatedImage(
        ImageRecord(buffer.getvalue(), height, width, label, name),
        rotated and not upright,
        converted=kind,
        first_of_several=several,
        dark=dark,
        digest=_digest(np.asarray(oriented), height, width),
    )


def _passes_training_check(encoded: bytes) -> bool:
    """Whether training accepts these bytes as they are.

    A truncated file fails here and in Pillow's decoder.
    """
    try:
        image_header.parse_header(encoded)
    except image_header.InvalidImage:
        return False
    return True


def _kind(image: Image.Image, encoded: bytes, file_format: str, frames: int) -> str:
    """Describes a file that is converted, by what training cannot decode in it.

    Args:
        image: as Pillow opened it.
        encoded: bytes of the file.
        file_format: of Pillow.
        frames: number of images in the file.
    """
    name = _NAMES.get(file_format, file_format)
    if file_format not in _MODES:
        return name
    if file_format == "GIF" and frames > 1:
        return "animated GIF"
    if "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands():
        return f"{name} with transparency"
    if file_format == "PNG" and encoded[24] > 8:
        return f"16-bit {name}"
    return name


def _digest(pixels: np.ndarray, height: int, width: int) -> bytes:
    """Returns 8 bytes that are equal for equal pixels: two checksums, which cost little."""
    content = struct.pack("<II", height, width) + pixels.tobytes()
    return struct.pack("<II", google_crc32c.value(content), zlib.crc32(content))


def _to_rgb(image: Image.Image, file_format: str) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, with transparency laid on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode, file_format))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_bytes(values: np.ndarray, mode: str, file_format: str) -> np.ndarray:
    """Scales numbers of more than 8 bits to uint8, by their kind.

    Args:
        values: [height, width].
        mode: of Pillow: F (float), I (32-bit integer) or I;16...
        file_format: of Pillow. In a PNG or PPM, I is 16 bits.

    Raises:
        ValueError: the kind does not say what is black and what is white.
    """
    low, high = values.min(), values.max()
    if mode.startswith("I;16") or (mode == "I" and file_format in ("PNG", "PPM") and low >= 0 and high <= 65535):
        return (values.astype(np.float64) / 257).round().astype(np.uint8)
    if mode == "I":
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"32-bit integers from {low} to {high}, and it is not known what is black and white: save it with 8 or 16 bits"
            )
        return values.astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError("floating-point values that are NaN or infinite: save it with 8 bits")
    if low < 0 or high > 255:
        raise ValueError(
            f"floating-point values from {low:g} to {high:g}, neither 0 to 1 nor 0 to 255: save it with 8 bits"
        )
    if 1 < high < _LEAST_WHITE:
        raise ValueError(
            f"floating-point values from {low:g} to {high:g}, and it is not known whether 1 or 255 is white: save it with 8 bits"
        )
    return (values.astype(np.float64) * (255 if high <= 1 else 1)).round().astype(np.uint8)
