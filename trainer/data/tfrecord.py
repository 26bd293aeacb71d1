"""The TFRecord format: framing, masked CRC32C, and where a damaged file can be read again."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import google_crc32c

from trainer.core.errors import DataError

HEADER = struct.Struct("<QI")  # length, masked CRC of the length
FOOTER = struct.Struct("<I")  # masked CRC of the payload
_LONGEST = 1 << 31  # a tf.train.Example cannot be longer


def masked_crc(payload: bytes | memoryview) -> int:
    """TFRecord's masked CRC32C of `payload`."""
    crc = google_crc32c.value(bytes(payload))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """A TFRecord: length, its CRC, payload, its CRC."""
    length = struct.pack("<Q", len(payload))
    return length + FOOTER.pack(masked_crc(length)) + payload + FOOTER.pack(masked_crc(payload))


def payloads(content: bytes | memoryview, where: str) -> Iterator[tuple[int, memoryview]]:
    """Offsets and payloads of the records in a TFRecord file's `content`, each checked against its CRC.

    Raises:
        DataError: a record is cut off or damaged; the text has file, record number and byte offset.
    """
    for number, (offset, payload, trouble) in enumerate(read_frames(content)):
        if payload is None:
            raise DataError(f"{location(where, number, offset)} {trouble}")
        yield offset, payload


def read_frames(content: bytes | memoryview) -> Iterator[tuple[int, memoryview | None, str]]:
    """Offset, payload and trouble of each record; payload is None where there is trouble.

    After a record whose end is not known, it goes on at the next one that has a whole head. Records between the two are not
    told: whoever knows how many there should be must count.
    """
    view, offset = memoryview(content), 0
    while offset < len(view):
        payload, trouble = _frame_at(view, offset)
        yield offset, payload, trouble
        if payload is not None:
            offset += HEADER.size + len(payload) + FOOTER.size
        elif trouble == _DAMAGED:
            offset += HEADER.size + HEADER.unpack_from(view, offset)[0] + FOOTER.size
        else:
            offset = _next_head(view, offset + 1)


_DAMAGED = "is damaged (its CRC32C does not match)"


def _frame_at(view: memoryview, offset: int) -> tuple[memoryview | None, str]:
    if offset + HEADER.size > len(view):
        return None, "is cut off"
    length, crc = HEADER.unpack_from(view, offset)
    if masked_crc(view[offset : offset + 8]) != crc:
        return None, "has a damaged length"
    start, end = offset + HEADER.size, offset + HEADER.size + length
    if length > _LONGEST or end + FOOTER.size > len(view):
        return None, "is cut off"
    if masked_crc(view[start:end]) != FOOTER.unpack_from(view, end)[0]:
        return None, _DAMAGED
    return view[start:end], ""


def _next_head(view: memoryview, offset: int) -> int:
    """Where the next record with a whole head begins, at `offset` or after it; the file's length if nowhere."""
    content = bytes(view)
    # A length below 2^31 has zeros in its upper half, and bytes.find is quick.
    while (zeros := content.find(bytes(4), offset + 4)) >= 0:
        offset = zeros - 4
        if _frame_at(view, offset)[1] in ("", _DAMAGED):
            return offset
        offset += 1
    return len(view)


def location(path: str, number: int, offset: int) -> str:
    """A record for messages: file, number, byte offset."""
    return f"{path}: record {number} at byte {offset}"
