"""Configuration: validation, flags, round trip through JSON, identity."""

from __future__ import annotations

import dataclasses
import json

import pytest
from absl import flags

from trainer.core.config import Config, fingerprint
from trainer.core.errors import ConfigError
from trainer.core.flags import define_flags, from_flags
from trainer.core.options import option

# Job specs, recipes and scripts rely on these names.
FLAGS = frozenset(
    [
        "batch_norm",
        "batch_size",
        "cache_dir",
        "cache_gb",
        "central_fraction",
        "boundaries",
        "check",
        "checkpoint_every",
        "clip_norm",
        "compat",
        "data",
        "data_weights",
        "distance",
        "dry_run",
        "ensemble",
        "epochs",
        "eval_batch_size",
        "eval_data",
        "eval_every",
        "eval_split",
        "export_from",
        "final_split",
        "fixed_crops",
        "hp_metric",
        "image_size",
        "jit_compile",
        "keep_best",
        "keep_checkpoints",
        "label_smoothing",
        "learning_rate",
        "lease_seconds",
        "log_every",
        "max_bad_fraction",
        "max_warmup",
        "min_crop_area",
        "min_teacher_agreement",
        "mixup",
        "model_dir",
        "mixup_alpha",
        "optimizer",
        "precision",
        "recipe",
        "resize_size",
        "root_pool",
        "schedule",
        "schedule_steps",
        "seed",
        "steps",
        "steps_per_loop",
        "store",
        "store_size",
        "student",
        "student_range",
        "student_weights",
        "teacher",
        "teacher_image_size",
        "teacher_outputs",
        "teacher_precision",
        "teacher_range",
        "teacher_sha256",
        "temperature",
        "tensorboard_dir",
        "tpu",
        "train_split",
        "views",
        "warmup_steps",
        "weight_decay",
        "workdir",
    ]
)


def parsed(*arguments: str) -> Config:
    values = flags.FlagValues()
    define_flags(values)
    values(["test", *arguments])
    return from_flags(values)


def test_flags_are_frozen() -> None:
    values = flags.FlagValues()
    define_flags(values)
    assert frozenset(values) == FLAGS


def test_defaults_of_flags_are_defaults_of_fields() -> None:
    assert parsed() == Config()


def test_flags_set_their_fields() -> None:
    config = parsed(
        "--teacher=keras:a",
        "--teacher=keras:b",
        "--teacher_image_size=32",
        "--teacher_image_size=64",
        "--steps=7",
        "--temperature=2.5",
        "--teacher_range=0,1",
        "--dry_run",
    )
    assert config.teacher == ("keras:a", "keras:b")
    assert config.teacher_image_size == (32, 64)
    assert (config.steps, config.temperature, config.teacher_range, config.dry_run) == (
        7,
        2.5,
        ("0,1",),
        True,
    )


def test_store_size_takes_auto_and_integers() -> None:
    assert parsed("--store_size=auto").store_size == parsed().store_size == 0
    assert parsed("--store_size=384").store_size == 384
    with pytest.raises(flags.IllegalFlagValueError, match="store_size=large"):
        parsed("--store_size=large")
    assert parsed("--store_size=auto", "--image_size=128").resolve(1).store_size == 256


