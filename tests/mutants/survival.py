"""What survives a crash or a stop: locks, checkpoints, signals, values that are not finite."""

from mutants import Mutant, Never, Replace, Return, Skip

CHECKPOINT = "run/test_checkpoint.py"
LOCK = "io/test_lock.py"
SILENT_BUCKET = f"{LOCK}::test_release_sends_no_request_to_a_bucket_that_does_not_answer"
SIGNALS = "core/test_signals.py"
NOT_FINITE = "run/test_numbers.py::test_non_finite_value_stops_before_a_commit"

MUTANTS = [
    # The lock of a workdir.
    Mutant(
        "a second writer on a disk is refused",
        "trainer.io.lock._lock_file",
        Replace("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        f"{LOCK}::test_a_second_process_is_refused",
    ),
    Mutant(
        "who lost the lock's file stops",
        "trainer.io.lock._is_at",
        Return("True"),
        f"{LOCK}::test_a_job_whose_lock_file_was_removed_stops",
    ),
    Mutant(
        "a living owner keeps its bucket",
        "trainer.io.lock.Lease.acquire",
        Never("_ not in (0, _)"),
        f"{LOCK}::test_a_second_job_is_refused_while_the_owner_renews",
    ),
    Mutant(
        "who lost its lease stops",
        "trainer.io.lock.Lease.check",
        Skip("raise self._lost"),
        f"{LOCK}::test_a_job_that_stood_still_loses_its_lease_and_stops",
    ),
    Mutant(
        "a lease that could not be renewed runs out",
        "trainer.io.lock.Lease.check",
        Never("_ > self._seconds"),
        f"{LOCK}::test_renewals_may_fail_for_as_long_as_the_lease",
    ),
    Mutant(
        "a conflict with one's own lost answer is none",
        "trainer.io.lock.Lease._write",
        Replace("_ != content", "True"),
        f"{LOCK}::test_a_lost_answer_is_no_conflict",
    ),
    Mutant(
        "a lease is written on a condition",
        "trainer.io.lock.Lease._write",
        Replace("self._store.write(_1, _2, _)", "self._store.write(_1, _2, self._store.read(_1)[0])"),
        f"{LOCK}::test_a_job_that_stood_still_loses_its_lease_and_stops",
    ),
    Mutant(
        "a silent bucket is not waited for at the end",
        "trainer.io.lock.Lease.release",
        Never("self._failure"),
        SILENT_BUCKET,
    ),
    Mutant(
        "a renewal that worked ends the trouble",
        "trainer.io.lock.Lease._renew",
        Skip("self._failure = ''"),
        SILENT_BUCKET,
    ),
    # Checkpoints.
    Mutant(
        "damaged checkpoints push no whole one out",
        "trainer.run.checkpoint.Checkpoints._sweep",
        Replace("newest is None or _ <= newest", "True"),
        f"{CHECKPOINT}::test_damaged_checkpoint_does_not_displace_a_complete_one",
    ),
    Mutant(
        "the best checkpoint is kept",
        "trainer.run.checkpoint.Checkpoints._sweep",
        Replace("_1 | {_[_3] for _3 in _ if _3 in _}", "_1"),
        f"{CHECKPOINT}::test_best_checkpoint_is_kept",
    ),
    Mutant(
        "a folder that does not answer holds no damage",
        "trainer.run.checkpoint.Checkpoints._read",
        Never("isinstance(_, _UNKNOWN)"),
        f"{CHECKPOINT}::test_unreadable_folder_is_not_damage",
    ),
    Mutant(
        "a checkpoint of another format is refused",
        "trainer.run.checkpoint.Checkpoints._commit",
        Never("_['format'] != FORMAT"),
        f"{CHECKPOINT}::test_another_format_is_an_error",
    ),
    Mutant(
        "a checkpoint of another run is refused",
        "trainer.run.checkpoint.Checkpoints._commit",
        Skip("self._check_identity(...)"),
        CHECKPOINT,
    ),
    Mutant(
        "a checkpoint has the committed content",
        "trainer.run.checkpoint.Checkpoints._arrays",
        Never("_ != _['sha256']"),
        f"{CHECKPOINT}::test_damaged_checkpoint_is_passed_over",
    ),
    Mutant(
        "weights that are not finite are not saved",
        "trainer.run.checkpoint.Checkpoints.save",
        Replace("np.isfinite(_).all()", "True"),
        CHECKPOINT,
    ),
    Mutant(
        "who lost the workdir commits nothing",
        "trainer.run.checkpoint.Checkpoints.save",
        Skip("self._before_commit()"),
        f"{CHECKPOINT}::test_no_commit_without_the_lock",
    ),
    Mutant(
        "an old checkpoint that cannot be deleted is a warning",
        "trainer.run.checkpoint.Checkpoints._sweep",
        Skip("self.warnings.append(_)"),
        f"{CHECKPOINT}::test_failed_delete_is_a_warning",
    ),
    Mutant(
        "what a crash left of checkpoints is deleted",
        "trainer.run.checkpoint.Checkpoints.clean",
        Skip("self._sweep(...)"),
        f"{CHECKPOINT}::test_orphans_are_deleted_on_resume",
    ),
    Mutant(
        "a save is finished whatever happens",
        "trainer.run.checkpoint.Background.__exit__",
        Skip("self._thread.join()"),
        f"{CHECKPOINT}::test_first_error_is_raised_and_the_save_completes",
    ),
    Mutant(
        "a save that failed in the background is raised",
        "trainer.run.checkpoint.Background.wait",
        Replace("_1, self._error = self._error, None", "_1 = None"),
        f"{CHECKPOINT}::test_background_error_is_raised_at_the_next_check",
    ),
    Mutant(
        "rows of metrics are written before the commit",
        "trainer.run.loop.save",
        Replace(
            "_1.write(_2)\ncheckpoints.save(step, arrays, extra, best.get('step'))",
            "checkpoints.save(step, arrays, extra, best.get('step'))\n_1.write(_2)",
        ),
        "run/test_job.py::test_save_writes_metrics_then_state_then_commit",
    ),
    Mutant(
        "of equal evaluations the first is the best",
        "trainer.run.loop._update_best",
        Replace("_1 <= _2", "_1 < _2"),
        "run/test_job.py::test_best_checkpoint_is_kept_and_exported",
    ),
    Mutant(
        "TensorBoard may fail",
        "trainer.run.metric_writer.MetricWriter._try_tensorboard",
        Replace("(tf.errors.OpError, DataError)", "ZeroDivisionError"),
        "run/test_job.py::test_tensorboard_errors_are_warnings",
    ),
    Mutant(
        "files are flushed before they are renamed",
        "trainer.io.files.replacing",
        Skip("os.fsync(...)"),
        "io/test_files.py",
    ),
    # Values that are not finite.
    Mutant(
        "training stops at a value that is not finite",
        "trainer.run.job.Job.run_steps",
        Never("_ >= 0 or not all(_)"),
        "run/test_job.py::test_non_finite_values_stop_before_a_commit",
    ),
    Mutant(
        "weights that are not finite are named as the cause",
        "trainer.method.step._all_finite",
        Return("tf.constant(True)"),
        f"{NOT_FINITE}[weight]",
    ),
    Mutant(
        "a teacher's output that is not finite is named as the cause",
        "trainer.method.step.example_losses",
        Replace("1.0 - tf.cast(_1, _2)", "0.0 * tf.cast(_1, _2)"),
        f"{NOT_FINITE}[teacher]",
    ),
    Mutant(
        "the first bad step is named",
        "trainer.method.step.make_train_loop",
        Replace("_1 < 0", "_1 < 99"),
        f"{NOT_FINITE}[gradient]",
    ),
    # Signals.
    Mutant(
        "an error that a stop led to is the stop",
        "trainer.core.signals._is_caused_by",
        Return("False"),
        f"{SIGNALS}::test_stopped_survives_wrapping_as_data_error",
    ),
    Mutant(
        "a signal ends what saves nothing at once",
        "trainer.core.signals.StopRequest._handle",
        Never("self._at_once and not _"),
        f"{SIGNALS}::test_signal_raises_stopped_at_once",
    ),
    Mutant(
        "a second signal does not cut the clean-up short",
        "trainer.core.signals.StopRequest._handle",
        Replace("self._at_once and not _", "self._at_once"),
        f"{SIGNALS}::test_second_signal_does_not_interrupt_cleanup",
    ),
    Mutant(
        "a stop that a library wrapped is a stop",
        "trainer.core.signals.StopRequest.__exit__",
        Skip("raise Stopped(...) from None"),
        f"{SIGNALS}::test_stopped_survives_wrapping_by_a_library",
    ),
    Mutant(
        "a stop that was swallowed is seen by the next phase",
        "trainer.core.signals.StopRequest.__enter__",
        Skip("self.name = _.name"),
        f"{SIGNALS}::test_swallowed_signal_is_seen_by_the_next_request",
    ),
]
