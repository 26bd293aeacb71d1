"""Guards of the store and of what each replica is given."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "rows in the order of the replica",
        "feed.py",
        "np.array_equal(place, np.arange(len(self._needed)))",
        "len(place) == len(self._needed)",
        "test_feed.py::test_a_host_reads_its_rows_and_their_partners_only",
    ),
]
