"""SIGTERM and SIGINT as a flag or as an exception.

The training loop polls the flag, so that it can finish the device's steps and save. Other phases
have nothing to save, and the signal raises `Stopped` at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from trainer.core.errors import FunmatchError, Stopped

OTHER_MACHINE = "a signal to another machine"


def _is_caused_by(cause: BaseException, error: BaseException) -> bool:
    """Whether `cause` is in the chain of exceptions that led to `error`."""
    link: BaseException | None = error
    while link is not None and link is not cause:
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return link is cause


class StopRequest:
    """Records SIGTERM and SIGINT while entered; a second SIGINT ends the process at once.

    Requests nest: the inner one handles the signals, and starts with the signal that the outer one
    has recorded.

    Attributes:
        name: the last signal, such as "SIGTERM"; empty before the first one.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        """
        Args:
            at_once: raise `Stopped` from the signal handler, for phases with nothing to save.
        """
        self.name = ""
        self._at_once = at_once
        self._raised: Stopped | None = None
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread set signal handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = self._previous_handlers[number] = signal.signal(number, self._handle)
            outer = getattr(previous, "__self__", None)
            if isinstance(outer, StopRequest) and outer.name:
                self.name = outer.name
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        # TensorFlow's tracer, an import or a loader may have wrapped `Stopped` in its own error.
        if self._raised is None or error is self._raised or not isinstance(error, Exception):
            return
        if isinstance(error, Stopped) or not isinstance(error, FunmatchError) or _is_caused_by(self._raised, error):
            raise Stopped(*self._raised.args) from None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        repeated, self.name = bool(self.name), signal.Signals(number).name
        if self._at_once and not repeated:  # a second one must not interrupt the cleanup
            self._raised = Stopped(f"stopped by {self.name}: give the same command again")
            raise self._raised
