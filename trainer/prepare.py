"""Any images -> TFRecord shards and dataset.json, in a folder or on gs://.

    python -m trainer.prepare --dataset=folder:PATH --out=OUT       PATH/SPLIT/CLASS/*.{jpg,png,...}
    python -m trainer.prepare --dataset=synthetic --out=OUT         drawn flowers, no download
    python -m trainer.prepare --verify=OUT                          reads everything back

Shards are written first, dataset.json last: a folder without it is no data set. Same input and seed, same bytes.
"""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trainer.records import Dataset, Picture, Shard

SYNTHETIC_SPLITS = {
    "train": 1020,
    "validation": 1020,
    "test": 6149,
    "pretrain": 40800,
}  # Flowers102's, and one for teachers
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SHARD_BYTES = 128 << 20
_CHUNK = 256

Progress = Callable[[str, int, int], None]


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags."""
    group: dict[str, Any] = {"flag_values": values, "module_name": "prepare"}
    flags.DEFINE_string("dataset", "", "synthetic, or folder:PATH with PATH/SPLIT/CLASS/IMAGE files.", **group)
    flags.DEFINE_string("out", "", "Folder or gs:// prefix to write to.", **group)
    flags.DEFINE_string(
        "verify",
        "",
        "A prepared data set to read back: counts, CRCs, every image decoded.",
        **group,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the synthetic garden.", **group)
    flags.DEFINE_integer("classes", 102, "Species of the synthetic garden, at least 2.", **group)
    flags.DEFINE_integer("size", 256, "Longer side of synthetic pictures in pixels, at least 16.", **group)
    for split, count in SYNTHETIC_SPLITS.items():
        flags.DEFINE_integer(split, count, f"Synthetic pictures in the split {split}; 0 leaves it out.", **group)
    flags.DEFINE_boolean("overwrite", False, "Replace the data set that is at --out.", **group)


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _run, argv)


def _run(values: Any) -> None:
    from trainer.journal import Screen

    screen = Screen()
    if values.verify:
        screen.say(verify(values.verify, screen.progress))
        return
    if not values.out:
        raise ConfigError("--out is missing: the folder or gs:// prefix to write to")
    kind, _, rest = values.dataset.partition(":")
    if kind == "synthetic" and not rest:
        splits = {name: getattr(values, name) for name in SYNTHETIC_SPLITS}
        dataset = synthetic(
            values.out,
            values.seed,
            values.classes,
            values.size,
            splits,
            screen.progress,
            overwrite=values.overwrite,
        )
    elif kind == "folder" and rest:
        dataset = folder(rest, values.out, screen.progress, overwrite=values.overwrite)
    else:
        raise ConfigError(f"--dataset={values.dataset}: it must be synthetic or folder:PATH")
    screen.close()
    counts = ", ".join(f"{split.name} {split.examples:,}" for split in dataset.splits.values())
    screen.say(f"{values.out}: {len(dataset.classes)} classes; {counts}")


def synthetic(
    out: str,
    seed: int,
    classes: int,
    size: int,
    splits: dict[str, int],
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Dataset:
    """Draws a garden (trainer.synthetic) with a process per core.

    Args:
        out: folder or gs:// prefix.
        seed: >= 0.
        classes: species, >= 2.
        size: longer side in pixels, >= 16.
        splits: pictures in each split; those of 0 are left out.
        progress: called with what, done, total.

    Raises:
        ConfigError: a number out of range.
        DataError: `out` cannot be written, or holds a data set already.
    """
    from trainer import synthetic as garden
    from trainer.records import Picture

    for name, value, least in (("seed", seed, 0), ("classes", classes, 2), ("size", size, 16)):
        if value < least:
            raise ConfigError(f"--{name}={value}: it must be at least {least}")
    if negative := [name for name, count in splits.items() if count < 0]:
        raise ConfigError(f"--{negative[0]}={splits[negative[0]]}: it must not be negative")
    wanted = {name: count for name, count in splits.items() if count}
    if not wanted:
        raise ConfigError("every split is empty: give --train and the others a number of pictures")
    writer = _Writer(out, f"synthetic, seed {seed}", tuple(map(garden.species_name, range(classes))), overwrite)
    # Fresh processes: TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for split, count in wanted.items():
            starts = range(0, count, _CHUNK)
            jobs = [pool.submit(_draw, seed, split, s, min(s + _CHUNK, count), classes, size) for s in starts]

            def pictures(jobs: list = jobs, split: str = split, count: int = count) -> Iterator[Picture]:
                number = 0
                for job in jobs:
                    for encoded, label, (height, width) in job.result():
                        yield Picture(encoded, height, width, label, f"{split}/{number}.jpg")
                        number += 1
                    progress(f"draw {split}", number, count)

            writer.add(split, count, pictures())
    return writer.finish()


def _draw(
    seed: int, split: str, start: int, stop: int, classes: int, size: int
) -> list[tuple[bytes, int, tuple[int, int]]]:
    from trainer import synthetic as garden

    return [garden.example(seed, split, index, classes, size) for index in range(start, stop)]


def folder(path: str, out: str, progress: Progress, *, overwrite: bool = False) -> Dataset:
    """Converts PATH/SPLIT/CLASS/IMAGE files; class names are the sorted union over splits.

    JPEG files, and PNG, BMP and GIF files without transparency, keep their bytes. What TensorFlow could not decode the
    same way everywhere (WebP, TIFF, transparency, more than 8 bits a channel) becomes an RGB PNG, transparency on white.

    Raises:
        DataError: no images, an image that cannot be read (it is named), or `out` cannot be written.
    """
    from trainer import files

    if not files.exists(path):
        raise DataError(f"--dataset=folder:{path}: there is no such folder")
    found: dict[str, list[tuple[str, str]]] = {}
    for split in files.names(path):
        for name in files.names(files.join(path, split)):
            for image in files.names(files.join(path, split, name)):
                if image.lower().endswith(SUFFIXES):
                    found.setdefault(split, []).append((name, image))
    if not found:
        raise DataError(
            f"--dataset=folder:{path} has no images: they must lie as SPLIT/CLASS/NAME, for example train/daisy/1.jpg, "
            f"and end in {' '.join(SUFFIXES)}"
        )
    classes = tuple(sorted({name for images in found.values() for name, _ in images}))
    writer = _Writer(out, f"folder {os.path.basename(path.rstrip('/'))}", classes, overwrite)
    for split, images in found.items():

        def pictures(split: str = split, images: list[tuple[str, str]] = images) -> Iterator[Picture]:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                for start in range(0, len(images), _CHUNK):
                    part = images[start : start + _CHUNK]
                    yield from pool.map(
                        lambda item: picture(
                            files.join(path, split, *item),
                            classes.index(item[0]),
                            "/".join((split, *item)),
                        ),
                        part,
                    )
                    progress(f"read {split}", start + len(part), len(images))

        writer.add(split, len(images), pictures())
    return writer.finish()


def picture(path: str, label: int, name: str) -> Picture:
    """Reads one image file and makes sure that training can decode it.

    Raises:
        DataError: it cannot be read or decoded; the file is named.
    """
    import tensorflow as tf
    from PIL import Image

    from trainer import files
    from trainer.records import Picture, decode

    encoded = files.read(path, "an image")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            plain = image.format in ("JPEG", "PNG", "BMP", "GIF") and "transparency" not in image.info
            plain = (
                plain
                and image.mode in ("L", "RGB", "CMYK", "YCCK", "1", "P")
                and not getattr(image, "is_animated", False)
            )
            if not plain:
                buffer = io.BytesIO()
                _opaque(image).save(buffer, "PNG")
                encoded = buffer.getvalue()
        height, width, _ = decode(tf.constant(encoded)).shape
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        tf.errors.OpError,
    ) as error:
        raise DataError(
            f"{path}: the image cannot be read ({files.reason(error)}); replace it or take it out"
        ) from error
    return Picture(encoded, height, width, label, name)


def _opaque(image: Any) -> Any:
    """RGB of any Pillow image: 16-bit grey scaled to 8 bits, transparency laid on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values * 255.0 / top, 0, 255).round().astype(np.uint8))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


