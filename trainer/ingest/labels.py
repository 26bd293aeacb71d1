"""From the labels of a source to class names and numbers, and what is odd about them.

Labels are compared as `clean` leaves them. Which labels are numbers, names or missing is decided
for the source as a whole, so that one odd label does not renumber the others.
"""

from __future__ import annotations

import dataclasses
import decimal
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from trainer.core.errors import DataError
from trainer.core.natural_order import natural_key, numbers_first_key, value_of
from trainer.core.wording import conjunction, first_few, plural
from trainer.ingest.sources import SourceOptions
from trainer.io import files, text

NO_LABEL = -1  # the class number of an image without a label
# What pandas and others write for a missing value, in lower case.
_MISSING = frozenset({"nan", "null", "none", "na", "n/a", "<na>", "#n/a", "nat"})
# Numbers are class numbers if at least one in so many, up to the largest, occurs. Sparser ones are
# identifiers.
_SPARSEST = 10
# Values as programs print them: b'3' '3' ="3"; and, around numbers and quoted text: [3] (3,)
# tensor(3) np.int64(3) tf.Tensor(3, shape=(), dtype=int64).
_QUOTED = re.compile(r"""(?:b?'(.+)'|=?b?"(.+)")""", re.DOTALL)
_BRACKETS = re.compile(
    r"(?:tensor|tf\.Tensor|array|(?:np|numpy)\.\w+)?(?:\[(.+)\]|\((.+?),?(?:, *[a-z]+=.*)?\))", re.DOTALL
)
_NUMBERS = re.compile(r"[-+0-9.,e\[\]\s]+", re.IGNORECASE)
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphen, zero width
_NUMBERED = re.compile(r"([0-9]+)\s*[\s,;:]\s*(\S.*)")  # a line of a list of class names
_NAME_THEN_NUMBER = re.compile(r"(\S.*?)\s*[\s,;:]\s*([0-9]+)")
_TITLES = ("class", "classes", "class_name", "label", "labels", "name", "names")


class Found(NamedTuple):
    """A label of a source.

    Attributes:
        where: the first image that has it, for messages.
        images: number of images that have it.
    """

    where: str
    images: int


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a source.

    Attributes:
        names: in the order of their numbers; empty: unlabelled.
        number: class number of each label text; `NO_LABEL` for labels that mean none, also "".
        notes: what the user should know about how labels were understood, each a line.
        warnings: what probably is a mistake, each a line.
    """

    names: tuple[str, ...]
    number: dict[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def clean(label: str) -> str:
    """Returns a label in Unicode's composed form (NFC), without white space around it."""
    return unicodedata.normalize("NFC", label).strip().strip("\ufeff\u200b").strip()


def tally(labels: Iterable[tuple[str, str]]) -> dict[str, Found]:
    """Counts labels, given with the place of each; the argument for `number_classes`."""
    found: dict[str, Found] = {}
    for label, where in labels:
        before = found.get(label)
        found[label] = Found(before.where, before.images + 1) if before else Found(where, 1)
    return found


def read_class_names(path: str, encoding: str = "") -> tuple[str, ...]:
    """Reads class names from a text file, one per line.

    Args:
        path: of the file.
        encoding: a Python codec; empty: UTF-8, or what a byte order mark says.

    Raises:
        DataError: the file cannot be read or decoded, is empty, repeats a name, or has a line
            that is no name: empty, a comment, a header, or with a number beside the name.
    """
    content = text.decode(files.read(path, "class names"), path, encoding)
    if content.lstrip()[:1] in ("[", "{"):
        raise DataError(f"{path} looks like JSON: class names must be a text file with one name per line")
    names = tuple(clean(line) for line in re.split(r"\r\n|\r|\n", content.rstrip()))
    if not any(names):
        raise DataError(f"{path} has no class names: it must have one name per line")
    if "" in names:
        raise DataError(f"{path} has no name in line {names.index('') + 1}: name every class, since lines are numbered")
    if comment := next((name for name in names if re.match(r"#\s", name)), ""):
        raise DataError(
            f"{path} has a comment in line {names.index(comment) + 1}: delete it, since every line is a class"
        )
    if len(names) > 1 and (names[0].lower() in _TITLES or re.match(r"(index|id)[\s,;]", names[0].lower())):
        raise DataError(f"{path} has the header {names[0]!r} in line 1: delete it, since every line is a class")
    _refuse_numbered(path, names)
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        first = names.index(repeated)
        raise DataError(
            f"{path} has the class name {repeated!r} twice, in lines {first + 1} and {names.index(repeated, first + 1) + 1}: "
            "remove one"
        )
    return names


