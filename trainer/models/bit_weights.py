"""BiT's published weights: npz files in both of their layouts, known by name or by path.

One layout is that of google-research/big_transfer (`resnet/block1/unit01/a/standardized_conv2d/kernel`), the other that of
big_vision (`block1/unit01/conv1/kernel`). Kernels are height, width, in, out in both, as in Keras.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import zipfile
import zlib
from typing import Any

import keras
import numpy as np

from trainer.core.errors import ConfigError, DataError
from trainer.io import download
from trainer.models import bit

_BUCKET = "https://storage.googleapis.com/bit_models"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published file.

    Attributes:
        arch: a name in `bit.ARCHS`.
        address: where it lies.
        size: side in pixels that it was trained for; 0 where it was pre-trained to be fine-tuned.
        classes: width of its head.
    """

    arch: str
    address: str
    size: int
    classes: int


def _published() -> dict[str, Published]:
    found = {}
    for arch in (name for name, arch in bit.ARCHS.items() if arch.released):
        for kind, classes in (("S", 1000), ("M", 21_843)):
            found[f"BiT-{kind}-{arch}"] = Published(arch, f"{_BUCKET}/BiT-{kind}-{arch}.npz", 0, classes)
        name = f"BiT-M-{arch}-ILSVRC2012"
        found[name] = Published(arch, f"{_BUCKET}/{name}.npz", 480, 1000)  # BiT-HyperRule: 512, crop 480
    distilled = [
        ("R50x1_160", 160, 1000),
        ("R50x1_224", 224, 1000),
        ("R152x2_T_224", 224, 1000),
        ("R152x2_T_384", 384, 1000),
        ("R152x2_T_flowers128", 128, 102),
        ("R152x2_T_pet128", 128, 37),
        ("R152x2_T_food128", 128, 101),
        ("R152x2_T_sun128", 128, 397),
    ]
    for name, size, classes in distilled:
        found[name] = Published(name.split("_")[0], f"{_BUCKET}/distill/{name}.npz", size, classes)
    return found


PUBLISHED = _published()


@dataclasses.dataclass(frozen=True)
class Source:
    """What the text after `bit:` means: an architecture ("": see the shapes), a file, and the size it was made for (0: unknown)."""

    arch: str
    path: str
    size: int


def source(text: str, flag: str) -> Source:
    """Reads "R152x2_T_flowers128" (a published name), "R152x2@PATH", or "@PATH" for the architecture that the shapes tell.

    Raises:
        ConfigError: neither; the nearest name is given.
    """
    arch, at, path = text.partition("@")
    if not at:
        if text in PUBLISHED:
            known = PUBLISHED[text]
            return Source(known.arch, known.address, known.size)
        near = difflib.get_close_matches(text, PUBLISHED, 1)
        hint = f"did you mean bit:{near[0]}? " if near else ""
        raise ConfigError(
            f"--{flag}=bit:{text}: {hint}It must be bit:ARCH@FILE.npz or one of {', '.join(sorted(PUBLISHED))}"
        )
    if not arch and path:
        return Source("", path, 0)
    if arch not in bit.ARCHS or not path:
        near = difflib.get_close_matches(arch, bit.ARCHS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--{flag}=bit:{text}: {hint}It must be bit:ARCH@FILE.npz, ARCH one of {', '.join(bit.ARCHS)}"
        )
    return Source(arch, path, 0)


