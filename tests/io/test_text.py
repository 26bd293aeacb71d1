"""Text that users bring is decoded as it was written, or refused with the place."""

from __future__ import annotations

import codecs

import pytest

from trainer.core.errors import ConfigError, DataError
from trainer.io import text

NAMES = "Bär\nBör\n"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (NAMES.encode(), ""),
        (NAMES.encode("utf-8-sig"), ""),
        (NAMES.encode("utf-16"), ""),
        (codecs.BOM_UTF16_BE + NAMES.encode("utf-16-be"), ""),
        (NAMES.encode("utf-32"), ""),
        (NAMES.encode("cp1252"), "cp1252"),
        (NAMES.encode("utf-16-le"), "utf-16-le"),
        # One flag may be for several files, so a mark takes precedence.
        (NAMES.encode("utf-8-sig"), "cp1252"),
        (NAMES.encode("utf-16"), "utf-8"),
    ],
)
def test_text_is_decoded_by_mark_or_name(content: bytes, encoding: str) -> None:
    assert text.decode(content, "x.txt", encoding) == NAMES


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("a\r\nrose\r\nBär".encode("cp1252"), "", r"x\.txt is not UTF-8: line 3, byte 2 .* 0xe4; .*--encoding=cp1252"),
        ("a\rBär".encode("cp1252"), "", "line 2, byte 2"),
        ("Bär".encode("utf-16-le"), "", "line 1, .*--encoding=utf-16-le"),
        ("Bär".encode("utf-16-be"), "", "--encoding=utf-16-be"),
        (b"rose\nda\0isy", "", "zero bytes in line 2"),
        (NAMES.encode(), "cp1252", r"x\.txt is UTF-8, not cp1252"),
        (b"\x81", "cp1252", "not CP1252: line 1, byte 1"),
    ],
)
def test_what_is_not_in_the_encoding_is_refused_with_its_place(content: bytes, encoding: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text.decode(content, "x.txt", encoding)


@pytest.mark.parametrize("name", ["cp12", "hex", "a\0b"])
def test_an_encoding_that_does_not_exist(name: str) -> None:
    text.require_encoding("latin-1", "--encoding")
    with pytest.raises(ConfigError, match=r"--encoding=.*no such encoding"):
        text.require_encoding(name, "--encoding")