def test_every_flag_has_help() -> None:
    assert all(len(field.metadata["help"]) > 15 for field in dataclasses.fields(Config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "--temperature=0.0"),
        ({"temperature": float("nan")}, "finite"),
        ({"max_bad_fraction": 1.0}, "--max_bad_fraction=1.0"),
        ({"learning_rate": -1.0}, "--learning_rate=-1.0"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"steps": 5, "epochs": 1.0}, "one of the two"),
        ({"steps": -5}, "negative"),
        ({"seed": 2**31}, "--seed"),
        ({"warmup_steps": -2}, "--warmup_steps"),
        ({"distance": "labels", "teacher": ("keras:x",)}, "no teacher"),
        ({"teacher": ("a", "b", "c"), "teacher_image_size": (1, 2)}, "2 times for 3 teachers"),
        ({"teacher_range": ("0,2",)}, "0,255"),
        ({"precision": "float16"}, "mixed_bfloat16"),
        ({"views": "same/xx"}, "fix/ic_ens"),
        ({"compat": ("everything",)}, "keras_example"),
        ({"central_fraction": 0.0}, "--central_fraction=0.0"),
        ({"min_crop_area": 1.5}, "--min_crop_area=1.5"),
        ({"max_warmup": 1.1}, "--max_warmup=1.1"),
        ({"mixup_alpha": 0.0}, "--mixup_alpha=0"),
        ({"resize_size": 100}, "--resize_size=100"),
        ({"schedule": "step", "boundaries": (5, 5)}, "--boundaries"),
        ({"schedule": "step"}, "--schedule=step"),
        ({"boundaries": (5,)}, "--schedule=cosine"),
        ({"min_teacher_agreement": 1.5}, "--min_teacher_agreement=1.5"),
        ({"teacher_precision": ("int4",)}, "--teacher_precision=int4"),
        ({"label_smoothing": 1.0}, "--label_smoothing=1.0"),
        ({"fixed_crops": 0}, "--fixed_crops=0"),
        ({"distance": "labels", "views": "ind/ic"}, "--views=ind/ic"),
        ({"optimizer": "muon", "compat": ("keras_example",)}, "--optimizer=muon"),
        ({"distance": "l2", "compat": ("distance",)}, "--distance=l2"),
        ({"distance": "hard", "compat": ("keras_example",)}, "--distance=hard"),
        ({"distance": "l2", "ensemble": "mean_probabilities"}, "no logits"),
    ],
)
def test_invalid_value_names_the_flag(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Config(**changes)


@pytest.mark.parametrize("missing", ["data", "workdir", "steps", "teacher"])
def test_missing_option_names_the_flag(missing: str) -> None:
    complete = {"data": "d", "workdir": "w", "steps": 3, "teacher": ("keras:x",)}
    Config(**complete).require_complete()
    del complete[missing]
    with pytest.raises(ConfigError, match=f"--{missing}"):
        Config(**complete).require_complete()


def from_json(text: str) -> Config:
    """The inverse of `Config.to_dict` in JSON."""
    return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()})


def test_round_trip_through_json() -> None:
    first = Config(teacher=("keras:a",), teacher_image_size=(32,), epochs=2.5)
    assert from_json(json.dumps(first.to_dict())) == first


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        (
            {"data": ("d",), "teacher": ("keras:t",), "steps": 100},
            "9e7e64144454c8bc9a80408b67796043f4aa8b6625399a057308bb93c177c5e8",
        ),
        (
            {
                "data": ("d",),
                "epochs": 10,
                "student": "resnet50v2",
                "optimizer": "muon",
                "schedule": "step",
                "boundaries": (3, 7),
                "mixup": "example",
                "temperature": 5.0,
                "teacher": ("keras:a", "keras:b"),
                "teacher_precision": ("bfloat16",),
            },
            "4db414291c49e06eca764b61fecd72b7f80074271112c0600d56993d17ca8b3a",
        ),
        (
            {
                "data": ("d", "e"),
                "data_weights": (0.7, 0.3),
                "steps": 5,
                "distance": "labels",
                "views": "same/ic",
                "compat": ("keras_example",),
                "precision": "mixed_bfloat16",
            },
            "1741029703081fd53c5fb3cd31842d9378d9238ecf8a2a01873059fb465cd2c6",
        ),
    ],
)
def test_identity_of_version_0_1_is_unchanged(changes: dict[str, object], digest: str) -> None:
    """Digests of commit 40e380c: runs of that version still resume."""
    config = Config(workdir="w", **changes).resolve(1000)  # type: ignore[arg-type]
    assert fingerprint(config.identity()) == digest


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "steps"),
    [
        (1000, 1020, 512, 1992),
        (10_000, 1020, 512, 19922),
        (300, 3312, 512, 1941),
        (0.001, 10, 512, 1),
    ],
)
def test_epochs_become_steps_as_in_big_vision(epochs: float, examples: int, batch: int, steps: int) -> None:
    assert Config(epochs=epochs, batch_size=batch).resolve(examples).steps == steps


def test_automatic_warmup_is_a_tenth_of_a_short_run() -> None:
    assert Config(steps=480).resolve(10).warmup_steps == 48
    assert Config(steps=100_000).resolve(10).warmup_steps == 1500
    assert Config(steps=480, warmup_steps=1500).resolve(10).warmup_steps == 1500


def test_long_warmup_is_warned_about_and_capped() -> None:
    short = Config(steps=480, warmup_steps=1500, schedule_steps=1992).resolve(10)
    assert "never gets above 32% of its peak" in short.warnings()[0]
    assert "--max_warmup" in short.warnings()[0]
    long = Config(steps=1992, warmup_steps=1500).resolve(10)
    assert "1,500 of 1,992" in long.warnings()[0]
    assert Config(steps=1992, warmup_steps=1500, max_warmup=0.1).resolve(10).warmup_steps == 199
    assert Config(steps=19922, warmup_steps=1500).resolve(10).warnings() == []
    assert Config(steps=480, warmup_steps=10, max_warmup=0.1).resolve(10).warmup_steps == 10


