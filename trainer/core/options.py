"""The options of a training job in five groups: data, teacher, student, method, run.

Every field is also a flag of `trainer.task` (flags.py). The text of a field is the flag's help: unit,
range, source. `deploy/` reads this file as source, since a laptop that submits jobs may lack absl:
choices are tuples of names defined here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from trainer.core.errors import ConfigError

RANGES = ("-1,1", "0,1", "0,255")
OUTPUTS = ("auto", "logits", "probabilities")
PRECISIONS = ("float32", "mixed_bfloat16")
TEACHER_PRECISIONS = ("float32", "bfloat16", "int8")
DISTANCES = ("kl", "hard", "l2", "euclidean", "labels")
VIEWS = ("fix/rs", "fix/cc", "fix/ic_ens", "ind/rc", "ind/ic", "same/rc", "same/ic", "mix")
MIXUPS = ("batch", "example")
ENSEMBLES = ("mean_logits", "mean_probabilities", "sum_losses")
OPTIMIZERS = ("adamw", "muon", "sgdm")
SCHEDULES = ("cosine", "step")
COMPAT = ("keras_example", "crop", "central", "mixup", "t2", "distance", "clip", "decay")
STORES = ("auto", "device", "host", "disk")
ROOT_POOLS = ("zero", "inf")
JIT = ("auto", "on", "off")
BEST = ("none", "student_top1", "agreement_top1", "kl")
HP_METRICS = ("student_top1", "student_top5", "agreement_top1", "kl")


def option(
    default: Any,
    text: str,
    *,
    affects_weights: bool = True,
    choices: tuple[str, ...] = (),
    omit_default: bool = False,
) -> Any:
    """A field of an options group with what its flag needs.

    Args:
        default: value where neither a flag nor a recipe gives one.
        text: help of the flag: unit, range, source.
        affects_weights: the value decides the weights that training yields. Such a field is part of
            the run's identity, and a checkpoint made with another value is refused.
        choices: the values that a text may take; empty: any.
        omit_default: set this for a field added after version 0.1 that affects weights: it is left
            out of the identity at its default, so that earlier runs keep theirs and still resume.
    """
    metadata = {"help": text, "affects_weights": affects_weights, "choices": choices, "omit_default": omit_default}
    return dataclasses.field(default=default, metadata=metadata)


def require(options: Any, name: str, condition: bool, reason: str) -> None:
    """Checks one field.

    Args:
        options: holds the field.
        name: of the field, which is the flag's.
        condition: what must be true.
        reason: what the value must be, for the message.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"--{name}={getattr(options, name)}: {reason}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where data and results are."""

    group: ClassVar[str] = "data"

    data: tuple[str, ...] = option(
        (),
        "Folder or gs:// prefix made by trainer.prepare (it holds dataset.json). Its labels are "
        "not used but for --distance=labels. Repeat for several sets.",
        affects_weights=False,
    )
    max_bad_fraction: float = option(
        0.0,
        "Share of a split's records that may be bad (damaged, or of an image that cannot be "
        "used), 0 to below 1. 0: the first one stops the job. Above: bad ones are left out, told "
        "and listed in result.json, and each image is decoded once more before the first step to "
        "find them all.",
    )
    data_weights: tuple[float, ...] = option(
        (),
        "Share of each --data in the rows, > 0, as 0.7,0.3 (any sum): each set goes through "
        "epochs of its own. Empty: several sets are one, in which an epoch shows every image "
        "once.",
        affects_weights=False,  # part of the identity's "data"
    )
    eval_data: str = option(
        "",
        "The same, with classes, for evaluation; empty: the first --data.",
        affects_weights=False,
    )
    train_split: str = option(
        "train",
        "Split whose images are trained on.",
    )
    eval_split: str = option(
        "validation",
        "Split measured every --eval_every steps.",
        affects_weights=False,
    )
    final_split: str = option(
        "test",
        "Split measured once, at the end, for result.json.",
        affects_weights=False,
    )
    workdir: str = option(
        "",
        "Folder or gs:// prefix of this run. The same command goes on from what it holds. Empty: "
        "on Vertex AI the folder above AIP_CHECKPOINT_DIR; a trial of a study gets a folder "
        "trial-N in a workdir that is given.",
        affects_weights=False,
    )
    model_dir: str = option(
        "",
        "Folder or gs:// prefix for a copy of the SavedModel, as `gcloud ai models upload` takes "
        "it. Empty: AIP_MODEL_DIR, if set.",
        affects_weights=False,
    )
    tensorboard_dir: str = option(
        "",
        "Folder or gs:// prefix for TensorBoard's files. Empty: AIP_TENSORBOARD_LOG_DIR, if set, "
        "else one in the workdir.",
        affects_weights=False,
    )
    store: str = option(
        "auto",
        "Where decoded images are: on the device; in the host's memory; on the host's disk, "
        "encoded, decoded in the order of the steps. auto: the first with room. The result is the "
        "same.",
        affects_weights=False,
        choices=STORES,
    )
    cache_dir: str = option(
        "",
        "Folder on this machine's disk for copies of shards from a bucket, with --store=disk, "
        "shared by all runs; empty: $FUNMATCH_CACHE, else ~/.cache/funmatch.",
        affects_weights=False,
    )
    cache_gb: float = option(
        0.0,
        "Gibibytes that those copies may take in all, >= 0; 0: what the disk has, but for one.",
        affects_weights=False,
    )

    def validate(self) -> None:
        """Checks each field.

        Raises:
            ConfigError: names the flag, its value and what it may be.
        """
        require(self, "max_bad_fraction", 0 <= self.max_bad_fraction < 1, "it must be at least 0 and below 1")
        require(self, "cache_gb", self.cache_gb >= 0, "it must not be negative")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ConfigError(
                f"--data_weights has {len(self.data_weights)} numbers for {len(self.data)} sets of --data: "
                "give one for each"
            )
        require(self, "data_weights", all(weight > 0 for weight in self.data_weights), "each must be above 0")
        unique = len(set(self.data)) == len(self.data)
        require(self, "data", unique, "a set is given twice; --data_weights says how much of each")


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """The teachers, what they take and return."""

    group: ClassVar[str] = "teacher"

    teacher: tuple[str, ...] = option(
        (),
        "keras:PATH; saved_model:PATH; app:NAME@WEIGHTS.h5 (keras.applications); "
        "bit:ARCH@FILE.npz or bit:NAME, a published BiT such as R152x2_T_flowers128; "
        "kaggle:OWNER/DATASET[/VERSION][:FILE] or kaggle:OWNER/MODEL/FRAMEWORK/VARIATION; "
        "random:NAME (untrained, for timing). Repeat for several. Paths may be gs:// or https://.",
        affects_weights=False,
    )
    teacher_image_size: tuple[int, ...] = option(
        (),
        "Side in pixels that each teacher takes; empty: what its file says, else --image_size.",
    )
    teacher_range: tuple[str, ...] = option(
        ("auto",),
        "Value range that each teacher takes: -1,1 or 0,1 or 0,255. auto: what a probe batch "
        "shows of a SavedModel that is a BiT, 0,255 for app: (it takes no other), else -1,1.",
        choices=(*RANGES, "auto"),
    )
    teacher_outputs: str = option(
        "auto",
        "What a teacher returns; auto looks at its last layer and at its outputs.",
        choices=OUTPUTS,
    )
    teacher_sha256: tuple[str, ...] = option(
        (),
        "SHA-256 (hex) that each teacher's file must have; empty: any.",
        affects_weights=False,
    )
    teacher_precision: tuple[str, ...] = option(
        ("float32",),
        "Form that each teacher is asked in: float32; bfloat16; or int8, its convolutions with "
        "whole numbers from -127 to 127.",
        choices=TEACHER_PRECISIONS,
    )
    min_teacher_agreement: float = option(
        0.98,
        "A cheap form must give the float32 teacher's most likely class on at least this share of "
        "512 training views, in [0, 1].",
        affects_weights=False,
    )
    ensemble: str = option(
        "mean_logits",
        "Several teachers: mean_logits (paper), mean_probabilities, or sum_losses: the sum of the "
        "distances (big_vision).",
        choices=ENSEMBLES,
    )

    def validate(self) -> None:
        """Checks each field.

        Raises:
            ConfigError: names the flag, its value and what it may be.
        """
        share = self.min_teacher_agreement
        require(self, "min_teacher_agreement", 0 <= share <= 1, "it must be from 0 to 1")
        for name in ("teacher_image_size", "teacher_range", "teacher_sha256", "teacher_precision"):
            count = len(getattr(self, name))
            if count > 1 and count != len(self.teacher):
                raise ConfigError(
                    f"--{name} is given {count} times for {len(self.teacher)} teachers: once, or once each"
                )
        positive = all(side >= 1 for side in self.teacher_image_size)
        require(self, "teacher_image_size", positive, "it must be at least 1")


