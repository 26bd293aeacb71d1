"""Checks encoded images without decoding them: format, size in pixels, and completeness.

A decoder allocates whatever size a header claims. TensorFlow's decodes every frame of a GIF to
return one, and silently reduces 16 bits per channel to 8. This check runs before decoding; it
takes microseconds and allocates nothing.
"""

from __future__ import annotations

import dataclasses
import struct

# A decoded image is resized as float32, 12 bytes per pixel: 0.8 GB per decoding thread at this
# size. Cameras of 60 megapixels stay below it; the sizes that a few hundred hostile bytes can
# claim do not.
MAX_PIXELS = 1 << 26

_SOF = frozenset(range(0xC0, 0xD0)) - {
    0xC4,
    0xC8,
    0xCC,
}  # start of frame; the excluded three are tables and an extension
# Sequential and progressive, with Huffman's or arithmetic coding. The others are lossless or
# hierarchical, which TensorFlow does not decode.
_DECODED_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


class InvalidImage(ValueError):
    """An encoded image that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What the header of an encoded image declares.

    Attributes:
        format: "JPEG", "PNG", "GIF" or "BMP".
        height: in pixels.
        width: in pixels.
    """

    format: str
    height: int
    width: int


def parse_header(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Parses the header of an image file and checks that the file is complete.

    Args:
        encoded: a whole file.
        max_pixels: largest height x width to accept.

    Raises:
        InvalidImage: none of the four formats, no pixels or too many, more than 8 bits per
            channel, more than one frame (GIF), or cut off.
    """
    for magic, format_name, read_size in _FORMATS:
        if encoded.startswith(magic):
            try:
                height, width = read_size(encoded)
            except (IndexError, struct.error) as error:
                raise InvalidImage(
                    f"a {format_name} that is cut off in its header, after {len(encoded):,} bytes"
                ) from error
            if height < 1 or width < 1:
                raise InvalidImage(f"a {format_name} of {height} x {width} pixels")
            if height * width > max_pixels:
                raise InvalidImage(f"a {format_name} of {height:,} x {width:,} pixels, more than {max_pixels:,} in all")
            return Header(format_name, height, width)
    raise InvalidImage("not a JPEG, PNG, GIF or BMP" if encoded else "an empty image")


def _jpeg(encoded: bytes) -> tuple[int, int]:
    position, size = 2, None
    while True:
        if encoded[position] != 0xFF:
            raise InvalidImage(f"a damaged JPEG: no marker at byte {position:,}")
        marker = encoded[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in _STANDALONE:
            position += 2
            continue
        if marker == 0xD9:
            raise InvalidImage("a JPEG without image data")
        (length,) = struct.unpack_from(">H", encoded, position + 2)
        if marker in _SOF:
            bits, *size = struct.unpack_from(">BHH", encoded, position + 4)
            if bits != 8:
                raise InvalidImage(f"a JPEG of {bits} bits per channel: training decodes 8")
            if marker not in _DECODED_SOF:
                raise InvalidImage("a lossless or hierarchical JPEG: training decodes the common kinds")
        if marker == 0xDA:
            break
        position += 2 + length
    # Within a scan 0xFF is followed by zero or a restart marker only, so an end marker found here
    # is the real end.
    if encoded.find(b"\xff\xd9", position) < 0:
        raise InvalidImage(f"a JPEG that is cut off: {len(encoded):,} bytes and no end-of-image marker")
    if not size:
        raise InvalidImage("a JPEG without a frame header")
    return size[0], size[1]


def _png(encoded: bytes) -> tuple[int, int]:
    width, height, bits = struct.unpack_from(">IIB", encoded, 16)
    if bits > 8:
        raise InvalidImage(f"a PNG of {bits} bits per channel: training decodes 8 and would silently drop the rest")
    position = 8
    while encoded[position + 4 : position + 8] != b"IEND":
        (length,) = struct.unpack_from(">I", encoded, position)
        position += 12 + length
        if position + 12 > len(encoded):
            raise InvalidImage(f"a PNG that is cut off: {len(encoded):,} bytes and no IEND chunk")
    return height, width


def _gif(encoded: bytes) -> tuple[int, int]:
    width, height, flags = struct.unpack_from("<HHB", encoded, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = 0
    try:
        while (block := encoded[position]) != 0x3B:
            if block == 0x2C:
                frames += 1
                frame_width, frame_height, flags = struct.unpack_from("<HHB", encoded, position + 5)
                width, height = max(width, frame_width), max(height, frame_height)
                position += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
            elif block == 0x21:
                position += 2
            else:
                raise InvalidImage(f"a damaged GIF: block {block:#04x} at byte {position:,}")
            while encoded[position]:
                position += 1 + encoded[position]
            position += 1
    except (IndexError, struct.error) as error:
        raise InvalidImage(f"a GIF that is cut off: {len(encoded):,} bytes and no trailer") from error
    if frames != 1:
        raise InvalidImage(f"a GIF of {frames} frames: training takes single images")
    return height, width


def _bmp(encoded: bytes) -> tuple[int, int]:
    start, _, width, height, _, bits = struct.unpack_from("<IIiiHH", encoded, 10)
    height = abs(height)  # negative: rows are stored top to bottom
    pixel_bytes = (width * bits + 31) // 32 * 4 * height
    if width > 0 and len(encoded) < start + pixel_bytes:
        raise InvalidImage(f"a BMP that is cut off: {len(encoded):,} of {start + pixel_bytes:,} bytes")
    return height, width


_FORMATS = (
    (b"\xff\xd8", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"GIF8", "GIF", _gif),
    (b"BM", "BMP", _bmp),
)

SNIFF_BYTES = 32  # of a file's start, enough for `sniff`

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)
# Brands of ISO base media files that are images; films have others.
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
}
_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})  # lengths of the headers that BMP has had


def sniff(head: bytes) -> str:
    """Returns the format of an image file, whatever its name, from its first bytes.

    Args:
        head: the first `SNIFF_BYTES` bytes, or the whole file if it is shorter.

    Returns:
        "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PNM", "AVIF", "HEIC", "JPEG XL", "JPEG 2000"
        or "".
    """
    for magic, format_name in _MAGIC:
        if head.startswith(magic):
            return format_name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # The major brand, then, after a version, compatible ones: mif1 alone means HEIF of any
        # codec.
        brands = [head[8:12], *(head[start : start + 4] for start in range(16, len(head) - 3, 4))]
        if brands[0] in _BRANDS:
            return "AVIF" if b"avif" in brands else _BRANDS[brands[0]]
        return ""
    if head[:2] == b"BM" and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in _BMP_HEADERS:
        return "BMP"
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PNM"
    return ""
