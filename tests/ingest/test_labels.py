"""Labels become class names and numbers: which are numbers, names, or none, and in which order."""

from __future__ import annotations

import pathlib
import unicodedata

import pytest

from trainer.core.errors import DataError
from trainer.ingest.labels import (
    NO_LABEL,
    Classes,
    clean,
    coverage_warnings,
    number_classes,
    read_class_names,
    tally,
)
from trainer.ingest.sources import SourceOptions


def numbered(labels: list[str], *, numeric: bool = True, **options: object) -> Classes:
    found = tally((clean(label), f"line {line}") for line, label in enumerate(labels, 1))
    return number_classes("csv:x", found, SourceOptions(**options), numeric=numeric)  # type: ignore[arg-type]


DIGITS = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    "labels",
    [
        DIGITS,
        DIGITS[::-1],
        [f"{number}.0" for number in range(12)],
        [f"{number},0" for number in range(12)],  # as a decimal comma has it
        [f" {number:02d} " for number in range(12)],
        [*DIGITS, "1.0", "01", "1e0", "+1"],
        [*DIGITS, "-1", "-1.0", "nan", "NaN", "None", "NULL", "<NA>", "n/a", ""],
    ],
)
def test_spellings_of_numbers_are_one_label_and_odd_ones_do_not_reorder(labels: list[str]) -> None:
    classes = numbered(labels)
    assert classes.names == tuple(DIGITS)
    for label in map(clean, labels):
        expected = int(float(label.replace(",", "."))) if label[:1] in {*"0123456789+"} and label else NO_LABEL
        assert classes.number[label] == expected


def test_images_without_a_label_are_counted() -> None:
    assert numbered(["0", "1", "-1", "nan", "nan", "-1.0"]).notes == (
        "4 images have no label (1 '-1', 2 'nan', 1 '-1.0')",
    )
    assert numbered(["-1", "NA"]).names == ()


def test_numbers_with_few_gaps_are_class_numbers() -> None:
    assert numbered(["3", "0", "36", "1", "2"]).names == tuple(map(str, range(37)))
    assert numbered(["2", "0"]).number == {"": -1, "2": 2, "0": 0}


def test_sparse_numbers_are_names_in_their_order() -> None:
    classes = numbered(["30417", "2013042", "1205.0", "1205"])
    assert classes.names == ("1205", "30417", "2013042")
    assert classes.number["1205.0"] == classes.number["1205"] == 0
    assert "taken as names of 3 classes" in classes.notes[0]
    assert numbered(["007", "1205"]).names == ("007", "1205")
    assert len(numbered(["9007199254740993", "9007199254740992"]).names) == 2  # one number as a float


def test_numbers_from_one_are_reported_and_can_be_names() -> None:
    from_one = [str(number) for number in range(1, 13)]
    classes = numbered(from_one)
    assert classes.number["12"] == 12
    assert len(classes.names) == 13
    assert "class 0 has no image; --class_order=natural makes 12 classes" in classes.warnings[0]
    assert numbered(from_one, class_order="natural").names == tuple(from_one)
    assert numbered(from_one, class_order="text").names == tuple(sorted(from_one))
    assert "classes 0 to 4 have no image" in numbered(["5", "6"]).warnings[0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*DIGITS, "abc"], r"'abc' \(line 13\) is a name, while 12 are numbers.*--classes=FILE"),
        (["daisy", "rose", "-1"], r"'-1' \(line 3\) is a number, while 2 are names.*leave it empty"),
        (["daisy", "rose", "1.0", "2"], r"'1.0' \(line 3, and 1 more\)|'daisy' \(line 1, and 1 more\)"),
        (["0", "1", "0.5"], r"0.5 \(line 3\) is not a whole number"),
        (["0", "-2"], r"-2 \(line 2\) is negative"),
        (["a", "B\ufffdr"], r"\(line 2\) has U\+FFFD"),
    ],
)
def test_labels_that_fit_no_reading_are_refused_with_their_line(labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        numbered(labels)
    assert numbered(labels, labelled=False).names == ()


def test_missing_values_among_names_are_names_and_pointed_out() -> None:
    classes = numbered(["daisy", "None", "rose"])
    assert classes.names == ("None", "daisy", "rose")
    assert "'None' (line 2) is taken as the name of a class" in classes.warnings[0]


def test_names_that_are_numbers_have_their_natural_order() -> None:
    names = [str(number) for number in range(1, 13)]
    classes = numbered(sorted(names), numeric=False)
    assert classes.names == tuple(names)
    assert (
        "1, 2, 3, 4, 5, and 7 more. Keras and torchvision sort names as text (1, 10, 11, 12, 2, and" in classes.notes[0]
    )
    assert numbered(names, numeric=False, class_order="text").names == tuple(sorted(names))
    assert numbered(["10", "other", "9", "10a"], numeric=False).names == ("9", "10", "10a", "other")
    padded = numbered(["10", "01", "02"], numeric=False)
    assert (padded.names, padded.notes) == (("01", "02", "10"), ())


def test_other_names_keep_the_order_of_keras_and_a_natural_one_is_offered() -> None:
    classes = numbered(["class10", "class2"], numeric=False)
    assert classes.names == ("class10", "class2")
    assert "--class_order=natural makes it class2, class10" in classes.notes[0]
    assert numbered(["class10", "class2"], class_order="natural").names == ("class2", "class10")
    assert numbered(["10²", "9²"], class_order="natural").names == (
        "9²",
        "10²",
    )  # ² is a digit of Unicode, and no number
    assert numbered(["daisy", "Rose", "rose"], numeric=False) == Classes(
        ("Rose", "daisy", "rose"), {"": -1, "Rose": 0, "daisy": 1, "rose": 2}
    )


FLOWERS = ("zinnia", "rose", "daisy")


@pytest.mark.parametrize("numeric", [True, False])
@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["rose", "daisy"], FLOWERS, [1, 2]),
        (["0", "2"], FLOWERS, [0, 2]),
        (["1", "3"], FLOWERS, [0, 2]),  # 3 can only be the third of three
        (["1.0", "02"], ("2", "1"), [1, 0]),
    ],
)
def test_given_classes_are_found_by_name_or_number(
    numeric: bool, labels: list[str], classes: tuple[str, ...], expected: list[int]
) -> None:
    result = numbered(labels, numeric=numeric, classes=classes)
    assert result.names == classes
    assert [result.number[label] for label in labels] == expected


def test_labels_that_given_classes_do_not_have() -> None:
    with pytest.raises(DataError, match=r"label 3 \(line 2\); --classes has 3 classes, from 0 to 2"):
        numbered(["0", "3"], classes=FLOWERS)
    with pytest.raises(DataError, match=r"class 'tulip' \(line 2, and 1 more\)"):
        numbered(["rose", "tulip", "Rose"], classes=FLOWERS)
    with pytest.raises(DataError, match="class '1'"):
        numbered(["rose", "1"], classes=FLOWERS)
    result = numbered(["rose", "NA", "-1"], classes=FLOWERS)
    assert [result.number[label] for label in ("rose", "NA", "-1")] == [1, -1, -1]
    assert "2 images have no label" in result.notes[0]
    assert numbered(["rose"], labelled=False, classes=FLOWERS) == Classes(FLOWERS, {"": -1, "rose": -1})


def test_names_are_compared_composed_and_without_white_space() -> None:
    assert clean(f"\ufeff {unicodedata.normalize('NFD', 'Löwe')}\u00a0") == "Löwe"


def test_class_names_of_a_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("Bär\r\n Bör \r\n\r\n".encode("cp1252"))
    assert read_class_names(str(path), "cp1252") == ("Bär", "Bör")
    with pytest.raises(DataError, match="line 1, byte 2"):
        read_class_names(str(path))
    for content, message in (
        ("a\n\nb\n", "no name in line 2"),
        ("\n \n", "has no class names"),
        ("Bär\nb\n" + unicodedata.normalize("NFD", "Bär"), "'Bär' twice, in lines 1 and 3"),
        ('["a", "b"]', "looks like JSON"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_class_names(str(path))


def test_classes_that_are_missing_somewhere_are_named() -> None:
    names = ("a", "b", "c", "d")
    counts = {"train": {0: 3, 1: 2, -1: 5}, "test": {0: 1, 2: 4}, "extra": {-1: 9}}
    assert coverage_warnings(names, counts) == [
        "1 class has no image in test: b",
        "1 class has no image in train: c",
        "1 class has no image in any split: d",
    ]
    three = {"train": {0: 1, 1: 1}, "val": {0: 1}, "test": {0: 1}}
    assert coverage_warnings(("a", "b"), three) == ["1 class has no image in val and test (train only): b"]
    assert coverage_warnings(("a", "b"), {"train": {0: 1, 1: 1}, "test": {0: 1, 1: 1}}) == []
    assert coverage_warnings(names, {"train": {-1: 3}}) == []
    many = coverage_warnings(tuple(map(str, range(100))), {"train": {0: 1}})
    assert many == ["99 classes have no image in train: 1, 2, 3, 4, 5, and 94 more"]


def test_names_that_are_likely_one_class_are_pointed_out() -> None:
    names = ("Daisy", "daisy", "rose red", "rose_red", "1", "01", "tulip")
    (line,) = coverage_warnings(names, {"train": dict.fromkeys(range(7), 1)})
    assert "'Daisy' and 'daisy'; 'rose red' and 'rose_red'; '1' and '01'" in line


@pytest.mark.parametrize(
    "form",
    [
        "[{}]",
        "({},)",
        "tensor({})",
        "np.int64({})",
        "tf.Tensor({}, shape=(), dtype=int64)",
        "b'{}'",
        '"{}"',
        '="{}"',
        "['x{}']",
        "[0, {}]",
        "array([{}.])",
    ],
)
def test_values_as_programs_print_them_are_refused(form: str, tmp_path: pathlib.Path) -> None:
    labels = [form.format(number) for number in range(12)]
    with pytest.raises(DataError, match=r"\(line 1\) is how a program prints the value"):
        numbered(labels)
    (tmp_path / "names.txt").write_text("\n".join(labels))
    assert numbered(
        labels, classes=read_class_names(str(tmp_path / "names.txt")) if form[0] != "[" else tuple(labels)
    ).names
    assert numbered(labels, numeric=False).names  # of folders


def test_names_with_brackets_are_names() -> None:
    assert numbered(["(unknown)", "cat(2)", "[other]", "'tis", "b'"]).names == (
        "'tis",
        "(unknown)",
        "[other]",
        "b'",
        "cat(2)",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# my classes\nx\ny\n", "a comment in line 1"),
        ("class\nx\ny\n", "the header 'class'"),
        ("index,name\n0,x\n1,y\n", "the header 'index,name'"),
        ("1,x\n0,y\n", "numbers beside the names \\(1,x\\)"),
        ("0 x y\n1 z\n", "numbers beside"),
        ("1: x\n2: y\n", "numbers beside"),
        ("x 0\ny 1\n", "numbers beside"),
    ],
)
def test_lines_that_are_no_class_names(tmp_path: pathlib.Path, text: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("text", ["1.rose\n2.lily\n", "0\n1\n", "#1\n#2\n", "1 Euro\n2 Euro\n", "737 200\n737 300\n"])
def test_class_names_with_numbers_in_them(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    assert read_class_names(str(tmp_path / "names.txt")) == tuple(text.split("\n")[:2])


def test_labels_of_several_classes_are_pointed_out() -> None:
    (line,) = numbered(["scab rust", "scab", "rust", "healthy leaf", "healthy"]).warnings
    assert line.startswith("1 label looks like several classes and is taken as one each (first: 'scab rust', line 1)")
    (line,) = numbered(["a|b", "b|c", "roses, red"]).warnings
    assert line.startswith("2 labels look like several classes and are taken as one each")


def test_names_read_in_another_encoding_are_pointed_out() -> None:
    names = ["Bär", "Löwe", "\u00e9t\u00e9", "cat"]
    assert coverage_warnings(names, {"train": dict.fromkeys(range(4), 1)}) == []
    (line,) = coverage_warnings(["Bär".encode().decode("cp1252"), "cat"], {"train": {0: 1, 1: 1}})
    assert line.startswith(
        "1 name of a class looks like UTF-8 that was read in another encoding (first: 'B\u00c3\u00a4r' for 'Bär')"
    )


@pytest.mark.parametrize("numeric", [True, False])
def test_a_name_has_one_line(numeric: bool) -> None:
    with pytest.raises(DataError, match="has a line break"):
        numbered(["a\nb", "c"], numeric=numeric)


def test_invisible_letters_are_pointed_out() -> None:
    (line,) = coverage_warnings(["xy", "x\u200by"], {"train": {0: 1, 1: 1}})
    assert "'xy' and 'x\\u200by'" in line
