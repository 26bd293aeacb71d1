"""Images per second, time left, and the columns of metrics that follow from them."""

from __future__ import annotations

import time

from trainer.method import optim
from trainer.run.job import Job


class Throughput:
    """Measures training speed; compilation, evaluation and saving are left out."""

    def __init__(self, job: Job) -> None:
        self._job, self._start, self._earlier_seconds = job, time.monotonic(), job.seconds
        self._last, self._steps, self._seconds = self._start, 0, 0.0
        self._compiled = False  # the first loop compiles, so its time is left out

    def update(self, steps: int, metrics: dict[str, float]) -> str:
        """Counts a device loop that has just ended, and the job's wall time.

        Args:
            steps: of the loop.
            metrics: its means; loss and agreement are shown.

        Returns:
            A note for the progress line: loss, agreement, speed, time left.
        """
        now = time.monotonic()
        if self._compiled:
            self._steps, self._seconds = self._steps + steps, self._seconds + now - self._last
        self._compiled, self._last = True, now
        self._job.seconds = self._earlier_seconds + now - self._start
        config, rate = self._job.config, self.images_per_second()
        seconds_left = (config.steps - self._job.step) * config.batch_size / rate if rate else 0.0
        speed = f", {rate:,.0f} images/s, {_clock(seconds_left)} left" if rate else ""
        return f"loss {metrics['loss']:.3f}, agreement {100 * metrics['agreement']:.0f}%{speed}"

    def pause(self) -> None:
        """Leaves out the time since the last update."""
        self._last = time.monotonic()

    def images_per_second(self) -> float:
        """Mean over this process; 0 before the second loop has ended."""
        return self._steps * self._job.config.batch_size / self._seconds if self._seconds else 0.0

    def row(self) -> dict[str, float]:
        """Columns of a row of metrics: learning_rate, images_per_second, wall_seconds."""
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
