"""Guards of gs://, and against models that want more than to be loaded."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "a folder that cannot be looked at is not empty",
        "files.py",
        'if not folder.startswith("gs://"):\n            raise\n',
        "raise\n",
        "test_gcs.py::test_a_folder_that_cannot_be_looked_at_is_not_empty",
    ),
    Mutant(
        "refusals that may pass",
        "files.py",
        'for pause in (0.5, 1.5) if path.startswith("gs://") else ():',
        "for pause in ():",
        "test_gcs.py::test_what_passes_is_not_felt",
    ),
    Mutant(
        "the client's settings before TensorFlow",
        "cli.py",
        "storage.set_defaults()",
        "pass",
        "test_gcs.py::test_defaults_are_set_unless_they_are_set_already",
    ),
    Mutant(
        "what to do without credentials",
        "storage.py",
        'if status == 401 or "nonymous" in said:',
        "if False:",
        "test_gcs.py::test_what_errors_mean",
    ),
    Mutant(
        "a member outside of its zip",
        "models/loading.py",
        'return f"its member {name!r} would lie outside of it"',
        "continue",
        "test_hostile_models.py::test_a_hostile_keras_file",
    ),
    Mutant(
        "a link in a zip",
        "models/loading.py",
        'return f"its member {name!r} is a link or a device"',
        "continue",
        "test_hostile_models.py::test_a_link_in_a_keras_file",
    ),
    Mutant(
        "a zip bomb",
        "models/loading.py",
        "if total > max(_EXPANSION * size, 1 << 26):",
        "if False:",
        "test_hostile_models.py::test_a_zip_bomb",
    ),
    Mutant(
        "an npz larger than any BiT",
        "models/weights.py",
        "> _LARGEST:",
        "> 1 << 62:",
        "test_hostile_models.py::test_an_npz_larger_than_any_bit",
    ),
    Mutant(
        "a student's file wherever it lies",
        "loop.py",
        '"student": "keras" if config.student.startswith("keras:") else config.student,',
        "",
        "test_students.py::test_a_students_file_is_known_by_its_content_and_not_by_its_place",
    ),
    Mutant(
        "what a crash left of an export",
        "export.py",
        'for part in ("", "saved_model", "saved_model/variables"):',
        'for part in ("",):',
        "test_export.py::test_what_a_crash_left_on_a_disk_goes",
    ),
    Mutant(
        "a bucket gets whole objects of a SavedModel",
        "export.py",
        "tf.saved_model.save(servable, local, signatures=signatures)",
        'tf.saved_model.save(servable, files.join(folder, "saved_model"), signatures=signatures)',
        "test_export.py::test_a_bucket_gets_whole_objects_and_refusals_that_pass_are_not_felt",
    ),
    Mutant(
        "a failed upload is not begun again unseen",
        "files.py",
        "ctypes.pythonapi.Py_IncRef(ctypes.py_object(inner))",
        "pass",
        "test_gcs.py::test_a_failed_upload_is_not_begun_again_unseen",
    ),
    Mutant(
        "no more waiting for a silent bucket at the end",
        "lock.py",
        "        if self._trouble:\n            return",
        "        if False:\n            return",
        "test_lock.py::test_who_ends_for_a_silent_bucket_does_not_wait_for_it_again",
    ),
    Mutant(
        "trouble that is over",
        "lock.py",
        '            self._trouble = ""\n        except Conflict:',
        "        except Conflict:",
        "test_lock.py::test_who_ends_for_a_silent_bucket_does_not_wait_for_it_again",
    ),
]