_WHERE = r"block(?P<block>\d)/unit(?P<unit>\d\d)"
_OURS = r"block(?P<block>\d)_unit(?P<unit>\d\d)"
_N = r"(?:_\d+)?"  # some files number their layers: standardized_conv2d_17
# Pattern of a key, the layer's name in our models, the weight's name there; {x} is the pattern's group x, mapped.
_KEYS = [
    (rf"resnet/root_block/standardized_conv2d{_N}/kernel", "root_conv", "kernel"),
    (rf"resnet/{_WHERE}/(?P<part>[abc])/standardized_conv2d{_N}/kernel", "{where}_{part}", "kernel"),
    (rf"resnet/{_WHERE}/a/proj/standardized_conv2d{_N}/kernel", "{where}_proj", "kernel"),
    (rf"resnet/{_WHERE}/(?P<part>[abc])/group_norm{_N}/(?P<weight>gamma|beta)", "{where}_{part}_norm", "{weight}"),
    (rf"resnet/group_norm{_N}/(?P<weight>gamma|beta)", "final_norm", "{weight}"),
    (rf"resnet/head/conv2d{_N}/(?P<weight>kernel|bias)", "head", "{weight}"),
    (r"root_block/conv_root/kernel", "root_conv", "kernel"),
    (rf"{_WHERE}/conv(?P<part>[123])/kernel", "{where}_{part}", "kernel"),
    (rf"{_WHERE}/conv_proj/kernel", "{where}_proj", "kernel"),
    (rf"{_WHERE}/gn(?P<part>[123])/(?P<weight>scale|bias)", "{where}_{part}_norm", "{norm}"),
    (r"norm-pre-head/(?P<weight>scale|bias)", "final_norm", "{norm}"),
    (r"head/(?P<weight>kernel|bias)", "head", "{weight}"),
    # Ours, as a SavedModel of ours has them.
    (r"root_conv/kernel", "root_conv", "kernel"),
    (rf"{_OURS}_(?P<part>[abc]|proj)/kernel", "{where}_{part}", "kernel"),
    (rf"{_OURS}_(?P<part>[abc])_norm/(?P<weight>gamma|beta)", "{where}_{part}_norm", "{weight}"),
    (r"final_norm/(?P<weight>gamma|beta)", "final_norm", "{weight}"),
]
# Where a training checkpoint has the model, beside much else: big_vision's of today, and that of its first years.
_PREFIXES = ("params/", "opt/target/")


def canonical(key: str) -> str | None:
    """A file's key as "layer/weight" of `bit.bit`'s model; None if it is none of BiT's."""
    for pattern, layer, weight in _KEYS:
        if match := re.fullmatch(pattern, key):
            groups = match.groupdict()
            names = {
                "where": f"block{groups.get('block')}_unit{groups.get('unit')}",
                "part": {"1": "a", "2": "b", "3": "c"}.get(groups.get("part", ""), groups.get("part")),
                "weight": groups.get("weight"),
                "norm": {"scale": "gamma", "bias": "beta"}.get(groups.get("weight", "")),
            }
            return f"{layer}/{weight}".format(**names)
    return None


def known(units: tuple[int, ...], filters: int) -> bit.Arch | None:
    """The architecture with these units and root filters: one of `bit.ARCHS`, else one of the paper's 32 groups."""
    for arch in bit.ARCHS.values():
        if (arch.units, arch.filters) == (units, filters):
            return arch
    return bit.Arch(units, filters) if units and filters % 32 == 0 else None


def architecture(shapes: dict[str, tuple[int, ...]]) -> bit.Arch | None:
    """The architecture whose weights have these shapes, by "layer/weight"; None if it is none of BiT's."""
    units: dict[int, int] = {}
    for name in shapes:
        if match := re.fullmatch(r"block(\d)_unit(\d\d)_b/kernel", name):
            units[int(match[1])] = units.get(int(match[1]), 0) + 1
    if sorted(units) != list(range(1, len(units) + 1)) or len(shapes.get("root_conv/kernel", ())) != 4:
        return None
    return known(tuple(units[block] for block in sorted(units)), shapes["root_conv/kernel"][-1])


_LARGEST = 1 << 34  # R152x4, the largest, has 3.7 GB of weights; a checkpoint of training some times that


