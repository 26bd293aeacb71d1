"""SavedModels whose variables are a BiT's, turned into our own BiT: the same function, which can then be folded and made cheap.

Nothing is believed of names or orders. Whatever they suggest is tried on a batch of pictures, and only a network that says there
what the SavedModel says is used in its place; the batch shows the value range that the SavedModel takes as well.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.core.options import RANGES, ROOT_POOLS
from trainer.models import bit, bit_weights, saved_models
from trainer.models.saved_models import SavedClassifier
from trainer.models.value_range import to_range

# Largest difference of a logit, as a share of the largest distance of a logit from the mean over the batch. Two float32 graphs of
# our smallest BiT differ by 2e-6; a wrong epsilon of the groups (1e-2) by more than 1e-2.
TOLERANCE = 1e-3
_SIDE = 64  # of the probe's pictures, where the SavedModel takes any


@dataclasses.dataclass(frozen=True)
class Native:
    """A SavedModel as our own network.

    Attributes:
        model: images in [-1, 1] -> logits; unfolded; on the CPU, of no strategy.
        value_range: what the SavedModel takes, which `model` does not need.
        note: what was found, a line.
    """

    model: keras.Model
    value_range: str
    note: str


def convert(path: str, role: str, value_range: str) -> Native | str:
    """Our own BiT in place of a SavedModel, or why not: a line, empty where the SavedModel has nothing of a BiT.

    Both are held in memory only for the time of the check.

    Args:
        path: folder of the SavedModel, on a disk or gs://.
        role: the flag whose model it is, for errors.
        value_range: what the user says that it takes; "auto": what the probe says.

    Raises:
        DataError: see `SavedClassifier`.
    """
    shapes = saved_models.variable_shapes(path, role)
    if not any(shape[:3] == (7, 7, 3) for shape in shapes) or not any(shape[:2] == (3, 3) for shape in shapes):
        return ""
    # In a thread of its own there is no strategy's scope: no mirrored copies, and no TPU or GPU whose products of
    # matrices are rounded more than a check to float32's accuracy allows.
    with concurrent.futures.ThreadPoolExecutor(1) as alone:
        found = alone.submit(_convert, path, role, value_range).result()
    gc.collect()  # a SavedModel's functions refer to each other
    return found


def _convert(path: str, role: str, value_range: str) -> Native | str:
    with tf.device("/CPU:0"):
        saved = SavedClassifier(path, role)
        candidates: dict[bit.Arch, list[dict[str, Any]]] = {}
        for arch, found in _candidates(saved.variables):
            candidates.setdefault(arch, []).append(found)
        if not candidates:
            return "its variables are not those of a BiT that we know"
        height, width = saved.input_shape[1:3]
        if height != width:
            return f"it takes {height} x {width} pixels"
        views = probe(height or _SIDE)
        said = {name: saved(to_range(views, name)).numpy().astype(np.float64) for name in RANGES}
        if not all(np.isfinite(outputs).all() for outputs in said.values()):
            return "it says things that are not finite of a probe batch"
        probabilities = all(
            (outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-3) for outputs in said.values()
        )
        best = np.inf
        for root_pool, (arch, group) in itertools.product(ROOT_POOLS, candidates.items()):
            model = bit.bit(arch, saved.output_shape[-1], height, root_pool=root_pool)
            for variables in group:
                bit_weights.assign(model, _Reading(variables), f"--{role}=saved_model:{path}")
                own = np.asarray(model(views), np.float64)
                errors = {name: _difference(own, outputs, probabilities) for name, outputs in said.items()}
                fits = [name for name, error in errors.items() if error <= TOLERANCE]
                best = min(best, *errors.values())
                if len(fits) > 1:
                    return f"a probe batch does not tell whether it takes {' or '.join(fits)}"
                if fits and value_range not in ("auto", fits[0]):
                    return f"it takes {fits[0]}, as a probe batch shows, and --{role}_range says {value_range}"
                if fits:
                    what = next((name for name, known in bit.ARCHS.items() if known == arch), "of a size of its own")
                    pool = "" if root_pool == "zero" else f" with root pool {root_pool}"
                    return Native(
                        model,
                        fits[0],
                        f"a BiT {what}{pool} that takes {fits[0]}: run as our own network, which differs by "
                        f"{errors[fits[0]]:.0e} of the largest logit on a probe batch",
                    )
        return f"a BiT with its variables differs by {best:.1g} of the largest logit on a probe batch ({TOLERANCE:g} is allowed)"


def probe(side: int) -> tf.Tensor:
    """Pictures with edges, areas and noise, float32 [n, side, side, 3] in [-1, 1]; the same at each call."""
    rng = np.random.Generator(np.random.Philox(7))
    count = 4 if side <= 256 else 2
    coarse = rng.uniform(-1, 1, (count, 5, 5, 3))
    areas = coarse.repeat(-(-side // 5), axis=1).repeat(-(-side // 5), axis=2)[:, :side, :side]
    fine = rng.uniform(-1, 1, (count, side, side, 3))
    return tf.constant(np.clip(0.7 * areas + 0.3 * fine, -1, 1), tf.float32)


def _difference(own: np.ndarray, outputs: np.ndarray, probabilities: bool) -> float:
    if own.shape != outputs.shape:
        return float("inf")
    if probabilities:
        own = np.exp(own - own.max(1, keepdims=True))
        own /= own.sum(1, keepdims=True)
    spread = np.abs(outputs - outputs.mean(0)).max()
    return float(np.abs(own - outputs).max() / max(spread, 1e-30))


class _Reading(dict):
    """Variables by name whose values are read one at a time, when they are asked for."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(super().__getitem__(name).numpy(), np.float32)