def _refuse_numbered(path: str, names: Sequence[str]) -> None:
    """Raises if the lines of a file of class names have a number beside each name."""
    for pattern, number, name in ((_NUMBERED, 1, 2), (_NAME_THEN_NUMBER, 2, 1)):
        matches = [match for line in names if (match := pattern.fullmatch(line))]
        numbers = sorted(int(match[number]) for match in matches)
        if len(names) < 2 or len({match[name] for match in matches}) < len(names):
            continue
        if numbers in (list(range(len(names))), list(range(1, len(names) + 1))):
            raise DataError(
                f"{path} has numbers beside the names ({names[0]}): it must have only names, one per line, in the order of "
                "their numbers"
            )


def number_classes(flag: str, found: Mapping[str, Found], options: SourceOptions, *, numeric: bool = False) -> Classes:
    """Determines class names and numbers from the labels of a source.

    Args:
        flag: the source as given by the user, for messages.
        found: label texts that went through `clean`; "" is no label.
        options: its `classes`, if any, fix names and order; else its `class_order`.
        numeric: whether labels that are all whole numbers are class numbers rather than names: 1,
            1.0 and 01 are one label then, and -1, nan and the like are none.

    Raises:
        DataError: a label is not among `options.classes`; or numbers are mixed with names, or are
            negative or not whole.
    """
    found = {label: occurrence for label, occurrence in found.items() if label}
    none = {"": NO_LABEL}
    if not options.labelled:
        return Classes(options.classes, none | dict.fromkeys(found, NO_LABEL))
    if broken := [label for label in found if "\ufffd" in label and label not in options.classes]:
        raise DataError(
            f"{flag}: the label {broken[0]!r} ({found[broken[0]].where}) has U+FFFD where a letter was lost when text was "
            "converted: write it again from the original"
        )
    if broken := [label for label in found if re.search(r"[\r\n]", label)]:
        raise DataError(
            f"{flag}: the label {broken[0]!r} ({found[broken[0]].where!r}) has a line break, and lists of classes have one name "
            "per line: rename it"
        )
    if numeric and (printed := [label for label in found if label not in options.classes and _content(label)]):
        raise DataError(
            f"{flag}: the label {printed[0]} ({found[printed[0]].where}) is how a program prints the value "
            f"{_content(printed[0])}: write the value itself, or list such names in --classes=FILE"
        )
    # Names that are numbers stay names, unless --classes gives other names.
    read_numbers = numeric or options.classes
    values = {label: number for label in found if (number := value_of(label)) is not None} if read_numbers else {}
    missing = [label for label in found if numeric and (label.lower() in _MISSING or values.get(label) == NO_LABEL)]
    if options.classes:
        matched, notes = _match(flag, found, values, set(missing), options.classes)
        missing = [label for label in missing if label not in matched]
        names, warnings = options.classes, list[str]()
    else:
        rest = [label for label in found if label not in missing]
        if numeric and all(label in values for label in rest):
            names, matched, notes, warnings = _from_numbers(flag, {n: values[n] for n in rest}, found, options)
        else:
            _refuse_mixture(flag, found, values)
            warnings = [
                f"the label {label!r} ({found[label].where}) is taken as the name of a class; leave it empty if it means "
                "that there is no label"
                for label in missing
            ]
            missing = []
            warnings += _several(found)
            names, order_note = _order(found, options.class_order)
            matched, notes = {name: number for number, name in enumerate(names)}, [*order_note]
    if missing:
        count = sum(found[label].images for label in missing)
        listed = ", ".join(f"{found[label].images:,} {label!r}" for label in missing)
        notes.append(f"{plural(count, 'image has', 'images have')} no label ({listed})")
    return Classes(names, none | dict.fromkeys(missing, NO_LABEL) | matched, tuple(notes), tuple(warnings))


