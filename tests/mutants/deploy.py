"""Guards of job specs and of the commands that send them. Paths go up from trainer/, where the other guards are."""

from mutants import Mutant

CHECK = "../deploy/check.py"
SPECS = "../deploy/specs.py"
SUBMIT = "../deploy/submit.py"
YAML = "../deploy/plainyaml.py"
WRONG = "test_deploy.py::test_a_wrong_job_is_refused_and_named"
MISTAKE = "test_deploy.py::test_a_mistake_is_a_line_and_no_call"

MUTANTS = [
    Mutant("fields that do not exist", CHECK, "if name not in fields:", "if False:", WRONG),
    Mutant("types of fields", CHECK, "if not isinstance(value, _CASTS[kind])", "if False", WRONG),
    Mutant("values of enumerations", CHECK, "if value not in allowed:", "if False:", WRONG),
    Mutant("topologies of TPU machines", CHECK, "if topology not in TPU_MACHINES[kind]:", "if False:", WRONG),
    Mutant("one replica on a TPU", CHECK, "if tpu and any(", "if False and any(", WRONG),
    Mutant(
        "one pool on a TPU",
        CHECK,
        "if tpu and len(pools) > 1:",
        "if False:",
        "test_deploy.py::test_two_pools_are_for_machines_without_tpu",
    ),
    Mutant(
        "TensorBoard needs an account",
        CHECK,
        'if not spec.get("serviceAccount"):\n            yield',
        "if False:\n            yield",
        WRONG,
    ),
    Mutant("TensorBoard of the job's region", CHECK, "elif match[1] != region:", "elif False:", WRONG),
    Mutant("GPUs that come with a machine", CHECK, "if accelerator != gpu or count != fixed:", "if False:", WRONG),
    Mutant("deprecated strategies", CHECK, "if strategy in STRATEGIES:", "if False:", WRONG),
    Mutant(
        "regions",
        CHECK,
        'if region not in SCHEMA["regions"]:',
        "if False:",
        "test_deploy.py::test_a_region_that_is_none",
    ),
    Mutant(
        "flags of the trainer",
        CHECK,
        'if name not in known:\n            yield f"trainer flag',
        'if False:\n            yield f"trainer flag',
        MISTAKE,
    ),
    Mutant("paths of this machine", CHECK, "if cloud and _is_local(name, value):", "if False:", MISTAKE),
    Mutant(
        "the trainer's own checks",
        SUBMIT,
        'yield from check.configuration(list(args), job.get("studySpec", {}))',
        "yield from ()",
        MISTAKE,
    ),
    Mutant(
        "what the trainer misses",
        CHECK,
        ".require_complete()",
        "",
        "test_deploy.py::test_the_trainer_takes_the_arguments_that_specs_send",
    ),
    Mutant(
        "accounts of another project",
        "../deploy/setup.py",
        'if account.partition("@")[2] != home:',
        "if False:",
        "test_deploy.py::test_setups_mistakes",
    ),
    Mutant(
        "a bucket of somebody else's",
        "../deploy/setup.py",
        'and "not available" not in told',
        "",
        "test_deploy.py::test_setup_makes_what_is_missing_and_stops_at_what_fails",
    ),
    Mutant(
        "parameters of a study are flags",
        CHECK,
        'if name in given:\n            yield f"study',
        'if False:\n            yield f"study',
        "test_deploy.py::test_study_parameters_are_flags_of_the_trainer",
    ),
    Mutant("unknown settings", SPECS, "if name not in SETTINGS:", "if False:", MISTAKE),
    Mutant("the form of settings", SPECS, "if not re.fullmatch(setting.pattern, part):", "if False:", MISTAKE),
    Mutant(
        "a user's flag over the spec's",
        SPECS,
        "found = [text for text in found if _name(text) not in own]",
        "pass",
        "test_deploy.py::test_a_flag_given_twice_is_the_users",
    ),
    Mutant(
        "a trial reports what its study looks at",
        SUBMIT,
        "extra = [*extra, f\"--hp_metric={study['studySpec']['metrics'][0]['metricId']}\"]",
        "pass",
        "test_deploy.py::test_a_studys_metric_is_one_that_the_trainer_reports",
    ),
    Mutant(
        "one writer for a run",
        SUBMIT,
        "if not chosen.beside:",
        "if False:",
        "test_deploy.py::test_a_second_job_of_a_run_waits_for_the_end_of_the_first",
    ),
    Mutant(
        "nothing is sent that is wrong",
        SUBMIT,
        "if wrong := list(_wrong(kind, job, settings)):",
        "if wrong := []:",
        MISTAKE,
    ),
    Mutant(
        "a dry run calls nothing",
        SUBMIT,
        "if chosen.dry_run:",
        "if False:",
        "test_deploy.py::test_dry_run_prints_job_command_and_cost_and_calls_nothing",
    ),
    Mutant(
        "Google's refusal is an exit code",
        SUBMIT,
        "if done.returncode == 0:",
        "if True:",
        "test_deploy.py::test_what_google_refuses_is_told_with_what_to_do",
    ),
    Mutant(
        "keys given twice",
        YAML,
        "if key in found:",
        "if False:",
        "test_deploy.py::test_yaml_that_can_be_read_in_two_ways_is_refused",
    ),
    Mutant(
        "words that YAML takes for truths",
        YAML,
        "if _AMBIGUOUS.fullmatch(text):",
        "if False:",
        "test_deploy.py::test_yaml_is_read_as_pyyaml_reads_it_or_refused",
    ),
    Mutant(
        "words for a TPU VM's shell",
        "../deploy/tpu_vm.py",
        "arguments=shlex.join(arguments)",
        'arguments=" ".join(arguments)',
        "test_deploy.py::test_a_tpu_vms_mistakes_and_other_actions",
    ),
]
