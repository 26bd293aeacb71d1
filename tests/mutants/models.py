"""Teachers, students and their files."""

from mutants import Mutant, Never, Replace, Skip

DOWNLOADS = "models/test_bit_weights.py::test_files_over_https_are_fetched_once_and_whole"
PICKLES = "models/test_bit_weights.py::test_pickles_and_shape_bombs_are_not_loaded"
SAVERS = "models/test_saved_models.py::test_a_saver_by_name_alone_is_no_way_around"

MUTANTS = [
    Mutant(
        "a SavedModel that touches files is refused",
        "trainer.models.saved_models._refuse",
        Replace("sorted(_ & set(_REFUSED))", "[]"),
        "models/test_saved_models.py::test_programs_that_touch_files_or_processes_are_refused_before_they_run",
    ),
    Mutant(
        "what a SavedModel can reach is checked, whatever its functions are called",
        "trainer.models.saved_models.SavedClassifier.__init__",
        Skip("_refuse(...)"),
        f"{SAVERS}[pixels]",
    ),
    Mutant(
        "what a servable can reach is checked, whatever its functions are called",
        "trainer.models.saved_models.SavedServable.__init__",
        Skip("_refuse(...)"),
        f"{SAVERS}[files]",
    ),
    Mutant(
        "--teacher_sha256 pins a file",
        "trainer.models.teachers.load",
        Replace("_1 != _.lower()", "not _1"),
        "models/test_bit_weights.py::test_a_pinned_digest_must_be_the_files",
    ),
    Mutant(
        "a teacher knows the data set's classes",
        "trainer.models.teachers._teacher",
        Never("_.output_shape[-1] != _"),
        "verbs/test_cli.py::test_teacher_with_another_number_of_classes",
    ),
    Mutant(
        "probabilities become logits",
        "trainer.models.teachers.Teacher.logits",
        Never("self.probabilities"),
        "models/test_keras_files.py::test_a_teachers_logits_give_its_probabilities",
    ),
    Mutant(
        "nothing pickled is loaded",
        "trainer.models.bit_weights._array",
        Never("_.kind != 'f'"),
        PICKLES,
    ),
    Mutant(
        "an array is no larger than its bytes",
        "trainer.models.bit_weights._array",
        Replace("_ * _.itemsize > _.file_size", "False"),
        PICKLES,
    ),
    Mutant(
        "missing weights are refused",
        "trainer.models.bit_weights.assign",
        Replace("missing or extra", "extra"),
        "models/test_bit_weights.py::test_missing_left_over_and_strange_keys_are_listed",
    ),
    Mutant(
        "code inside a .keras file does not run",
        "trainer.models.keras_files._load",
        Replace("keras.saving.load_model(_1, ...)", "keras.saving.load_model(_1, compile=False, safe_mode=False)"),
        "models/test_bit.py::test_code_inside_a_file_does_not_run",
    ),
    Mutant(
        "a head without its softmax keeps its weights",
        "trainer.models.heads._before",
        Skip("linear.set_weights(operation.get_weights())"),
        "models/test_keras_files.py::test_a_softmax_is_taken_off_at_its_call",
    ),
    Mutant(
        "a layer of a program in an .h5 file is refused before it loads",
        "trainer.models.keras_files._load",
        Never("legacy and (program := keras_config.programs(config))"),
        "models/test_hostile_models.py::test_a_hostile_h5_file",
    ),
    Mutant(
        "a download is whole",
        "trainer.io.download._copy",
        Never("target.tell() != int(_)"),
        DOWNLOADS,
    ),
    Mutant(
        "another version of a download is another file",
        "trainer.io.download.local_copy",
        Replace("f'{path} {_version(path)}'", "f'{path}'"),
        DOWNLOADS,
    ),
]