def _candidates(orders: list[list[Any]]) -> Iterator[tuple[bit.Arch, dict[str, Any]]]:
    """Which variable might be which weight: by their names, else by their shapes in each order that may be that of creation."""
    if (named := _by_name(orders[0])) is not None:
        yield named
        return
    seen = set()
    for variables in orders:
        for arch, found in _by_order(variables):
            key = tuple(id(found[name]) for name in sorted(found))
            if key not in seen:
                seen.add(key)
                yield arch, found


def structural(name: str) -> str | None:
    """A variable's name as "layer/weight" of `bit.bit`, whatever stands before the part that carries BiT's structure."""
    parts = name.split(":")[0].split("/")
    for start in range(len(parts)):
        rest = "/".join(parts[start:])
        for key in (rest, f"resnet/{rest}"):
            if found := bit_weights.canonical(key):
                return found
    return None


def _by_name(variables: list[Any]) -> tuple[bit.Arch, dict[str, Any]] | None:
    found: dict[str, Any] = {}
    others = []
    for variable in variables:
        name = structural(variable.name)
        if name is None:
            others.append(variable)
        elif name in found:
            return None
        else:
            found[name] = variable
    if len(others) == 2 and "head/kernel" not in found:  # a classifier put on top goes by any name
        found |= dict(zip(("head/bias", "head/kernel"), sorted(others, key=lambda v: len(v.shape)), strict=True))
    elif others:
        return None
    arch = bit_weights.infer_arch({name: tuple(variable.shape) for name, variable in found.items()})
    expected = {name for name, _ in _layout(arch, _ORDERS[0])} if arch else set()
    return (arch, found) if arch and found.keys() == expected | {"head/kernel", "head/bias"} else None


# Orders in which the parts of a unit are made; the projection stands at any place in each.
_PARTS = [
    ("a_norm", "a", "b_norm", "b", "c_norm", "c"),
    ("a", "b", "c", "a_norm", "b_norm", "c_norm"),
    ("a_norm", "b_norm", "c_norm", "a", "b", "c"),
]
_ORDERS = [
    ((*parts[:place], "proj", *parts[place:]), norm)
    for norm in (("gamma", "beta"), ("beta", "gamma"))
    for parts in _PARTS
    for place in range(len(parts) + 1)
]


def _layout(arch: bit.Arch, order: tuple[tuple[str, ...], tuple[str, str]]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without axes of size one, of all weights but the classifier's, in an order of `_ORDERS`."""
    parts, norm = order
    found: list[tuple[str, tuple[int, ...]]] = [("root_conv/kernel", (7, 7, 3, arch.filters))]
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
                where = f"block{block + 1}_unit{unit + 1:02d}_{part}"
                for weight in norm if part.endswith("norm") else ("kernel",):
                    found.append((f"{where}/{weight}", shapes[part]))
            incoming = 4 * inside
    return found + [(f"final_norm/{weight}", (incoming,)) for weight in norm]


def _by_order(variables: list[Any]) -> Iterator[tuple[bit.Arch, dict[str, Any]]]:
    shapes = [tuple(side for side in variable.shape if side != 1) for variable in variables]
    roots = [shape for shape in shapes if shape[:3] == (7, 7, 3) and len(shape) == 4]
    inner = [shape[-1] for shape in shapes if len(shape) == 4 and shape[:2] == (3, 3)]
    if len(roots) != 1 or not inner or len(shapes) < 3:
        return
    blocks = [(width, len(list(group))) for width, group in itertools.groupby(inner)]
    arch = bit_weights.find_arch(tuple(count for _, count in blocks), roots[0][-1])
    if arch is None or [width for width, _ in blocks] != [arch.filters * 2**b for b in range(len(blocks))]:
        return
    # The classifier is made before the network or after it.
    for head, body in ((variables[-2:], slice(0, -2)), (variables[:2], slice(2, None))):
        kernel, bias = sorted(head, key=lambda v: -sum(side != 1 for side in v.shape))
        for order in _ORDERS:
            layout = _layout(arch, order)
            if [shape for _, shape in layout] == shapes[body]:
                found = {name: variable for (name, _), variable in zip(layout, variables[body], strict=True)}
                yield arch, found | {"head/kernel": kernel, "head/bias": bias}
