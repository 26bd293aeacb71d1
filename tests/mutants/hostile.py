"""Guards against damaged and hostile data."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "a share of bad records is a limit",
        "records.py",
        "if len(self._found) > self.limit * self._split.examples:",
        "if not self.limit:",
        "test_hostile_data.py::test_truncation_at_every_byte",
    ),
    Mutant(
        "missing records are counted",
        "records.py",
        "for missing in range(number + 1, shard.examples):",
        "for missing in range(0):",
        "test_hostile_data.py::test_truncation_at_every_byte",
    ),
    Mutant(
        "on after a broken length",
        "records.py",
        "offset = _next_head(view, offset + 1)",
        "offset = len(view)",
        "test_hostile_data.py::test_two_thousand_flipped_bytes",
    ),
    Mutant(
        "another whole file",
        "records.py",
        'if (table["offset"] >= 0).all() and google_crc32c',
        "if False and google_crc32c",
        "test_hostile_data.py::test_empty_foreign_and_overlong_shards",
    ),
    Mutant(
        "bytes after the last record",
        "records.py",
        "if number >= shard.examples:",
        "if False:",
        "test_hostile_data.py::test_empty_foreign_and_overlong_shards",
    ),
    Mutant(
        "pixels before decoding",
        "headers.py",
        "if height * width > max_pixels:",
        "if False:",
        "test_hostile_data.py::test_a_hostile_picture_is_named_and_counted",
    ),
    Mutant(
        "the end of a JPEG",
        "headers.py",
        'if encoded.find(b"\\xff\\xd9", place) < 0:',
        'if encoded.find(b"\\xff\\xd9") < 0:',
        "test_hostile_data.py::test_a_thumbnail_with_an_end_of_its_own_does_not_hide_a_cut",
    ),
    Mutant(
        "images that only decoding shows to be bad",
        "records.py",
        "_decode_all(content, table, shard, damage)",
        "pass",
        "test_hostile_data.py::test_a_picture_that_only_its_decoder_refuses",
    ),
    Mutant(
        "the same records on resume",
        "loop.py",
        'elif files.read(path, "the list of bad records").decode(errors="replace") != f"{text}\\n":',
        "elif False:",
        "test_hostile_data.py::test_a_run_that_did_without_others_is_not_gone_on_with",
    ),
]
