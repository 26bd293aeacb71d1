"""What is computed: views, distances, the update, schedules, evaluation."""

from mutants import Constant, Mutant, Negate, Never, Replace, Return, Skip

FORMULA = "method/test_optim.py::test_two_hundred_updates_are_the_formula"
REPLICAS = "method/test_step.py::test_one_two_and_four_replicas_give_the_same_weights"
MODES = "method/test_views.py::test_every_mode_is_the_numpy_reference_pixel_for_pixel"

MUTANTS = [
    Mutant(
        "a crop loses nothing where the original has no more pixels",
        "trainer.method.fidelity.blurred_share",
        Replace("_ < crops.sizes", "True"),
        "method/test_fidelity.py::test_originals_with_fewer_pixels_than_the_square_lose_nothing",
    ),
    # The update.
    Mutant(
        "gradients are clipped after the all-reduce",
        "trainer.method.optim.apply_gradients",
        Skip("_.all_reduce(...)"),
        FORMULA,
    ),
    Mutant(
        "Keras's own sum over replicas is undone",
        "trainer.method.optim.apply_gradients",
        Replace("(_1 / _, _2)", "(_1, _2)"),
        FORMULA,
    ),
    Mutant(
        "weight decay is for kernels only",
        "trainer.method.optim.is_kernel",
        Return("True"),
        "method/test_optim.py",
    ),
    Mutant(
        "weight decay is not multiplied by the learning rate",
        "trainer.method.optim._keras_decay",
        Replace("config.weight_decay / config.learning_rate", "config.weight_decay"),
        FORMULA,
    ),
    Mutant("Adam's epsilon", "trainer.method.optim.ADAM_EPSILON", Constant("0.001"), FORMULA),
    Mutant("SGD's momentum", "trainer.method.optim.MOMENTUM", Constant("0.5"), FORMULA),
    Mutant(
        "a step schedule's boundary belongs to the larger rate",
        "trainer.method.optim.WarmupSteps.__call__",
        Replace("_1 > tf.constant(...)", "_1 >= tf.constant(self.boundaries, tf.float32)"),
        "method/test_optim.py::test_schedule_of_steps_is_big_transfers",
    ),
    Mutant(
        "Muon's step is for matrices only",
        "trainer.method.optim.ConvolutionalMuon._should_use_adamw",
        Return("True"),
        FORMULA,
    ),
    Mutant(
        "--compat clips each gradient by itself",
        "trainer.method.keras_example.replacements",
        Never("like_example('clip')"),
        FORMULA,
    ),
    Mutant(
        "--compat decays whatever the learning rate",
        "trainer.method.keras_example.ExampleAdamW.update_step",
        Replace("_1 * self._decay", "_1 * self._decay * learning_rate"),
        FORMULA,
    ),
    # The loss.
    Mutant(
        "the loss is divided by the global batch",
        "trainer.method.step.make_train_loop",
        Replace("tf.reduce_sum(_1['loss']) / config.batch_size", "tf.reduce_mean(_1['loss'])"),
        REPLICAS,
    ),
    Mutant(
        "KL is multiplied by T squared",
        "trainer.method.distances.kl",
        Replace("temperature ** 2", "temperature"),
        "method/test_step.py::test_kl_is_scipys",
    ),
    Mutant(
        "--compat's distance is the Keras example's",
        "trainer.method.keras_example.replacements",
        Never("like_example('distance')"),
        "method/test_step.py::test_loss_is_the_mean_over_the_global_batch[compat distance]",
    ),
    Mutant(
        "fixed targets are looked up by example",
        "trainer.method.step.example_losses",
        Replace("_1.split_partners(positions)", "_1.split_partners(_1.rows)"),
        "method/test_step.py::test_fixed_targets_are_the_teachers_mean_logits",
    ),
    Mutant(
        "labels are mixed as the views are",
        "trainer.method.step.example_losses",
        Replace("_.mixup_ratios * _1 + _", "_1"),
        "method/test_step.py::test_labels_are_mixed_as_the_images_are",
    ),
    Mutant(
        "--ensemble=sum_losses sums losses",
        "trainer.method.step.example_losses",
        Never("config.ensemble == 'sum_losses'"),
        "method/test_step.py::test_loss_of_several_teachers",
    ),
    Mutant(
        "probabilities are averaged at the temperature",
        "trainer.models.teachers.ensemble",
        Replace("tf.nn.log_softmax(_1 / temperature)", "tf.nn.log_softmax(_1)"),
        "method/test_step.py::test_loss_of_several_teachers",
    ),
    # Views.
    Mutant(
        "a mixup partner is a row of the global batch",
        "trainer.method.views.BatchRows.of",
        Replace(
            "tf.math.floormod(_1 - 1 + tf.range(_2 + 1), batch_size)",
            "tf.concat([[_1 + _2 - 1], _1 + tf.range(_2)], 0)",
        ),
        "method/test_views.py::test_views_are_the_same_for_any_number_of_replicas",
    ),
    Mutant(
        "--compat's partner is the reversed batch's",
        "trainer.method.views.BatchRows.of",
        Replace("tf.concat([_1, batch_size - 1 - _1], 0)", "tf.concat([_1, _1], 0)"),
        "method/test_views.py::test_compat_mixup_reverses_the_batch",
    ),
    Mutant(
        "a crop has the original's proportions",
        "trainer.method.crops.inception_box",
        Replace("ASPECT_RATIOS[0] + _1", "height / width * ASPECT_RATIOS[0] + _1"),
        "method/test_views.py::test_crops_are_distributed_as_tensorflows",
    ),
    Mutant(
        "a resized crop takes no pixel from outside",
        "trainer.method.crops._interpolation",
        Never("crop_first"),
        "method/test_views.py::test_render_is_crop_then_tensorflows_resize",
    ),
    Mutant(
        "evaluation averages over areas",
        "trainer.method.crops._interpolation",
        Negate("not area"),
        "method/test_views.py",
    ),
    Mutant(
        "one crop for teacher and student",
        "trainer.method.views.training_views",
        Never("mode(config).teacher == 'same'"),
        MODES,
    ),
    Mutant(
        "mixup by example draws a ratio for each",
        "trainer.method.views.mixup_ratios",
        Never("config.mixup == 'example'"),
        "method/test_views.py::test_mixup_by_example_has_a_ratio_for_each",
    ),
    Mutant(
        "--compat resizes, then crops",
        "trainer.method.keras_example.RANDOM_CROP",
        Replace("False", "True"),
        "method/test_views.py::test_compat_crop_is_the_examples",
    ),
    Mutant(
        "mixup's ratios are Beta distributed",
        "trainer.method.counter_rng.beta",
        Replace("tf.math.reduce_logsumexp(...) <= 0", "True"),
        "verbs/test_teacher.py::test_beta_samples_match_scipy",
    ),
    Mutant(
        "HyperRule evaluates on the whole image",
        "trainer.method.views.find_crop",
        Replace("CROPS['whole'] if config.resize_size else _1", "_1"),
        "verbs/test_teacher.py::test_hyperrule_resizes_then_crops",
    ),
    # Evaluation.
    Mutant(
        "every example is evaluated once",
        "trainer.run.evaluator.Evaluator._run_over_split",
        Replace("_1[:len(examples)]", "_1"),
        "verbs/test_evaluate.py::test_every_example_is_counted_once",
    ),
    Mutant(
        "ties count against the label",
        "trainer.run.evaluator.top_k",
        Replace("logits >= _1", "logits > _1"),
        "verbs/test_evaluate.py",
    ),
    # Configuration.
    Mutant(
        "a flag overrides a recipe",
        "trainer.core.flags.from_flags",
        Replace("_1 not in given", "True"),
        "verbs/test_recipes.py::test_flag_overrides_the_recipe",
    ),
    Mutant(
        "--max_warmup caps the warm-up",
        "trainer.core.config.Config.resolve",
        Skip("if self.max_warmup:\n    ..."),
        "core/test_config.py::test_long_warmup_is_warned_about_and_capped",
    ),
]