def coverage_warnings(classes: Sequence[str], counts_by_split: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Describes classes without images, or with images in some splits only, and similar names.

    Args:
        classes: class names.
        counts_by_split: for each split, number of images by class number, `NO_LABEL` included.

    Returns:
        Lines; none if every class has images in every split that has labels.
    """
    labelled = [
        split
        for split, counts in counts_by_split.items()
        if any(count and number != NO_LABEL for number, count in counts.items())
    ]
    if not labelled:
        return []
    groups: dict[tuple[str, ...], list[str]] = {}
    for number, name in enumerate(classes):
        present = tuple(split for split in labelled if counts_by_split[split].get(number))
        groups.setdefault(present, []).append(name)
    lines = []
    for present, names in groups.items():
        if len(present) == len(labelled):
            continue
        absent = [split for split in labelled if split not in present]
        where = conjunction(absent) if present or len(labelled) == 1 else "any split"
        only = f" ({conjunction(present)} only)" if present and len(labelled) > 2 else ""
        lines.append(f"{plural(len(names), 'class has', 'classes have')} no image in {where}{only}: {first_few(names)}")
    return lines + _similar(classes) + _misread(classes)


def _several(found: Mapping[str, Found]) -> list[str]:
    """Describes labels that are likely several classes in one text."""
    joined = []
    for label in found:
        parts = [
            part.strip()
            for part in re.split(r"[|;]" if re.search(r"[|;]", label) else r"[,\s]+", label)
            if part.strip()
        ]
        if len(parts) > 1 and (all(part in found for part in parts) or "|" in label):
            joined.append(label)
    if not joined:
        return []
    return [
        f"{plural(len(joined), 'label looks', 'labels look')} like several classes and {'is' if len(joined) == 1 else 'are'} "
        f"taken as one each (first: {joined[0]!r}, {found[joined[0]].where}): images have one label, or none (--unlabelled)"
    ]


def _misread(names: Sequence[str]) -> list[str]:
    """Describes names that are UTF-8 which a program took for another encoding."""
    intended: dict[str, str] = {}
    for name in names:
        for encoding in ("cp1252", "latin-1"):
            try:
                meant = name.encode(encoding).decode()
            except UnicodeError:
                continue
            if meant != name:
                intended.setdefault(name, meant)
    if not intended:
        return []
    first = next(iter(intended))
    return [
        f"{plural(len(intended), 'name of a class looks', 'names of classes look')} like UTF-8 that was read in another "
        f"encoding (first: {first!r} for {intended[first]!r}): correct the source"
    ]


def _similar(classes: Sequence[str]) -> list[str]:
    """Describes classes whose names are likely meant to be the same."""
    by_key: dict[str, list[str]] = {}
    for name in classes:
        value = value_of(name)
        folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", name).casefold())
        by_key.setdefault(str(value) if value is not None else re.sub(r"[\s_-]+", " ", folded).strip(), []).append(name)
    groups = [names for names in by_key.values() if len(names) > 1]
    listed = [conjunction([repr(name) for name in names]) for names in groups]
    if not groups:
        return []
    return [
        f"names of classes differ only in case, spaces, signs or zeros: {first_few(listed, '; ')}; give them one name if they "
        "are one class"
    ]


def _content(label: str) -> str:
    """Returns the value in a label that a program printed, such as 3 in "tensor(3)"; else ""."""
    if match := _QUOTED.fullmatch(label):
        return match[1] or match[2]
    match = _BRACKETS.fullmatch(label)
    content = (match[1] or match[2]).strip() if match else ""
    # "(unknown)" is a name.
    return content if _NUMBERS.fullmatch(content) or _QUOTED.fullmatch(content) else ""


def _match(
    flag: str,
    found: Mapping[str, Found],
    values: Mapping[str, decimal.Decimal],
    missing: set[str],
    classes: tuple[str, ...],
) -> tuple[dict[str, int], list[str]]:
    """Finds labels among given class names: by name, or, if no name fits, by number.

    Args:
        flag: the source as given by the user, for messages.
        found: the labels.
        values: of those that are numbers.
        missing: labels that mean none, unless they are among `classes`.
        classes: class names.

    Returns:
        Class number of each label that is not missing, and lines for the user.
    """
    by_name = {name: number for number, name in enumerate(classes)}
    by_value = {value_of(name): number for number, name in enumerate(classes)}
    matched = {label: by_name[label] for label in found if label in by_name}
    matched |= {label: by_value[value] for label, value in values.items() if label not in matched and value in by_value}
    unknown = [label for label in found if label not in matched and label not in missing]
    if not unknown:
        return matched, []
    if matched or not all(label in values for label in unknown):
        label = next((label for label in unknown if matched or label not in values), unknown[0])
        others = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(
            f"{flag} has class {label!r} ({found[label].where}{others}), which is not in the file --classes: add it there, "
            "or correct it"
        )
    numbers = _whole(flag, {label: values[label] for label in unknown}, found)
    first = 1 if max(numbers.values()) == len(classes) and min(numbers.values()) > 0 else 0
    largest = max(numbers, key=lambda label: numbers[label])
    if numbers[largest] - first >= len(classes):
        raise DataError(
            f"{flag} has label {largest} ({found[largest].where}); --classes has {len(classes)} classes, from 0 to "
            f"{len(classes) - 1}"
        )
    smallest = min(numbers.values())
    notes = [
        f"labels are taken as numbers of the names in --classes, from {first}: {smallest} is {classes[smallest - first]}, "
        f"{largest} is {classes[numbers[largest] - first]}"
    ]
    return {label: number - first for label, number in numbers.items()}, notes


def _from_numbers(
    flag: str, values: Mapping[str, decimal.Decimal], found: Mapping[str, Found], options: SourceOptions
) -> tuple[tuple[str, ...], dict[str, int], list[str], list[str]]:
    """Determines the classes of labels that are all numbers.

    Args:
        flag: the source as given by the user, for messages.
        values: of the labels.
        found: the labels.
        options: its `class_order` other than auto makes the numbers names.

    Returns:
        Names, class number of each label, notes, warnings.
    """
    numbers = _whole(flag, values, found)
    used = sorted(set(numbers.values()))
    if not used:
        return (), {}, [], []
    if options.class_order == "auto" and len(used) * _SPARSEST > used[-1]:
        warnings = []
        if used[0] > 0:
            empty = "class 0 has" if used[0] == 1 else f"classes 0 to {used[0] - 1} have"
            warnings.append(
                f"the smallest label is {used[0]}, and labels are taken as class numbers, which count from 0: {empty} no image; "
                f"--class_order=natural makes {plural(len(used), 'class', 'classes')} of the labels that occur"
            )
        return tuple(map(str, range(used[-1] + 1))), numbers, [], warnings
    spellings: dict[int, list[str]] = {}
    for label, number in numbers.items():
        spellings.setdefault(number, []).append(label)
    name_of = {
        number: labels[0] if len(labels) == 1 and labels[0].isdigit() else str(number)
        for number, labels in spellings.items()
    }
    names, notes = _order(name_of.values(), options.class_order)
    position = {name: number for number, name in enumerate(names)}
    if options.class_order == "auto":
        notes = (
            f"the labels are numbers up to {used[-1]:,}, too few of them to be class numbers: they are taken as names of "
            f"{plural(len(used), 'class', 'classes')}, in the order of the numbers: {first_few(names)}",
        )
    return names, {label: position[name_of[number]] for label, number in numbers.items()}, [*notes], []


def _whole(flag: str, values: Mapping[str, decimal.Decimal], found: Mapping[str, Found]) -> dict[str, int]:
    """Returns labels as class numbers.

    Raises:
        DataError: one is negative or not whole.
    """
    for label, value in values.items():
        if value != int(value):
            raise DataError(
                f"{flag}: the label {label} ({found[label].where}) is not a whole number, so it is not a class number; if "
                "such numbers are names of classes, list them in --classes=FILE"
            )
        if value < 0:
            raise DataError(
                f"{flag}: the label {label} ({found[label].where}) is negative: class numbers count from 0, and -1 or an "
                "empty label means none"
            )
    return {label: int(value) for label, value in values.items()}


def _refuse_mixture(flag: str, found: Mapping[str, Found], values: Mapping[str, decimal.Decimal]) -> None:
    """Raises if some labels are numbers and some are names; the rarer kind is named."""
    numbers = [label for label in found if label in values]
    names = [label for label in found if label not in values]
    if not numbers or not names:
        return
    odd, kind, others = (names, "a name", "numbers") if len(names) <= len(numbers) else (numbers, "a number", "names")
    more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
    raise DataError(
        f"{flag}: the label {odd[0]!r} ({found[odd[0]].where}{more}) is {kind}, while {len(found) - len(odd):,} are "
        f"{others}: correct it, leave it empty if it means no label, or list all classes in --classes=FILE"
    )


def _order(names: Iterable[str], class_order: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sorts class names.

    Args:
        names: without repetitions.
        class_order: text: by Unicode; natural: numbers within names by value; auto: by Unicode,
            but names that are numbers first, by value.

    Returns:
        The names, and lines for the user if another order is likely too.
    """
    by_text, by_number, by_parts = sorted(names), sorted(names, key=numbers_first_key), sorted(names, key=natural_key)
    if class_order == "text":
        return tuple(by_text), ()
    if class_order == "natural":
        return tuple(by_parts), ()
    if by_number != by_text:
        return tuple(by_number), (
            f"classes are in the order of their numbers: {first_few(by_number)}. Keras and torchvision sort names as text "
            f"({first_few(by_text)}): --class_order=text for a teacher that was trained so",
        )
    if by_parts != by_text:
        return tuple(by_text), (
            f"classes are in the order of their names as text, as Keras and torchvision sort them: {first_few(by_text)}; "
            f"--class_order=natural makes it {first_few(by_parts)}",
        )
    return tuple(by_text), ()
