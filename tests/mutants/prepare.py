"""Guards of preparing data: sources, shards, buckets."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "an object of another writer",
        "places.py",
        "if_generation_match=known,",
        "if_generation_match=None,",
        "test_places.py::test_two_writers_do_not_mix",
    ),
    Mutant(
        "an upload whose answer was lost",
        "places.py",
        "if generation == 0 or (blob.size",
        "if True or (blob.size",
        "test_places.py::test_what_fails_once_is_tried_again",
    ),
    Mutant(
        "checksum of what arrived",
        "places.py",
        "        if (blob.size, _number(blob.crc32c)) != (size, crc32c):",
        "        if False:",
        "test_places.py::test_a_server_that_has_other_bytes_is_noticed",
    ),
    Mutant(
        "uploads in pieces",
        "places.py",
        "blob(self._prefix + name, chunk_size=_CHUNK)",
        "blob(self._prefix + name)",
        "test_places.py::test_an_upload_broken_midway_goes_on",
    ),
    Mutant(
        "shards are still ours before the index",
        "prepare.py",
        "if changed := self._place.changed(",
        "if changed := [] and self._place.changed(",
        "test_places.py::test_a_shard_that_changes_before_the_index_is_noticed",
    ),
    Mutant(
        "a shard of other pictures",
        "prepare.py",
        "made.key == key and",
        "",
        "test_sources.py::test_a_changed_picture_makes_its_shard_again",
    ),
    Mutant(
        "a shard that is not whole",
        "prepare.py",
        "self._place.holds(file, made.size, made.crc32c)",
        "True",
        "test_sources.py::test_an_interrupted_run_goes_on_with_what_is_missing",
    ),
    Mutant(
        "another unfinished data set",
        "prepare.py",
        "new=True) or place.read(name) == content:",
        "new=True) or True:",
        "test_sources.py::test_another_unfinished_data_set_is_not_mixed_with",
    ),
    Mutant(
        "shards of the data set before",
        "prepare.py",
        "for name in _shard_files(old) - ",
        "for name in set() - ",
        "test_sources.py::test_overwriting_leaves_no_shard_of_before",
    ),
    Mutant(
        "pictures that cannot be used",
        "prepare.py",
        "if not self._skip:",
        "if False:",
        "test_sources.py::test_bad_pictures_are_counted_or_left_out",
    ),
    Mutant(
        "pictures under way",
        "prepare.py",
        "part.loads(start, stop), _AHEAD)",
        "part.loads(start, stop), 1 << 30)",
        "test_sources.py::test_pictures_under_way_are_few",
    ),
    Mutant(
        "small classes in every split",
        "sources.py",
        'offset = int.from_bytes(drawn, "big") / 2.0**64',
        "offset = 0.0 * len(drawn)",
        "test_sources.py::test_small_classes_round_each_its_own_way",
    ),
    Mutant(
        "proof that a picture can be decoded",
        "pictures.py",
        "_prove(encoded, kind, height, width)\n                return",
        "pass\n                return",
        "test_sources.py::test_no_cut_or_spoilt_jpeg_passes_that_training_cannot_decode",
    ),
]
