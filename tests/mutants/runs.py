"""Guards of data, order, checkpoints, the journal and what a run leaves."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "all the fixed crops",
        "loop.py",
        "(total / done)",
        "(total / 1)",
        "test_distill.py::test_fixed_teachers_are_asked_once",
    ),
    Mutant(
        "the student's range in the export",
        "export.py",
        "config.image_size), config.student_range)",
        'config.image_size), "-1,1")',
        "test_evaluate.py::test_export_gives_what_was_evaluated",
    ),
    Mutant(
        "another run's workdir before the work",
        "loop.py",
        "open_checkpoints(config, identity).require_ours()",
        "pass",
        "test_distill.py::test_another_runs_workdir_is_refused_before_the_work",
    ),
    Mutant(
        "half-made targets are kept",
        "loop.py",
        "(done == crops or stopping or",
        "(done == crops or",
        "test_distill.py::test_a_signal_among_the_fixed_crops_keeps_their_sum",
    ),
    Mutant(
        "an epoch shows all",
        "store.py",
        "return np.argsort(raw",
        "return raw % len(raw) if raw.size else np.argsort(raw",
        "test_store.py",
    ),
    Mutant(
        "finite weights in a checkpoint", "checkpoint.py", "not np.isfinite(array).all()", "False", "test_checkpoint.py"
    ),
    Mutant(
        "checkpoint's checksum",
        "checkpoint.py",
        '!= commit["sha256"]',
        '== ""',
        "test_checkpoint.py::test_a_damaged_one_is_named_and_passed_over",
    ),
    Mutant("another run's checkpoint", "checkpoint.py", "if differing:", "if False:", "test_checkpoint.py"),
    Mutant(
        "record's checksum",
        "records.py",
        "if masked_crc(view[start:end]) !=",
        "if False and masked_crc(view[start:end]) !=",
        "test_records.py",
    ),
    Mutant(
        "label in range", "records.py", "if picture.label >= max", "if picture.label >= 99 + max", "test_records.py"
    ),
    Mutant(
        "missing data set", "records.py", "if not files.exists(path):", "if False:", "test_cli.py::test_missing_data"
    ),
    Mutant("fsync before rename", "files.py", "os.fsync(file.fileno())", "pass", "test_files.py"),
    Mutant("folded on export", "export.py", "return bit.fold(copy)", "return copy", "test_load_alone.py"),
    Mutant(
        "stop on what is not finite",
        "loop.py",
        "if bad >= 0 or not all(math.isfinite(value) for value in metrics.values()):",
        "if False:",
        "test_job.py::test_what_is_not_finite_stops_before_a_commit",
    ),
    Mutant(
        "rows of a crash are dropped",
        "journal.py",
        'row["step"] <= step and',
        "",
        "test_job.py::test_journal_goes_back_to_the_checkpoint",
    ),
    Mutant(
        "metrics under way are saved",
        "loop.py",
        '"pending": list(job.pending_metrics),',
        '"pending": [],',
        "test_job.py::test_sigterm_saves_says_so_and_exits_75",
    ),
    Mutant(
        "names that do not depend on the process",
        "loop.py",
        "{variable.path.replace('/', '_').rsplit('_', 1)[-1]}",
        "{variable.path}",
        "test_job.py::test_sigterm_saves_says_so_and_exits_75",
    ),
    Mutant(
        "teacher in the identity",
        "loop.py",
        "[teachers.checksum(config, name) for name in config.teacher]",
        "[]",
        "test_job.py::test_a_teacher_changed_between_runs_is_refused",
    ),
]
