"""Confusions of the student with the labels and with the teacher: tables and a matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from trainer.output import formatting

_MATRIX_CLASSES = 40  # a larger confusion matrix is not readable
_PAIRS = 12  # rows of the tables of confusions
_WORST = 10  # rows of the table of classes with the lowest accuracy


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The top-1 class of each model for every example of the final split.

    Attributes:
        labels: int [n], the true classes in 0..len(classes)-1, -1 where there is none; None: all
            unknown.
        teacher: int [n]; None without a teacher.
        student: int [n].
        classes: names, by class index.
    """

    labels: np.ndarray | None
    teacher: np.ndarray | None
    student: np.ndarray
    classes: list[str]

    def __post_init__(self) -> None:
        sizes = {np.shape(x) for x in (self.labels, self.teacher, self.student) if x is not None}
        if len(sizes) > 1 or len(next(iter(sizes))) != 1:
            raise ValueError(f"labels and predictions must have the same length, got {sorted(sizes)}")


def confusions(predictions: Predictions) -> dict[str, Any] | None:
    """The report's section on confusions.

    Returns:
        `size` (number of examples), `labelled` (how many have a label), `tables` and `matrix` as
        the template takes them; None if there is nothing to show. Accuracies are of the examples
        with a label, disagreements of all. A table has a `title`, a `caption`, `columns` (names),
        `text_columns` (how many of them are text), `rows` and `empty` (text shown without rows).
    """
    student = np.asarray(predictions.student, np.int64)
    labels, teacher = (
        None if x is None else np.asarray(x, np.int64) for x in (predictions.labels, predictions.teacher)
    )
    if student.size == 0:
        return None
    known = np.zeros(len(student), bool) if labels is None else labels >= 0
    if not known.any():
        labels = None
    highest = max(int(x.max()) for x in (labels, teacher, student) if x is not None)
    names = list(predictions.classes)
    names += [f"class {index}" for index in range(len(names), highest + 1)]
    tables = []
    if teacher is not None:
        tables.append(_disagreements(labels, teacher, student, names))
    matrix = None
    if labels is not None:
        true, answer = labels[known], student[known]
        reference = None if teacher is None else teacher[known]
        tables.insert(0, _mistakes(true, reference, answer, names))
        tables.append(_worst(true, reference, answer, names))
        if reference is not None:
            tables.append(_who_is_right(true, reference, answer))
        if 1 < len(names) <= _MATRIX_CLASSES:
            matrix = _matrix(true, answer, names, "true class")
    elif 1 < len(names) <= _MATRIX_CLASSES and teacher is not None:
        matrix = _matrix(teacher, student, names, "teacher's prediction")
    if not tables and not matrix:
        return None
    return {"size": student.size, "labelled": int(known.sum()), "tables": tables, "matrix": matrix}


def _name(names: list[str], index: int) -> str:
    return names[index] if index >= 0 else f"class {index}"


def _mistakes(labels: np.ndarray, teacher: np.ndarray | None, student: np.ndarray, names: list[str]) -> dict[str, Any]:
    caption = "A row counts the images of one class that the student predicts as another"
    columns = ["True class", "Student", "Images", "Share of class"]
    if teacher is not None:
        caption += ", and how often the teacher makes the same mistake"
        columns.append("Teacher too")
    rows = []
    for a, b, at in _pairs(labels, student):
        row = [_name(names, a), _name(names, b), formatting.count(at.sum())]
        row.append(formatting.percent(at.sum() / (labels == a).sum()))
        if teacher is not None:
            row.append(formatting.count((teacher[at] == b).sum()))
        rows.append(row)
    return {
        "title": "Most frequent mistakes of the student",
        "caption": caption + ".",
        "columns": columns,
        "text_columns": 2,
        "rows": rows,
        "empty": "The student made no mistake.",
    }


def _disagreements(
    labels: np.ndarray | None, teacher: np.ndarray, student: np.ndarray, names: list[str]
) -> dict[str, Any]:
    caption = "A row counts the images with one prediction of the teacher and another of the student"
    columns = ["Teacher", "Student", "Images"]
    if labels is not None:
        some = "" if (labels >= 0).all() else ", where there is a label"
        caption += f", and how often each is right{some}"
        columns += ["Teacher right", "Student right"]
    caption += f"; they agree on {formatting.percent((teacher == student).mean())} of all images."
    rows = []
    for a, b, at in _pairs(teacher, student):
        row = [_name(names, a), _name(names, b), formatting.count(at.sum())]
        if labels is not None:
            row += [formatting.count((labels[at] == a).sum()), formatting.count((labels[at] == b).sum())]
        rows.append(row)
    return {
        "title": "Most frequent disagreements",
        "caption": caption,
        "columns": columns,
        "text_columns": 2,
        "rows": rows,
        "empty": "They agree on every image.",
    }


