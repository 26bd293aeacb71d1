"""The configuration of a training job: frozen, validated once, and saved as config.json.

Only the verbs read flags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from trainer.core.errors import ConfigError
from trainer.core.options import DataOptions, MethodOptions, RunOptions, StudentOptions, TeacherOptions, require

GROUPS = (DataOptions, TeacherOptions, StudentOptions, MethodOptions, RunOptions)


@dataclasses.dataclass(frozen=True)
class Config(RunOptions, MethodOptions, StudentOptions, TeacherOptions, DataOptions):
    """What one job does: the fields of all option groups.

    Raises:
        ConfigError: a value out of range, or two values that exclude each other; names the flag.
    """

    def __post_init__(self) -> None:
        data: Any = self.data
        if isinstance(data, str):  # a caller may give one data set as a string
            object.__setattr__(self, "data", (data,) if data else ())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, float) and not math.isfinite(item):
                    raise ConfigError(f"--{field.name}={item}: it must be a finite number")
                choices = field.metadata["choices"]
                if choices and item not in choices:
                    raise ConfigError(f"--{field.name}={item}: it must be one of {' | '.join(choices)}")
        for group in GROUPS:
            group.validate(self)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Checks options of one group against those of others."""
        fits = self.resize_size == 0 or self.resize_size >= self.image_size
        require(self, "resize_size", fits, "it must be 0 or at least --image_size")
        if self.keep_best in ("agreement_top1", "kl") and self.distance == "labels":
            raise ConfigError(f"--keep_best={self.keep_best} compares with a teacher; --distance=labels has none")
        if self.distance == "labels" and self.teacher:
            raise ConfigError(f"--distance=labels uses no teacher, but --teacher={self.teacher[0]} is given: drop one")
        if self.distance in ("l2", "euclidean") and self.ensemble == "mean_probabilities":
            raise ConfigError(
                f"--ensemble=mean_probabilities gives no logits, which --distance={self.distance} compares"
            )

    @property
    def held_out(self) -> str:
        """The data set that evaluation uses and whose classes the models have."""
        return self.eval_data or (self.data[0] if self.data else "")

    def require_complete(self) -> None:
        """Checks that the options without a usable default are set.

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
        """Replaces the automatic values of steps, warm-up, intervals and sizes.

        Args:
            examples: number of training examples, >= 1.

        Raises:
            ConfigError: the warm-up is longer than the schedule.
        """
        steps = self.steps or max(1, round(self.epochs * examples / self.batch_size))
        warmup = self.warmup_steps if self.warmup_steps >= 0 else min(1500, steps // 10)
        if self.max_warmup:
            warmup = min(warmup, int(self.max_warmup * steps))
        if self.schedule_steps not in (0, steps) and warmup > self.schedule_steps:
            raise ConfigError(
                f"--schedule_steps={self.schedule_steps} ends within the warm-up of {warmup} steps: give a longer schedule "
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
        """Messages about settings of a resolved configuration that are probably mistakes."""
        messages = []
        if self.warmup_steps > self.steps / 4:
            peak = min(1.0, self.steps / self.warmup_steps)
            messages.append(
                f"warm-up takes {self.warmup_steps:,} of {self.steps:,} steps"
                + (f", so the learning rate never gets above {peak:.0%} of its peak" if peak < 1 else "")
                + "; --max_warmup=0.1 keeps it to a tenth"
            )
        if self.schedule_steps < self.steps:
            rest = self.steps - self.schedule_steps
            messages.append(f"the last {rest:,} of {self.steps:,} steps have learning rate 0 (--schedule_steps)")
        return messages

    def to_dict(self) -> dict[str, Any]:
        """The fields as values of JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """The fields that affect the weights; a checkpoint of another identity is refused."""
        values = self.to_dict()
        return {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if field.metadata["affects_weights"]
            and not (field.metadata["omit_default"] and getattr(self, field.name) == field.default)
        }


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
