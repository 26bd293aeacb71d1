"""Converts SavedModels that hold a BiT to a Keras BiT, which can then be folded and quantized.

Variables are matched to weights by their names, or else by their shapes and order. A match is
accepted only if the outputs of both models agree on a probe batch. The probe also shows the value
range that the SavedModel takes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import itertools
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from trainer.core.options import RANGES, ROOT_POOLS
from trainer.models import bit, bit_weights, saved_models
from trainer.models.saved_models import SavedClassifier
from trainer.models.value_range import to_range

# Largest accepted difference of a logit, divided by the largest distance of a logit from its mean
# over the batch. Two float32 graphs of bit-tiny differ by 2e-6; with a group epsilon of 1e-2, not
# 1e-5, they differ by more than 1e-2.
TOLERANCE = 1e-3
_SIDE = 64  # of the probe's images in pixels, if the SavedModel takes any size

# A variable of each weight, by "layer/weight" of `bit.bit`'s model.
Assignment = dict[str, tf.Variable]


@dataclasses.dataclass(frozen=True)
class ConvertedBit:
    """A SavedModel as a Keras BiT.

    Attributes:
        model: images in [-1, 1] -> logits; not folded; on the CPU, outside of any strategy.
        value_range: that the SavedModel takes; `model` takes [-1, 1].
        note: what was recognised, a line.
    """

    model: keras.Model
    value_range: str
    note: str


def convert(path: str, role: str, value_range: str, output: str = "") -> ConvertedBit | str:
    """Converts a SavedModel to a Keras BiT.

    Both are in memory only during the check.

    Args:
        path: folder of the SavedModel, on a disk or gs://.
        role: the flag whose model it is, for errors.
        value_range: that the user gives for it; "auto": any that agrees on the probe.
        output: see `SavedClassifier`.

    Returns:
        The converted model; or why it was not converted, a line, empty if it is no BiT at all.

    Raises:
        DataError: see `SavedClassifier`.
    """
    shapes = saved_models.variable_shapes(path, role)
    if not any(shape[:3] == (7, 7, 3) for shape in shapes) or not any(shape[:2] == (3, 3) for shape in shapes):
        return ""
    # A thread is outside of the strategy's scope: no mirrored copies of variables, and no TPU or
    # GPU, whose matrix products are rounded more than a comparison in float32 allows.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        converted = executor.submit(_convert, path, role, value_range, output).result()
    gc.collect()  # a SavedModel's functions refer to each other
    return converted


def _convert(path: str, role: str, value_range: str, output: str) -> ConvertedBit | str:
    with tf.device("/CPU:0"):
        saved = SavedClassifier(path, role, output)
        assignments: dict[bit.Arch, list[Assignment]] = {}
        for arch, assignment in _candidates(saved.variables):
            assignments.setdefault(arch, []).append(assignment)
        if not assignments:
            return "its variables are not those of a known BiT"
        height, width = saved.input_shape[1:3]
        if height != width:
            return f"it takes {height} x {width} pixels"
        views = probe(height or _SIDE)
        expected = {name: saved(to_range(views, name)).numpy().astype(np.float64) for name in RANGES}
        if not all(np.isfinite(outputs).all() for outputs in expected.values()):
            return "its outputs on a probe batch are not finite"
        probabilities = all(
            (outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-3) for outputs in expected.values()
        )
        smallest_error = np.inf
        for root_pool, (arch, group) in itertools.product(ROOT_POOLS, assignments.items()):
            model = bit.bit(arch, saved.output_shape[-1], height, root_pool=root_pool)
            for assignment in group:
                bit_weights.assign(model, _LazyArrays(assignment), f"--{role}=saved_model:{path}")
                logits = np.asarray(model(views), np.float64)
                errors = {name: _difference(logits, outputs, probabilities) for name, outputs in expected.items()}
                fits = [name for name, error in errors.items() if error <= TOLERANCE]
                smallest_error = min(smallest_error, *errors.values())
                if len(fits) > 1:
                    return f"a probe batch does not show whether it takes {' or '.join(fits)}"
                if fits and value_range not in ("auto", fits[0]):
                    return f"on a probe batch it takes {fits[0]}, but --{role}_range is {value_range}"
                if fits:
                    name = next((name for name, known in bit.ARCHS.items() if known == arch), "of another size")
                    pool = "" if root_pool == "zero" else f" with root pool {root_pool}"
                    return ConvertedBit(
                        model,
                        fits[0],
                        f"a BiT {name}{pool} that takes {fits[0]}: converted to Keras, which differs by "
                        f"{errors[fits[0]]:.0e} of the largest logit on a probe batch",
                    )
        return (
            f"a BiT with its variables differs by {smallest_error:.1g} of the largest logit on a probe batch "
            f"({TOLERANCE:g} is allowed)"
        )


def probe(side: int) -> tf.Tensor:
    """Images of areas and noise, float32 [n, side, side, 3] in [-1, 1]; the same at each call."""
    rng = np.random.Generator(np.random.Philox(7))
    count = 4 if side <= 256 else 2
    coarse = rng.uniform(-1, 1, (count, 5, 5, 3))
    areas = coarse.repeat(-(-side // 5), axis=1).repeat(-(-side // 5), axis=2)[:, :side, :side]
    fine = rng.uniform(-1, 1, (count, side, side, 3))
    return tf.constant(np.clip(0.7 * areas + 0.3 * fine, -1, 1), tf.float32)


def _difference(logits: np.ndarray, outputs: np.ndarray, probabilities: bool) -> float:
    """The largest difference as `TOLERANCE` counts it; infinite if the shapes differ."""
    if logits.shape != outputs.shape:
        return float("inf")
    if probabilities:
        logits = np.exp(logits - logits.max(1, keepdims=True))
        logits /= logits.sum(1, keepdims=True)
    spread = np.abs(outputs - outputs.mean(0)).max()
    return float(np.abs(logits - outputs).max() / max(spread, 1e-30))


class _LazyArrays(dict):
    """Arrays by name, read from their variables on access, so that one is in memory at a time."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(super().__getitem__(name).numpy(), np.float32)


