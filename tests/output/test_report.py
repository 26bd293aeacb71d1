"""The report: figures, no external resources, escaping of names, missing input."""

from __future__ import annotations

import html.parser
import io
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from trainer.core.errors import ConfigError
from trainer.output import charts, formatting, report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

_MALICIOUS_NAME = "<script>alert(\"x\")</script> & 'tulip'"
_CLASSES = ["daisy", _MALICIOUS_NAME, "rose $a^$"]
_VOID = {"meta", "img", "br", "link", "hr", "input"}


class _Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _sample(teacher: str, student: str, truth: str | None = None, side: int = 32) -> report.Sample:
    image = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    others = [name for name in _CLASSES if name not in (teacher, student)]
    return report.Sample(
        image=image,
        caption=f"crop of #7 <{teacher}>",
        teacher=[(teacher, 0.8125), (others[0], 0.1)],
        student=[(student, 0.6543), (others[0], 0.2)],
        truth=truth,
    )


def _history(rows: int = 120) -> list[dict]:
    history: list[dict] = []
    for step in range(10, 10 * rows + 1, 10):
        history.append(
            {
                "kind": "train",
                "step": step,
                "loss": 3 * math.exp(-step / 200) + 0.01,
                "kl": 2 * math.exp(-step / 200) + 0.01,
                "agreement": 1 - math.exp(-step / 300),
                "learning_rate": 0.001,
                "grad_norm": 1.0,
                "images_per_second": 1234.0 + step % 7,
                "wall_seconds": step / 10,
            }
        )
        if step % 100 == 0:
            history.append(
                {
                    "kind": "eval",
                    "step": step,
                    "split": "validation",
                    "student_top1": 0.75,
                    "student_top5": 0.9,
                    "teacher_top1": 0.875,
                    "teacher_top5": 0.95,
                    "agreement_top1": 0.8,
                    "kl": 0.3,
                }
            )
    return history


def _arguments(**changes):
    arguments = {
        "title": "tulips <1>",
        "config": {
            "batch_size": 64,
            "data": "/data/<img src=x>",
            "teacher": ["keras:a", "keras:b"],
        },
        "history": _history(),
        "result": {
            "teacher_top1": 0.9,
            "student_top1": 0.8765,
            "agreement_top1": 0.9123,
            "kl": 0.12345,
            "steps": 1200,
            "images_per_second": 1234.5,
            "wall_seconds": 3725.0,
            "seed": 3,
            "examples": 1000,
            "versions": {"tensorflow": "2.19.1"},
        },
        "train_samples": [_sample("daisy", "daisy"), _sample("daisy", _MALICIOUS_NAME)],
        "eval_samples": [
            _sample("daisy", _MALICIOUS_NAME, truth="daisy"),
            _sample("daisy", "daisy", truth=_MALICIOUS_NAME),
        ],
        "predictions": report.Predictions(
            labels=np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2]),
            teacher=np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2]),
            student=np.array([0, 1, 1, 1, 1, 2, 2, 2, 2, 0]),
            classes=_CLASSES,
        ),
        "cost": {"chip_hours": 4.25},
    }
    return arguments | changes


@pytest.fixture(scope="module")
def text() -> str:
    return report.render(**_arguments())


@pytest.fixture(scope="module")
def page(text) -> _Page:
    return _Page(text)


def test_headline_states_the_figures(page):
    for phrase in (
        "87.6% of the images correctly, 2.4 points below the teacher's 90.0%",
        "−2.4 points",  # noqa: RUF001 - a real minus
        "91.2%",
        "0.123 nats",
        "1,200",
        "1,234",
        "1 h 02 min",
    ):
        assert phrase in page.text, phrase


@pytest.mark.parametrize(
    ("student", "comparison"),
    [(0.9, "equal to the teacher's 90.0%"), (0.95, "5.0 points above the teacher's 90.0%")],
)
def test_headline_at_and_above_the_teacher(student, comparison):
    result = {"student_top1": student, "teacher_top1": 0.9}
    assert comparison in _Page(report.render(**_arguments(result=result))).text


def test_gap_has_a_paired_interval(page):
    # Only the student is wrong on 3 of 10: the differences are three times -1 and seven times 0.
    margin = 100 * 1.96 * np.std([-1] * 3 + [0] * 7, ddof=1) / math.sqrt(10)
    assert f"±{margin:.1f} at 95%, on 10 images" in page.text


