"""Breaks each guard in turn, in a copy, and shows that a test notices. `make mutations`; a mutant that lives is a failure.

Not a test module itself: a mutant takes as long as starting TensorFlow takes, so all of them take some minutes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of `file` from `old`, which stands there once, to `new`, and the tests that must fail for it."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "clip after the all-reduce",
        "optim.py",
        "gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)",
        "pass",
        "test_optim.py::test_two_hundred_updates_are_the_formula",
    ),
    Mutant("decay on kernels only", "optim.py", "if not is_kernel(v)]", "if False]", "test_optim.py"),
    Mutant(
        "decay not times the learning rate",
        "optim.py",
        "decay = config.weight_decay / config.learning_rate",
        "decay = config.weight_decay",
        "test_optim.py::test_two_hundred_updates_are_the_formula",
    ),
    Mutant(
        "loss over the global batch",
        "distill.py",
        'tf.reduce_sum(values["loss"]) / config.batch_size',
        'tf.reduce_mean(values["loss"])',
        "test_distill.py::test_one_two_and_four_replicas_give_the_same_weights",
    ),
    Mutant("T squared", "distill.py", "temperature**2 * tf", "temperature * tf", "test_distill.py::test_kl_is_scipys"),
    Mutant(
        "partner from the global batch",
        "views.py",
        "cls(tf.math.floormod(first - 1 + tf.range(share + 1), batch_size), partner)",
        "cls(tf.concat([[first + share - 1], first + tf.range(share)], 0), partner)",
        "test_views.py::test_views_are_the_same_for_any_number_of_replicas",
    ),
    Mutant(
        "crop in the original's proportions",
        "views.py",
        "aspect = ASPECT[0] +",
        "aspect = height / width * ASPECT[0] +",
        "test_views.py::test_crops_are_distributed_as_tensorflows",
    ),
    Mutant(
        "samples stay inside the crop",
        "views.py",
        "        if inside:\n",
        "        if False:\n",
        "test_views.py::test_render_is_crop_then_tensorflows_resize",
    ),
    Mutant(
        "independent views have draws of their own",
        "views.py",
        "else make(_TEACHER_CROP,",
        "else make(_OWN_CROP,",
        "test_views.py::test_every_mode_is_the_numpy_reference_pixel_for_pixel",
    ),
    Mutant(
        "one crop for both models",
        "views.py",
        'same = chosen.teacher == "same"',
        "same = False",
        "test_views.py::test_every_mode_is_the_numpy_reference_pixel_for_pixel",
    ),
    Mutant(
        "a coefficient for each example",
        "views.py",
        'config.mixup == "example"',
        "False",
        "test_views.py::test_mixup_by_example_has_a_coefficient_for_each",
    ),
    Mutant(
        "the example's partner",
        "views.py",
        "tf.concat([own, batch_size - 1 - own], 0)",
        "tf.concat([own, own], 0)",
        "test_views.py::test_compat_mixup_reverses_the_batch",
    ),
    Mutant(
        "the example resizes, then crops",
        "views.py",
        'cropped_first = not config.like_example("crop")',
        "cropped_first = True",
        "test_views.py::test_compat_crop_is_the_examples",
    ),
    Mutant(
        "the example's distance",
        "distill.py",
        'if config.like_example("distance"):',
        "if False:",
        "test_distill.py::test_loss_is_the_mean_over_the_global_batch",
    ),
    Mutant(
        "fixed targets are the example's own",
        "distill.py",
        "[tf.gather(table, rows.split(chosen)[0]) for table",
        "[tf.gather(table, rows.split(rows.numbers)[0]) for table",
        "test_distill.py::test_fixed_teachers_are_asked_once",
    ),
    Mutant(
        "all the fixed crops",
        "loop.py",
        "(total / done)",
        "(total / 1)",
        "test_distill.py::test_fixed_teachers_are_asked_once",
    ),
    Mutant(
        "labels are mixed with the views",
        "distill.py",
        "target = made.share * own + (1.0 - made.share) * other",
        "target = own",
        "test_distill.py::test_labels_are_mixed_as_the_pictures_are",
    ),
    Mutant(
        "probabilities averaged at the temperature",
        "models/teachers.py",
        "tf.nn.log_softmax(z / temperature) for z",
        "tf.nn.log_softmax(z) for z",
        "test_distill.py::test_loss_of_several_teachers",
    ),
    Mutant(
        "sum of losses",
        "distill.py",
        'config.ensemble == "sum_losses"',
        "False",
        "test_distill.py::test_loss_of_several_teachers",
    ),
    Mutant(
        "the example's clip",
        "optim.py",
        'config.clip_norm and config.like_example("clip")',
        "False",
        "test_optim.py::test_two_hundred_updates_are_the_formula",
    ),
    Mutant(
        "the example's decay",
        "optim.py",
        "variable * self._decay)",
        "variable * self._decay * learning_rate)",
        "test_optim.py::test_two_hundred_updates_are_the_formula",
    ),
    Mutant(
        "Muon's step for convolutions",
        "optim.py",
        "return variable.path not in self._chosen",
        "return True",
        "test_optim.py::test_two_hundred_updates_are_the_formula",
    ),
    Mutant(
        "a flag overrides a recipe",
        "config.py",
        "for name, value in offered.items() if name not in given}",
        "for name, value in offered.items()}",
        "test_recipes.py::test_a_flag_beside_a_recipe_overrides_it",
    ),
    Mutant(
        "a warm-up too long is told",
        "config.py",
        "if self.warmup_steps > self.steps / 4:",
        "if False:",
        "test_config.py::test_warmup_that_a_run_spends_its_life_in_is_told_and_capped",
    ),
    Mutant(
        "warm-up is capped",
        "config.py",
        "warmup = min(warmup, int(self.max_warmup * steps))",
        "pass",
        "test_config.py::test_warmup_that_a_run_spends_its_life_in_is_told_and_capped",
    ),
    Mutant(
        "the student's range in the export",
        "export.py",
        "config.image_size), config.student_range)",
        'config.image_size), "-1,1")',
        "test_evaluate.py::test_export_gives_what_was_evaluated",
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
        "_refuse(self._call.graph.as_graph_def(), where, savers=False)",
        "pass",
        "test_saved_models.py::test_a_saver_by_name_alone_is_no_way_around",
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
        "(done == crops or stop.name or",
        "(done == crops or",
        "test_distill.py::test_a_signal_among_the_fixed_crops_keeps_their_sum",
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
        "probabilities to logits",
        "models/teachers.py",
        "if self.probabilities:",
        "if False:",
        "test_models.py::test_any_ending_and_range_gives_logits",
    ),
    Mutant(
        "each example once",
        "evaluate.py",
        "[: len(store) - start]",
        "",
        "test_evaluate.py::test_every_example_once_whatever_the_batch",
    ),
    Mutant("ties are wrong", "evaluate.py", "(logits >= own)", "(logits > own)", "test_evaluate.py"),
    Mutant("folded on export", "export.py", "return bit.fold(copy)", "return copy", "test_load_alone.py"),
    Mutant(
        "stop on what is not finite",
        "loop.py",
        "if not all(math.isfinite(value) for value in metrics.values()):",
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
        '"pending": job.pending}',
        '"pending": []}',
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


def lives(mutant: Mutant, folder: pathlib.Path) -> str:
    """Runs a mutant's tests in a copy of the project; returns what they said if they pass, else nothing."""
    for name in ("trainer", "tests", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    path = folder / "trainer" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/{mutant.tests}",
        "-m",
        "not slow",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    # 1 is a failed test. Anything else (no test found, a mutant that is no Python) shows nothing.
    return "" if done.returncode == 1 else f"pytest exited with {done.returncode}: {done.stdout[-500:]}"


def main() -> int:
    """Tries all, or those whose description holds the first argument."""
    wanted = [m for m in MUTANTS if len(sys.argv) < 2 or sys.argv[1] in m.what]
    failed = 0
    for mutant in wanted:
        with tempfile.TemporaryDirectory() as folder:
            alive = lives(mutant, pathlib.Path(folder))
        failed += bool(alive)
        print(f"{'LIVES ' if alive else 'caught'} {mutant.what}{': ' + alive if alive else ''}", flush=True)
    print(f"{len(wanted) - failed} of {len(wanted)} broken guards were noticed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
