"""Files on gs://."""

from mutants import Mutant, Negate, Replace, Skip

MUTANTS = [
    Mutant(
        "a folder that cannot be listed is not empty",
        "trainer.io.files._list",
        Negate("is_remote(folder)"),
        "io/test_gcs.py::test_a_folder_that_cannot_be_looked_at_is_not_empty",
    ),
    Mutant(
        "a refusal is tried again",
        "trainer.io.files.attempt",
        Replace("client.REFUSAL_PAUSES", "()"),
        "io/test_gcs.py::test_what_passes_is_not_felt",
    ),
    Mutant(
        "a failed upload is not repeated unseen",
        "trainer.io.files._upload",
        Skip("ctypes.pythonapi.Py_IncRef(_)"),
        "io/test_gcs.py::test_a_failed_upload_is_not_begun_again_unseen",
    ),
]
