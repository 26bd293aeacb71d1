"""Decodes images strictly: what a decoder only warns about is an error.

TensorFlow's and Pillow's JPEG decoders fill what is missing with grey and return no error, for a
file with a hole and for one that was cut and then closed. libjpeg warns about both, and
`simplejpeg` raises its warnings.

Most of the cost of a JPEG is its arithmetic, and the errors are in what comes before it, so a JPEG
is decoded at an eighth of its size, which reads every byte.
"""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import simplejpeg
import tensorflow as tf

from trainer.data.image_header import InvalidImage
from trainer.io import files

_LEAST_SIDE = 32  # pixels that a JPEG keeps on each side, as far as it has them
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_BIT_BUFFER = 16  # bytes after the last pixel that libjpeg may have taken in before it stopped


def decode_strictly(encoded: bytes, file_format: str, height: int, width: int) -> np.ndarray:
    """Decodes an image at little cost, and finds every damage that its decoder notices.

    Args:
        encoded: an image file that `image_header.parse_header` accepts.
        file_format: JPEG, PNG, GIF or BMP.
        height: that its header declares, in pixels.
        width: likewise.

    Returns:
        uint8 [rows, columns, 3]. A JPEG has an eighth of its size, or more if it is small.

    Raises:
        InvalidImage: it is damaged; the message says how.
    """
    if file_format == "JPEG":
        return _decode_jpeg(encoded, height, width)
    if file_format == "PNG":
        check_png(encoded)
    try:
        pixels: np.ndarray = tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        raise InvalidImage(f"a {file_format} that cannot be decoded: {files.reason(error)}") from error
    if pixels.shape[:2] != (height, width):
        raise InvalidImage(f"its header says {height} x {width} pixels, but it decodes to another size")
    return pixels


def _decode_jpeg(encoded: bytes, height: int, width: int) -> np.ndarray:
    least = {"min_height": min(height, _LEAST_SIDE), "min_width": min(width, _LEAST_SIDE)}
    checked = encoded
    while True:
        try:
            return simplejpeg.decode_jpeg(checked, colorspace="RGB", strict=True, **least)
        except ValueError as error:
            message = str(error)
        if _ends_in_padding(checked, message):
            return simplejpeg.decode_jpeg(checked, colorspace="RGB", strict=False, **least)
        if message.startswith("tj"):  # a sampling that TurboJPEG does not know, and libjpeg does
            return _decode_unusual_jpeg(encoded)
        # libjpeg reports its first warning only. One that means nothing may hide one that does.
        without = _without_oddity(checked, message)
        if without == checked:
            raise InvalidImage(f"a damaged JPEG: {message}")
        checked = without


def _decode_unusual_jpeg(encoded: bytes) -> np.ndarray:
    try:
        pixels: np.ndarray = tf.io.decode_jpeg(encoded, channels=3, ratio=8).numpy()
    except tf.errors.OpError as error:
        raise InvalidImage(f"a JPEG that cannot be decoded: {files.reason(error)}") from error
    return pixels


def _ends_in_padding(encoded: bytes, message: str) -> bool:
    """Whether the unused bytes before a JPEG's end were put there after a complete image.

    Some cameras do that. A hole also leaves bytes over, since zeros decode to many pixels in few
    bits, but then the hole is longer than what is left over.
    """
    found = _EXTRANEOUS.search(message)
    end = encoded.find(b"\xff\xd9", encoded.rfind(b"\xff\xda"))
    if not found or end < 0:
        return False
    left_over = encoded[end - int(found[1]) : end]
    return left_over.count(left_over[:1]) == len(left_over) and (
        len(left_over) + _BIT_BUFFER >= end - len(encoded[:end].rstrip(left_over[:1]))
    )


def _without_oddity(encoded: bytes, message: str) -> bytes:
    """Corrects what libjpeg warns about although no pixel depends on it."""
    if "JFIF revision" in message:
        version = encoded.find(b"JFIF\0") + 5
        return encoded[:version] + b"\1\1" + encoded[version + 2 :]
    if "Invalid SOS parameters" in message:  # which range of coefficients: all, in a sequential JPEG
        corrected, scan = bytearray(encoded), encoded.find(b"\xff\xda")
        while 0 <= scan < len(encoded) - 4:
            end = scan + 2 + struct.unpack_from(">H", encoded, scan + 2)[0]
            corrected[end - 3 : end] = b"\x00\x3f\x00"
            scan = encoded.find(b"\xff\xda", scan + 2)
        return bytes(corrected)
    return encoded


def check_png(encoded: bytes) -> None:
    """Checks the CRC of every chunk of a PNG; Pillow does not check those of pixels.

    Args:
        encoded: a whole file.

    Raises:
        InvalidImage: a chunk is damaged or cut off.
    """
    position, kind = 8, b""
    view = memoryview(encoded)
    while kind != b"IEND":
        if position + 12 > len(encoded):
            raise InvalidImage(f"a PNG that is cut off: {len(encoded):,} bytes and no IEND chunk")
        length, kind = struct.unpack_from(">I4s", encoded, position)
        end = position + 8 + length
        if end + 4 > len(encoded):
            raise InvalidImage(f"a PNG that is cut off: {len(encoded):,} bytes and no IEND chunk")
        # A capital letter marks a chunk that decoding needs.
        if kind[:1].isupper() and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", encoded, end)[0]:
            raise InvalidImage(f"a damaged PNG: the CRC of chunk {kind.decode('ascii', 'replace')} does not match")
        position = end + 4
