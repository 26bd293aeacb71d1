"""Guards of cheap teachers, fine-tuning and evaluation."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "a form that disagrees",
        "agreement.py",
        "if found.top1 < config.min_teacher_agreement:",
        "if False:",
        "test_cheap.py::test_a_form_that_disagrees_is_refused",
    ),
    Mutant(
        "int8 sums are exact",
        "models/cheap.py",
        "few = max(1, _EXACT_TERMS // (height * width))",
        "few = channels",
        "test_cheap.py::test_int8_convolution_is_numpys_to_the_bit",
    ),
    Mutant(
        "int8 convolutions for compilers that have them",
        "models/cheap.py",
        "if native and control_flow_util",
        "if False and control_flow_util",
        "test_cheap.py::test_compilers_with_int8_are_asked_for_it",
    ),
    Mutant(
        "padding is the grid's zero",
        "models/cheap.py",
        "constant_values=self._grid.zero)",
        "constant_values=0)",
        "test_cheap.py::test_int8_convolution_is_numpys_to_the_bit",
    ),
    Mutant(
        "cheap values that are not finite",
        "agreement.py",
        "if not np.isfinite(logits).all():",
        "if False:",
        "test_cheap.py::test_values_that_are_not_finite_are_refused",
    ),
    Mutant(
        "programs have no cheap form",
        "agreement.py",
        "if not bit.is_plain(teacher.model):",
        "if False:",
        "test_cheap.py::test_a_program_is_asked_in_float32_only",
    ),
    Mutant(
        "batch statistics over all replicas",
        "models/students.py",
        "layer.synchronized = tf.distribute.get_strategy().num_replicas_in_sync > 1",
        "layer.synchronized = False",
        "test_students.py::test_moving_statistics_are_the_mean_of_what_was_seen",
    ),
    Mutant(
        "eight groups",
        "models/students.py",
        "if isinstance(layer, keras.layers.BatchNormalization) and flag.endswith(GROUP_NORM):",
        "if False:",
        "test_students.py::test_group_norm_is_computed_over_eight_groups",
    ),
    Mutant(
        "weights that a file has not",
        "models/loading.py",
        "if new := [w.path for w in model.weights if _digest(keras.ops.convert_to_numpy(w)) not in held]:",
        "if new := []:",
        "test_students.py::test_applications_that_do_not_fit",
    ),
    Mutant(
        "an application's own preprocessing",
        "models/students.py",
        "other(_Preprocess(name)(inputs))",
        "other(inputs)",
        "test_students.py::test_an_application_is_a_teacher_with_its_own_preprocessing",
    ),
]
