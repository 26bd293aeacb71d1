"""Images per second, time left, and the columns of metrics that follow from them."""

from __future__ import annotations

import time

from trainer.method import optim
from trainer.run.job import Job


class Throughput:
    """Speed and time left; compilation, evaluation and saving do not count towards speed."""

    def __init__(self, job: Job) -> None:
        self._job, self._began, self._before = job, time.monotonic(), job.seconds
        self._mark, self._steps, self._seconds, self._warm = self._began, 0, 0.0, False

    def tick(self, steps: int, metrics: dict[str, float]) -> str:
        now = time.monotonic()
        if self._warm:
            self._steps, self._seconds = self._steps + steps, self._seconds + now - self._mark
        self._warm, self._mark = True, now
        self._job.seconds = self._before + now - self._began
        config, rate = self._job.config, self.images_per_second()
        left = (config.steps - self._job.step) * config.batch_size / rate if rate else 0.0
        speed = f", {rate:,.0f} images/s, {_clock(left)} left" if rate else ""
        return f"loss {metrics['loss']:.3f}, agreement {100 * metrics['agreement']:.0f}%{speed}"

    def skip(self) -> None:
        """Leaves the time since the last tick out."""
        self._mark = time.monotonic()

    def images_per_second(self) -> float:
        return self._steps * self._job.config.batch_size / self._seconds if self._seconds else 0.0

    def row(self) -> dict[str, float]:
        schedule = optim.schedule(self._job.config)
        return {
            "learning_rate": float(schedule(self._job.step - 1)),
            "images_per_second": self.images_per_second(),
            "wall_seconds": self._job.seconds,
        }


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
