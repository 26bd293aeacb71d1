"""Archives from elsewhere, unpacked by code of ours that trusts nothing in them: zip, and tar plain or compressed.

An archive is refused whole where any name in it leaves the target folder (absolute, "..", backslashes, drive letters), is no plain
file or folder (links, devices, sparse files), comes twice, or where what it holds is out of proportion to its own size. Nothing
is written but new plain files below a new folder, which is gone again if anything is wrong.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from trainer.core.errors import DataError

_CHUNK = 1 << 20
# More than a header of tar is ever long; a longer one would be read into memory whole.
_LARGEST_READ = 4 << 20
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    NotImplementedError,  # a way to compress that nobody uses
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an archive may hold. The defaults leave the largest published teacher (BiT-R152x4, 3.8 GB) room.

    Attributes:
        total: bytes of all files together.
        files: files and folders.
        ratio: bytes that may come out for each byte of the archive. Weights shrink by a tenth; text by ten times.
        floor: bytes that may come out whatever the ratio.
    """

    total: int = 32 << 30
    files: int = 10_000
    ratio: int = 100
    floor: int = 16 << 20

    def allowed(self, archive_bytes: int) -> int:
        """Bytes that may come out of an archive of this size."""
        return min(self.total, max(self.floor, self.ratio * archive_bytes))


class _Refused(ValueError):
    """Why; the caller adds where."""


def extract(path: str, target: str, where: str, limits: Limits | None = None) -> list[str]:
    """Unpacks an archive into a new folder, all of it or nothing.

    Args:
        path: a zip or tar (plain, gzip, bzip2, xz) on this machine's disk; known by its first bytes, not by its name.
        target: a folder that does not exist yet; made private to this user.
        where: whose archive it is, for errors.
        limits: None for the defaults.

    Returns:
        The files' paths in `target`, with slashes, sorted.

    Raises:
        DataError: no archive, a damaged or an unsafe one, or no room on the disk; `target` does not exist then.
    """
    limits = limits or Limits()
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    os.mkdir(target, 0o700)
    try:
        if not (found := _unpack(path, target, limits)):
            raise _Refused("it holds no file")
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, _Refused):
            raise DataError(f"{where} is refused: {error}; nothing of it was kept") from None
        if isinstance(error, _DAMAGED):
            raise DataError(f"{where} is a damaged archive: {_line(error)}; nothing of it was kept") from error
        if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: a password is asked for
            reason = getattr(error, "strerror", None) or _line(error)
            raise DataError(f"{where} cannot be unpacked into {target}: {reason}") from error
        raise
    return sorted(found)


def _line(error: BaseException) -> str:
    return ascii((str(error) or type(error).__name__).splitlines()[0])[1:-1]


def _unpack(path: str, target: str, limits: Limits) -> list[str]:
    with open(path, "rb") as file:
        head = file.read(512)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        gate = _Gate(limits, limits.allowed(size), shutil.disk_usage(target).free)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return _unzip(file, target, gate)
        opened: Any = file
        if head[:2] == b"\x1f\x8b":
            opened = gzip.GzipFile(fileobj=file, mode="rb")
        elif head[:3] == b"BZh":
            opened = bz2.BZ2File(file)
        elif head[:6] == b"\xfd7zXZ\x00":
            opened = lzma.LZMAFile(file)  # noqa: SIM115  `file` is closed above, and with it all there is
        elif head[257:262] != b"ustar":
            raise _Refused("it is neither a zip nor a tar (plain, gzip, bzip2 or xz)")
        # Folders, headers and padding come on top of the files: a tar has 1 KiB for each name and 10 KiB at its end.
        bound = gate.allowed + 4096 * limits.files
        return _untar(_Bounded(opened, bound), target, gate)


class _Gate:
    """What each entry must pass before a byte of it is written."""

    def __init__(self, limits: Limits, allowed: int, free: int) -> None:
        self.limits, self.allowed, self.free = limits, allowed, free
        self.files: set[str] = set()
        self.folders: set[str] = set()
        self.entries = self.promised = self.written = 0

    def enter(self, name: str, *, folder: bool, size: int) -> str:
        """The entry's path below the target; "" for the target itself.

        Raises:
            _Refused: its name, its size, or a name that was there before.
        """
        self.entries += 1
        if self.entries > self.limits.files:
            raise _Refused(f"it holds more than {self.limits.files:,} entries")
        inside = safe_name(name)
        if not inside and not folder:
            raise _Refused(f"the file {name!a} has no name")
        parents = inside.split("/")[:-1]
        above = {"/".join(parents[: n + 1]) for n in range(len(parents))}
        if inside in self.files or (not folder and inside in self.folders) or above & self.files:
            raise _Refused(f"{name!a} is in it twice")
        self.folders |= above | ({inside} if folder and inside else set())
        if not folder:
            self.files.add(inside)
        self.promised += size
        if self.promised > self.allowed:
            raise _Refused(self._too_much())
        if self.promised > self.free:
            raise OSError(0, f"it holds {self.promised:,} bytes and more, and the disk has {self.free:,} left")
        return inside

    def count(self, written: int) -> None:
        """Counts what really came out, whatever a header promised."""
        self.written += written
        if self.written > self.allowed:
            raise _Refused(self._too_much())

    def _too_much(self) -> str:
        return f"more than {self.allowed:,} bytes would come out, which is no proportion for weights"


