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
        "if not cheap.is_plain(teacher.model):",
        "if False:",
        "test_cheap.py::test_a_program_is_asked_in_float32_only",
    ),
]
