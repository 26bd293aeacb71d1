"""The images of the report that are chosen by what the models say."""

from __future__ import annotations

import numpy as np

from trainer.output.samples import confident_disagreements


def test_confident_disagreements_come_first() -> None:
    """Both must be sure: the less sure model's probability decides."""
    teacher = np.array([[9, 0], [9, 0], [2, 0], [0, 4], [0, 1]], np.float32)
    student = np.array([[9, 0], [0, 1], [0, 2], [3, 0], [0, 9]], np.float32)
    assert confident_disagreements(teacher, student, 8).tolist() == [3, 2, 1]
    assert confident_disagreements(teacher, student, 2).tolist() == [3, 2]
    assert confident_disagreements(teacher, teacher, 8).tolist() == []