def safe_name(name: str) -> str:
    """A name in an archive as a relative path with slashes and without "." parts; "" for the folder itself.

    Raises:
        ValueError: it leaves the folder, or might on some system; the text says how.
    """
    shown = ascii(name)
    if name.startswith("/"):
        raise _Refused(f"the path {shown} is absolute")
    if "\\" in name or re.match("[A-Za-z]:", name):
        raise _Refused(f"the path {shown} is one of Windows")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise _Refused(f"the path {shown} has control characters")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _Refused(f"the path {shown} leads out of the folder")
    try:
        longest = max((len(part.encode()) for part in parts), default=0)
    except UnicodeEncodeError:
        raise _Refused(f"the path {shown} is no text") from None
    if longest > 255 or len(parts) > 64:
        raise _Refused(f"the path {shown[:80]}... is too long")
    return "/".join(parts)


def _write(source: IO[bytes], target: str, inside: str, size: int, gate: _Gate) -> None:
    """Copies an entry to a new file, durably."""
    full = os.path.join(target, *inside.split("/"))
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "xb") as file:  # never over another file, on any file system
        while part := source.read(_CHUNK):
            gate.count(len(part))
            file.write(part)
        if file.tell() != size:
            raise _Refused(f"{inside!a} has {file.tell():,} bytes and not the {size:,} that it promises")
        file.flush()
        os.fsync(file.fileno())


def _unzip(file: IO[bytes], target: str, gate: _Gate) -> list[str]:
    found = []
    with zipfile.ZipFile(file) as archive:
        entries = []
        for info in archive.infolist():  # all of them, before the first byte is written
            # zipfile itself cuts a name at a null byte; the name as it stands is judged.
            kind = stat.S_IFMT(info.external_attr >> 16)
            folder = info.is_dir()
            if kind not in (0, stat.S_IFDIR if folder else stat.S_IFREG):
                raise _Refused(f"{info.orig_filename!a} is {_kind(kind)}, neither a file nor a folder")
            inside = gate.enter(info.orig_filename, folder=folder, size=0 if folder else info.file_size)
            if folder and info.file_size:
                raise _Refused(f"the folder {info.orig_filename!a} has content")
            entries.append((info, inside, folder))
        for info, inside, folder in entries:
            if folder:
                os.makedirs(os.path.join(target, *inside.split("/")), exist_ok=True)
                continue
            with archive.open(info) as source:
                _write(source, target, inside, info.file_size, gate)
            found.append(inside)
    return found


def _kind(mode: int) -> str:
    names: dict[int, str] = {
        stat.S_IFLNK: "a link",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return names.get(mode, "something else")


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends a reader's way beyond `bound` bytes, and never gives much at once."""

    def __init__(self, inner: IO[bytes], bound: int) -> None:
        self._inner, self._bound = inner, bound

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0 or size > _LARGEST_READ:
            raise _Refused("it has a header of millions of bytes")
        if self._inner.tell() + size > self._bound + _LARGEST_READ:
            raise _Refused(f"more than {self._bound:,} bytes would come out, which is no proportion for weights")
        return self._inner.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        # Going forward decompresses everything on the way.
        if whence != 0 or offset > self._bound + _LARGEST_READ:
            raise _Refused(f"more than {self._bound:,} bytes would come out, which is no proportion for weights")
        return self._inner.seek(offset)

    def tell(self) -> int:
        return self._inner.tell()


_TAR_KINDS: list[tuple[Callable[[tarfile.TarInfo], bool], str]] = [
    (tarfile.TarInfo.issym, "a link"),
    (tarfile.TarInfo.islnk, "a link"),
    (tarfile.TarInfo.isdev, "a device or a pipe"),
    (tarfile.TarInfo.issparse, "a file with holes"),
]


def _untar(file: _Bounded, target: str, gate: _Gate) -> list[str]:
    found = []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _members(archive):
            plain = "" if member.isreg() or member.isdir() else "something else"
            if kind := next((kind for test, kind in _TAR_KINDS if test(member)), plain):
                raise _Refused(f"{member.name!a} is {kind}, neither a file nor a folder")
            folder = member.isdir()
            inside = gate.enter(member.name, folder=folder, size=0 if folder else member.size)
            if folder:
                os.makedirs(os.path.join(target, *inside.split("/")), exist_ok=True)
                continue
            source = archive.extractfile(member)
            assert source is not None
            with source:
                _write(source, target, inside, member.size, gate)
            found.append(inside)
        # tarfile takes a file that stops between two members, or a checksum that nobody read, for a good end.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it stops before its end")
        while file.read(_CHUNK):
            pass
    return found


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """One by one, remembering none, so that a million empty entries cost no memory."""
    while member := archive.next():
        yield member
        archive.members = []  # type: ignore[attr-defined]
