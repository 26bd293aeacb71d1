"""What the bytes of an encoded picture say of themselves, read without decoding it: format, size, and whether the end is there.

A decoder believes any size that a header claims, TensorFlow's takes all frames of a GIF into memory to give one, and makes
8 bits of 16 without a word. So a picture is looked at here before it is decoded: some microseconds, and no memory.
"""

from __future__ import annotations

import dataclasses
import struct

# A decoder's output is resized as float32, 12 bytes a pixel: 0.8 GB in each decoding thread for a picture of this size. It is above
# what cameras of 60 megapixels make, and below what a few hundred hostile bytes can claim.
MAX_PIXELS = 1 << 26

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame; the three are tables and an extension
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


class InvalidImage(ValueError):
    """The picture cannot be used; the text says why."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What an encoded picture claims to be: "JPEG", "PNG", "GIF" or "BMP"; height and width in pixels."""

    kind: str
    height: int
    width: int


def parse_header(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Reads the header, and finds the end.

    Args:
        encoded: a whole file.
        max_pixels: largest height x width that is let through to a decoder.

    Raises:
        Unfit: not one of the four formats, of no or too many pixels, with more than 8 bits a channel (PNG) or one frame (GIF),
            or cut off.
    """
    for magic, kind, read in _FORMATS:
        if encoded.startswith(magic):
            try:
                height, width = read(encoded)
            except (IndexError, struct.error) as error:
                raise InvalidImage(f"a {kind} that is cut off in its header, after {len(encoded):,} bytes") from error
            if height < 1 or width < 1:
                raise InvalidImage(f"a {kind} of {height} x {width} pixels")
            if height * width > max_pixels:
                raise InvalidImage(f"a {kind} of {height:,} x {width:,} pixels, more than {max_pixels:,} in all")
            return Header(kind, height, width)
    raise InvalidImage("no JPEG, PNG, GIF or BMP" if encoded else "an empty image")


def _jpeg(encoded: bytes) -> tuple[int, int]:
    place, size = 2, None
    while True:
        if encoded[place] != 0xFF:
            raise InvalidImage(f"a damaged JPEG: no marker at its byte {place:,}")
        marker = encoded[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _ALONE:
            place += 2
            continue
        if marker == 0xD9:
            raise InvalidImage("a JPEG without a picture")
        (length,) = struct.unpack_from(">H", encoded, place + 2)
        if marker in _SOF:
            bits, *size = struct.unpack_from(">BHH", encoded, place + 4)
            if bits != 8:
                raise InvalidImage(f"a JPEG of {bits} bits a channel: training decodes 8")
        if marker == 0xDA:
            break
        place += 2 + length
    # Within a scan 0xFF is always followed by a zero or a restart, so an end marker is the end and nothing else.
    if encoded.find(b"\xff\xd9", place) < 0:
        raise InvalidImage(f"a JPEG that is cut off: {len(encoded):,} bytes and no end-of-image marker")
    if not size:
        raise InvalidImage("a JPEG that names no size")
    return size[0], size[1]


def _png(encoded: bytes) -> tuple[int, int]:
    width, height, bits = struct.unpack_from(">IIB", encoded, 16)
    if bits > 8:
        raise InvalidImage(f"a PNG of {bits} bits a channel: training decodes 8, and would drop the rest unseen")
    place = 8
    while encoded[place + 4 : place + 8] != b"IEND":
        (length,) = struct.unpack_from(">I", encoded, place)
        place += 12 + length
        if place + 12 > len(encoded):
            raise InvalidImage(f"a PNG that is cut off: {len(encoded):,} bytes and no IEND chunk")
    return height, width


def _gif(encoded: bytes) -> tuple[int, int]:
    width, height, flags = struct.unpack_from("<HHB", encoded, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = 0
    try:
        while (kind := encoded[place]) != 0x3B:
            if kind == 0x2C:
                frames += 1
                wide, high, flags = struct.unpack_from("<HHB", encoded, place + 5)
                width, height = max(width, wide), max(height, high)
                place += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
            elif kind == 0x21:
                place += 2
            else:
                raise InvalidImage(f"a damaged GIF: block {kind:#04x} at its byte {place:,}")
            while encoded[place]:
                place += 1 + encoded[place]
            place += 1
    except (IndexError, struct.error) as error:
        raise InvalidImage(f"a GIF that is cut off: {len(encoded):,} bytes and no trailer") from error
    if frames != 1:
        raise InvalidImage(f"a GIF of {frames} frames: training takes one")
    return height, width


def _bmp(encoded: bytes) -> tuple[int, int]:
    start, _, width, height, _, bits = struct.unpack_from("<IIiiHH", encoded, 10)
    height = abs(height)  # negative: stored from the top
    rows = (width * bits + 31) // 32 * 4 * height
    if width > 0 and len(encoded) < start + rows:
        raise InvalidImage(f"a BMP that is cut off: {len(encoded):,} of {start + rows:,} bytes")
    return height, width


_FORMATS = (
    (b"\xff\xd8", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"GIF8", "GIF", _gif),
    (b"BM", "BMP", _bmp),
)
