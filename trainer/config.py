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
DISTANCES = ("kl", "labels")
MIXUPS = ("batch", "none")
JIT = ("auto", "on", "off")


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

    # Where things are.
    data: str = _field(
        "",
        "data",
        "Folder or gs:// prefix made by trainer.prepare (it holds dataset.json).",
        state=False,
    )
    eval_data: str = _field("", "data", "The same, for evaluation; empty: --data.", state=False)
    train_split: str = _field("train", "data", "Split whose images are trained on.")
    eval_split: str = _field("validation", "data", "Split measured every --eval_every steps.", state=False)
    final_split: str = _field("test", "data", "Split measured once, at the end, for result.json.", state=False)
    workdir: str = _field(
        "",
        "data",
        "Folder or gs:// prefix of this run. The same command goes on from what it holds.",
        state=False,
    )
    # Teacher.
    teacher: tuple[str, ...] = _field(
        (),
        "teacher",
        "keras:PATH, random:NAME (untrained, for timing). Repeat for several.",
        state=False,
    )
    teacher_image_size: tuple[int, ...] = _field(
        (),
        "teacher",
        "Side in pixels that each teacher takes; empty: what its file says, else --image_size.",
    )
    teacher_range: tuple[str, ...] = _field(
        ("-1,1",),
        "teacher",
        "Value range that each teacher takes: -1,1 or 0,1 or 0,255.",
        choices=RANGES,
    )
    teacher_outputs: str = _field(
        "auto",
        "teacher",
        "What a teacher returns; auto looks at its last layer and at its outputs.",
        choices=OUTPUTS,
    )
    # Student.
    student: str = _field(
        "bit-r50x1",
        "student",
        "bit-tiny, bit-small, bit-r50x1, ..., resnet50v2, mobilenetv3-large, app:NAME (keras.applications), keras:PATH.",
    )
    image_size: int = _field(
        128,
        "student",
        "Side in pixels of the student's images (paper: 128 for small sets, 224 for ImageNet).",
    )
    precision: str = _field(
        "float32",
        "student",
        "Arithmetic of the student; losses and updates are always float32.",
        choices=PRECISIONS,
    )
    # Method.
    distance: str = _field(
        "kl",
        "method",
        "kl: match the teacher (paper, eq. 1, times T^2). labels: cross-entropy with the labels, no teacher.",
        choices=DISTANCES,
    )
    temperature: float = _field(1.0, "method", "Softmax temperature of both models, > 0 (paper: 1, 2, 5 or 10).")
    mixup: str = _field(
        "batch",
        "method",
        "batch: one coefficient a step, uniform in [0, 1], partner is the previous image (paper). none: off.",
        choices=MIXUPS,
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
    steps: int = _field(0, "method", "Updates to make; give this or --epochs.")
    epochs: float = _field(
        0.0,
        "method",
        "Passes over the training split, turned into round(epochs * examples / batch) steps.",
    )
    batch_size: int = _field(512, "method", "Images a step, over all replicas (paper: 512, ImageNet 4096).")
    seed: int = _field(0, "method", "Seed of weights, order and views, 0 to 2^31 - 1.")
    # Running.
    store_size: int = _field(
        0,
        "running",
        "Side in pixels of the squares that images are kept as before cropping; 0: twice --image_size.",
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
    eval_batch_size: int = _field(0, "running", "Images a step of evaluation; 0: --batch_size.", state=False)
    tpu: str = _field(
        "none",
        "running",
        "none, local (a TPU VM or Vertex), a name, grpc://HOST:PORT, or '' for the environment's.",
        state=False,
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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, float) and not math.isfinite(item):
                    raise ConfigError(f"--{field.name}={item}: it must be a finite number")
                choices = field.metadata["choices"]
                if choices and item not in choices:
                    raise ConfigError(f"--{field.name}={item}: it must be one of {' | '.join(choices)}")
        for name in ("image_size", "batch_size", "keep_checkpoints"):
            self._need(name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("temperature", "learning_rate"):
            self._need(name, getattr(self, name) > 0, "it must be above 0")
        for name in (
            "weight_decay",
            "clip_norm",
            "steps",
            "epochs",
            "store_size",
            "steps_per_loop",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "eval_batch_size",
        ):
            self._need(name, getattr(self, name) >= 0, "it must not be negative")
        self._need("warmup_steps", self.warmup_steps >= -1, "it must be -1 (automatic) or more")
        self._need("seed", 0 <= self.seed < 2**31, "it must be from 0 to 2147483647")
        if self.steps and self.epochs:
            raise ConfigError(f"--steps={self.steps} and --epochs={self.epochs}: give one of the two")
        if self.distance == "labels" and self.teacher:
            raise ConfigError(f"--distance=labels uses no teacher, yet --teacher={self.teacher[0]} is given: drop one")
        for name in ("teacher_image_size", "teacher_range"):
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
        return dataclasses.replace(
            self,
            steps=steps,
            epochs=0.0,
            warmup_steps=warmup,
            store_size=self.store_size or 2 * self.image_size,
            log_every=self.log_every or max(1, steps // 100),
            eval_every=self.eval_every or max(1, steps // 10),
            checkpoint_every=self.checkpoint_every or max(1, steps // 10),
            eval_batch_size=self.eval_batch_size or self.batch_size,
        )

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
            kind = flags.DEFINE_multi_integer if field.name == "teacher_image_size" else flags.DEFINE_multi_string
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


def from_flags(values: flags.FlagValues, **fixed: Any) -> Config:
    """The configuration that parsed flags describe; `fixed` sets fields that the verb does not offer."""
    chosen: dict[str, Any] = dict(fixed)
    for field in dataclasses.fields(Config):
        if field.name in values and field.name not in fixed:
            value = values[field.name].value
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    return Config(**chosen)
