"""The options of a training job in five groups: data, teacher, student, method, run.

Every field is also a flag of `trainer.task` (flags.py), and its text is the flag's help: unit,
range, source of the default. `deploy/` parses this file without importing it, because a machine
that submits jobs may lack absl. Choices must therefore be tuples of strings defined in this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from trainer.core.errors import ConfigError

RANGES = ("-1,1", "0,1", "0,255")
OUTPUTS = ("auto", "logits", "probabilities", "sigmoid")
TEACHER_VIEWS = ("auto", "central", "squash", "pad")
PRECISIONS = ("float32", "mixed_bfloat16")
BATCH_NORMS = ("reestimate", "moving")
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
    auto: bool = False,
) -> Any:
    """A dataclass field of an options group, with the metadata of its flag.

    Args:
        default: value if neither a flag nor a recipe sets the field.
        text: help of the flag: unit, range, source.
        affects_weights: whether the trained weights depend on the value. Such a field is part of
            the run's identity: a checkpoint written with another value is refused.
        choices: the allowed values of a string; empty: any.
        omit_default: leaves the field out of the identity at its default. Set it for fields added
            after version 0.1 that affect weights, so that earlier runs still resume.
        auto: whether the flag of an integer also takes the text "auto", which stands for 0.
    """
    metadata = {
        "help": text,
        "affects_weights": affects_weights,
        "choices": choices,
        "omit_default": omit_default,
        "auto": auto,
    }
    return dataclasses.field(default=default, metadata=metadata)


def require(options: Any, name: str, condition: bool, reason: str) -> None:
    """Checks one field.

    Args:
        options: the configuration or group with the field.
        name: name of the field, which is also the flag's.
        condition: whether the value is valid.
        reason: the valid values, for the message.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"--{name}={getattr(options, name)}: {reason}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Locations of data and results."""

    group: ClassVar[str] = "data"

    data: tuple[str, ...] = option(
        (),
        "Folder or gs:// prefix written by trainer.prepare (it holds dataset.json). Labels are "
        "used only with --distance=labels. Repeatable: one flag for each data set.",
        affects_weights=False,
    )
    max_bad_fraction: float = option(
        0.0,
        "Largest share of a split's records that may be corrupt (damaged, or with an image that "
        "cannot be used), in [0, 1). 0: the first corrupt record stops the job. Above 0: corrupt "
        "records are skipped, reported and listed in result.json; each image is decoded once "
        "before the first step to find them all.",
    )
    data_weights: tuple[float, ...] = option(
        (),
        "Share of each --data set among the training images, > 0, such as 0.7,0.3 (normalised to "
        "1). Each set then has epochs of its own. Empty: the sets are concatenated, and one epoch "
        "shows every image once.",
        affects_weights=False,  # in the identity under "data"
    )
    eval_data: str = option(
        "",
        "Folder or gs:// prefix of the data set for evaluation; the models have its classes. Empty: the first --data.",
        affects_weights=False,
    )
    train_split: str = option(
        "train",
        "Split to train on.",
    )
    eval_split: str = option(
        "validation",
        "Split evaluated every --eval_every steps.",
        affects_weights=False,
    )
    final_split: str = option(
        "test",
        "Split evaluated once, at the end, for result.json.",
        affects_weights=False,
    )
    workdir: str = option(
        "",
        "Folder or gs:// prefix for checkpoints and results. The same command resumes from the "
        "newest checkpoint in it. Empty: on Vertex AI, the parent folder of AIP_CHECKPOINT_DIR. "
        "Trials of a hyperparameter study use the subfolder trial-N of a given workdir.",
        affects_weights=False,
    )
    model_dir: str = option(
        "",
        "Folder or gs:// prefix for a copy of the SavedModel, in the layout that `gcloud ai "
        "models upload` takes. Empty: AIP_MODEL_DIR if set, else no copy.",
        affects_weights=False,
    )
    tensorboard_dir: str = option(
        "",
        "Folder or gs:// prefix for TensorBoard event files. Empty: AIP_TENSORBOARD_LOG_DIR if "
        "set, else a subfolder of --workdir.",
        affects_weights=False,
    )
    store: str = option(
        "auto",
        "Where images are kept. device: decoded, in accelerator memory; host: decoded, in RAM; "
        "disk: encoded, decoded as the steps need them; auto: the first of these with room. With "
        "one --store_size the training result does not depend on it.",
        affects_weights=False,
        choices=STORES,
    )
    cache_dir: str = option(
        "",
        "Local folder for copies of shards from a bucket, with --store=disk; runs share it. "
        "Empty: $FUNMATCH_CACHE/data, else ~/.cache/funmatch/data.",
        affects_weights=False,
    )
    cache_gb: float = option(
        0.0,
        "Largest total size of the copies in --cache_dir, in GiB, >= 0. 0: the free disk space less 1 GiB.",
        affects_weights=False,
    )

    def validate(self) -> None:
        """Checks each field.

        Raises:
            ConfigError: names the flag, its value and the valid values.
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
        require(self, "data", unique, "a data set is given twice; use --data_weights to change its share")


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """The teachers, their inputs and outputs."""

    group: ClassVar[str] = "teacher"

    teacher: tuple[str, ...] = option(
        (),
        "keras:PATH; saved_model:PATH; app:NAME@WEIGHTS.h5 (keras.applications); "
        "bit:ARCH@FILE.npz or bit:NAME, a published BiT such as R152x2_T_flowers128; "
        "kaggle:OWNER/DATASET[/VERSION][:FILE] or kaggle:OWNER/MODEL/FRAMEWORK/VARIATION; "
        "random:NAME (untrained, for timing). Repeatable for an ensemble. Paths may be gs:// or "
        "https://.",
        affects_weights=False,
    )
    teacher_image_size: tuple[int, ...] = option(
        (),
        "Side of each teacher's input in pixels, >= 1. Given once for all teachers or once for "
        "each. Empty: the size in the model's file, else --image_size.",
    )
    teacher_range: tuple[str, ...] = option(
        ("auto",),
        "Value range of each teacher's input: -1,1 or 0,1 or 0,255. Given once or once for each "
        "teacher. auto: what the model shows (a first Rescaling or Normalization, a BiT, app:), else "
        "the one of the three with which the teacher is clearly best on labelled images; if there "
        "is none, the job stops.",
        choices=(*RANGES, "auto"),
    )
    teacher_output: tuple[str, ...] = option(
        (),
        "Name or number (from 0) of the output to use of each teacher with several, as the error "
        "lists them. Given once or once for each teacher. Empty: the only one.",
        omit_default=True,
    )
    teacher_outputs: str = option(
        "auto",
        "What the teachers output: logits; probabilities, of a softmax; or sigmoid, an independent "
        "probability of each class. auto: inferred from the last layer and from the values of the "
        "outputs.",
        choices=OUTPUTS,
    )
    teacher_view: tuple[str, ...] = option(
        ("auto",),
        "The view on which each teacher's own accuracy is reported, beside that on the student's "
        "view. Given once or once for each teacher. central: the crop of --central_fraction; "
        "squash: the whole image resized to a square (the default of Keras's "
        "image_dataset_from_directory); pad: the whole image between black bars; auto: squash or "
        "central, whichever is clearly better on labelled images, else central.",
        affects_weights=False,
        choices=TEACHER_VIEWS,
    )
    force_teacher: bool = option(
        False,
        "Use a teacher that is at chance on labelled images, returns NaN or one answer for all "
        "images, has its classes in another order than the data, or whose value range or outputs are "
        "not clear. Warnings are printed all the same.",
        affects_weights=False,
    )
    teacher_sha256: tuple[str, ...] = option(
        (),
        "Expected SHA-256 (hex) of each teacher's file, in the order of --teacher. Empty: not checked.",
        affects_weights=False,
    )
    teacher_precision: tuple[str, ...] = option(
        ("float32",),
        "Precision of each teacher's forward pass: float32; bfloat16; or int8, which quantises "
        "the convolutions to integers from -127 to 127. Given once or once for each teacher.",
        choices=TEACHER_PRECISIONS,
    )
    min_teacher_agreement: float = option(
        0.98,
        "Least share, in [0, 1], of 512 training views on which a teacher in lower precision must "
        "have the float32 teacher's top-1 class; below it the job stops.",
        affects_weights=False,
    )
    ensemble: str = option(
        "mean_logits",
        "How several teachers are combined: mean_logits (paper), mean_probabilities, or "
        "sum_losses, the sum of the distances to each teacher (big_vision).",
        choices=ENSEMBLES,
    )

    def validate(self) -> None:
        """Checks each field.

        Raises:
            ConfigError: names the flag, its value and the valid values.
        """
        share = self.min_teacher_agreement
        require(self, "min_teacher_agreement", 0 <= share <= 1, "it must be from 0 to 1")
        for name in (
            "teacher_image_size",
            "teacher_range",
            "teacher_output",
            "teacher_view",
            "teacher_sha256",
            "teacher_precision",
        ):
            count = len(getattr(self, name))
            if count > 1 and count != len(self.teacher):
                raise ConfigError(
                    f"--{name} is given {count} times for {len(self.teacher)} teachers: give it once, or once for each"
                )
        positive = all(side >= 1 for side in self.teacher_image_size)
        require(self, "teacher_image_size", positive, "it must be at least 1")


@dataclasses.dataclass(frozen=True)
class StudentOptions:
    """The student and its precision."""

    group: ClassVar[str] = "student"

    student: str = option(
        "bit-r50x1",
        "Architecture: bit-tiny, bit-small, bit-r50x1, ..., resnet50v2, mobilenetv3-large, "
        "mobilenetv3-small, or app:NAME (keras.applications). All of these but BiT take the "
        "suffix -gn, which replaces batch by group normalisation (paper: MobileNetV3). keras:PATH "
        "loads an architecture from a file.",
    )
    student_weights: str = option(
        "",
        "Initial weights of the student (paper, Fig. 5): keras:PATH or h5:PATH of the same "
        "network; for bit-ARCH also bit:ARCH@FILE.npz or a published bit:NAME. The classifier is "
        "loaded too if it has as many classes as the data. Empty: random initialisation.",
        affects_weights=False,
    )
    root_pool: str = option(
        "zero",
        "Padding of the root max-pooling in BiT students and bit: teachers: zero (released BiT "
        "weights) or inf (big_vision's own model).",
        choices=ROOT_POOLS,
    )
    image_size: int = option(
        128,
        "Side of the student's input in pixels, >= 1 (paper: 128 for small data sets, 224 for ImageNet).",
    )
    student_range: str = option(
        "-1,1",
        "Value range of the student's input: -1,1 or 0,1 or 0,255.",
        choices=RANGES,
    )
    precision: str = option(
        "float32",
        "Precision of the student's forward and backward pass; losses and weight updates are "
        "always float32. It affects the weights, so the default is the same on all hardware; "
        "mixed_bfloat16 is usual on a TPU.",
        choices=PRECISIONS,
    )
    batch_norm: str = option(
        "reestimate",
        "Statistics of the student's batch normalisations in evaluation and export. reestimate: "
        "those of the current weights on training views; moving: the moving averages, which lag "
        "behind a short run (with momentum 0.999 by thousands of steps). Training does not depend "
        "on it.",
        affects_weights=False,
        choices=BATCH_NORMS,
    )

    def validate(self) -> None:
        """Checks each field.

        Raises:
            ConfigError: names the flag, its value and the valid values.
        """
        require(self, "image_size", self.image_size >= 1, "it must be at least 1")


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Function matching: views, distance, optimizer, length (paper, sections 2 and 3.1)."""

    group: ClassVar[str] = "method"

    recipe: str = option(
        "",
        "Published settings, for example flowers102_fast, for all flags that are not given; "
        "`funmatch recipes` lists them.",
        affects_weights=False,
    )
    views: str = option(
        "mix",
        "Inputs of teacher and student (paper, section 3.1.1). fix/*: teacher outputs computed "
        "once for each image; ind/*: independent crops; same/*: one crop for both; mix: same/ic "
        "with mixup, which is function matching. rs: whole image resized; cc: central crop; rc: "
        "mild random crop; ic: inception crop; ic_ens: teacher's mean over --fixed_crops "
        "inception crops.",
        choices=VIEWS,
    )
    mixup: str = option(
        "batch",
        "With --views=mix, how often a mixup coefficient is sampled, uniform in [0, 1]. batch: "
        "one for each step (big_vision); example: one for each image.",
        choices=MIXUPS,
    )
    mixup_alpha: float = option(
        1.0,
        "The mixup coefficient is sampled from Beta(alpha, alpha), alpha in (0, 1]. 1: uniform "
        "(paper); BiT-HyperRule: 0.1.",
    )
    resize_size: int = option(
        0,
        "Cropping of BiT-HyperRule: resize the image to a square of this side in pixels, then "
        "take a random crop of --image_size; evaluation takes the whole square. 0: crop as "
        "--views says.",
    )
    min_crop_area: float = option(
        0.05,
        "Least area of an inception crop as a share of the image, in (0, 1] (big_vision: 0.05).",
    )
    central_fraction: float = option(
        0.8,
        "Side of the central crop (evaluation) and of the mild random crop, as a share of the "
        "image's shorter side, in (0, 1] (big_vision: 0.8 for small data sets, 0.875 for "
        "ImageNet).",
    )
    fixed_crops: int = option(
        1000,
        "Number of crops averaged with --views=fix/ic_ens, >= 1 (paper: 1,000).",
    )
    distance: str = option(
        "kl",
        "Loss between student and teacher. kl: KL divergence of softened probabilities (paper, "
        "eq. 1, times T^2); hard: cross-entropy with the teacher's top-1 class; l2, euclidean: "
        "distance of the logits; labels: cross-entropy with the labels, without a teacher.",
        choices=DISTANCES,
    )
    temperature: float = option(
        1.0,
        "Softmax temperature T of both models with --distance=kl, > 0 (paper: 1, 2, 5 or 10).",
    )
    label_smoothing: float = option(
        0.0,
        "With --distance=hard, total probability of the other classes, in [0, 1).",
    )
    optimizer: str = option(
        "adamw",
        "adamw (paper); muon: orthogonalised momentum for convolutions, AdamW for the rest; sgdm: "
        "SGD with momentum 0.9 (BiT-HyperRule).",
        choices=OPTIMIZERS,
    )
    schedule: str = option(
        "cosine",
        "Learning rate after the warm-up. cosine: decay to 0 (paper); step: times 0.1 after each "
        "of --boundaries (BiT-HyperRule).",
        choices=SCHEDULES,
    )
    boundaries: tuple[int, ...] = option(
        (),
        "Steps at which --schedule=step decays the learning rate, > 0, ascending. Repeatable.",
    )
    learning_rate: float = option(
        0.001,
        "Peak learning rate, > 0.",
    )
    weight_decay: float = option(
        0.0001,
        "Decoupled weight decay of kernels, >= 0. It is scaled by the schedule but not by --learning_rate.",
    )
    clip_norm: float = option(
        1.0,
        "Largest global L2 norm of the gradients, after the all-reduce, >= 0. 0: no clipping.",
    )
    warmup_steps: int = option(
        -1,
        "Steps of linear warm-up from 0. -1: 1,500 or a tenth of the run, whichever is less.",
    )
    max_warmup: float = option(
        0.0,
        "Upper bound of the warm-up as a share of the run, in [0, 1]; for published warm-ups on "
        "short runs. 0: no bound.",
        affects_weights=False,  # `Config.resolve` applies it to warmup_steps, which does
    )
    steps: int = option(
        0,
        "Training steps, >= 0. Give either this or --epochs.",
    )
    epochs: float = option(
        0.0,
        "Passes over the training split, >= 0, converted to round(epochs * examples / batch_size) steps.",
    )
    schedule_steps: int = option(
        0,
        "Step at which the learning rate reaches 0, >= 0; the run may end earlier or later. 0: the last step.",
    )
    batch_size: int = option(
        512,
        "Images in a training step, summed over all replicas, >= 1 (paper: 512; ImageNet: 4096).",
    )
    seed: int = option(
        0,
        "Seed of initial weights, example order and views, 0 to 2^31 - 1.",
    )
    compat: tuple[str, ...] = option(
        (),
        "Reproduce the Keras example for comparison: keras_example (all points), or single "
        "points: crop (160 -> 128), central (evaluation takes 0.875 of each side), mixup "
        "(partners in reversed order), t2 (no T^2), distance (no T^2, clipped softmax), clip "
        "(each variable's gradient on its own), decay (all variables, not scaled by the "
        "schedule). Repeatable.",
        choices=COMPAT,
    )

    def validate(self) -> None:
        """Checks each field, and fields of this group against each other.

        Raises:
            ConfigError: names the flag, its value and the valid values.
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
                f"--schedule={self.schedule} with --boundaries={self.boundaries}: only step takes boundaries, and it needs them"
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
            raise ConfigError(f"--views={self.views} needs a teacher; --distance=labels takes same/rc, same/ic or mix")
        if self.optimizer != "adamw" and self.like_example("decay"):
            raise ConfigError(f"--optimizer={self.optimizer}: --compat=decay takes adamw only")
        if self.distance not in ("kl", "labels") and (self.like_example("distance") or self.like_example("t2")):
            raise ConfigError(f"--distance={self.distance}: --compat=distance and --compat=t2 take kl only")

    def like_example(self, point: str) -> bool:
        """Whether `--compat` selects this point (one of `COMPAT`) of the Keras example."""
        return point in self.compat or "keras_example" in self.compat


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run is executed; of these, only `store_size` affects the weights."""

    group: ClassVar[str] = "running"

    store_size: int = option(
        0,
        "Images are stored as squares of this side in pixels before they are cropped, >= 0. auto "
        "or 0: --resize_size if set, else twice --image_size; a new training run takes more, as "
        "far as its crops need it and memory allows, and keeps that when it resumes.",
        auto=True,
    )
    steps_per_loop: int = option(
        0,
        "Training steps that run on the device without returning to the host, >= 0. 0: chosen for the accelerator.",
        affects_weights=False,
    )
    log_every: int = option(
        0,
        "Steps between training rows of metrics.jsonl, >= 0. 0: a hundredth of the run.",
        affects_weights=False,
    )
    eval_every: int = option(
        0,
        "Steps between evaluations on --eval_split, >= 0. 0: a tenth of the run.",
        affects_weights=False,
    )
    checkpoint_every: int = option(
        0,
        "Steps between checkpoints, >= 0. 0: a tenth of the run.",
        affects_weights=False,
    )
    keep_checkpoints: int = option(
        2,
        "Number of newest checkpoints to keep, >= 1.",
        affects_weights=False,
    )
    keep_best: str = option(
        "none",
        "Also keep the checkpoint of the best evaluation by this metric: highest student_top1 or "
        "agreement_top1, or lowest kl. none: keep only the newest (paper).",
        affects_weights=False,
        choices=BEST,
    )
    export_from: str = option(
        "last",
        "Weights that are evaluated on --final_split and exported. last: those of the last step "
        "(paper); best: those that --keep_best selected on --eval_split.",
        affects_weights=False,
        choices=("last", "best"),
    )
    lease_seconds: float = option(
        60.0,
        "For gs:// workdirs, seconds without a renewal of the writer's lease after which another "
        "job may take over, >= 0. 0: no lease, so two jobs are not kept from writing to one "
        "workdir.",
        affects_weights=False,
    )
    eval_batch_size: int = option(
        0,
        "Images in an evaluation step, >= 0. 0: --batch_size.",
        affects_weights=False,
    )
    tpu: str = option(
        "none",
        "none, local (a TPU VM or Vertex AI), a TPU's name, grpc://HOST:PORT, or '' to read "
        "TPU_NAME or TPU_CONFIG from the environment. With none, the job uses all GPUs of this "
        "machine or of the machines in TF_CONFIG, else the CPU.",
        affects_weights=False,
    )
    hp_metric: str = option(
        "student_top1",
        "Metric on --eval_split that a trial reports to its hyperparameter study; the study's "
        "metricId must have this name.",
        affects_weights=False,
        choices=HP_METRICS,
    )
    jit_compile: str = option(
        "auto",
        "Compile the training step with XLA. auto: on for GPUs, off for CPUs, where small models "
        "run faster without; TPUs always compile.",
        affects_weights=False,
        choices=JIT,
    )
    check: bool = option(
        False,
        "Check accelerator, data, teacher, workdir and the first batch, print the findings, and exit.",
        affects_weights=False,
    )
    dry_run: bool = option(
        False,
        "Build everything, run one step, print the plan and exit; nothing is written.",
        affects_weights=False,
    )

    def validate(self) -> None:
        """Checks each field, and fields of this group against each other.

        Raises:
            ConfigError: names the flag, its value and the valid values.
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
            raise ConfigError("--export_from=best: it needs --keep_best, for example --keep_best=student_top1")
