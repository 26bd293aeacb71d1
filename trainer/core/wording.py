"""Counts and lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 5  # names in a message, at most, unless a caller gives another number


def plural(count: int, one: str, many: str) -> str:
    """A number with its noun, and a verb if it has one: "1 image is", "1,200 images are".

    Args:
        count: of the things.
        one: what follows 1.
        many: what follows any other number.
    """
    return f"{count:,} {one if count == 1 else many}"


def conjunction(words: Sequence[str]) -> str:
    """All words: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def first_few(words: Sequence[str], separator: str = ", ", most: int = NAMED) -> str:
    """The first few of many words, and the number of the others.

    Args:
        words: any number of them.
        separator: between two words.
        most: words that are listed, >= 1.
    """
    more = f"{separator}and {len(words) - most:,} more" if len(words) > most else ""
    return separator.join(words[:most]) + more
