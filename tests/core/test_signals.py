"""Signals: `Stopped` at once where nothing needs saving, else only a flag."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from trainer.core.errors import DataError, Stopped
from trainer.core.signals import StopRequest


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_raises_stopped_at_once(number: int) -> None:
    before = signal.getsignal(number)
    message = f"stopped by {signal.Signals(number).name}: give the same"
    with pytest.raises(Stopped, match=message) as raised, StopRequest(at_once=True):
        send(number)
    assert raised.value.exit_code == 75
    assert signal.getsignal(number) is before


def test_stopped_survives_wrapping_by_a_library() -> None:
    """TensorFlow's tracer and Python's import wrap exceptions into errors of their own."""

    def wrap() -> None:
        try:
            send()
        except Stopped as error:
            raise ImportError("in user code:\n ...") from error

    with pytest.raises(Stopped, match=r"^stopped by SIGTERM: give"), StopRequest(at_once=True):
        wrap()


def test_stopped_survives_wrapping_as_data_error() -> None:
    """A loader reports any exception of a library as a damaged file, including `Stopped`."""

    def load() -> None:
        try:
            try:
                send()
            except Stopped as error:
                raise ValueError("cannot be read") from error
        except Exception as error:
            raise DataError("teacher.keras does not load") from error

    with pytest.raises(Stopped, match=r"^stopped by SIGTERM: give"), StopRequest(at_once=True):
        load()


def test_unrelated_data_error_is_kept() -> None:
    def mistake() -> None:
        try:
            send()
        except Stopped:
            raise DataError("no such file") from None

    with pytest.raises(DataError), StopRequest(at_once=True):
        mistake()


def test_second_signal_does_not_interrupt_cleanup() -> None:
    cleaned = []

    def work() -> None:
        try:
            send()
        finally:
            send()
            cleaned.append(True)

    with pytest.raises(Stopped), StopRequest(at_once=True):
        work()
    assert cleaned


def test_nested_request_restores_the_outer_handler() -> None:
    def job() -> None:
        with StopRequest() as inner:
            send()
            assert inner.name == "SIGTERM"
        send()

    with pytest.raises(Stopped), StopRequest(at_once=True):
        job()


def test_swallowed_signal_is_seen_by_the_next_request() -> None:
    """Exceptions are dropped in a destructor, or by a library's `except`."""
    with StopRequest(at_once=True):
        with contextlib.suppress(Stopped):
            send()
        with StopRequest() as inner:
            assert inner.name == "SIGTERM"


def test_other_threads_set_no_handlers() -> None:
    errors = []

    def enter() -> None:
        try:
            with StopRequest(at_once=True):
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not errors