class _Writer:
    """Writes splits as shards of about 128 MiB, then the index."""

    def __init__(self, out: str, name: str, classes: tuple[str, ...], overwrite: bool) -> None:
        from trainer import files
        from trainer.records import INDEX, Dataset

        if files.exists(files.join(out, INDEX)):
            if not overwrite:
                raise DataError(f"--out={out} holds a data set already: give another folder, or --overwrite")
            # From here on there is no data set at `out` until the new one is complete.
            files.remove(files.join(out, INDEX))
        files.require_writable(out, "--out")
        self._dataset = Dataset(out, name, classes, {}, {})
        self._heights: list[int] = []
        self._widths: list[int] = []

    def add(self, split: str, count: int, pictures: Iterator[Picture]) -> None:
        """Writes `count` pictures. Shard names need the number of shards, which the first pictures' size foretells."""
        from trainer.records import Split, write_shard

        sample = [picture for _, picture in zip(range(min(count, 64)), pictures, strict=False)]
        mean = sum(len(picture.encoded) for picture in sample) / len(sample)
        shards = max(1, round(count * mean / _SHARD_BYTES))
        stream = self._measured(sample, pictures)
        made: list[Shard] = []
        for number in range(shards):
            size = count * (number + 1) // shards - count * number // shards
            part = (next(stream) for _ in range(size))
            made.append(write_shard(self._dataset.folder, f"{split}-{number:05d}-of-{shards:05d}.tfrecord", part))
        self._dataset.splits[split] = Split(split, tuple(made))

    def _measured(self, first: list[Picture], rest: Iterator[Picture]) -> Iterator[Picture]:
        for source in (first, rest):
            for picture in source:
                self._heights.append(picture.height)
                self._widths.append(picture.width)
                yield picture

    def finish(self) -> Dataset:
        """Writes dataset.json."""
        import statistics

        self._dataset.image_size.update(
            max_height=max(self._heights),
            max_width=max(self._widths),
            median_height=int(statistics.median_low(self._heights)),
            median_width=int(statistics.median_low(self._widths)),
        )
        self._dataset.save()
        return self._dataset


