"""Records, the cache of shards, the order of examples, and what each replica is given."""

from mutants import Mutant, Never, Replace

CACHE = "data/test_cache.py"
HOSTILE = "data/test_hostile_data.py"

MUTANTS = [
    # Records.
    Mutant(
        "a record has its checksum",
        "trainer.data.tfrecord._frame_at",
        Never("masked_crc(view[_1:_2]) != FOOTER.unpack_from(view, _2)[0]"),
        "data/test_records.py",
    ),
    Mutant(
        "a label is in range",
        "trainer.data.records.check_record",
        Never("_.label >= max(...)"),
        "data/test_records.py",
    ),
    Mutant(
        "a shard has its checksum",
        "trainer.data.records.index_shard",
        Never("google_crc32c.value(bytes(content)) != shard.crc32c"),
        f"{CACHE}::test_a_shard_that_is_another_file_is_refused_where_it_lies",
    ),
    Mutant(
        "a record has its checksum at each read",
        "trainer.data.records.EncodedShard",
        Never("masked_crc(_) != _"),
        f"{CACHE}::test_a_record_that_changes_during_the_run_is_named",
    ),
    Mutant(
        "a share of corrupt records is a limit",
        "trainer.data.records.CorruptRecordLog.add",
        Replace("len(_) > self.max_fraction * _", "not self.max_fraction"),
        f"{HOSTILE}::test_truncation_at_every_byte",
    ),
    Mutant(
        "missing records are counted",
        "trainer.data.records.index_shard",
        Replace("range(_ + 1, shard.examples)", "range(0)"),
        f"{HOSTILE}::test_truncation_at_every_byte",
    ),
    # The cache.
    Mutant(
        "copies that a living run uses stay",
        "trainer.data.cache.Cache._lease",
        Replace("self._leased() | _1", "_1"),
        f"{CACHE}::test_the_least_recently_used_copy_goes_first_and_copies_in_use_stay",
    ),
    Mutant(
        "the least recently used copy goes first",
        "trainer.data.cache.Cache._lease",
        Replace("(_1.last_used, _2)", "(-_1.last_used, _2)"),
        f"{CACHE}::test_the_least_recently_used_copy_goes_first_and_copies_in_use_stay",
    ),
    Mutant(
        "a copy is used again",
        "trainer.data.cache.Cache._fetch",
        Never("self._has(shard)"),
        f"{CACHE}::test_a_shard_that_two_runs_need_at_once_is_read_once",
    ),
    Mutant(
        "an index has its checksum",
        "trainer.data.cache._load_index",
        Never("_ != _.digest()"),
        f"{CACHE}::test_a_damaged_index_is_rebuilt",
    ),
    Mutant(
        "a damaged shard is not copied",
        "trainer.data.cache.Cache._fetch",
        Never("google_crc32c.value(_) != shard.crc32c"),
        f"{CACHE}::test_a_damaged_shard_is_not_copied_whatever_the_limit_on_corrupt_records",
    ),
    Mutant(
        "no more is copied than the disk has room for",
        "trainer.run.stores.choose_kinds",
        Never("_.required > _.available"),
        "method/test_feed.py::test_data_larger_than_the_disk_is_refused_before_training",
    ),
    # The order of examples.
    Mutant(
        "an epoch shows every example once",
        "trainer.data.order.permutation",
        Replace("np.argsort(_1, kind='stable')", "_1 % len(_1)"),
        "data/test_store.py",
    ),
    Mutant(
        "each set has its own epochs",
        "trainer.data.order.ExampleSampler.batches",
        Replace("_1 * _2 + int(_.sum())", "_1 * _2"),
        "data/test_store.py::test_restored_at_every_batch_of_two_epochs_the_rest_is_the_same",
    ),
    Mutant(
        "rows of several sets are mixed at random",
        "trainer.data.order.ExampleSampler._sets_in_cycle",
        Replace("_1[permutation(...)]", "_1"),
        "data/test_store.py::test_shares_are_exact_and_placed_at_random",
    ),
    Mutant(
        "a replica gets its rows in its order",
        "trainer.method.feed.BatchPrefetcher._load",
        Replace("np.array_equal(_1, _2)", "len(_1) == len(_2)"),
        "method/test_feed.py::test_a_host_reads_its_rows_and_their_partners_only",
    ),
    Mutant(
        "a prefetched loop is used only if it is the one needed",
        "trainer.method.feed.BatchPrefetcher.take",
        Replace("_1[0] == _2", "_1[0]"),
        "method/test_feed.py::test_the_next_loop_is_loaded_while_this_one_runs",
    ),
]
