"""Ctrl-C is held while one fact is put in several places, and SIGTERM and SIGHUP can be as
Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from lntune.system import interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as they were, whatever a test does to them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    """SIGINT in the block lets it finish and is raised behind it, and the handler is the one that
    was.
    """
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done
    assert signal.getsignal(signal.SIGINT) is before


def test_each_signal_reaches_its_own_handler() -> None:
    """SIGTERM with a handler of Python's is held too, and what came is handed on in order and once;
    a default action is not touched.
    """
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    with interrupts.held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert came == []
    assert came == [signal.SIGTERM, signal.SIGINT]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with interrupts.held():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_blocks_within_blocks() -> None:
    """The interrupt arrives behind the outermost block."""
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
        done.append("the outer block")
    assert done


def test_an_error_in_the_block() -> None:
    """Handlers are put back where the block raises, and the error is what is seen."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="full"), interrupts.held():
        raise OSError("the disk is full")
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread() -> None:
    """Python handles signals in the main thread alone: elsewhere the block runs as it is."""
    done = []

    def work() -> None:
        with interrupts.held():
            done.append("ran")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["ran"]


@pytest.mark.parametrize("number", interrupts.ENDING)
def test_what_ends_a_process_is_as_ctrl_c(number: signal.Signals) -> None:
    """In the block SIGTERM and SIGHUP raise KeyboardInterrupt, where it is held too behind what is
    held; the block's caller learns which came; they mean what they did before afterwards.
    """
    before, done = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), interrupts.as_ctrl_c() as came, interrupts.held():
        signal.raise_signal(number)
        assert interrupts.waiting()
        done.append("all of it")
    assert done and came == [number]
    assert not interrupts.waiting()
    assert signal.getsignal(number) is before


def test_a_signal_that_is_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends SIGTERM to the process and once more to its group: that is one interrupt; a
    second after some time is another.
    """
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    with interrupts.as_ctrl_c() as came:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert came[0] == signal.SIGTERM and len(came) == 4


def test_a_signal_that_is_ignored_stays_so() -> None:
    """A process that was started with nohup is not ended by a terminal that is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.as_ctrl_c() as came:
            signal.raise_signal(signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)
