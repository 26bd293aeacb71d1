"""What makes a run the same run, and what it leaves."""

from mutants import Mutant, Never, Replace, Skip

MUTANTS = [
    Mutant(
        "fixed targets are the mean over all crops",
        "trainer.run.fixed_targets.fixed_targets",
        Replace("_1 / _2", "_1"),
        "method/test_step.py::test_fixed_targets_are_the_teachers_mean_logits",
    ),
    Mutant(
        "half-made fixed targets are kept",
        "trainer.run.fixed_targets.fixed_targets",
        Replace("_1 == _2 or _3 or _4 > _5", "_1 == _2 or _4 > _5"),
        "method/test_step.py::test_a_signal_during_the_fixed_crops_keeps_their_sum",
    ),
    Mutant(
        "another run's workdir is refused before the work",
        "trainer.run.build.build",
        Skip("_.require_same_run()"),
        "method/test_step.py::test_another_runs_workdir_is_refused_before_targets_are_computed",
    ),
    Mutant(
        "a teacher's file is part of the run's identity",
        "trainer.run.plan.make_plan",
        Replace("[teachers.checksum(config, _1) for _1 in _]", "[]"),
        "run/test_job.py::test_changed_teacher_is_refused",
    ),
    Mutant(
        "a student's file is known by its content",
        "trainer.run.plan.make_plan",
        Never("config.student.startswith('keras:')"),
        "models/test_students.py::test_a_students_file_is_known_by_its_content_and_not_by_its_place",
    ),
    Mutant(
        "weights of data sets are part of the run's identity",
        "trainer.run.plan.make_plan",
        Skip("if config.data_weights:\n    ..."),
        "method/test_feed.py::test_sets_with_other_classes_or_none_train_without_labels",
    ),
    Mutant(
        "a run keeps the size of its stored images",
        "trainer.run.plan._earlier_store_size",
        Replace("Checkpoints.saved_identity(_)", "{}"),
        "run/test_store_size.py::test_a_run_keeps_its_size",
    ),
    Mutant(
        "a start writes down the size that it chose",
        "trainer.run.stores.fit_store_size",
        Skip("plan.record()"),
        "run/test_store_size.py::test_a_start_without_a_checkpoint_decides_too",
    ),
    Mutant(
        "the configuration of another run does not decide the size",
        "trainer.run.plan._earlier_store_size",
        Never("not isinstance(saved, dict) or _"),
        "run/test_store_size.py::test_a_start_without_a_checkpoint_decides_too",
    ),
    Mutant(
        "larger squares stay in the memory that holds the smallest",
        "trainer.run.stores._largest_side",
        Replace("STORE_ORDER.index(_1) <= STORE_ORDER.index(_2)", "True"),
        "run/test_store_size.py::test_memory_limits_the_size",
    ),
    Mutant(
        "all machines store images in one size",
        "trainer.run.stores.fit_store_size",
        Replace("accelerator.least_of_all(_1)", "_1"),
        "run/test_store_size.py::test_a_run_takes_what_all_machines_have_room_for",
    ),
    Mutant(
        "labels of other classes are not used",
        "trainer.run.stores._drop_foreign_labels",
        Never("_.classes != _.classes"),
        "method/test_feed.py::test_sets_with_other_classes_or_none_train_without_labels",
    ),
    Mutant(
        "a run resumes only if the same records are corrupt",
        "trainer.run.stores.require_same_records",
        Never("files.read(...).decode(...) != _"),
        "data/test_hostile_data.py::test_a_run_that_left_out_other_records_is_not_resumed",
    ),
    Mutant(
        "rows after the checkpoint are dropped",
        "trainer.run.metric_writer.MetricWriter.rewind",
        Replace("_['step'] <= step", "True"),
        "run/test_job.py::test_metrics_are_truncated_to_the_checkpoint",
    ),
    Mutant(
        "metrics since the last row are saved",
        "trainer.run.loop.save",
        Replace("list(job.pending_metrics)", "[]"),
        "run/test_job.py::test_sigterm_saves_and_exits_75",
    ),
    Mutant(
        "names in a checkpoint do not depend on the process",
        "trainer.run.job.Job.state",
        Replace("_1.path.replace('/', '_').rsplit('_', 1)[-1]", "_1.path"),
        "run/test_job.py::test_sigterm_saves_and_exits_75",
    ),
    Mutant(
        "the export takes the student's value range",
        "trainer.output.export.Servable._classify",
        Replace("config.student_range", "'-1,1'"),
        "verbs/test_evaluate.py::test_exported_model_gives_the_evaluated_logits",
    ),
    Mutant(
        "an exported model loads without this project",
        "trainer.output.export.single_device_copy",
        Replace("bit.fold(_1)", "_1"),
        "output/test_export.py::test_small_students_load_without_this_package",
    ),
    Mutant(
        "what a crash left of an export is deleted",
        "trainer.output.export.clean",
        Replace("('', 'saved_model', 'saved_model/variables')", "('',)"),
        "output/test_export.py::test_what_a_crash_left_on_a_disk_goes",
    ),
    Mutant(
        "a bucket gets whole objects of a SavedModel",
        "trainer.output.export.save_saved_model",
        Replace(
            "tf.saved_model.save(_1, _, signatures=_2)",
            "tf.saved_model.save(_1, path, signatures=_2)",
        ),
        "output/test_export.py::test_a_bucket_gets_whole_objects_and_refusals_that_pass_are_not_felt",
    ),
    Mutant(
        "an evaluation leaves the moving averages to training",
        "trainer.run.batch_statistics.BatchStatistics.reestimated",
        Replace("for _1, _2 in own:\n    _1.assign(_2)", "pass"),
        "run/test_batch_statistics.py::test_evaluations_do_not_change_training",
    ),
    Mutant(
        "the variance of batches' means is part of the variance",
        "trainer.run.batch_statistics.BatchStatistics.estimate",
        Replace("_1.mean(0) + _2.var(0)", "_1.mean(0)"),
        "run/test_batch_statistics.py::test_statistics_equal_numpys",
    ),
    Mutant(
        "what is exported has the statistics that were evaluated",
        "trainer.run.job.Job.for_inference",
        Replace("int(_)", "self.step"),
        "run/test_batch_statistics.py::test_export_of_the_best_step_has_its_statistics",
    ),
    Mutant(
        "trust in a teacher: one at chance is refused",
        "trainer.run.teacher_check._Judge._require_knowledge",
        Replace("not accuracy.above_chance and accuracy.images >= MIN_IMAGES", "False"),
        "run/test_teacher_check.py::test_a_teacher_at_chance_is_refused_if_there_are_images_enough_to_tell",
    ),
    Mutant(
        "trust in a teacher: a range that is given is questioned",
        "trainer.run.teacher_check._Judge._find_range",
        Replace("accuracy.share >= _GOOD", "True"),
        "run/test_teacher_check.py::test_a_given_range_is_questioned_above_chance_too",
    ),
    Mutant(
        "trust in a teacher: images of one class choose no order",
        "trainer.run.teacher_statistics.better_order",
        Never("len(np.unique(labels)) < 2"),
        "run/test_teacher_statistics.py::test_images_of_one_class_say_nothing_about_an_order",
    ),
    Mutant(
        "trust in a teacher: an order is tested on the images that it moves",
        "trainer.run.teacher_statistics._compare",
        Replace("then[moved].mean() < max(_1, now[moved].mean() + _2)", "then.mean() < max(_1, now.mean() + _2)"),
        "run/test_teacher_statistics.py::test_two_swapped_classes_of_many_are_found",
    ),
    Mutant(
        "trust in a teacher: what was found is that of this run",
        "trainer.run.teacher_check._read",
        Replace("content['run'] != plan.run_id or _", "_"),
        "run/test_teacher_check.py::test_what_was_found_is_kept_for_the_processes_that_resume",
    ),
]
