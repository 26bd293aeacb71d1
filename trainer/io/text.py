"""Text files that users bring, decoded without guesses.

Nothing is replaced: two names that differ in one letter stay two names, or there is an error.
"""

from __future__ import annotations

import codecs
import re

from trainer.core.errors import ConfigError, DataError

# Longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def require_encoding(name: str, flag: str) -> None:
    """Checks the name of an encoding.

    Args:
        name: a Python codec.
        flag: with its dashes, for errors.

    Raises:
        ConfigError: Python has no such encoding of text.
    """
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise ConfigError(f"{flag}={name}: there is no such encoding; usual ones are utf-8, cp1252, utf-16") from None


def decode(content: bytes, path: str, encoding: str = "") -> str:
    """Decodes a text file.

    Args:
        content: of the file.
        path: of the file, for errors.
        encoding: a Python codec; empty: UTF-8. A byte order mark takes precedence, because one
            flag may be for several files.

    Raises:
        DataError: the content is not in this encoding; the message has line and byte.
    """
    for mark, marked in _MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], marked
            break
    try:
        decoded = content.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        if b"\0" in before[:64]:  # UTF-16 without a mark, or not text at all
            raise _zeros(path, 1, content) from None
        line = len(re.findall(rb"\r\n|\r|\n", before)) + 1
        byte = error.start - max(before.rfind(b"\n"), before.rfind(b"\r"))
        is_guess = not encoding
        hint = (
            "save it as UTF-8, or say how it is encoded, as --encoding=cp1252 (Windows, Western Europe)"
            if is_guess
            else "give the right --encoding, or save it as UTF-8"
        )
        raise DataError(
            f"{path} is not {(encoding or 'utf-8').upper()}: line {line}, byte {byte} of the line is "
            f"0x{content[error.start]:02x}; {hint}"
        ) from None
    if encoding and len(decoded) == len(content) and not content.isascii() and is_utf8(content):
        # Text of one byte per letter is UTF-8 by chance only where it is not text.
        raise DataError(
            f"{path} is UTF-8, not {encoding}, which would give other letters; leave --encoding out, or save it as {encoding}"
        )
    if "\0" in decoded:
        raise _zeros(path, decoded[: decoded.index("\0")].count("\n") + 1, content)
    return decoded.removeprefix("\ufeff")


def is_utf8(content: bytes) -> bool:
    """Whether these bytes are text in UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _zeros(path: str, line: int, content: bytes) -> DataError:
    likely = "utf-16-be" if content.startswith(b"\0") else "utf-16-le"
    return DataError(
        f"{path} has zero bytes in line {line}, so it is not text in this encoding; if it is UTF-16, say so: "
        f"--encoding={likely}"
    )