def _candidates(orders: list[list[tf.Variable]]) -> Iterator[tuple[bit.Arch, Assignment]]:
    """Assignments to try: the one by names, or else those by shapes in each order of creation."""
    if (named := _by_name(orders[0])) is not None:
        yield named
        return
    seen = set()
    for variables in orders:
        for arch, assignment in _by_order(variables):
            key = tuple(id(assignment[name]) for name in sorted(assignment))
            if key not in seen:
                seen.add(key)
                yield arch, assignment


def weight_name(name: str) -> str | None:
    """A variable's name, with any prefix, as "layer/weight" in `bit.bit`'s model, or None."""
    parts = name.split(":")[0].split("/")
    for start in range(len(parts)):
        suffix = "/".join(parts[start:])
        for key in (suffix, f"resnet/{suffix}"):
            if weight := bit_weights.canonical(key):
                return weight
    return None


def _by_name(variables: list[tf.Variable]) -> tuple[bit.Arch, Assignment] | None:
    assignment: Assignment = {}
    unnamed = []
    for variable in variables:
        name = weight_name(variable.name)
        if name is None:
            unnamed.append(variable)
        elif name in assignment:
            return None
        else:
            assignment[name] = variable
    if len(unnamed) == 2 and "head/kernel" not in assignment:  # a classifier on top may have any name
        assignment |= dict(zip(("head/bias", "head/kernel"), sorted(unnamed, key=lambda v: len(v.shape)), strict=True))
    elif unnamed:
        return None
    arch = bit_weights.infer_arch({name: tuple(variable.shape) for name, variable in assignment.items()})
    expected = {name for name, _ in _layout(arch, _ORDERS[0])} if arch else set()
    return (arch, assignment) if arch and assignment.keys() == expected | {"head/kernel", "head/bias"} else None


# Orders in which the parts of a unit may be created; the projection may be at any position.
_PARTS = [
    ("a_norm", "a", "b_norm", "b", "c_norm", "c"),
    ("a", "b", "c", "a_norm", "b_norm", "c_norm"),
    ("a_norm", "b_norm", "c_norm", "a", "b", "c"),
]
_ORDERS = [
    ((*parts[:position], "proj", *parts[position:]), norm)
    for norm in (("gamma", "beta"), ("beta", "gamma"))
    for parts in _PARTS
    for position in range(len(parts) + 1)
]


def _layout(arch: bit.Arch, order: tuple[tuple[str, ...], tuple[str, str]]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without axes of size one, of all weights but the classifier's.

    Args:
        arch: the architecture.
        order: of creation, one of `_ORDERS`.
    """
    parts, norm = order
    layout: list[tuple[str, tuple[int, ...]]] = [("root_conv/kernel", (7, 7, 3, arch.filters))]
    incoming = arch.filters
    for block, units in enumerate(arch.units):
        inside = arch.filters * 2**block
        for unit in range(units):
            shapes = {
                "a": (incoming, inside),
                "b": (3, 3, inside, inside),
                "c": (inside, 4 * inside),
                "proj": (incoming, 4 * inside),
                "a_norm": (incoming,),
                "b_norm": (inside,),
                "c_norm": (inside,),
            }
            for part in parts:
                if part == "proj" and unit > 0:
                    continue
                layer = f"block{block + 1}_unit{unit + 1:02d}_{part}"
                for weight in norm if part.endswith("norm") else ("kernel",):
                    layout.append((f"{layer}/{weight}", shapes[part]))
            incoming = 4 * inside
    return layout + [(f"final_norm/{weight}", (incoming,)) for weight in norm]


def _by_order(variables: list[tf.Variable]) -> Iterator[tuple[bit.Arch, Assignment]]:
    shapes = [tuple(side for side in variable.shape if side != 1) for variable in variables]
    roots = [shape for shape in shapes if shape[:3] == (7, 7, 3) and len(shape) == 4]
    inner = [shape[-1] for shape in shapes if len(shape) == 4 and shape[:2] == (3, 3)]
    if len(roots) != 1 or not inner or len(shapes) < 3:
        return
    blocks = [(width, len(list(group))) for width, group in itertools.groupby(inner)]
    arch = bit_weights.find_arch(tuple(count for _, count in blocks), roots[0][-1])
    if arch is None or [width for width, _ in blocks] != [arch.filters * 2**b for b in range(len(blocks))]:
        return
    # The classifier was created before the network or after it.
    for head, body in ((variables[-2:], slice(0, -2)), (variables[:2], slice(2, None))):
        kernel, bias = sorted(head, key=lambda v: -sum(side != 1 for side in v.shape))
        for order in _ORDERS:
            layout = _layout(arch, order)
            if [shape for _, shape in layout] == shapes[body]:
                assignment = {name: variable for (name, _), variable in zip(layout, variables[body], strict=True)}
                yield arch, assignment | {"head/kernel": kernel, "head/bias": bias}
