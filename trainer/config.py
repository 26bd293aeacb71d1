"""The configuration of a training job: one frozen value, made from flags, checked once, written beside the run.

Every field is also a flag of `trainer.task` (`define_flags`), so a flagfile is a configuration file. Nothing below
the command-line modules reads flags. This module imports no TensorFlow: `--help` and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from absl import flags

from trainer.errors import ConfigError

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


def _field(default: Any, group: str, text: str, *, state: bool = True, choices: tuple[str, ...] = ()) -> Any:
    """A field with what its flag needs.

    `state` is true where the value decides the weights that come out: such a field is part of the
    run's fingerprint, and a checkpoint made with another value is refused.
    """
    metadata = {"group": group, "help": text, "state": state, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """What one job does. The `help` texts below give unit, range and source of each field.

    Raises:
        ConfigError: a value out of range, or two values that exclude each other; the text names the flag.
    """

    recipe: str = _field(
        "",
        "method",
        "Published settings for the flags that are not given: flowers102_fast, ...; `funmatch recipes` lists them.",
        state=False,
    )
    # Where things are.
    data: tuple[str, ...] = _field(
        (),
        "data",
        "Folder or gs:// prefix made by trainer.prepare (it holds dataset.json). Its labels are not used but for "
        "--distance=labels. Repeat for several sets.",
        state=False,
    )
    max_bad_fraction: float = _field(
        0.0,
        "data",
        "Share of a split's records that may be bad (damaged, or of an image that cannot be used), 0 to below 1. 0: the first "
        "one stops the job. Above: bad ones are left out, told and listed in result.json, and each image is decoded once "
        "more before the first step to find them all.",
    )
    data_weights: tuple[float, ...] = _field(
        (),
        "data",
        "Share of each --data in the rows, > 0, as 0.7,0.3 (any sum): each set goes through epochs of its own. Empty: several "
        "sets are one, in which an epoch shows every image once.",
        state=False,  # part of the identity's data
    )
    eval_data: str = _field("", "data", "The same, with classes, for evaluation; empty: the first --data.", state=False)
    train_split: str = _field("train", "data", "Split whose images are trained on.")
    eval_split: str = _field("validation", "data", "Split measured every --eval_every steps.", state=False)
    final_split: str = _field("test", "data", "Split measured once, at the end, for result.json.", state=False)
    workdir: str = _field(
        "",
        "data",
        "Folder or gs:// prefix of this run. The same command goes on from what it holds. Empty: on Vertex AI the folder above "
        "AIP_CHECKPOINT_DIR; a trial of a study gets a folder trial-N in a workdir that is given.",
        state=False,
    )
    model_dir: str = _field(
        "",
        "data",
        "Folder or gs:// prefix for a copy of the SavedModel, as `gcloud ai models upload` takes it. Empty: AIP_MODEL_DIR, if set.",
        state=False,
    )
    tensorboard_dir: str = _field(
        "",
        "data",
        "Folder or gs:// prefix for TensorBoard's files. Empty: AIP_TENSORBOARD_LOG_DIR, if set, else one in the workdir.",
        state=False,
    )
    store: str = _field(
        "auto",
        "data",
        "Where decoded images are: on the device; in the host's memory; on the host's disk, encoded, decoded in the order of the "
        "steps. auto: the first with room. The result is the same.",
        state=False,
        choices=STORES,
    )
    cache_dir: str = _field(
        "",
        "data",
        "Folder on this machine's disk for copies of shards from a bucket, with --store=disk, shared by all runs; "
        "empty: $FUNMATCH_CACHE, else ~/.cache/funmatch.",
        state=False,
    )
    cache_gb: float = _field(
        0.0,
        "data",
        "Gibibytes that those copies may take in all, >= 0; 0: what the disk has, but for one.",
        state=False,
    )
    # Teacher.
    teacher: tuple[str, ...] = _field(
        (),
        "teacher",
        "keras:PATH; saved_model:PATH; app:NAME@WEIGHTS.h5 (keras.applications); bit:ARCH@FILE.npz or bit:NAME, a published BiT "
        "such as R152x2_T_flowers128; kaggle:OWNER/DATASET[/VERSION][:FILE] or kaggle:OWNER/MODEL/FRAMEWORK/VARIATION; random:NAME "
        "(untrained, for timing). Repeat for several. Paths may be gs:// or https://.",
        state=False,
    )
    teacher_image_size: tuple[int, ...] = _field(
        (),
        "teacher",
        "Side in pixels that each teacher takes; empty: what its file says, else --image_size.",
    )
    teacher_range: tuple[str, ...] = _field(
        ("auto",),
        "teacher",
        "Value range that each teacher takes: -1,1 or 0,1 or 0,255. auto: what a probe batch shows of a SavedModel that is a BiT, "
        "0,255 for app: (it takes no other), else -1,1.",
        choices=(*RANGES, "auto"),
    )
    teacher_outputs: str = _field(
        "auto",
        "teacher",
        "What a teacher returns; auto looks at its last layer and at its outputs.",
        choices=OUTPUTS,
    )
    teacher_sha256: tuple[str, ...] = _field(
        (), "teacher", "SHA-256 (hex) that each teacher's file must have; empty: any.", state=False
    )
    teacher_precision: tuple[str, ...] = _field(
        ("float32",),
        "teacher",
        "Form that each teacher is asked in: float32; bfloat16; or int8, its convolutions with whole numbers from -127 to 127.",
        choices=TEACHER_PRECISIONS,
    )
    min_teacher_agreement: float = _field(
        0.98,
        "teacher",
        "A cheap form must give the float32 teacher's most likely class on at least this share of 512 training views, in [0, 1].",
        state=False,
    )
    ensemble: str = _field(
        "mean_logits",
        "teacher",
        "Several teachers: mean_logits (paper), mean_probabilities, or sum_losses: the sum of the distances (big_vision).",
        choices=ENSEMBLES,
    )
    # Student.
    student: str = _field(
        "bit-r50x1",
        "student",
        "bit-tiny, bit-small, bit-r50x1, ..., resnet50v2, mobilenetv3-large, mobilenetv3-small, app:NAME; these, "
        "but not BiT, also with -gn: group in place of batch normalisation (paper: MobileNetV3); keras:PATH.",
    )
    student_weights: str = _field(
        "",
        "student",
        "Weights that the student starts from (paper, Fig. 5): keras:PATH or h5:PATH of the same network; for a bit-ARCH also "
        "bit:ARCH@FILE.npz or a published bit:NAME. With their classifier if that has as many classes as the data. Empty: drawn.",
        state=False,
    )
    root_pool: str = _field(
        "zero",
        "student",
        "Border of the root pool of BiT students and bit: teachers: zero (the released BiT) or inf (big_vision's own model).",
        choices=ROOT_POOLS,
    )
    image_size: int = _field(
        128,
        "student",
        "Side in pixels of the student's images (paper: 128 for small sets, 224 for ImageNet).",
    )
    student_range: str = _field(
        "-1,1",
        "student",
        "Value range that the student takes: -1,1 or 0,1 or 0,255.",
        choices=RANGES,
    )
    precision: str = _field(
        "float32",
        "student",
        "Arithmetic of the student; losses and updates are always float32. The same on all hardware unless it is asked for, since "
        "it decides the weights; mixed_bfloat16 is the usual choice on a TPU.",
        choices=PRECISIONS,
    )
    # Method.
    views: str = _field(
        "mix",
        "method",
        "What teacher and student see (paper, section 3.1.1). fix: the teacher's output is fixed for each image; ind: own crops; "
        "same: one crop for both; mix: same/ic with mixup, which is function matching. rs: whole image; cc: central crop; "
        "rc: mild random crop; ic: inception crop; ic_ens: mean over --fixed_crops inception crops.",
        choices=VIEWS,
    )
    mixup: str = _field(
        "batch",
        "method",
        "With --views=mix, a coefficient uniform in [0, 1]: batch: one a step (big_vision); example: one for each image.",
        choices=MIXUPS,
    )
    mixup_alpha: float = _field(
        1.0, "method", "Mixup's coefficient is Beta(alpha, alpha), in (0, 1]; 1: uniform (paper). BiT-HyperRule: 0.1."
    )
    resize_size: int = _field(
        0,
        "method",
        "Crop as BiT-HyperRule does: the whole image squashed to this side, then a random crop of --image_size; evaluation sees "
        "the squashed image whole. 0: as --views says.",
    )
    min_crop_area: float = _field(
        0.05, "method", "Least area of an inception crop as a share of the image, in (0, 1] (big_vision: 0.05)."
    )
    central_fraction: float = _field(
        0.8,
        "method",
        "Side of the central crop, which evaluation sees, and of the mild random crop, as a share of the image's smaller side, "
        "in (0, 1] (big_vision: 0.8 for the small sets, 0.875 for ImageNet).",
    )
    fixed_crops: int = _field(1000, "method", "Crops averaged for --views=fix/ic_ens (paper: 1,000).")
    distance: str = _field(
        "kl",
        "method",
        "kl: match the teacher (paper, eq. 1, times T^2). hard: its most likely class. l2, euclidean: its logits. "
        "labels: cross-entropy with the labels, no teacher.",
        choices=DISTANCES,
    )
    temperature: float = _field(
        1.0, "method", "Softmax temperature of both models in --distance=kl, > 0 (paper: 1, 2, 5 or 10)."
    )
    label_smoothing: float = _field(
        0.0, "method", "With --distance=hard, probability given to the other classes together, in [0, 1)."
    )
    optimizer: str = _field(
        "adamw",
        "method",
        "adamw (paper); muon: orthogonalised momentum for convolutions, AdamW for the rest; sgdm: SGD with momentum 0.9 "
        "(BiT-HyperRule).",
        choices=OPTIMIZERS,
    )
    schedule: str = _field(
        "cosine",
        "method",
        "Of the learning rate after the warm-up: cosine to 0 (paper), or step: a tenth after each of --boundaries (BiT-HyperRule).",
        choices=SCHEDULES,
    )
    boundaries: tuple[int, ...] = _field(
        (), "method", "With --schedule=step, numbers of updates, ascending. Repeatable."
    )
    learning_rate: float = _field(1e-3, "method", "Peak learning rate, > 0.")
    weight_decay: float = _field(
        1e-4,
        "method",
        "Decoupled, on kernels only, times the schedule but not times the learning rate; >= 0.",
    )
    clip_norm: float = _field(1.0, "method", "Bound of the gradient's global L2 norm, after the all-reduce; 0 is off.")
    warmup_steps: int = _field(
        -1, "method", "Linear warm-up from 0; -1: 1,500 or a tenth of the run, whichever is less."
    )
    max_warmup: float = _field(
        0.0,
        "method",
        "Warm-up takes at most this share of the run, in [0, 1], for published warm-ups on short runs; 0: any.",
        state=False,  # `resolve` puts what follows from it into warmup_steps
    )
    steps: int = _field(0, "method", "Updates to make; give this or --epochs.")
    epochs: float = _field(
        0.0,
        "method",
        "Passes over the training split, turned into round(epochs * examples / batch) steps.",
    )
    schedule_steps: int = _field(
        0, "method", "Step at which the learning rate reaches 0; 0: the run's end. A run may end earlier or later."
    )
    batch_size: int = _field(512, "method", "Images a step, over all replicas (paper: 512, ImageNet 4096).")
    seed: int = _field(0, "method", "Seed of weights, order and views, 0 to 2^31 - 1.")
    compat: tuple[str, ...] = _field(
        (),
        "method",
        "Do as the Keras example does, to compare: keras_example (all of it), or points of it: crop (160 -> 128), central "
        "(evaluation sees 0.875 of each side), mixup (reversed partner), t2 (no T^2), distance (no T^2, softmaxes clipped), clip "
        "(each variable), decay (all variables, whatever the rate). Repeatable.",
        choices=COMPAT,
    )
    # Running.
    store_size: int = _field(
        0,
        "running",
        "Side in pixels of the squares that images are kept as before cropping; 0: --resize_size, or twice --image_size.",
    )
    steps_per_loop: int = _field(
        0,
        "running",
        "Steps that the device runs between looks of the host; 0: chosen by hardware.",
        state=False,
    )
    log_every: int = _field(
        0, "running", "Steps between rows of metrics.jsonl; 0: a hundredth of the run.", state=False
    )
    eval_every: int = _field(0, "running", "Steps between evaluations; 0: a tenth of the run.", state=False)
    checkpoint_every: int = _field(0, "running", "Steps between checkpoints; 0: a tenth of the run.", state=False)
    keep_checkpoints: int = _field(2, "running", "Newest checkpoints kept, >= 1.", state=False)
    keep_best: str = _field(
        "none",
        "running",
        "Keep, beside the newest, the checkpoint of the best evaluation by student_top1, agreement_top1 or kl (the least). "
        "none: the paper's practice, which knows no best.",
        state=False,
        choices=BEST,
    )
    export_from: str = _field(
        "last",
        "running",
        "Measure and export the last weights (paper), or the best by --keep_best, which --eval_split then has chosen.",
        state=False,
        choices=("last", "best"),
    )
    lease_seconds: float = _field(
        60.0,
        "running",
        "gs:// workdirs: seconds without a sign of life of their job after which another may take over; 0: any number may write.",
        state=False,
    )
    eval_batch_size: int = _field(0, "running", "Images a step of evaluation; 0: --batch_size.", state=False)
    tpu: str = _field(
        "none",
        "running",
        "none, local (a TPU VM or Vertex AI), a name, grpc://HOST:PORT, or '' for the environment's (TPU_NAME, TPU_CONFIG). With "
        "none: all GPUs of the machine, or of the machines in TF_CONFIG; else the CPU.",
        state=False,
    )
    hp_metric: str = _field(
        "student_top1",
        "running",
        "What a trial of a hyperparameter study reports on the evaluation split, under this name (the study's metricId).",
        state=False,
        choices=HP_METRICS,
    )
    jit_compile: str = _field(
        "auto",
        "running",
        "XLA for the step. auto: on for GPU; a TPU always compiles; a CPU runs small models faster without.",
        state=False,
        choices=JIT,
    )
    check: bool = _field(
        False,
        "running",
        "Look at accelerator, data, teacher, workdir and first batch, say what is there, and stop.",
        state=False,
    )
    dry_run: bool = _field(
        False,
        "running",
        "Build everything, run one step, print the plan; write nothing.",
        state=False,
    )

    def __post_init__(self) -> None:
        given: Any = self.data
        if isinstance(given, str):  # one set, as a caller may say it
            object.__setattr__(self, "data", (given,) if given else ())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, float) and not math.isfinite(item):
                    raise ConfigError(f"--{field.name}={item}: it must be a finite number")
                choices = field.metadata["choices"]
                if choices and item not in choices:
                    raise ConfigError(f"--{field.name}={item}: it must be one of {' | '.join(choices)}")
        for name in ("image_size", "batch_size", "keep_checkpoints", "fixed_crops"):
            self._need(name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("temperature", "learning_rate"):
            self._need(name, getattr(self, name) > 0, "it must be above 0")
        for name in ("min_crop_area", "central_fraction"):
            self._need(name, 0 < getattr(self, name) <= 1, "it must be above 0 and at most 1")
        self._need("min_teacher_agreement", 0 <= self.min_teacher_agreement <= 1, "it must be from 0 to 1")
        self._need("mixup_alpha", 0 < self.mixup_alpha <= 1, "it must be above 0 and at most 1")
        self._need(
            "resize_size",
            self.resize_size == 0 or self.resize_size >= self.image_size,
            "it must be 0 or at least --image_size",
        )
        self._need(
            "boundaries",
            list(self.boundaries) == sorted({b for b in self.boundaries if b > 0}),
            "they must be above 0 and ascend",
        )
        if (self.schedule == "step") != bool(self.boundaries):
            raise ConfigError(
                f"--schedule={self.schedule} with --boundaries={self.boundaries}: step needs them, cosine has none"
            )
        self._need("max_warmup", 0 <= self.max_warmup <= 1, "it must be from 0 to 1")
        self._need("max_bad_fraction", 0 <= self.max_bad_fraction < 1, "it must be at least 0 and below 1")
        self._need("label_smoothing", 0 <= self.label_smoothing < 1, "it must be at least 0 and below 1")
        for name in (
            "cache_gb",
            "weight_decay",
            "clip_norm",
            "steps",
            "schedule_steps",
            "epochs",
            "store_size",
            "steps_per_loop",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "eval_batch_size",
            "lease_seconds",
        ):
            self._need(name, getattr(self, name) >= 0, "it must not be negative")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ConfigError(
                f"--data_weights has {len(self.data_weights)} numbers for {len(self.data)} sets of --data: give one for each"
            )
        self._need("data_weights", all(weight > 0 for weight in self.data_weights), "each must be above 0")
        self._need(
            "data", len(set(self.data)) == len(self.data), "a set is given twice; --data_weights says how much of each"
        )
        self._need("warmup_steps", self.warmup_steps >= -1, "it must be -1 (automatic) or more")
        self._need("seed", 0 <= self.seed < 2**31, "it must be from 0 to 2147483647")
        if self.export_from == "best" and self.keep_best == "none":
            raise ConfigError("--export_from=best: nothing is kept as the best: give --keep_best=student_top1 too")
        if self.keep_best in ("agreement_top1", "kl") and self.distance == "labels":
            raise ConfigError(f"--keep_best={self.keep_best} compares with a teacher; --distance=labels has none")
        if self.steps and self.epochs:
            raise ConfigError(
                f"--steps={self.steps} and --epochs={self.epochs}: give one of the two, or 0 for the other"
            )
        if self.distance == "labels" and self.teacher:
            raise ConfigError(f"--distance=labels uses no teacher, yet --teacher={self.teacher[0]} is given: drop one")
        if self.distance == "labels" and self.views not in ("same/rc", "same/ic", "mix"):
            raise ConfigError(
                f"--views={self.views} is about a teacher; --distance=labels takes same/rc, same/ic or mix"
            )
        if self.optimizer != "adamw" and self.like_example("decay"):
            raise ConfigError(f"--optimizer={self.optimizer}: the Keras example's decay (--compat) is that of adamw")
        if self.distance not in ("kl", "labels") and (self.like_example("distance") or self.like_example("t2")):
            raise ConfigError(f"--distance={self.distance}: the Keras example's distance (--compat) is kl")
        if self.distance in ("l2", "euclidean") and self.ensemble == "mean_probabilities":
            raise ConfigError(
                f"--ensemble=mean_probabilities gives no logits, which --distance={self.distance} compares"
            )
        for name in ("teacher_image_size", "teacher_range", "teacher_sha256", "teacher_precision"):
            count = len(getattr(self, name))
            if count > 1 and count != len(self.teacher):
                raise ConfigError(
                    f"--{name} is given {count} times for {len(self.teacher)} teachers: once, or once each"
                )
        self._need(
            "teacher_image_size",
            all(s >= 1 for s in self.teacher_image_size),
            "it must be at least 1",
        )

    def _need(self, name: str, holds: bool, why: str) -> None:
        if not holds:
            raise ConfigError(f"--{name}={getattr(self, name)}: {why}")

    def like_example(self, point: str) -> bool:
        """Whether `--compat` asks for this point (one of `COMPAT`) of the Keras example."""
        return point in self.compat or "keras_example" in self.compat

    @property
    def held_out(self) -> str:
        """The data set that evaluation uses and whose classes the models have."""
        return self.eval_data or (self.data[0] if self.data else "")

    def require_complete(self) -> None:
        """Checks what a job needs and a partial configuration (a test, a plan) may lack.

        Raises:
            ConfigError: names the missing flag.
        """
        if not self.data:
            raise ConfigError("--data is missing: the folder or gs:// prefix that `python -m trainer.prepare` wrote")
        if not self.workdir:
            raise ConfigError("--workdir is missing: the folder or gs:// prefix where this run keeps its results")
        if not (self.steps or self.epochs):
            raise ConfigError("--steps or --epochs is missing: how long to train")
        if self.distance != "labels" and not self.teacher:
            raise ConfigError("--teacher is missing: for example --teacher=keras:teacher.keras (or --distance=labels)")

    def resolve(self, examples: int) -> Config:
        """Fills in what depends on the number of training examples (>= 1): steps, warm-up, intervals, sizes."""
        steps = self.steps or max(1, round(self.epochs * examples / self.batch_size))
        warmup = self.warmup_steps if self.warmup_steps >= 0 else min(1500, steps // 10)
        if self.max_warmup:
            warmup = min(warmup, int(self.max_warmup * steps))
        if self.schedule_steps not in (0, steps) and warmup > self.schedule_steps:
            raise ConfigError(
                f"--schedule_steps={self.schedule_steps} is within the warm-up of {warmup} steps: give a longer schedule "
                "or a shorter --warmup_steps"
            )
        return dataclasses.replace(
            self,
            steps=steps,
            epochs=0.0,
            warmup_steps=warmup,
            schedule_steps=self.schedule_steps or steps,
            store_size=self.store_size or self.resize_size or 2 * self.image_size,
            log_every=self.log_every or max(1, steps // 100),
            eval_every=self.eval_every or max(1, steps // 10),
            checkpoint_every=self.checkpoint_every or max(1, steps // 10),
            eval_batch_size=self.eval_batch_size or self.batch_size,
        )

    def warnings(self) -> list[str]:
        """What a resolved configuration probably does not mean, a line each."""
        found = []
        if self.warmup_steps > self.steps / 4:
            peak = min(1.0, self.steps / self.warmup_steps)
            found.append(
                f"warm-up takes {self.warmup_steps:,} of {self.steps:,} steps"
                + (f", so the learning rate never gets above {peak:.0%} of its peak" if peak < 1 else "")
                + "; --max_warmup=0.1 keeps it to a tenth"
            )
        if self.schedule_steps < self.steps:
            rest = self.steps - self.schedule_steps
            found.append(f"the last {rest:,} of {self.steps:,} steps have learning rate 0 (--schedule_steps)")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; unknown keys are an error.

        Raises:
            ConfigError: a key that is no field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown configuration fields {', '.join(unknown)}")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    def identity(self) -> dict[str, Any]:
        """The fields that decide which weights come out; two runs with equal identity, data and teacher are one."""
        values = self.to_dict()
        return {f.name: values[f.name] for f in dataclasses.fields(self) if f.metadata["state"]}


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def define_flags(values: flags.FlagValues, *, skip: tuple[str, ...] = (), **defaults: Any) -> None:
    """Defines a flag in `values` for each field of `Config` but `skip`; `defaults` replace the fields' own."""
    for field in dataclasses.fields(Config):
        if field.name in skip:
            continue
        default = defaults.get(field.name, field.default)
        text, choices = field.metadata["help"], field.metadata["choices"]
        module = f"{field.metadata['group']}"
        kind: Any
        if isinstance(field.default, tuple):
            kind = {
                "teacher_image_size": flags.DEFINE_multi_integer,
                "boundaries": flags.DEFINE_multi_integer,
                "data_weights": flags.DEFINE_list,
            }.get(field.name, flags.DEFINE_multi_string)
            kind(field.name, list(default), text, flag_values=values, module_name=module)
        elif choices:
            flags.DEFINE_enum(field.name, default, choices, text, flag_values=values, module_name=module)
        else:
            kind = {
                bool: flags.DEFINE_boolean,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
            }.get(type(field.default), flags.DEFINE_string)
            kind(field.name, default, text, flag_values=values, module_name=module)


def from_flags(values: flags.FlagValues, recipe: dict[str, Any] | None = None, **fixed: Any) -> Config:
    """The configuration that parsed flags describe.

    Args:
        values: parsed.
        recipe: values of flags that were not given.
        fixed: fields that the verb does not offer.
    """
    given = {name for name in values if values[name].present}
    offered = dict(recipe or {})
    if given & {"steps", "epochs"}:  # a length beside a recipe replaces the recipe's, whichever way it is said
        offered = {name: value for name, value in offered.items() if name not in ("steps", "epochs", "schedule_steps")}
    chosen: dict[str, Any] = {name: value for name, value in offered.items() if name not in given} | fixed
    for field in dataclasses.fields(Config):
        if field.name in values and field.name not in chosen:
            value = values[field.name].value
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        chosen["data_weights"] = tuple(map(float, chosen.get("data_weights", ())))
    except ValueError as error:
        raise ConfigError(f"--data_weights={','.join(chosen['data_weights'])}: numbers such as 0.7,0.3") from error
    return Config(**chosen)
