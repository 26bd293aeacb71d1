"""Names as numbers, and the order of names in which numbers count by their value."""

from __future__ import annotations

import decimal
import re

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?", re.IGNORECASE)
_COMMA = re.compile(r"[+-]?[0-9]+,00?")  # a whole number with decimals, where a comma separates them
_LARGEST = 25  # digits before the point, from which a number is a name


def value_of(name: str) -> decimal.Decimal | None:
    """The value of a name that is a decimal number of a usual size, else None."""
    if _COMMA.fullmatch(name):
        name = name.partition(",")[0]
    if not _NUMBER.fullmatch(name):
        return None
    value = decimal.Decimal(name).normalize()
    return value + 0 if value.adjusted() < _LARGEST else None  # adding 0 makes -0 equal to 0 in its text, too


def numbers_first_key(name: str) -> tuple[bool, decimal.Decimal, str]:
    """Sorts names that are numbers first, by value, and all others by Unicode."""
    value = value_of(name)
    return value is None, value or decimal.Decimal(0), name


def natural_key(name: str) -> tuple[bool, decimal.Decimal, list[tuple[bool, int, str]], str]:
    """Sorts as `numbers_first_key`, and numbers within names by value too: "class 2" before
    "class 10". Only the digits 0 to 9 are numbers.
    """
    parts = [
        (False, int(digits), "") if digits else (True, 0, other)
        for digits, other in re.findall(r"([0-9]+)|([^0-9]+)", name)
    ]
    return *numbers_first_key(name)[:2], parts, name
