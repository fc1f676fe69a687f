"""Time loops as graphs, interrupted or called again at any line: what follows is right."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_graph_places import HIDDEN, ROWS, Layer, forward, set_up

from lntune.torch import graphs

Line = tuple[str, int]


@pytest.fixture
def memory() -> Iterator[Any]:
    """The CPU's tensors count as a GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_SMALL", 8)
        yield set_up(patch)
        graphs.forget()


def at(line: Line | None, what: Callable[[], None], seen: set[Line]) -> Any:
    """A tracer that does something once, before a line of graphs.py, and collects its lines."""
    done = [False]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != graphs.__file__:
            return None
        here = (frame.f_code.co_name, frame.f_lineno)
        if event == "line":
            seen.add(here)
            if here == line and not done[0]:
                done[0] = True
                what()
        return trace

    return trace


def calls(memory: Any, trace: Any, traced: range) -> None:
    """Calls of a layer whose tensors settle, and whose gain then wanders: each is right, or is
    interrupted.
    """
    layer = Layer(memory)
    gains = [memory.copy(torch.full((HIDDEN,), i + 1.0)) for i in range(3)]
    for number in range(20):
        layer.gain = gains[number % 3 if number > 8 else 0]
        x = memory.copy(torch.full((ROWS, HIDDEN), number + 1.0))
        expected = forward(x, layer.matrix, layer.gain)
        sys.settrace(trace if number in traced else None)
        try:
            outputs = graphs.run(forward, (x, layer.matrix, layer.gain), ())
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(None)
        assert all(map(torch.equal, outputs, expected)), f"call {number}"
        del outputs


def lines(memory: Any) -> list[Line]:
    """The lines of graphs.py that those calls come to."""
    seen = set[Line]()
    calls(memory, at(None, lambda: None, seen), range(12))
    graphs.forget()
    return sorted(seen)


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def test_an_interrupt_at_any_line(memory: Any) -> None:
    """Whatever is half done then is not taken for done."""
    for line in lines(memory):
        calls(memory, at(line, interrupt, set()), range(12))
        graphs.forget()


def test_a_call_in_the_middle_of_another(memory: Any) -> None:
    """A signal's handler, or what is collected as garbage, may call the same loop at any line."""
    layer = Layer(memory)

    def nested() -> None:
        trace = sys.gettrace()
        sys.settrace(None)
        x = memory.copy(torch.full((ROWS, HIDDEN), -7.0))
        outputs = graphs.run(forward, (x, layer.matrix, layer.gain), ())
        assert all(map(torch.equal, outputs, forward(x, layer.matrix, layer.gain)))
        sys.settrace(trace)

    for line in lines(memory):
        calls(memory, at(line, nested, set()), range(12))
        graphs.forget()


def test_kernels_that_change_while_a_loop_runs() -> None:
    """Who says that kernels have changed waits for no loop, which may wait for what they hold; the
    next call begins anew.
    """
    running, go_on = threading.Event(), threading.Event()

    def loop(x: torch.Tensor, into: Any = None) -> tuple[torch.Tensor, ...]:
        running.set()
        assert go_on.wait(60)
        return (x + 1,) if into is None else (into[0].copy_(x + 1),)

    with pytest.MonkeyPatch.context() as patch:
        set_up(patch)
        call = threading.Thread(target=graphs.run, args=(loop, (torch.ones(3),), ()))
        call.start()
        assert running.wait(60)
        other = threading.Thread(target=graphs.forget)
        other.start()
        other.join(60)
        assert not other.is_alive()
        go_on.set()
        call.join(60)
        assert graphs._seen
        graphs.run(loop, (torch.ones(2),), ())
        assert len(graphs._seen) == 1
        graphs.forget()
        assert not graphs._seen