def test_schedule_within_the_warmup_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--schedule_steps=1000 ends within the warm-up of 1500"):
        Config(steps=2000, warmup_steps=1500, schedule_steps=1000).resolve(10)
    # Resolving is idempotent.
    resolved = Config(steps=12, warmup_steps=1500).resolve(10)
    assert resolved.resolve(10) == resolved


# These may change between two processes of one run. All others affect the weights.
NOT_IN_IDENTITY = """
    batch_norm cache_dir cache_gb check checkpoint_every data data_weights dry_run eval_batch_size eval_data eval_every
    eval_split export_from final_split hp_metric jit_compile keep_best keep_checkpoints lease_seconds log_every max_warmup
    min_teacher_agreement model_dir recipe steps_per_loop store student_weights teacher teacher_sha256 tensorboard_dir tpu
    workdir
"""


def test_fields_that_are_not_part_of_the_identity() -> None:
    """Data, teachers and initial weights are in a run's identity by their content (plan.py)."""
    assert (
        sorted(f.name for f in dataclasses.fields(Config) if not f.metadata["affects_weights"])
        == NOT_IN_IDENTITY.split()
    )


def test_schedule_that_ends_before_the_run_is_warned_about() -> None:
    assert "last 160 of 2,100" in Config(steps=2100, schedule_steps=1940, warmup_steps=100).resolve(10).warnings()[0]


def test_identity_has_the_fields_that_affect_the_weights() -> None:
    base = Config(steps=10)
    for change in (
        {"workdir": "elsewhere"},
        {"log_every": 3},
        {"steps_per_loop": 7},
        {"tpu": "local"},
        {"data": "copy"},
    ):
        assert dataclasses.replace(base, **change).identity() == base.identity()
    for change in (
        {"seed": 1},
        {"steps": 11},
        {"temperature": 2.0},
        {"student": "resnet50v2"},
        {"views": "same/ic"},
        {"mixup": "example"},
        {"optimizer": "muon"},
        {"compat": ("clip",)},
        {"student_range": "0,1"},
    ):
        assert fingerprint(dataclasses.replace(base, **change).identity()) != fingerprint(base.identity())


def test_one_or_several_data_sets_with_weights() -> None:
    assert parsed("--data=a").data == ("a",) == Config(data="a").data  # type: ignore[arg-type]
    assert parsed().data == () == Config(data="").data  # type: ignore[arg-type]
    config = parsed("--data=a", "--data=gs://b/c", "--data_weights=0.7,3")
    assert (config.data, config.data_weights) == (("a", "gs://b/c"), (0.7, 3.0))
    assert from_json(json.dumps(config.to_dict())) == config
    assert (parsed("--data=a", "--data=b").held_out, parsed("--data=a", "--eval_data=b").held_out) == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=a", "--data=b", "--data_weights=1"], "1 numbers for 2 sets"),
        (["--data=a", "--data=b", "--data_weights=1,0"], "each must be above 0"),
        (["--data=a", "--data=b", "--data_weights=1,x"], "numbers such as 0.7,0.3"),
        (["--data=a", "--data=b", "--data_weights=1,nan"], "finite"),
        (["--data=a", "--data=a"], "given twice"),
        (["--cache_gb=-1"], "must not be negative"),
    ],
)
def test_invalid_data_sets_are_config_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*arguments)


# The options of version 0.1 that decide the weights.
IDENTITY_0_1 = """
batch_size boundaries central_fraction clip_norm compat distance ensemble epochs fixed_crops
image_size label_smoothing learning_rate max_bad_fraction min_crop_area mixup mixup_alpha
optimizer precision resize_size root_pool schedule schedule_steps seed steps store_size student
student_range teacher_image_size teacher_outputs teacher_precision teacher_range temperature
train_split views warmup_steps weight_decay
"""


def test_options_added_since_0_1_are_left_out_of_the_identity_at_their_default() -> None:
    """Else each of them would make all earlier checkpoints and results those of another run."""
    added = [
        field
        for field in dataclasses.fields(Config)
        if field.metadata["affects_weights"] and field.name not in IDENTITY_0_1.split()
    ]
    assert all(field.metadata["omit_default"] for field in added)


def test_omit_default_leaves_an_identity_as_it_was() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(Config):
        extra: int = option(3, "An option of a later version.", omit_default=True)

    assert Later(steps=5).identity() == Later(steps=5, extra=3).identity() == Config(steps=5).identity()
    assert Later(steps=5, extra=4).identity() == Config(steps=5).identity() | {"extra": 4}
