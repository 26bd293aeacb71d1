"""Guards of the store: copies of shards, order, what each replica is given, and several sets."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "a live run's copies stay",
        "cache.py",
        "if other not in leased)",
        "if other not in wanted)",
        "test_cache.py::test_the_longest_unused_goes_first_and_what_a_run_uses_stays",
    ),
    Mutant(
        "the longest unused copy goes first",
        "cache.py",
        "sorted((found.used, other)",
        "sorted((-found.used, other)",
        "test_cache.py::test_the_longest_unused_goes_first_and_what_a_run_uses_stays",
    ),
    Mutant(
        "a copy is used again",
        "cache.py",
        "if self._has(shard):\n                return",
        "if False:\n                return",
        "test_cache.py::test_a_shard_that_two_runs_want_at_once_is_read_once",
    ),
    Mutant(
        "the index's checksum",
        "cache.py",
        "if file.read() != crc.digest():",
        "if False:",
        "test_cache.py::test_a_damaged_index_is_made_again",
    ),
    Mutant(
        "a whole shard's checksum",
        "records.py",
        "google_crc32c.value(bytes(content)) != shard.crc32c",
        "False",
        "test_cache.py::test_a_shard_that_is_another_file_is_refused_where_it_lies",
    ),
    Mutant(
        "no copy of a damaged shard",
        "cache.py",
        "if google_crc32c.value(content) != shard.crc32c:",
        "if False:",
        "test_cache.py::test_a_damaged_shard_is_not_copied_even_if_bad_records_are_borne",
    ),
    Mutant(
        "a record's checksum at each read",
        "records.py",
        "or masked_crc(payload) != _FOOTER",
        "or False and masked_crc(payload) != _FOOTER",
        "test_cache.py::test_a_record_that_changes_under_the_run_is_named",
    ),
    Mutant(
        "no more than the disk has",
        "loop.py",
        "if found.copies > found.room:",
        "if False:",
        "test_feed.py::test_more_than_the_disk_is_refused_before_training_with_the_sizes",
    ),
    Mutant(
        "rows in the order of the replica",
        "feed.py",
        "np.array_equal(place, np.arange(len(self._needed)))",
        "len(place) == len(self._needed)",
        "test_feed.py::test_a_host_reads_its_rows_and_their_partners_only",
    ),
    Mutant(
        "the loop made ahead is the one asked for",
        "feed.py",
        "known[0] == (first, steps, order)",
        "known[0]",
        "test_feed.py::test_the_next_loop_is_made_while_this_one_is_used",
    ),
    Mutant(
        "each set's own epochs",
        "store.py",
        "seen = cycles[0] * int(self._shares[number]) + int((before == number).sum())",
        "seen = cycles[0] * int(self._shares[number])",
        "test_store.py::test_restored_at_every_batch_of_two_epochs_the_rest_is_the_same",
    ),
    Mutant(
        "shares are placed at random",
        "store.py",
        "return rows[permutation(self._seed, cycle, _CYCLE, _PATTERN)]",
        "return rows",
        "test_store.py::test_shares_are_exact_and_placed_at_random",
    ),
    Mutant(
        "weights are part of a run",
        "loop.py",
        "if config.data_weights:\n",
        "if False:\n",
        "test_feed.py::test_other_images_than_the_teachers",
    ),
    Mutant(
        "labels of other classes",
        "loop.py",
        "if part.classes != held_out.classes:",
        "if False:",
        "test_feed.py::test_other_images_than_the_teachers",
    ),
]
