"""Ctrl-C is held while one fact is put in several places, and SIGTERM can be as Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from lntune import interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as they were, whatever a test does to them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    """SIGINT in the block lets it finish and is raised behind it, and the handler is the one that was."""
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done
    assert signal.getsignal(signal.SIGINT) is before


def test_each_signal_reaches_its_own_handler() -> None:
    """SIGTERM with a handler of Python's is held too, and what came is handed on in order and once; a default action is not touched."""
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


def test_sigterm_as_ctrl_c() -> None:
    """In the block SIGTERM raises KeyboardInterrupt, where it is held too behind what is held, and means what it did before afterwards."""
    before, done = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(KeyboardInterrupt), interrupts.by_sigterm(), interrupts.held():
        signal.raise_signal(signal.SIGTERM)
        done.append("all of it")
    assert done
    assert signal.getsignal(signal.SIGTERM) is before
