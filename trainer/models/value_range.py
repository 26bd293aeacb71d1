"""Value ranges of a model's input."""

from __future__ import annotations

import tensorflow as tf


def to_range(views: tf.Tensor, value_range: str) -> tf.Tensor:
    """Views in [-1, 1] -> the range that a model takes: "-1,1", "0,1" or "0,255"."""
    if value_range == "0,1":
        return (views + 1.0) / 2.0
    if value_range == "0,255":
        return (views + 1.0) * 127.5
    return views