def verify(path: str, progress: Progress) -> str:
    """Reads a whole data set back: counts, lengths, CRCs, and decodes every image. Returns one line that says so.

    Raises:
        DataError: the first thing that is wrong, with file, record and offset.
    """
    import google_crc32c
    import tensorflow as tf

    from trainer import files
    from trainer.records import Dataset, EncodedSplit, decode

    dataset = Dataset.load(path, "verify")
    total = 0
    for split in dataset.splits.values():
        for shard in split.shards:
            content = files.read(files.join(path, shard.file), "a shard")
            if google_crc32c.value(content) != shard.crc32c:
                list(EncodedSplit(dataset, split).labels)  # names the record, if a record is what is damaged
                raise DataError(f"{files.join(path, shard.file)} does not have the CRC32C that dataset.json says")
        encoded = EncodedSplit(dataset, split)
        for number in range(len(encoded)):
            picture = encoded.picture(number)
            try:
                height, width, _ = decode(tf.constant(picture.encoded)).shape
            except tf.errors.OpError as error:
                raise DataError(f"{encoded.where(number)} ({picture.filename}): the image cannot be decoded") from error
            if (height, width) != (picture.height, picture.width):
                raise DataError(
                    f"{encoded.where(number)}: {height} x {width} pixels; its record says {picture.height} x {picture.width}"
                )
            progress(f"verify {split.name}", number + 1, len(encoded))
        total += len(encoded)
    return f"{path}: {total:,} images in {len(dataset.splits)} splits are whole and decodable"


if __name__ == "__main__":
    sys.exit(main())
