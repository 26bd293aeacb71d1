"""Guards of unpacking."""

from mutants import Mutant

_FILE, _TEST = "archives.py", "test_archives.py::test_"

MUTANTS = [
    Mutant(
        "absolute paths in archives",
        _FILE,
        'if name.startswith("/"):',
        "if False:",
        _TEST + "paths_that_leave_the_folder",
    ),
    Mutant(
        "paths in archives that lead out",
        _FILE,
        'if ".." in parts:',
        "if False:",
        _TEST + "paths_that_leave_the_folder",
    ),
    Mutant(
        "backslashes in archives",
        _FILE,
        'if "\\\\" in name or re.match("[A-Za-z]:", name):',
        "if False:",
        _TEST + "paths_that_leave_the_folder",
    ),
    Mutant(
        "null bytes in names of a zip",
        _FILE,
        "gate.enter(info.orig_filename, folder",
        "gate.enter(info.filename, folder",
        _TEST + "a_null_byte_hides_no_path",
    ),
    Mutant(
        "links and devices in a zip",
        _FILE,
        "if kind not in (0, stat.S_IFDIR if folder else stat.S_IFREG):",
        "if False:",
        _TEST + "what_is_neither_file_nor_folder_in_a_zip",
    ),
    Mutant(
        "links and devices in a tar",
        _FILE,
        "if kind := next((kind for test, kind in _TAR_KINDS if test(member)), plain):",
        'if kind := "":',
        _TEST + "what_is_neither_file_nor_folder_in_a_tar",
    ),
    Mutant(
        "files with holes in a tar",
        _FILE,
        '(tarfile.TarInfo.issparse, "a file with holes"),',
        "",
        _TEST + "a_file_with_holes_is_refused",
    ),
    Mutant(
        "names that come twice in an archive",
        _FILE,
        "if inside in self.files or (not folder and inside in self.folders) or above & self.files:",
        "if False:",
        _TEST + "names_that_come_twice",
    ),
    Mutant(
        "bombs by ratio",
        _FILE,
        "min(self.total, max(self.floor, self.ratio * archive_bytes))",
        "self.total",
        _TEST + "bombs_by_ratio",
    ),
    Mutant(
        "bombs by number",
        _FILE,
        "if self.entries > self.limits.files:",
        "if False:",
        _TEST + "bombs_by_size_and_number",
    ),
    Mutant(
        "headers as large as memory",
        _FILE,
        "size < 0 or size > _LARGEST_READ",
        "size < 0",
        _TEST + "a_header_of_tar_as_large_as_memory",
    ),
    Mutant(
        "an endless tail",
        _FILE,
        "if self._inner.tell() + size > self._bound + _LARGEST_READ:",
        "if False:",
        _TEST + "an_endless_tail_is_not_read",
    ),
    Mutant(
        "a tar cut between two files",
        _FILE,
        "if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):",
        "if False:",
        _TEST + "a_tar_cut_between_two_files",
    ),
    Mutant(
        "checksums behind a tar",
        _FILE,
        "while file.read(_CHUNK):",
        "while False:",
        _TEST + "a_wrong_checksum_behind_the_last_file",
    ),
    Mutant(
        "nothing of a refused archive stays",
        _FILE,
        "shutil.rmtree(target, ignore_errors=True)",
        "pass",
        _TEST + "damaged_archives",
    ),
    Mutant(
        "room on the disk",
        _FILE,
        "if self.promised > self.free:",
        "if False:",
        _TEST + "no_room_is_said_before_anything_is_written",
    ),
]