def test_cost(page):
    for phrase in (
        "Images seen in training 76,800",
        "Passes over the 1,000 training images 76.8",
        "Wall time 1 h 02 min",
        "Chip-hours 4.25",
    ):
        assert phrase in page.text, phrase


def test_confusions_are_counted(page):
    for phrase in (
        f"daisy {_MALICIOUS_NAME} 2 66.7% 0",  # two of three daisies, the teacher none of them
        f"{_MALICIOUS_NAME} rose $a^$ 1 33.3% 1",  # and the teacher makes the same mistake
        f"daisy {_MALICIOUS_NAME} 2 2 0",  # disagreements: the teacher is right on both
        "daisy 3 33.3% 100.0% −66.7",  # noqa: RUF001
        "Both right 6 60.0%",
        "Only the teacher right 3 30.0%",
        "Only the student right 0 0.0%",
        "Both wrong, same class 1 10.0%",
        "they agree on 70.0% of all images",
    ):
        assert phrase in page.text, phrase


def test_confusion_matrix_needs_at_most_40_classes(page):
    assert f"daisy → {_MALICIOUS_NAME}: 2 (66.7%)" in page.text
    assert any((a.get("aria-label") or "").startswith("Confusion matrix") for a in page.all("div"))
    classes = np.arange(41)
    readable = report.Predictions(classes[:40], None, classes[:40], [f"c{i}" for i in range(40)])
    too_large = report.Predictions(classes, None, classes, [f"c{i}" for i in range(41)])
    assert "Confusion matrix" in report.render(**_arguments(predictions=readable))
    assert "Confusion matrix" not in report.render(**_arguments(predictions=too_large))


def test_disagreements_are_marked_with_text(page):
    assert page.text.count("≠ they disagree") == 2 + 1  # two images, and the sentence about them
    assert page.text.count("= they agree") == 2
    assert "(1 of 2 here)" in page.text
    assert page.text.count("✓ right") == 1
    assert page.text.count("✗ wrong") == 3


def test_names_are_escaped(text, page):
    assert "<script" not in text.lower()
    assert page.all("script") == []
    assert _MALICIOUS_NAME in page.text
    assert "/data/<img src=x>" in page.text
    assert "tulips <1>" in page.text
    assert all((a["src"] or "").startswith("data:") for a in page.all("img"))
    assert "rose $a^$" in page.text


def test_split_names_are_escaped_in_curves():
    history = [
        {"kind": "eval", "step": s, "split": split, "student_top1": 0.5, "kl": 0.1}
        for s in (1, 2)
        for split in ("</svg><script>$x_$", "test")
    ]
    page = _Page(report.render(**_arguments(history=history)))
    assert page.all("script") == []
    assert "</svg><script>$x_$" in page.text


