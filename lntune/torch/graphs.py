"""Replaying the time loops of LSTMs on a GPU as CUDA graphs: a loop is captured when it comes a
second time with tensors of the same shapes, and replayed from then on.

A time step's kernels take a GPU less time than a CPU needs to launch them; replaying all steps at
once leaves the GPU the only one that counts (Gray: *Getting Started with CUDA Graphs*, NVIDIA
developer blog, 2019). What a replay costs beside is a copy of the inputs to where the graph reads
them and one of the outputs from where it writes them, and the memory of both, for at most CAPACITY
graphs at a time.

`LNTUNE_CUDA_GRAPHS=0` leaves every loop as it is.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lntune import backends
from lntune.backends.cuda.capture import record
from lntune.system import callers
from lntune.system.forks import OUTER, held_at_fork
from lntune.torch import devices
from lntune.torch.reloading import on_kernels_changed

CAPACITY = 8
"""Graphs kept; beyond, the one that was not used for longest is dropped, with its memory."""
REMEMBERED = 256
"""Loops that are remembered without a graph, those called last: where every batch has a length of
its own, none of them may ever come again.
"""
_REPEATED = 2
"""The call of its kind at which a loop is captured: the first one builds and loads kernels, and may
be the only one.
"""

Loop = Callable[..., tuple[Tensor, ...]]
_lock = held_at_fork(threading.RLock(), OUTER)


@dataclass
class _Seen:
    """How often a loop was called, and its graph once it is captured; `plain` where that failed."""

    calls: int = 0
    inputs: list[Tensor] | None = None
    outputs: tuple[Tensor, ...] = ()
    replay: Callable[[], None] | None = None
    plain: bool = False


_seen: OrderedDict[Any, _Seen] = OrderedDict()


def run(
    loop: Loop, tensors: Sequence[Tensor | None], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """loop(*tensors, *options), whose outputs are new tensors; by a graph on a GPU where it comes
    again.

    A loop computes the same for the same arguments, does nothing that waits for the GPU, and keeps
    nothing.
    """
    inputs = [t for t in tensors if t is not None]
    if not _possible(inputs[0].device):
        return loop(*tensors, *options)
    key = (
        loop,
        tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors),
        _hashable(options),
        _stream(inputs[0].device),
    )
    # Tensors of a graph are none of inference mode, outside of which they could not be written to.
    # And two threads on one stream must not replay between each other's copies.
    with _lock, torch.inference_mode(False), torch.no_grad():
        seen = _seen.setdefault(key, _Seen())
        _seen.move_to_end(key)
        seen.calls += 1
        if len(_seen) > CAPACITY + REMEMBERED:  # graphs are CAPACITY at most, and so is the search
            del _seen[next(old for old, other in _seen.items() if other.replay is None)]
        if seen.replay is None and (
            seen.plain or seen.calls < _REPEATED or not _captured(seen, loop, tensors, options)
        ):
            return loop(*tensors, *options)
        assert seen.inputs is not None
        assert seen.replay is not None
        torch._foreach_copy_(seen.inputs, inputs)
        seen.replay()
        return tuple(t.clone() for t in seen.outputs)


@on_kernels_changed
def forget() -> None:
    """Drop all graphs and their memory: their kernels may no longer be those that serve."""
    with _lock:
        _seen.clear()


def _possible(torch_device: torch.device) -> bool:
    """True where a loop may be captured: on a GPU, and not while somebody else captures what it
    does.
    """
    device = devices.of(torch_device)
    if device is None or not backends.of(device).graphs:
        return False
    if os.environ.get("LNTUNE_CUDA_GRAPHS", "1") == "0":
        return False
    return not (torch_device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _captured(
    seen: _Seen, loop: Loop, tensors: Sequence[Tensor | None], options: tuple[Any, ...]
) -> bool:
    """Capture the loop on tensors of its own; False where it cannot be, now or later."""
    own = [
        None if t is None else t.detach().clone(memory_format=torch.contiguous_format)
        for t in tensors
    ]
    try:
        seen.outputs, seen.replay = capture(
            lambda: loop(*own, *options), next(t for t in own if t is not None).device
        )
    except Exception as e:
        seen.plain = True
        callers.warn(
            f"a time loop cannot be captured as a CUDA graph and runs without one: {e}",
            RuntimeWarning,
        )
        return False
    seen.inputs = [t for t in own if t is not None]
    graphs = [key for key, other in _seen.items() if other.replay is not None]
    for key in graphs[: max(0, len(graphs) - CAPACITY)]:
        del _seen[key]
    return True


def capture(
    call: Callable[[], tuple[Tensor, ...]], torch_device: torch.device
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """(the outputs of a call, a function that has the GPU do again what the call did, into the same
    outputs).
    """
    with torch.cuda.device(torch_device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # libraries set up on a stream what they may not while it is captured
        torch.cuda.current_stream().wait_stream(stream)
        outputs: list[tuple[Tensor, ...]] = []
        # other threads of the process may go on calling CUDA meanwhile
        launch = record(lambda: outputs.append(call()), stream, "thread_local")

    def replay() -> None:
        with torch.cuda.device(torch_device):
            launch()

    return outputs[0], replay


def _stream(torch_device: torch.device) -> int:
    """The current stream: a graph is replayed on the one it was captured for, so that its buffers
    are never used by two at once.
    """
    return (
        int(torch.cuda.current_stream(torch_device).cuda_stream)
        if torch_device.type == "cuda"
        else 0
    )


def _hashable(options: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(o) if isinstance(o, list) else o for o in options)
