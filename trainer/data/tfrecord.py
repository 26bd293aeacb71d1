"""The TFRecord format: framing, masked CRC32C, and resynchronization after damage."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import google_crc32c

from trainer.core.errors import DataError

HEADER = struct.Struct("<QI")  # payload length, masked CRC32C of the length
FOOTER = struct.Struct("<I")  # masked CRC32C of the payload
_MAX_LENGTH = 1 << 31  # protobuf's limit for one message


def masked_crc(payload: bytes | memoryview) -> int:
    """Returns TFRecord's masked CRC32C of `payload`."""
    crc = google_crc32c.value(bytes(payload))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """Encodes one TFRecord: length, CRC of the length, payload, CRC of the payload."""
    length = struct.pack("<Q", len(payload))
    return length + FOOTER.pack(masked_crc(length)) + payload + FOOTER.pack(masked_crc(payload))


def payloads(content: bytes | memoryview, where: str) -> Iterator[tuple[int, memoryview]]:
    """Yields the byte offset and payload of each record in `content`, checked against its CRCs.

    Args:
        content: a whole TFRecord file.
        where: file name for messages.

    Raises:
        DataError: a record is cut off or damaged. The message has file, record number and byte
            offset.
    """
    for number, (offset, payload, problem) in enumerate(read_frames(content)):
        if payload is None:
            raise DataError(f"{location(where, number, offset)} {problem}")
        yield offset, payload


def read_frames(content: bytes | memoryview) -> Iterator[tuple[int, memoryview | None, str]]:
    """Yields byte offset, payload and problem of each record; a damaged record has payload None.

    If a record's length is damaged, reading resumes at the next intact header. Records skipped on
    the way are not reported: the caller must compare the number of records with the expected one.
    """
    view, offset = memoryview(content), 0
    while offset < len(view):
        payload, problem = _frame_at(view, offset)
        yield offset, payload, problem
        if payload is not None:
            offset += HEADER.size + len(payload) + FOOTER.size
        elif problem == _DAMAGED:
            offset += HEADER.size + HEADER.unpack_from(view, offset)[0] + FOOTER.size
        else:
            offset = _next_header(view, offset + 1)


_DAMAGED = "is damaged (its CRC32C does not match)"


def _frame_at(view: memoryview, offset: int) -> tuple[memoryview | None, str]:
    """Returns the payload of the record at `offset`, or None and what is wrong with it."""
    if offset + HEADER.size > len(view):
        return None, "is cut off"
    length, crc = HEADER.unpack_from(view, offset)
    if masked_crc(view[offset : offset + 8]) != crc:
        return None, "has a damaged length"
    start, end = offset + HEADER.size, offset + HEADER.size + length
    if length > _MAX_LENGTH or end + FOOTER.size > len(view):
        return None, "is cut off"
    if masked_crc(view[start:end]) != FOOTER.unpack_from(view, end)[0]:
        return None, _DAMAGED
    return view[start:end], ""


def _next_header(view: memoryview, offset: int) -> int:
    """Returns the offset of the first intact header from `offset` on, or the file's length."""
    content = bytes(view)
    # A length below 2^31 has four zero bytes in its upper half, which bytes.find finds fast.
    while (zeros := content.find(bytes(4), offset + 4)) >= 0:
        offset = zeros - 4
        if _frame_at(view, offset)[1] in ("", _DAMAGED):
            return offset
        offset += 1
    return len(view)


def location(path: str, number: int, offset: int) -> str:
    """Describes a record for messages.

    Args:
        path: of the file.
        number: of the record in the file, from 0.
        offset: of the record in the file, in bytes.
    """
    return f"{path}: record {number} at byte {offset}"