@dataclasses.dataclass(frozen=True)
class StudentOptions:
    """The student and its arithmetic."""

    group: ClassVar[str] = "student"

    student: str = option(
        "bit-r50x1",
        "bit-tiny, bit-small, bit-r50x1, ..., resnet50v2, mobilenetv3-large, mobilenetv3-small, "
        "app:NAME; these, but not BiT, also with -gn: group in place of batch normalisation "
        "(paper: MobileNetV3); keras:PATH.",
    )
    student_weights: str = option(
        "",
        "Weights that the student starts from (paper, Fig. 5): keras:PATH or h5:PATH of the same "
        "network; for a bit-ARCH also bit:ARCH@FILE.npz or a published bit:NAME. With their "
        "classifier if that has as many classes as the data. Empty: drawn.",
        affects_weights=False,
    )
    root_pool: str = option(
        "zero",
        "Border of the root pool of BiT students and bit: teachers: zero (the released BiT) or "
        "inf (big_vision's own model).",
        choices=ROOT_POOLS,
    )
    image_size: int = option(
        128,
        "Side in pixels of the student's images (paper: 128 for small sets, 224 for ImageNet).",
    )
    student_range: str = option(
        "-1,1",
        "Value range that the student takes: -1,1 or 0,1 or 0,255.",
        choices=RANGES,
    )
    precision: str = option(
        "float32",
        "Arithmetic of the student; losses and updates are always float32. The same on all "
        "hardware unless it is asked for, since it decides the weights; mixed_bfloat16 is the "
        "usual choice on a TPU.",
        choices=PRECISIONS,
    )

    def validate(self) -> None:
        """Checks each field.

        Raises:
            ConfigError: names the flag, its value and what it may be.
        """
        require(self, "image_size", self.image_size >= 1, "it must be at least 1")


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Function matching: views, distance, optimizer, length (paper, sections 2 and 3.1)."""

    group: ClassVar[str] = "method"

    recipe: str = option(
        "",
        "Published settings for the flags that are not given: flowers102_fast, ...; `funmatch recipes` lists them.",
        affects_weights=False,
    )
    views: str = option(
        "mix",
        "What teacher and student see (paper, section 3.1.1). fix: the teacher's output is fixed "
        "for each image; ind: own crops; same: one crop for both; mix: same/ic with mixup, which "
        "is function matching. rs: whole image; cc: central crop; rc: mild random crop; ic: "
        "inception crop; ic_ens: mean over --fixed_crops inception crops.",
        choices=VIEWS,
    )
    mixup: str = option(
        "batch",
        "With --views=mix, a coefficient uniform in [0, 1]: batch: one a step (big_vision); "
        "example: one for each image.",
        choices=MIXUPS,
    )
    mixup_alpha: float = option(
        1.0,
        "Mixup's coefficient is Beta(alpha, alpha), in (0, 1]; 1: uniform (paper). BiT-HyperRule: 0.1.",
    )
    resize_size: int = option(
        0,
        "Crop as BiT-HyperRule does: the whole image squashed to this side, then a random crop of "
        "--image_size; evaluation sees the squashed image whole. 0: as --views says.",
    )
    min_crop_area: float = option(
        0.05,
        "Least area of an inception crop as a share of the image, in (0, 1] (big_vision: 0.05).",
    )
    central_fraction: float = option(
        0.8,
        "Side of the central crop, which evaluation sees, and of the mild random crop, as a share "
        "of the image's smaller side, in (0, 1] (big_vision: 0.8 for the small sets, 0.875 for "
        "ImageNet).",
    )
    fixed_crops: int = option(
        1000,
        "Crops averaged for --views=fix/ic_ens (paper: 1,000).",
    )
    distance: str = option(
        "kl",
        "kl: match the teacher (paper, eq. 1, times T^2). hard: its most likely class. l2, "
        "euclidean: its logits. labels: cross-entropy with the labels, no teacher.",
        choices=DISTANCES,
    )
    temperature: float = option(
        1.0,
        "Softmax temperature of both models in --distance=kl, > 0 (paper: 1, 2, 5 or 10).",
    )
    label_smoothing: float = option(
        0.0,
        "With --distance=hard, probability given to the other classes together, in [0, 1).",
    )
    optimizer: str = option(
        "adamw",
        "adamw (paper); muon: orthogonalised momentum for convolutions, AdamW for the rest; sgdm: "
        "SGD with momentum 0.9 (BiT-HyperRule).",
        choices=OPTIMIZERS,
    )
    schedule: str = option(
        "cosine",
        "Of the learning rate after the warm-up: cosine to 0 (paper), or step: a tenth after each "
        "of --boundaries (BiT-HyperRule).",
        choices=SCHEDULES,
    )
    boundaries: tuple[int, ...] = option(
        (),
        "With --schedule=step, numbers of updates, ascending. Repeatable.",
    )
    learning_rate: float = option(
        0.001,
        "Peak learning rate, > 0.",
    )
    weight_decay: float = option(
        0.0001,
        "Decoupled, on kernels only, times the schedule but not times the learning rate; >= 0.",
    )
    clip_norm: float = option(
        1.0,
        "Bound of the gradient's global L2 norm, after the all-reduce; 0 is off.",
    )
    warmup_steps: int = option(
        -1,
        "Linear warm-up from 0; -1: 1,500 or a tenth of the run, whichever is less.",
    )
    max_warmup: float = option(
        0.0,
        "Warm-up takes at most this share of the run, in [0, 1], for published warm-ups on short runs; 0: any.",
        affects_weights=False,  # `resolve` puts what follows from it into warmup_steps
    )
    steps: int = option(
        0,
        "Updates to make; give this or --epochs.",
    )
    epochs: float = option(
        0.0,
        "Passes over the training split, turned into round(epochs * examples / batch) steps.",
    )
    schedule_steps: int = option(
        0,
        "Step at which the learning rate reaches 0; 0: the run's end. A run may end earlier or later.",
    )
    batch_size: int = option(
        512,
        "Images a step, over all replicas (paper: 512, ImageNet 4096).",
    )
    seed: int = option(
        0,
        "Seed of weights, order and views, 0 to 2^31 - 1.",
    )
    compat: tuple[str, ...] = option(
        (),
        "Do as the Keras example does, to compare: keras_example (all of it), or points of it: "
        "crop (160 -> 128), central (evaluation sees 0.875 of each side), mixup (reversed "
        "partner), t2 (no T^2), distance (no T^2, softmaxes clipped), clip (each variable), decay "
        "(all variables, whatever the rate). Repeatable.",
        choices=COMPAT,
    )

    def validate(self) -> None:
        """Checks each field, and fields of this group against each other.

        Raises:
            ConfigError: names the flag, its value and what it may be.
        """
        for name in ("batch_size", "fixed_crops"):
            require(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("temperature", "learning_rate"):
            require(self, name, getattr(self, name) > 0, "it must be above 0")
        for name in ("min_crop_area", "central_fraction", "mixup_alpha"):
            require(self, name, 0 < getattr(self, name) <= 1, "it must be above 0 and at most 1")
        for name in ("weight_decay", "clip_norm", "steps", "schedule_steps", "epochs"):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
        ascending = list(self.boundaries) == sorted({b for b in self.boundaries if b > 0})
        require(self, "boundaries", ascending, "they must be above 0 and ascend")
        if (self.schedule == "step") != bool(self.boundaries):
            raise ConfigError(
                f"--schedule={self.schedule} with --boundaries={self.boundaries}: step needs them, cosine has none"
            )
        require(self, "max_warmup", 0 <= self.max_warmup <= 1, "it must be from 0 to 1")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "it must be at least 0 and below 1")
        require(self, "warmup_steps", self.warmup_steps >= -1, "it must be -1 (automatic) or more")
        require(self, "seed", 0 <= self.seed < 2**31, "it must be from 0 to 2147483647")
        if self.steps and self.epochs:
            raise ConfigError(
                f"--steps={self.steps} and --epochs={self.epochs}: give one of the two, or 0 for the other"
            )
        if self.distance == "labels" and self.views not in ("same/rc", "same/ic", "mix"):
            raise ConfigError(
                f"--views={self.views} is about a teacher; --distance=labels takes same/rc, same/ic or mix"
            )
        if self.optimizer != "adamw" and self.like_example("decay"):
            raise ConfigError(f"--optimizer={self.optimizer}: the Keras example's decay (--compat) is that of adamw")
        if self.distance not in ("kl", "labels") and (self.like_example("distance") or self.like_example("t2")):
            raise ConfigError(f"--distance={self.distance}: the Keras example's distance (--compat) is kl")

    def like_example(self, point: str) -> bool:
        """Whether `--compat` asks for this point (one of `COMPAT`) of the Keras example."""
        return point in self.compat or "keras_example" in self.compat


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run proceeds on the machine; apart from `store_size`, nothing here changes the weights."""

    group: ClassVar[str] = "running"

    store_size: int = option(
        0,
        "Side in pixels of the squares that images are kept as before cropping; 0: --resize_size, "
        "or twice --image_size.",
    )
    steps_per_loop: int = option(
        0,
        "Steps that the device runs between looks of the host; 0: chosen by hardware.",
        affects_weights=False,
    )
    log_every: int = option(
        0,
        "Steps between rows of metrics.jsonl; 0: a hundredth of the run.",
        affects_weights=False,
    )
    eval_every: int = option(
        0,
        "Steps between evaluations; 0: a tenth of the run.",
        affects_weights=False,
    )
    checkpoint_every: int = option(
        0,
        "Steps between checkpoints; 0: a tenth of the run.",
        affects_weights=False,
    )
    keep_checkpoints: int = option(
        2,
        "Newest checkpoints kept, >= 1.",
        affects_weights=False,
    )
    keep_best: str = option(
        "none",
        "Keep, beside the newest, the checkpoint of the best evaluation by student_top1, "
        "agreement_top1 or kl (the least). none: the paper's practice, which knows no best.",
        affects_weights=False,
        choices=BEST,
    )
    export_from: str = option(
        "last",
        "Measure and export the last weights (paper), or the best by --keep_best, which --eval_split then has chosen.",
        affects_weights=False,
        choices=("last", "best"),
    )
    lease_seconds: float = option(
        60.0,
        "gs:// workdirs: seconds without a sign of life of their job after which another may take "
        "over; 0: any number may write.",
        affects_weights=False,
    )
    eval_batch_size: int = option(
        0,
        "Images a step of evaluation; 0: --batch_size.",
        affects_weights=False,
    )
    tpu: str = option(
        "none",
        "none, local (a TPU VM or Vertex AI), a name, grpc://HOST:PORT, or '' for the "
        "environment's (TPU_NAME, TPU_CONFIG). With none: all GPUs of the machine, or of the "
        "machines in TF_CONFIG; else the CPU.",
        affects_weights=False,
    )
    hp_metric: str = option(
        "student_top1",
        "What a trial of a hyperparameter study reports on the evaluation split, under this name "
        "(the study's metricId).",
        affects_weights=False,
        choices=HP_METRICS,
    )
    jit_compile: str = option(
        "auto",
        "XLA for the step. auto: on for GPU; a TPU always compiles; a CPU runs small models faster without.",
        affects_weights=False,
        choices=JIT,
    )
    check: bool = option(
        False,
        "Look at accelerator, data, teacher, workdir and first batch, say what is there, and stop.",
        affects_weights=False,
    )
    dry_run: bool = option(
        False,
        "Build everything, run one step, print the plan; write nothing.",
        affects_weights=False,
    )

    def validate(self) -> None:
        """Checks each field, and fields of this group against each other.

        Raises:
            ConfigError: names the flag, its value and what it may be.
        """
        require(self, "keep_checkpoints", self.keep_checkpoints >= 1, "it must be at least 1")
        for name in (
            "store_size",
            "steps_per_loop",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "eval_batch_size",
            "lease_seconds",
        ):
            require(self, name, getattr(self, name) >= 0, "it must not be negative")
        if self.export_from == "best" and self.keep_best == "none":
            raise ConfigError("--export_from=best: nothing is kept as the best: give --keep_best=student_top1 too")
