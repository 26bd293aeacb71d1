"""Guards of turning SavedModels into our own network."""

from mutants import Mutant

_FILE, _TEST = "models/conversion.py", "test_conversion.py::test_"

MUTANTS = [
    Mutant(
        "a converted SavedModel is checked",
        _FILE,
        "if error <= TOLERANCE]",
        "if error <= 1e9]",
        _TEST + "what_is_not_quite_a_bit_is_called_as_it_was_saved",
    ),
    Mutant(
        "a range that the probe cannot tell",
        _FILE,
        "if len(fits) > 1:",
        "if False:",
        _TEST + "what_is_not_quite_a_bit_is_called_as_it_was_saved",
    ),
    Mutant(
        "a told range is obeyed",
        _FILE,
        'value_range not in ("auto", fits[0])',
        "False",
        _TEST + "a_range_that_contradicts_the_probe_is_obeyed_and_told",
    ),
    Mutant(
        "a converted teacher sees its own range",
        "models/teachers.py",
        'model, native, value_range = converted.model, True, "-1,1"',
        "model, native, value_range = converted.model, True, converted.value_range",
        _TEST + "the_examples_teacher_becomes_ours_and_leaves_no_copy",
    ),
    Mutant(
        "both paddings of the root are tried",
        _FILE,
        "itertools.product(ROOT_POOLS, ",
        "itertools.product(ROOT_POOLS[:1], ",
        _TEST + "the_padding_of_the_root_and_the_order_of_use_are_found",
    ),
    Mutant(
        "the SavedModel is dropped after the check",
        _FILE,
        "gc.collect()  # a SavedModel's functions refer to each other",
        "convert.__dict__.setdefault('kept', []).append(gc.get_objects())",
        _TEST + "the_examples_teacher_becomes_ours_and_leaves_no_copy",
    ),
    Mutant(
        "conversion outside a strategy's scope",
        _FILE,
        "alone.submit(_convert, path, role, value_range).result()",
        "_convert(path, role, value_range)",
        _TEST + "under_xla_and_on_two_replicas",
    ),
]