def _worst(labels: np.ndarray, teacher: np.ndarray | None, student: np.ndarray, names: list[str]) -> dict[str, Any]:
    columns = ["Class", "Images", "Student"]
    if teacher is not None:
        columns += ["Teacher", "Gap, points"]
    classes = []
    for index in np.unique(labels).tolist():
        at = labels == index
        student_top1 = float((student[at] == index).mean())
        row = [_name(names, index), formatting.count(at.sum()), formatting.percent(student_top1)]
        if teacher is not None:
            teacher_top1 = float((teacher[at] == index).mean())
            row += [formatting.percent(teacher_top1), formatting.points(student_top1 - teacher_top1)]
        classes.append((student_top1, index, row))
    rows = [row for _, _, row in sorted(classes)[:_WORST]]
    caption = f"The {len(rows)} of {len(classes):,} classes with the lowest accuracy of the student"
    if teacher is not None:
        caption += ", with the teacher's for comparison"
    return {
        "title": "Classes with the lowest accuracy",
        "caption": caption + ".",
        "columns": columns,
        "text_columns": 1,
        "rows": rows,
        "empty": "",
    }


def _who_is_right(labels: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> dict[str, Any]:
    student_right, teacher_right, same = student == labels, teacher == labels, student == teacher
    groups = [
        ("Both right", student_right & teacher_right),
        ("Only the teacher right", ~student_right & teacher_right),
        ("Only the student right", student_right & ~teacher_right),
        ("Both wrong, same class", ~student_right & ~teacher_right & same),
        ("Both wrong, different classes", ~student_right & ~teacher_right & ~same),
    ]
    return {
        "title": "Who is right",
        "caption": "Each image is counted in one row.",
        "columns": ["Top-1 classes", "Images", "Share"],
        "text_columns": 1,
        "rows": [[name, formatting.count(at.sum()), formatting.percent(at.mean())] for name, at in groups],
        "empty": "",
    }


def _pairs(rows: np.ndarray, columns: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """The most frequent pairs of different classes.

    Args:
        rows: int [n], one class for each example.
        columns: int [n].

    Returns:
        (row, column, mask) for each pair, most frequent first; mask is bool [n].
    """
    off = rows != columns
    pairs, counts = np.unique(np.stack([rows[off], columns[off]], 1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))[:_PAIRS]
    return [(a, b, (rows == a) & (columns == b)) for a, b in pairs[order].tolist()]


def _matrix(rows: np.ndarray, columns: np.ndarray, names: list[str], meaning: str) -> dict[str, Any]:
    """The confusion matrix as the template draws it; lengths are in pixels."""
    side = len(names)
    counts = np.zeros((side, side), np.int64)
    valid = (rows >= 0) & (columns >= 0)
    np.add.at(counts, (rows[valid], columns[valid]), 1)
    sizes = np.maximum(counts.sum(1, keepdims=True), 1)
    shares = counts / sizes
    cell = 15 if side > 25 else 22 if side > 12 else 34
    short = [name if len(name) <= 20 else name[:19] + "…" for name in names]
    margin = 12 + round(6.2 * max(map(len, short)))
    cells = []
    for a, b in np.argwhere(counts > 0).tolist():
        share = float(shares[a, b])
        count = int(counts[a, b])
        cells.append(
            {
                "x": margin + cell * b,
                "y": margin + cell * a,
                "fill": "student" if a == b else "bad",
                "opacity": f"{0.06 + 0.94 * math.sqrt(share):.3f}",
                "text": "card" if share > 0.35 else "ink",
                "count": count,
                "title": f"{names[a]} → {names[b]}: {count:,} ({formatting.percent(share)})",
            }
        )
    labels = [{"name": short[i], "at": margin + cell * i, "mid": margin + cell * (i + 0.5)} for i in range(side)]
    right = formatting.percent(counts.trace() / max(1, counts.sum()))
    return {
        "cell": cell,
        "margin": margin,
        "side": cell * side,
        "height": margin + cell * side + 8,
        "width": round(1.6 * margin) + cell * side + 8,  # the column names slant to the right
        "cells": cells,
        "labels": labels,
        "numbers": cell >= 22 and counts.max() < 1000,
        "diagonal": right,
        "classes": side,
        "rows": meaning,
        "angle": -90 if side > 25 else -55,
    }
