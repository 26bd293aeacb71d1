"""Guards of teachers, students and their files."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "probabilities averaged at the temperature",
        "models/teachers.py",
        "tf.nn.log_softmax(z / temperature) for z",
        "tf.nn.log_softmax(z) for z",
        "test_distill.py::test_loss_of_several_teachers",
    ),
    Mutant(
        "SavedModels that touch files",
        "models/saved_models.py",
        "if bad := sorted({node.op for node in nodes} & set(_REFUSED)):",
        "if bad := []:",
        "test_saved_models.py::test_programs_that_touch_files_or_processes_are_refused_before_they_run",
    ),
    Mutant(
        "SavedModels whose function only calls itself a saver",
        "models/saved_models.py",
        "_refuse(self._call.graph.as_graph_def(), where, savers=False)\n        self._output",
        "self._output",
        "test_saved_models.py::test_a_saver_by_name_alone_is_no_way_around[pixels]",
    ),
    Mutant(
        "servables whose function only calls itself a saver",
        "models/saved_models.py",
        "_refuse(self._call.graph.as_graph_def(), where, savers=False)\n        self.classes",
        "self.classes",
        "test_saved_models.py::test_a_saver_by_name_alone_is_no_way_around[files]",
    ),
    Mutant(
        "a pinned digest",
        "models/teachers.py",
        '(found := checksum(config, name).split(",")[0]) != pinned.lower()',
        "not (found := checksum(config, name))",
        "test_weights.py::test_a_pinned_digest_must_be_the_files",
    ),
    Mutant(
        "no pickles",
        "models/weights.py",
        'if dtype.kind != "f":',
        "if False:",
        "test_weights.py::test_pickles_and_shape_bombs_are_not_loaded",
    ),
    Mutant(
        "no shape bombs",
        "models/weights.py",
        "dtype.itemsize > info.file_size",
        "dtype.itemsize < 0",
        "test_weights.py::test_pickles_and_shape_bombs_are_not_loaded",
    ),
    Mutant(
        "whole downloads",
        "models/loading.py",
        "target.tell() != int(promised)",
        "False",
        "test_weights.py::test_files_over_https_are_fetched_once_and_whole",
    ),
    Mutant(
        "another version is another file",
        "models/loading.py",
        'f"{path} {_version(path)}"',
        'f"{path}"',
        "test_weights.py::test_files_over_https_are_fetched_once_and_whole",
    ),
    Mutant(
        "missing weights",
        "models/weights.py",
        "if missing or extra:",
        "if extra:",
        "test_weights.py::test_missing_left_over_and_strange_keys_are_listed",
    ),
    Mutant(
        "teacher's classes",
        "models/teachers.py",
        "if model.output_shape[-1] != classes:",
        "if False:",
        "test_cli.py::test_teacher_of_other_classes",
    ),
    Mutant(
        "safe loading",
        "models/loading.py",
        "safe_mode=True",
        "safe_mode=False",
        "test_models.py::test_code_inside_a_file_does_not_run",
    ),
    Mutant(
        "an application takes pixels",
        "models/teachers.py",
        'if value_range not in ("auto", "0,255"):',
        'if value_range == "0,1":',
        "test_students.py::test_an_application_takes_pixels_and_nothing_else",
    ),
    Mutant(
        "probabilities to logits",
        "models/teachers.py",
        "if self.probabilities:",
        "if False:",
        "test_models.py::test_any_ending_and_range_gives_logits",
    ),
]