def test_no_external_resources(text, page):
    addresses = set(re.findall(r"\w+://[^\s\"'<>)]*", text))
    assert addresses == {"https://arxiv.org/abs/2106.05237"}
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_inline_images_have_the_samples_pixels(page):
    import base64

    source = page.all("img")[0]["src"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
    np.testing.assert_array_equal(pixels, _arguments()["train_samples"][0].image)


def test_large_images_are_shrunk():
    page = _Page(report.render(**_arguments(train_samples=[_sample("daisy", "daisy", side=600)])))
    assert len(page.all("img")[0]["src"]) < 4 / 3 * 256 * 256 * 3 * 1.1


def test_page_is_accessible(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(a.get("alt") for a in page.all("img"))
    assert f"True class: daisy. Student: {_MALICIOUS_NAME} 65.4%; Teacher: daisy 81.2%" in page.all("img")[2]["alt"]
    assert page.all("th")
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    labels = [a["aria-label"] for a in page.all("div") if a.get("role") == "img"]
    assert len(labels) == 7  # six curves and the matrix
    assert "student 75.0%; teacher 87.5%" in " ".join(labels)


def test_ids_are_unique_and_references_resolve(text, page):
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', text)
    assert references
    assert set(references) <= set(ids)


def test_curves_use_the_css_colours(text):
    curves = text[text.index('id="curves"') : text.index('id="training"')]
    assert "var(--student)" in curves
    assert "var(--teacher)" in curves
    assert "stroke-dasharray" in curves  # the teacher's line differs without colour too
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", curves)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_equal_input_gives_equal_text(text):
    assert report.render(**_arguments()) == text
    reordered = _arguments()
    reordered["config"] = dict(reversed(reordered["config"].items()))
    assert report.render(**reordered) == text


def test_user_settings_of_matplotlib_are_ignored(text):
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        assert report.render(**_arguments()) == text
        assert matplotlib.rcParams["font.size"] == 30


_EMPTY = {
    "config": {},
    "history": [],
    "result": {},
    "train_samples": [],
    "eval_samples": [],
    "predictions": None,
    "cost": None,
}


@pytest.mark.parametrize("key", sorted(_EMPTY))
def test_each_part_may_be_missing(key):
    _Page(report.render(**_arguments(**{key: _EMPTY[key]})))


def test_everything_may_be_missing():
    page = _Page(report.render(title="", **_EMPTY))
    assert "No accuracy was measured." in page.text
    assert "No measurements were recorded." in page.text
    assert "None" not in page.text
    assert "nan" not in page.text


@pytest.mark.parametrize(
    "history",
    [
        [{"kind": "train", "step": 1, "loss": 0.0}],
        [{"kind": "train", "step": 0, "loss": 2.0, "kl": None, "agreement": 1.0}],
        [{"kind": "train", "step": 5, "loss": float("nan"), "learning_rate": float("inf")}],
        [{"kind": "train"}, {"step": 3}, {"kind": "eval", "step": 2}, {"kind": "note", "step": 2}],
        [{"kind": "eval", "step": 7, "split": "test", "student_top1": 1.0, "teacher_top1": 0.0}],
        [{"kind": "train", "step": s, "loss": -1.0, "images_per_second": 0} for s in range(3)],
    ],
)
def test_short_and_incomplete_histories(history):
    page = _Page(report.render(**_arguments(history=history)))
    assert "nan" not in page.text
    assert "inf" not in page.text


def test_last_evaluation_is_shown_without_a_final_result():
    page = _Page(report.render(**_arguments(result={})))
    assert "no final result" in page.text
    assert "at step 1,200" in page.text
    assert "12.5 points below the teacher's 87.5%" in page.text


def test_without_a_teacher():
    history = [{"kind": "train", "step": 1, "loss": 1.0}, {"kind": "train", "step": 2, "loss": 0.5}]
    history += [{"kind": "eval", "step": 2, "split": "validation", "student_top1": 0.5}]
    sample = report.Sample(np.zeros((8, 8, 3), np.uint8), "", [], [("daisy", 1.0)], "daisy")
    predictions = report.Predictions(np.array([0, 1]), None, np.array([0, 0]), _CLASSES)
    page = _Page(
        report.render(
            **_arguments(
                history=history,
                result={"student_top1": 0.5},
                train_samples=[sample],
                eval_samples=[sample],
                predictions=predictions,
            )
        )
    )
    assert "there was no teacher to compare it with" in page.text
    assert "Most frequent mistakes" in page.text
    assert "disagreements" not in page.text
    assert "they agree" not in page.text
    assert "Who is right" not in page.text


def test_without_labels():
    predictions = report.Predictions(None, np.array([0, 1, 5]), np.array([0, 0, 5]), _CLASSES)
    page = _Page(report.render(**_arguments(predictions=predictions)))
    assert "Most frequent disagreements" in page.text
    assert "Most frequent mistakes" not in page.text
    assert "class 5" in page.text  # a class without a name


def test_a_run_without_labels_has_a_result():
    """A run whose images have no labels shows its own final figures, not those of an evaluation."""
    result = {"agreement_top1": 0.043, "kl": 5.81, "split_images": 300, "labelled_images": 0}
    result |= {"constant_agreement": 0.041, "constant_kl": 5.6}
    history = [{"kind": "eval", "step": 5, "split": "validation", "agreement_top1": 0.0, "kl": 9.0}]
    sample = report.Sample(np.zeros((8, 8, 3), np.uint8), "", [("rose", 0.9)], [("daisy", 0.8)])
    unlabelled = report.Predictions(np.full(3, -1), np.array([0, 1, 2]), np.array([0, 0, 2]), _CLASSES)
    page = _Page(
        report.render(
            **_arguments(
                result=result,
                history=history,
                predictions=unlabelled,
                eval_samples=[sample],
                eval_choice="How they were chosen.",
                warning="The student is no better than a constant.",
            )
        )
    )
    for phrase in (
        "The student gives the teacher's class on 4.3% of the 300 images. The student is no better than a constant.",
        "No image has a label, so no accuracy is known.",
        "Student 4.3% Constant 4.1% Agreement: the share",
        "Best constant answer 4.1%, 5.600 nats",
        "Top-1 classes of all 3 images of the final split; none of them has a label.",
        "How they were chosen.",
    ):
        assert phrase in page.text, phrase
    for phrase in (
        "no final result",
        "Gap to",
        "Most frequent mistakes",
        "class -1",
        "true class",
        "True class",
        "Teacher 4",
    ):
        assert phrase not in page.text, phrase
    assert "Confusion matrix" in page.text


def test_accuracies_are_of_the_images_with_a_label():
    result = {"student_top1": 0.5, "teacher_top1": 1.0, "agreement_top1": 0.6, "split_images": 5, "labelled_images": 2}
    labels, teacher, student = np.array([0, -1, 1, -1, -1]), np.array([0, 0, 1, 2, 2]), np.array([0, 0, 0, 2, 1])
    partly = report.Predictions(labels, teacher, student, _CLASSES)
    page = _Page(report.render(**_arguments(result=result, predictions=partly)))
    for phrase in (
        "classifies 50.0% of the 2 images (of 5) that have a label correctly, 50.0 points below",
        "on 2 images",
        "Both right 1 50.0%",
        "Only the teacher right 1 50.0%",
        "how often each is right, where there is a label; they agree on 60.0% of all images",
        f"{_MALICIOUS_NAME} daisy 1 100.0% 0",
        "all 5 images of the final split; 2 of them have a label",
    ):
        assert phrase in page.text, phrase
    assert "class -1" not in page.text


def test_the_constant_has_lines_of_its_own():
    history = [
        {"kind": "eval", "step": step, "split": "test", "agreement_top1": 0.5, "kl": 1.0}
        | {"constant_agreement": 0.25, "constant_kl": 2.0}
        for step in (1, 2)
    ]
    labels = [curve["last"] for curve in charts.curves(history)]
    assert labels == ["test 50.0%; best constant, test 25.0%".replace(", test", ""), "test 1.000; best constant 2.000"]


def test_empty_predictions():
    no_examples = report.Predictions(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), _CLASSES)
    assert "Who is right" not in report.render(**_arguments(predictions=no_examples))


def test_predictions_must_have_the_same_length():
    with pytest.raises(ValueError, match="length"):
        report.Predictions(np.zeros(3, int), None, np.zeros(2, int), _CLASSES)


def test_last_row_of_a_step_counts():
    rows = [{"kind": "train", "step": s, "loss": v} for s, v in ((1, 9.0), (2, 9.0), (1, 5.0), (2, 4.0))]
    assert "loss 4.000" in _Page(report.render(**_arguments(history=rows))).text


def test_long_histories_stay_small():
    rows = [{"kind": "train", "step": s, "loss": 1 + s % 5, "kl": 1.0} for s in range(20_000)]
    text = report.render(**_arguments(history=rows, train_samples=[], eval_samples=[]))
    assert len(text) < 200_000


def test_path_with_a_surrogate_can_be_encoded():
    report.render(**_arguments(config={"data": "/data/\udcff"})).encode("utf-8")


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib", "PIL"])
def test_missing_library_is_a_config_error(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"{missing}.*pip install funmatch\[report\]"):
        report.render(**_arguments())


def test_import_is_cheap():
    code = (
        "import sys, trainer.output.report; "
        "heavy = 'tensorflow', 'keras', 'matplotlib', 'jinja2', 'PIL'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (None, "–")],  # noqa: RUF001
)
def test_durations(seconds, text):
    assert formatting.duration(seconds) == text


def test_running_mean_keeps_straight_lines():
    values = np.arange(200.0)
    np.testing.assert_allclose(charts._running_mean(values)[:190], values[:190])
    np.testing.assert_allclose(charts._running_mean(np.ones(7)), 1)
    assert charts._running_mean(np.array([5.0])).tolist() == [5.0]
