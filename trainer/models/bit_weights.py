"""BiT weights from npz files in both published layouts, by name or by path.

One layout is that of google-research/big_transfer, with keys such as
`resnet/block1/unit01/a/standardized_conv2d/kernel`; the other is that of big_vision, with keys
such as `block1/unit01/conv1/kernel`. Kernels are [height, width, in, out] in both, as in Keras.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import zipfile
import zlib

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
        url: of the file.
        size: side in pixels of the images that it was trained on; 0 for a pre-trained model to
            fine-tune.
        classes: width of its head.
    """

    arch: str
    url: str
    size: int
    classes: int


def _published() -> dict[str, Published]:
    files = {}
    for arch in (name for name, arch in bit.ARCHS.items() if arch.released):
        for kind, classes in (("S", 1000), ("M", 21_843)):
            files[f"BiT-{kind}-{arch}"] = Published(arch, f"{_BUCKET}/BiT-{kind}-{arch}.npz", 0, classes)
        name = f"BiT-M-{arch}-ILSVRC2012"
        files[name] = Published(arch, f"{_BUCKET}/{name}.npz", 480, 1000)  # BiT-HyperRule: 512, crop 480
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
        files[name] = Published(name.split("_")[0], f"{_BUCKET}/distill/{name}.npz", size, classes)
    return files


PUBLISHED = _published()


@dataclasses.dataclass(frozen=True)
class WeightsSource:
    """The meaning of the text after `bit:`.

    Attributes:
        arch: a name in `bit.ARCHS`; "": inferred from the shapes in the file.
        path: of the file, on a disk, gs:// or https://.
        size: side in pixels of the images that the file was trained on; 0: unknown.
    """

    arch: str
    path: str
    size: int


def parse_source(text: str, flag: str) -> WeightsSource:
    """Parses a published name (R152x2_T_flowers128), ARCH@PATH, or @PATH.

    Raises:
        ConfigError: it is none of these; the nearest name is given.
    """
    arch, at, path = text.partition("@")
    if not at:
        if text in PUBLISHED:
            published = PUBLISHED[text]
            return WeightsSource(published.arch, published.url, published.size)
        near = difflib.get_close_matches(text, PUBLISHED, 1)
        hint = f"did you mean bit:{near[0]}? " if near else ""
        raise ConfigError(
            f"--{flag}=bit:{text}: {hint}It must be bit:ARCH@FILE.npz or one of {', '.join(sorted(PUBLISHED))}"
        )
    if not arch and path:
        return WeightsSource("", path, 0)
    if arch not in bit.ARCHS or not path:
        near = difflib.get_close_matches(arch, bit.ARCHS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--{flag}=bit:{text}: {hint}It must be bit:ARCH@FILE.npz, ARCH one of {', '.join(bit.ARCHS)}"
        )
    return WeightsSource(arch, path, 0)


_UNIT = r"block(?P<block>\d)/unit(?P<unit>\d\d)"
_KERAS_UNIT = r"block(?P<block>\d)_unit(?P<unit>\d\d)"
_N = r"(?:_\d+)?"  # some files number their layers: standardized_conv2d_17
# Pattern of a key; names of layer and weight in `bit.bit`'s model. See `canonical` for {...}.
_KEYS = [
    (rf"resnet/root_block/standardized_conv2d{_N}/kernel", "root_conv", "kernel"),
    (rf"resnet/{_UNIT}/(?P<part>[abc])/standardized_conv2d{_N}/kernel", "{block_unit}_{part}", "kernel"),
    (rf"resnet/{_UNIT}/a/proj/standardized_conv2d{_N}/kernel", "{block_unit}_proj", "kernel"),
    (rf"resnet/{_UNIT}/(?P<part>[abc])/group_norm{_N}/(?P<weight>gamma|beta)", "{block_unit}_{part}_norm", "{weight}"),
    (rf"resnet/group_norm{_N}/(?P<weight>gamma|beta)", "final_norm", "{weight}"),
    (rf"resnet/head/conv2d{_N}/(?P<weight>kernel|bias)", "head", "{weight}"),
    (r"root_block/conv_root/kernel", "root_conv", "kernel"),
    (rf"{_UNIT}/conv(?P<part>[123])/kernel", "{block_unit}_{part}", "kernel"),
    (rf"{_UNIT}/conv_proj/kernel", "{block_unit}_proj", "kernel"),
    (rf"{_UNIT}/gn(?P<part>[123])/(?P<weight>scale|bias)", "{block_unit}_{part}_norm", "{norm}"),
    (r"norm-pre-head/(?P<weight>scale|bias)", "final_norm", "{norm}"),
    (r"head/(?P<weight>kernel|bias)", "head", "{weight}"),
    # `bit.bit`'s own names, as in an exported SavedModel.
    (r"root_conv/kernel", "root_conv", "kernel"),
    (rf"{_KERAS_UNIT}_(?P<part>[abc]|proj)/kernel", "{block_unit}_{part}", "kernel"),
    (rf"{_KERAS_UNIT}_(?P<part>[abc])_norm/(?P<weight>gamma|beta)", "{block_unit}_{part}_norm", "{weight}"),
    (r"final_norm/(?P<weight>gamma|beta)", "final_norm", "{weight}"),
]
# Prefixes of the model's weights in a training checkpoint of big_vision: newer ones, older ones.
_PREFIXES = ("params/", "opt/target/")


