"""A signal ends a phase that has nothing to save at once, and is only noted where there is something."""

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
def test_a_phase_that_saves_nothing_ends_at_once(number: int) -> None:
    before = signal.getsignal(number)
    told = f"stopped by {signal.Signals(number).name}: give the same"
    with pytest.raises(Stopped, match=told) as raised, StopRequest(at_once=True):
        send(number)
    assert raised.value.exit_code == 75
    assert signal.getsignal(number) is before


def test_what_others_made_of_it_is_a_stop_all_the_same() -> None:
    """TensorFlow's tracer and Python's import turn what is raised inside them into errors of their own."""

    def wrap() -> None:
        try:
            send()
        except Stopped as error:
            raise ImportError("in user code:\n ...") from error

    with pytest.raises(Stopped, match=r"^stopped by SIGTERM: give"), StopRequest(at_once=True):
        wrap()


def test_a_file_is_not_damaged_because_its_reading_was_stopped() -> None:
    """Where a library raises nearly every type, all of them are told as damage: the signal's among them."""

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


def test_a_mistake_of_the_user_stays_one() -> None:
    def mistake() -> None:
        try:
            send()
        except Stopped:
            raise DataError("no such file") from None

    with pytest.raises(DataError), StopRequest(at_once=True):
        mistake()


def test_a_second_one_does_not_cut_the_cleaning_short() -> None:
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


def test_the_inner_request_notes_and_the_outer_one_has_its_place_back() -> None:
    def job() -> None:
        with StopRequest() as inner:
            send()
            assert inner.name == "SIGTERM"
        send()

    with pytest.raises(Stopped), StopRequest(at_once=True):
        job()


def test_what_was_swallowed_is_seen_at_the_next_phase() -> None:
    """Python drops what is raised in a destructor; somebody else's `except` does as well."""
    with StopRequest(at_once=True):
        with contextlib.suppress(Stopped):
            send()
        with StopRequest() as inner:
            assert inner.name == "SIGTERM"


def test_other_threads_take_no_signals() -> None:
    failed = []

    def enter() -> None:
        try:
            with StopRequest(at_once=True):
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed
