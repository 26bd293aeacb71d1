"""Tables: how text becomes rows, which column is which, and rows that contradict each other."""

from __future__ import annotations

import json
import pathlib
import unicodedata

import pytest
from conftest import here
from samples import Prepared, prepare, put


def prepared(tmp_path: pathlib.Path, text: str | bytes, *flags: str) -> Prepared:
    put(tmp_path, *(f"a/{number}.jpg" for number in range(1, 5)))
    (tmp_path / "t.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return prepare(f"csv:{tmp_path}/t.csv", tmp_path / f"out{len(list(tmp_path.glob('out*')))}", *flags)


def labels(done: Prepared) -> dict[str, str]:
    assert done.dataset is not None, done.lines
    (split,) = done.dataset.splits
    return {name: done.dataset.classes[number] if number >= 0 else "" for name, number in done.labels(split).items()}


@pytest.mark.parametrize("text", ["a/1.jpg,1,0\na/2.jpg,0,1\n", "path,x,y\na/1.jpg,1,0\na/2.jpg,0,1\n"])
def test_without_labels_other_columns_do_not_matter(tmp_path: pathlib.Path, text: str) -> None:
    assert labels(prepared(tmp_path, text, "--unlabelled")) == {"a/1.jpg": "", "a/2.jpg": ""}


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na/1.jpg,x\na/2.jpg,y\n",
        "path;label\r\na/1.jpg;x;\r\na/2.jpg;y;\r\n",
        "path\tlabel\ra/1.jpg\tx\ra/2.jpg\ty\r",
        "path|label\na/1.jpg|x\na/2.jpg|y",
        "sep=;\r\npath;label\r\na/1.jpg;x\r\na/2.jpg;y\r\n",
        "# made by hand\npath,label\n\na/1.jpg,x\n# the rest\na/2.jpg,y\n,\n",
        "#label,path\nx,a/1.jpg\ny,a/2.jpg\n",
        "a/1.jpg x\na/2.jpg\ty\n",
        "Image Path,Class Name\na/1.jpg,x\na/2.jpg,y\n",
        ",path,label\n0,a/1.jpg,x\n1,a/2.jpg,y\n",
        ",0,1\n0,a/1.jpg,x\n1,a/2.jpg,y\n",
        "TRAIN,a/1.jpg,x\nTRAIN,a/2.jpg,y\n",
        'path, label\na/1.jpg, "x"\na/2.jpg, y\n',
        "id,photo,species\n1,a/1.jpg,x\n2,a/2.jpg,y\n",
    ],
)
def test_ways_to_write_a_table(tmp_path: pathlib.Path, text: str) -> None:
    assert labels(prepared(tmp_path, text)) == {"a/1.jpg": "x", "a/2.jpg": "y"}


@pytest.mark.parametrize(
    "text", ["a/1.jpg;roses, red\na/2.jpg;daisy\n", 'path,label\na/1.jpg,"roses, red"\na/2.jpg,daisy\n']
)
def test_separators_within_labels(tmp_path: pathlib.Path, text: str) -> None:
    assert labels(prepared(tmp_path, text)) == {"a/1.jpg": "roses, red", "a/2.jpg": "daisy"}


def test_paths_of_other_systems(tmp_path: pathlib.Path) -> None:
    composed = "Löwe.jpg"
    put(tmp_path / "b", unicodedata.normalize("NFD", composed))
    done = prepared(tmp_path, f"path,label\na\\1.jpg,x\n.\\b\\{composed},y\n")
    assert labels(done) == {"a\\1.jpg": "x", f".\\b\\{composed}": "y"}


def test_files_without_suffix_are_no_header(tmp_path: pathlib.Path) -> None:
    put(tmp_path, "plain/1", "plain/2")
    assert labels(prepared(tmp_path, "plain/1,x\nplain/2,y\n")) == {"plain/1": "x", "plain/2": "y"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: pathlib.Path, encoding: str) -> None:
    text = "path;label\na/1.jpg;Bär\na/2.jpg;Bör\na/3.jpg;Bur\n".encode(encoding)
    if encoding == "cp1252":
        refused = prepared(tmp_path, text)
        assert refused.code == 3
        refused.line("error", "t.csv is not UTF-8: line 2, byte 10", "--encoding=cp1252")
    done = prepared(tmp_path, text, *(["--encoding=cp1252"] if encoding == "cp1252" else []))
    assert labels(done) == {"a/1.jpg": "Bär", "a/2.jpg": "Bör", "a/3.jpg": "Bur"}


@pytest.mark.parametrize(
    ("text", "flags", "code", "message"),
    [
        ("path,label\na/1.jpg,roses, red\n", [], 3, "line 2 has 3 cells and the header has 2"),
        ("a/1.jpg,x\na/2.jpg,roses, red\n", [], 3, "line 2 has 3 cells and the first row has 2"),
        ('path,label\n\na/1.jpg,"x\na/2.jpg,y\n', [], 3, "a quotation mark in line 3"),
        (
            "a/1.jpg,x,7\n",
            [],
            3,
            "no header and 3 columns, of which 1, 2 could be the label: say which, as --columns=",
        ),
        ("0,a/1.jpg,3\n1,a/2.jpg,4\n", [], 3, "of which 0, 2 could be the label"),
        ("a/1.jpg,10,20,110,120,cat\na/2.jpg,30,22,130,122,dog\n", [], 3, "--columns=path:0,label:5"),
        ("path,x,y\na/1.jpg,1,0\na/2.jpg,0,1\n", [], 3, "no column of labels but 2 columns of 0 and 1 (x, y)"),
        ("path,label,label\na/1.jpg,x,y\n", [], 3, "2 columns 'label'; say which is the label, as --columns=label:1"),
        ("path,label,label\na/1.jpg,x,y\n", ["--columns=label:label"], 2, "2 columns 'label'; take one by number"),
        ("path,x\na/1.jpg,a\n", ["--columns=label:TYPO"], 2, "no column 'TYPO' for label; there are path, x"),
        ("a/1.jpg,x\n", ["--columns=label:x"], 2, "no column 'x' for label; there are 2 without a header: 0 to 1"),
        ("path,x,y\na/1.jpg,,a\n", ["--columns=label:x"], 3, "'x' (from --columns) is empty in every row"),
        ("path,x\na/1.jpg,a\n", ["--columns=path:0,label:0"], 2, "must be different columns"),
        ("path,label\na/1.jpg,x\n./a/1.jpg,y\n", [], 3, "lines 2 and 3 give ./a/1.jpg two labels, 'x' and 'y'"),
        ("path,label\na/1.jpg,-1\na/1.jpg,1\na/1.jpg,2\n", [], 3, "lines 3 and 4 give"),
        ("path,label,split\na/1.jpg,x,Train\na/2.jpg,x,train\n", [], 3, "differ only in case"),
        ("path,label,split\na/1.jpg,x,a/b\n", [], 3, "the split 'a/b'"),
        ("PK\x03\x04", [], 3, "is a workbook or a zip file: save it as CSV"),
        ('[{"path": "a/1.jpg"}]', [], 3, "is JSON"),
        ("path,label\n", [], 3, "has a header and no images"),
        ("path,label;\na/1.jpg,x;\na/2.jpg,y;\n", [], 3, "every line ends with ;"),
        ("path,label\na/1.jpg,0\n", ["--encoding=cp12"], 2, "--encoding=cp12: there is no such encoding"),
        ("path,label\na/1.jpg,0\n", ["--class_order=text", "--classes=x"], 2, "--classes gives the order"),
    ],
)
def test_tables_that_could_mean_something_else_are_refused(
    tmp_path: pathlib.Path, text: str, flags: list[str], code: int, message: str
) -> None:
    done = prepared(tmp_path, text, *flags)
    assert done.code == code
    done.line("error", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,kind,what\na/1.jpg,x,y\n", "warning: no column is known as the label"),
        ("path,label,fold\na/1.jpg,x,0\n", "warning: the column 'fold' is not used, so all images are in one split"),
        ("path,label,is_valid\na/1.jpg,x,True\n", "--columns=split:is_valid takes its values"),
        ("path,label\na/1.jpg,\n", "warning: the column 'label' is empty in every row"),
        ("path,label\na/1.jpg\na/2.jpg,x\na/3.jpg,\n", "2 of 3 rows have no label"),
        ("path,label,category\na/1.jpg,x,y\n", "'label' is taken as label, not category"),
        ("path,label\na/1.jpg,1\na/1.jpg,1.0\n", "1 row repeats an image of the same split: a/1.jpg (lines 2 and 3)"),
        ("a/1.jpg,0\na/2.jpg,1\na/1.jpg,-1\n", "1 image has no label (1 '-1')"),
        (
            "path,label,split\na/1.jpg,x,train\na/1.jpg,x,test\n",
            "warning: 1 image is in two splits: a/1.jpg in train (line 2) and test (line 3)",
        ),
        ("path,label\na/1.jpg,1205\na/2.jpg,2013042\n", "taken as names of 2 classes"),
        ("path,label\na/1.jpg,1\na/2.jpg,2\n", "class 0 has no image"),
    ],
)
def test_what_is_understood_is_reported(tmp_path: pathlib.Path, text: str, message: str) -> None:
    prepared(tmp_path, text).line(message)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1", "(first: '1', line 2); write a/1.jpg, if that is the image"),
        ("1.jpg", "write a/1.jpg"),
        ("C:\\\\data\\\\1.jpg", "write a/1.jpg"),
        (
            "nowhere.jpg",
            "none of the 2 images exists (first: 'nowhere.jpg', line 2); paths are relative to the table's folder",
        ),
        ("https://x.org/0.jpg", "addresses are not downloaded"),
    ],
)
def test_images_that_are_elsewhere(tmp_path: pathlib.Path, cell: str, message: str) -> None:
    done = prepared(tmp_path, f"path,label\n{cell},x\n{cell}x,y\n")
    assert done.code == 3
    done.line("error", message)


def test_floats_and_missing_values_do_not_change_the_classes(tmp_path: pathlib.Path) -> None:
    """As pandas writes a column of whole numbers that has a missing value."""
    put(tmp_path, *(f"b/{number}.jpg" for number in range(12)))
    for form in ("{}", "{}.0"):
        rows = [f"b/{number}.jpg,{form.format(number)}" for number in range(12)]
        for odd in ("", "a/1.jpg,-1\n", "a/1.jpg,nan\n", "a/1.jpg,\n"):
            done = prepared(tmp_path, "path,label\n" + "\n".join(rows) + "\n" + odd)
            assert done.dataset is not None
            assert done.dataset.classes == tuple(map(str, range(12)))
            assert all(done.labels()[f"b/{number}.jpg"] == number for number in range(12))


def test_a_data_set_without_splits_is_not_whole(tmp_path: pathlib.Path) -> None:
    prepared(tmp_path, "path,label\na/1.jpg,x\na/2.jpg,y\n")
    index = next(tmp_path.glob("out*/dataset.json"))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"splits": {}}))
    done = here("prepare", f"--verify={index.parent}")
    assert done.returncode == 3
    assert "has no splits" in done.stderr