def canonical(key: str) -> str | None:
    """A file's key as "layer/weight" in `bit.bit`'s model; None if it is not a BiT's."""
    for pattern, layer, weight in _KEYS:
        if match := re.fullmatch(pattern, key):
            groups = match.groupdict()
            names = {
                "block_unit": f"block{groups.get('block')}_unit{groups.get('unit')}",
                "part": {"1": "a", "2": "b", "3": "c"}.get(groups.get("part", ""), groups.get("part")),
                "weight": groups.get("weight"),
                "norm": {"scale": "gamma", "bias": "beta"}.get(groups.get("weight", "")),
            }
            return f"{layer}/{weight}".format(**names)
    return None


def find_arch(units: tuple[int, ...], filters: int) -> bit.Arch | None:
    """The architecture with these units in each block and these filters of the root convolution.

    One of `bit.ARCHS`, else one with the paper's 32 groups; None if 32 does not divide the
    filters.
    """
    for arch in bit.ARCHS.values():
        if (arch.units, arch.filters) == (units, filters):
            return arch
    return bit.Arch(units, filters) if units and filters % 32 == 0 else None


def infer_arch(shapes: dict[str, tuple[int, ...]]) -> bit.Arch | None:
    """The architecture with weights of these shapes, by "layer/weight"; None if not a BiT."""
    units: dict[int, int] = {}
    for name in shapes:
        if match := re.fullmatch(r"block(\d)_unit(\d\d)_b/kernel", name):
            units[int(match[1])] = units.get(int(match[1]), 0) + 1
    if sorted(units) != list(range(1, len(units) + 1)) or len(shapes.get("root_conv/kernel", ())) != 4:
        return None
    return find_arch(tuple(units[block] for block in sorted(units)), shapes["root_conv/kernel"][-1])


# Bytes. The largest BiT, R152x4, has 3.7 GB of weights; a training checkpoint has a few times that.
MAX_BYTES = 1 << 34


def read(path: str, role: str) -> dict[str, np.ndarray]:
    """Reads the arrays of a BiT npz, float32, by the names "layer/weight" of `bit.bit`'s model.

    Args:
        path: on a disk, gs:// or https://.
        role: the flag whose file it is, for errors.

    Raises:
        DataError: the file does not exist or is not an npz; an array is not of floats (pickles are
            never loaded) or claims to be larger than its bytes; or keys are not a BiT's (they are
            listed).
    """
    local = download.local_copy(path, role)
    arrays: dict[str, np.ndarray] = {}
    unknown = []
    try:
        with zipfile.ZipFile(local) as archive:
            names = [info.filename for info in archive.infolist()]
            if (total := sum(info.file_size for info in archive.infolist())) > MAX_BYTES:
                raise DataError(f"--{role}={path} claims to hold {total:,} bytes, more than any BiT with its optimizer")
            prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")
            for info in archive.infolist():
                if not info.filename.startswith(prefix):
                    continue
                key = info.filename.removesuffix(".npy").removeprefix(prefix)
                name = canonical(key)
                if name is None or name in arrays:
                    unknown.append(key)
                    continue
                arrays[name] = _array(archive, info, f"--{role}={path}")
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise DataError(f"--{role}={path} is not an npz file of weights: {error}") from error
    if unknown or not arrays:
        shown = ", ".join(sorted(unknown)[:5]) or "none at all"
        raise DataError(f"--{role}={path} holds {len(unknown)} arrays that no BiT has, the first: {shown}")
    return arrays


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """Reads a member after checking that its header says floats, and no more than it holds."""
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


def assign(model: keras.Model, arrays: dict[str, np.ndarray], where: str, *, with_head: bool = True) -> None:
    """Assigns a file's weights to a model of `bit.bit`.

    Args:
        model: not folded.
        arrays: from `read`; axes of size one that the model does not have are dropped.
        where: flag and path, for errors.
        with_head: assign the classifier too; otherwise it stays as it is.

    Raises:
        DataError: weights are missing, unexpected or of another shape; they are listed.
    """
    targets = {f"{layer.name}/{weight.name}": weight for layer in model.layers for weight in layer.weights}
    if not with_head:
        targets = {name: weight for name, weight in targets.items() if not name.startswith("head/")}
        arrays = {name: array for name, array in arrays.items() if not name.startswith("head/")}
    missing, extra = sorted(targets.keys() - arrays.keys()), sorted(arrays.keys() - targets.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise DataError(f"{where} does not fit {model.name}: {'; '.join(parts)}. Is it another architecture's file?")
    for name, weight in targets.items():
        array = arrays[name]
        if _without_ones(array.shape) != _without_ones(weight.shape):
            raise DataError(
                f"{where} does not fit {model.name}: {name} has shape {array.shape}, not {tuple(weight.shape)}. "
                "Is it another architecture's file?"
            )
        weight.assign(array.reshape(weight.shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def load(text: str, role: str, size: int | None, root_pool: str) -> keras.Model:
    """A BiT with the weights and the head of its file.

    Args:
        text: what follows `bit:`.
        role: the flag, for errors.
        size: side of its images in pixels; None leaves it open.
        root_pool: "zero" or "inf", see `bit.bit`.

    Returns:
        The model, not folded: images in [-1, 1] -> float32 logits.

    Raises:
        ConfigError: an unknown name or architecture.
        DataError: see `read` and `assign`.
    """
    source = parse_source(text, role)
    arrays = read(source.path, role)
    if "head/kernel" not in arrays:
        raise DataError(f"--{role}=bit:{text} has no head: it gives no classes; fine-tune it first")
    classes = arrays["head/kernel"].shape[-1]
    arch = source.arch or infer_arch({name: array.shape for name, array in arrays.items()})
    if arch is None:
        raise DataError(
            f"--{role}=bit:{text}: its shapes are of no known BiT; name the architecture: bit:ARCH@FILE.npz"
        )
    model = bit.bit(arch, classes, size, root_pool=root_pool)
    assign(model, arrays, f"--{role}=bit:{text}")
    return model
