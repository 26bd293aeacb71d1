"""Guards to break, a module for each part of the project: `tests/mutations.py` breaks them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of `file` from `old`, which stands there once, to `new`, and the tests that must fail for it."""

    what: str
    file: str
    old: str
    new: str
    tests: str
