import os
import signal

import pytest

from bolza.training.interrupt import InterruptGuard


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_as_many_as_the_patience_are_noted_and_the_next_raises():
    with InterruptGuard(patience=2) as guard:
        press()
        press()
        assert guard.requested
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_patience_the_first_raises():
    with InterruptGuard(patience=0), pytest.raises(KeyboardInterrupt):
        press()


def test_an_inner_guard_takes_over_knows_what_was_noted_and_gives_back():
    with InterruptGuard(patience=1) as outer:
        with InterruptGuard() as fresh:
            assert not fresh.requested
            press()
            assert fresh.requested and not outer.requested
        press()  # the outer one has its whole patience left
        with InterruptGuard() as late:
            assert late.requested
        with pytest.raises(KeyboardInterrupt):
            press()


def test_a_handler_of_the_program_is_left_in_place():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with InterruptGuard() as guard:
            press()
        assert seen == [1] and not guard.requested
    finally:
        signal.signal(signal.SIGINT, before)
