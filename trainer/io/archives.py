"""Unpacks downloaded archives safely: zip, and tar plain or compressed.

An archive is rejected as a whole if any path in it leaves the target folder (absolute, "..",
backslashes, drive letters), is neither a file nor a folder (links, devices, sparse files) or
occurs twice, or if the unpacked size is out of proportion to the archive's. Only new plain files
below a new folder are written. The folder is deleted if anything is wrong.
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
# tarfile reads a header into memory whole. No real one is this long.
_MAX_READ = 4 << 20
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    NotImplementedError,  # a rare compression method
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    The defaults have room for the largest published teacher (BiT-R152x4, 3.8 GB).

    Attributes:
        total: most bytes of all files together.
        files: most files and folders.
        ratio: most unpacked bytes per byte of the archive. Weights compress by a tenth, text to a
            tenth.
        floor: unpacked bytes that are allowed whatever the ratio.
    """

    total: int = 32 << 30
    files: int = 10_000
    ratio: int = 100
    floor: int = 16 << 20

    def allowed(self, archive_bytes: int) -> int:
        """Most unpacked bytes of an archive of this many bytes."""
        return min(self.total, max(self.floor, self.ratio * archive_bytes))


class _Rejected(ValueError):
    """The reason why an archive is rejected; the caller adds its name."""


def extract(path: str, target: str, where: str, limits: Limits | None = None) -> list[str]:
    """Unpacks an archive into a new folder, all of it or nothing.

    Args:
        path: a zip or tar (plain, gzip, bzip2, xz) on this machine's disk; its first bytes decide,
            not its name.
        target: a folder that does not exist yet; it is created for this user alone.
        where: what the archive is called in errors.
        limits: None: the defaults.

    Returns:
        The files' paths in `target`, with slashes, sorted.

    Raises:
        DataError: it is no archive, damaged or unsafe, or the disk is full; `target` does not
            exist then.
    """
    limits = limits or Limits()
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    os.mkdir(target, 0o700)
    try:
        names = _unpack(path, target, limits)
        if not names:
            raise _Rejected("it holds no file")
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, _Rejected):
            raise DataError(f"{where} is rejected: {error}; nothing of it was kept") from None
        if isinstance(error, _DAMAGED):
            raise DataError(f"{where} is a damaged archive: {_line(error)}; nothing of it was kept") from error
        if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: it is encrypted
            reason = getattr(error, "strerror", None) or _line(error)
            raise DataError(f"{where} cannot be unpacked into {target}: {reason}") from error
        raise
    return sorted(names)


def _line(error: BaseException) -> str:
    return ascii((str(error) or type(error).__name__).splitlines()[0])[1:-1]


def _unpack(path: str, target: str, limits: Limits) -> list[str]:
    with open(path, "rb") as file:
        head = file.read(512)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        checks = _EntryChecks(limits, limits.allowed(size), shutil.disk_usage(target).free)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return _unzip(file, target, checks)
        tar: Any = file
        if head[:2] == b"\x1f\x8b":
            tar = gzip.GzipFile(fileobj=file, mode="rb")
        elif head[:3] == b"BZh":
            tar = bz2.BZ2File(file)
        elif head[:6] == b"\xfd7zXZ\x00":
            tar = lzma.LZMAFile(file)  # noqa: SIM115  `file` itself is closed by `with`
        elif head[257:262] != b"ustar":
            raise _Rejected("it is neither a zip nor a tar (plain, gzip, bzip2 or xz)")
        # Folders, headers and padding come on top of the files: a tar has 1 KiB for each entry and
        # 10 KiB at its end.
        bound = checks.allowed + 4096 * limits.files
        return _untar(_BoundedStream(tar, bound), target, checks)


class _EntryChecks:
    """Checks each entry before a byte of it is written."""

    def __init__(self, limits: Limits, allowed: int, free: int) -> None:
        self.limits, self.allowed, self.free = limits, allowed, free
        self.files: set[str] = set()
        self.folders: set[str] = set()
        self.entries = self.promised = self.written = 0

    def enter(self, name: str, *, folder: bool, size: int) -> str:
        """Checks the next entry and returns its path below the target; "" for the target itself.

        Args:
            name: as it stands in the archive.
            folder: whether it is a folder.
            size: bytes, as the archive's header has it.

        Raises:
            _Rejected: its name or size is not allowed, or the name occurred before.
        """
        self.entries += 1
        if self.entries > self.limits.files:
            raise _Rejected(f"it holds more than {self.limits.files:,} entries")
        path = safe_name(name)
        if not path and not folder:
            raise _Rejected(f"the file {name!a} has no name")
        parts = path.split("/")[:-1]
        parents = {"/".join(parts[: n + 1]) for n in range(len(parts))}
        if path in self.files or (not folder and path in self.folders) or parents & self.files:
            raise _Rejected(f"{name!a} is in it twice")
        self.folders |= parents | ({path} if folder and path else set())
        if not folder:
            self.files.add(path)
        self.promised += size
        if self.promised > self.allowed:
            raise _Rejected(_too_much(self.allowed))
        if self.promised > self.free:
            raise OSError(0, f"it holds at least {self.promised:,} bytes, and the disk has {self.free:,} left")
        return path

    def count(self, written: int) -> None:
        """Counts the bytes that were unpacked, which may differ from the header's."""
        self.written += written
        if self.written > self.allowed:
            raise _Rejected(_too_much(self.allowed))


def _too_much(allowed: int) -> str:
    return f"it would unpack to more than {allowed:,} bytes, which is out of proportion for weights"


def safe_name(name: str) -> str:
    """A name in an archive as a relative path with slashes; "" for the folder itself.

    Raises:
        ValueError: it leaves the folder, or would on some system; the text says how.
    """
    shown = ascii(name)
    if name.startswith("/"):
        raise _Rejected(f"the path {shown} is absolute")
    if "\\" in name or re.match("[A-Za-z]:", name):
        raise _Rejected(f"the path {shown} is a Windows path")
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise _Rejected(f"the path {shown} has control characters")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _Rejected(f"the path {shown} leads out of the folder")
    try:
        longest = max((len(part.encode()) for part in parts), default=0)
    except UnicodeEncodeError:
        raise _Rejected(f"the path {shown} is not valid text") from None
    if longest > 255 or len(parts) > 64:
        raise _Rejected(f"the path {shown[:80]}... is too long")
    return "/".join(parts)


def _write(source: IO[bytes], target: str, path: str, size: int, checks: _EntryChecks) -> None:
    """Copies an entry to a new file and flushes it to the disk."""
    full = os.path.join(target, *path.split("/"))
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "xb") as file:  # never over another file, also where case is ignored
        while part := source.read(_CHUNK):
            checks.count(len(part))
            file.write(part)
        if file.tell() != size:
            raise _Rejected(f"{path!a} has {file.tell():,} bytes and not the {size:,} of its header")
        file.flush()
        os.fsync(file.fileno())


def _unzip(file: IO[bytes], target: str, checks: _EntryChecks) -> list[str]:
    names = []
    with zipfile.ZipFile(file) as archive:
        entries = []
        for info in archive.infolist():  # all are checked before the first byte is written
            # `filename` ends at a null byte; `orig_filename` is the whole name.
            kind = stat.S_IFMT(info.external_attr >> 16)
            folder = info.is_dir()
            if kind not in (0, stat.S_IFDIR if folder else stat.S_IFREG):
                raise _Rejected(f"{info.orig_filename!a} is {_kind(kind)}, neither a file nor a folder")
            path = checks.enter(info.orig_filename, folder=folder, size=0 if folder else info.file_size)
            if folder and info.file_size:
                raise _Rejected(f"the folder {info.orig_filename!a} has content")
            entries.append((info, path, folder))
        for info, path, folder in entries:
            if folder:
                os.makedirs(os.path.join(target, *path.split("/")), exist_ok=True)
                continue
            with archive.open(info) as source:
                _write(source, target, path, info.file_size, checks)
            names.append(path)
    return names


def _kind(mode: int) -> str:
    names: dict[int, str] = {
        stat.S_IFLNK: "a link",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return names.get(mode, "something else")


class _BoundedStream(io.RawIOBase):
    """A decompressed stream that rejects reads beyond `bound` bytes, and large single reads."""

    def __init__(self, inner: IO[bytes], bound: int) -> None:
        self._inner, self._bound = inner, bound

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0 or size > _MAX_READ:
            raise _Rejected("it has a header of several million bytes")
        if self._inner.tell() + size > self._bound + _MAX_READ:
            raise _Rejected(_too_much(self._bound))
        return self._inner.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        # Seeking forward decompresses everything in between.
        if whence != 0 or offset > self._bound + _MAX_READ:
            raise _Rejected(_too_much(self._bound))
        return self._inner.seek(offset)

    def tell(self) -> int:
        return self._inner.tell()


_TAR_KINDS: list[tuple[Callable[[tarfile.TarInfo], bool], str]] = [
    (tarfile.TarInfo.issym, "a link"),
    (tarfile.TarInfo.islnk, "a link"),
    (tarfile.TarInfo.isdev, "a device or a pipe"),
    (tarfile.TarInfo.issparse, "a sparse file"),
]


def _untar(file: _BoundedStream, target: str, checks: _EntryChecks) -> list[str]:
    names = []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _members(archive):
            unknown = "" if member.isreg() or member.isdir() else "something else"
            if kind := next((kind for test, kind in _TAR_KINDS if test(member)), unknown):
                raise _Rejected(f"{member.name!a} is {kind}, neither a file nor a folder")
            folder = member.isdir()
            path = checks.enter(member.name, folder=folder, size=0 if folder else member.size)
            if folder:
                os.makedirs(os.path.join(target, *path.split("/")), exist_ok=True)
                continue
            source = archive.extractfile(member)
            assert source is not None
            with source:
                _write(source, target, path, member.size, checks)
            names.append(path)
        # tarfile accepts an archive that was cut between two members, and does not read a checksum
        # after the last one.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it stops before its end")
        while file.read(_CHUNK):
            pass
    return names


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one by one. None is kept: a million empty ones must cost no memory."""
    while member := archive.next():
        yield member
        archive.members = []  # type: ignore[attr-defined]
