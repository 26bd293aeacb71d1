"""Rules between options of different groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.core.errors import ConfigError
from trainer.core.options import require

if TYPE_CHECKING:
    from trainer.core.config import Config


def check_combinations(config: Config) -> None:
    """Checks options of one group against those of others.

    Raises:
        ConfigError: two values exclude each other; names both flags.
    """
    fits = config.resize_size == 0 or config.resize_size >= config.image_size
    require(config, "resize_size", fits, "it must be 0 or at least --image_size")
    if config.keep_best in ("agreement_top1", "kl") and config.distance == "labels":
        raise ConfigError(f"--keep_best={config.keep_best} compares with a teacher; --distance=labels has none")
    if config.distance == "labels" and config.teacher:
        raise ConfigError(f"--distance=labels uses no teacher, yet --teacher={config.teacher[0]} is given: drop one")
    if config.distance in ("l2", "euclidean") and config.ensemble == "mean_probabilities":
        raise ConfigError(f"--ensemble=mean_probabilities gives no logits, which --distance={config.distance} compares")
