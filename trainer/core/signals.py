"""SIGTERM and SIGINT: in training a flag that the loop looks at (finish the device's loop, save); elsewhere a `Stopped` at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from trainer.core.errors import FunmatchError, Stopped

OTHER_MACHINE = "a signal to another machine"


def _led_to(first: BaseException, last: BaseException) -> bool:
    """Whether `last` is an error made of `first`, as where a library's many errors all mean that a file is damaged."""
    link: BaseException | None = last
    while link is not None and link is not first:
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return link is first


class StopRequest:
    """While entered, notes the first signal; a second one of SIGINT ends the process at once, as people expect.

    Requests nest: the inner one gets the signals, and begins with what the outer one has noted.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        """
        Args:
            at_once: where nothing needs saving: raise `Stopped` from wherever the program is.
        """
        self.name = ""
        self._at_once = at_once
        self._raised: Stopped | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals go to the main thread, and only it may say what happens then
        for number in (signal.SIGTERM, signal.SIGINT):
            before = self._before[number] = signal.signal(number, self._note)
            outer = getattr(before, "__self__", None)
            if isinstance(outer, StopRequest) and outer.name:
                self.name = outer.name
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        # Whoever runs our code (a tracer, an import) may have wrapped what was raised into an error of its own.
        if self._raised is None or error is self._raised or not isinstance(error, Exception):
            return
        if isinstance(error, Stopped) or not isinstance(error, FunmatchError) or _led_to(self._raised, error):
            raise Stopped(*self._raised.args) from None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        again, self.name = bool(self.name), signal.Signals(number).name
        if self._at_once and not again:  # a second one must not cut the first one's cleaning up short
            self._raised = Stopped(f"stopped by {self.name}: give the same command again")
            raise self._raised