def read(path: str, role: str) -> dict[str, np.ndarray]:
    """The arrays of a BiT npz by "layer/weight", float32, as our layers hold them.

    Args:
        path: on a disk, gs:// or https://.
        role: the flag whose file it is, for errors.

    Raises:
        DataError: not there, not an npz, an array that is no plain array of floats (nothing pickled is ever loaded) or
            that claims to be larger than its bytes, or keys that are none of BiT's, which are listed.
    """
    local = download.local_copy(path, role)
    found: dict[str, np.ndarray] = {}
    strange = []
    try:
        with zipfile.ZipFile(local) as archive:
            names = [info.filename for info in archive.infolist()]
            if (total := sum(info.file_size for info in archive.infolist())) > _LARGEST:
                raise DataError(f"--{role}={path} claims to hold {total:,} bytes, more than any BiT with its optimizer")
            inside = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")
            for info in archive.infolist():
                if not info.filename.startswith(inside):
                    continue
                key = info.filename.removesuffix(".npy").removeprefix(inside)
                name = canonical(key)
                if name is None or name in found:
                    strange.append(key)
                    continue
                found[name] = _array(archive, info, f"--{role}={path}")
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise DataError(f"--{role}={path} is no npz file of weights: {error}") from error
    if strange or not found:
        shown = ", ".join(sorted(strange)[:5]) or "none at all"
        raise DataError(f"--{role}={path} holds {len(strange)} arrays that no BiT has, the first: {shown}")
    return found


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """One member, after a look at its header: what it claims to hold must be there."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
    if dtype.kind != "f":
        raise DataError(f"{where}: {info.filename} holds {dtype}, not floats; nothing in it was executed")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > info.file_size:
        raise DataError(f"{where}: {info.filename} claims shape {shape} and has {info.file_size:,} bytes")
    with archive.open(info) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False), np.float32)


def fill(model: keras.Model, arrays: dict[str, np.ndarray], where: str, *, keep_head: bool = True) -> None:
    """Puts a file's weights into a model of `bit.bit`.

    Args:
        model: unfolded.
        arrays: as `read` gives them; singleton axes are dropped where the model has none.
        where: flag and path, for errors.
        keep_head: take the classifier too; else it stays as it is.

    Raises:
        DataError: weights are missing, left over or of another shape; they are listed.
    """
    targets: dict[str, Any] = {}
    for layer in model.layers:
        for weight in layer.weights:
            targets[f"{layer.name}/{weight.name}"] = weight
    if not keep_head:
        targets = {name: weight for name, weight in targets.items() if not name.startswith("head/")}
        arrays = {name: array for name, array in arrays.items() if not name.startswith("head/")}
    missing, extra = sorted(targets.keys() - arrays.keys()), sorted(arrays.keys() - targets.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for what, names in (("missing", missing), ("left over", extra))
            if names
        ]
        raise DataError(f"{where} does not fit {model.name}: {'; '.join(parts)}. Is it another architecture's file?")
    for name, weight in targets.items():
        array = arrays[name]
        if array.size != np.prod(weight.shape) or tuple(s for s in array.shape if s > 1) != tuple(
            s for s in weight.shape if s > 1
        ):
            raise DataError(
                f"{where} does not fit {model.name}: {name} has shape {array.shape}, not {tuple(weight.shape)}. "
                "Is it another architecture's file?"
            )
        weight.assign(array.reshape(weight.shape))


def load(text: str, role: str, size: int | None, root_pool: str) -> keras.Model:
    """A BiT with the weights and the head of its file.

    Args:
        text: what follows `bit:`.
        role: the flag, for errors.
        size: side of its images in pixels; None leaves it open.
        root_pool: "zero" or "inf", see `bit.bit`.

    Raises:
        ConfigError: an unknown name or architecture.
        DataError: see `read` and `fill`.
    """
    chosen = source(text, role)
    arrays = read(chosen.path, role)
    if "head/kernel" not in arrays:
        raise DataError(f"--{role}=bit:{text} has no head: it gives no classes; fine-tune it first")
    classes = arrays["head/kernel"].shape[-1]
    arch = chosen.arch or architecture({name: array.shape for name, array in arrays.items()})
    if arch is None:
        raise DataError(f"--{role}=bit:{text}: its shapes are of no BiT that we know; say which: bit:ARCH@FILE.npz")
    model = bit.bit(arch, classes, size, root_pool=root_pool)
    fill(model, arrays, f"--{role}=bit:{text}")
    return model
