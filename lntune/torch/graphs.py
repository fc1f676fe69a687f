"""Replaying the time loops of LSTMs on a GPU as CUDA graphs: a loop is captured when it comes a
second time with tensors of the same shapes, and replayed from then on.

A time step's kernels take a GPU less time than a CPU needs to launch them; replaying all steps at
once leaves the GPU the only one that counts (Gray: *Getting Started with CUDA Graphs*, NVIDIA
developer blog, 2019). A graph reads and writes where it was captured: the first one of a loop on
buffers of its own, so that a replay copies every input there and every output from there. In
training and serving the same memory comes again and again, since PyTorch's allocator hands out what
was given back: a loop that comes several times with its large tensors where they were before is
captured once more, on the caller's memory, and then replayed without copies. Where a tensor is
anywhere else the first graph serves.

That rests on nothing but what holds for any operator. A graph is replayed on inputs that are alive
and on outputs that were allocated for the call, whoever else held that memory before: what a caller
still holds, or another stream still reads (Tensor.record_stream), the allocator does not hand out.
Nothing of the caller's is kept alive, and nothing at an address is read or written but in a call
whose tensors are there.

`LNTUNE_CUDA_GRAPHS=0` leaves every loop as it is.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lntune import backends
from lntune.backends.cuda.capture import record
from lntune.log.cases import Tallies
from lntune.system import callers
from lntune.system.forks import OUTER, held_at_fork
from lntune.torch import devices, recording
from lntune.torch.reloading import on_kernels_changed

CAPACITY = 8
"""Loops kept with their graphs; beyond, the one that was not used for longest is dropped, with its
memory.
"""
REMEMBERED = 256
"""Loops that are remembered without a graph, those called last: where every batch has a length of
its own, none of them may ever come again.
"""
PLACES = 16
"""Places of a loop's tensors that are remembered, those used last: the layers of a model are one
loop with tensors in several places, and so are two calls that take turns with their outputs.
"""
_REPEATED = 2
"""The call of its kind at which a loop is captured: the first one builds and loads kernels, and may
be the only one.
"""
_SETTLED, _PATIENCE = 4, 1024
"""How often a loop's tensors are in one place before it is captured there; twice as often after
each such graph that had to be dropped, up to _PATIENCE: where tensors wander, few captures are for
nothing.
"""
_SMALL = 256
"""A tensor with less than one in so many of a loop's bytes does not tell one place from another."""
_ALIGNED = 16
"""Bytes to whose multiples kernels are aligned at their best."""
_OWN = 0
"""The address of a tensor that a graph reads or writes in a buffer of its own."""

Loop = Callable[..., tuple[Tensor, ...]]
Work = Callable[[Sequence[Tensor | None], Sequence[Tensor]], Any]
"""Computes from tensors, the loop's arguments, into others."""
_lock = held_at_fork(threading.RLock(), OUTER)


@dataclass
class Traffic:
    """What replays copied since the process began."""

    replays: int = 0
    tensors: int = 0
    bytes: int = 0


traffic = Traffic()


@dataclass
class _Place:
    """Where a loop's tensors were, one address each; _OWN for those that were in several places, or
    in one that kernels would not read at their best. `replay` is of a graph captured there.
    """

    addresses: tuple[int, ...]
    seen: int = 0
    replay: Callable[[], None] | None = None


@dataclass
class _Seen:
    """How often a loop was called, and its graph once it is captured, with the buffers on which it
    works, and which of them are large; `plain` where that failed, `moving` where a capture on the
    caller's memory did; how many graphs on the caller's memory were `dropped`; `counts` are the
    calls of kernels that a replay makes, where cases are recorded.
    """

    calls: int = 0
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    large: tuple[bool, ...] = ()
    replay: Callable[[], None] | None = None
    recorder: Recorder | None = None
    plain: bool = False
    moving: bool = False
    dropped: int = 0
    counts: Tallies = field(default_factory=dict)
    places: OrderedDict[tuple[int, ...], _Place] = field(default_factory=OrderedDict)

    @property
    def patience(self) -> int:
        """How often tensors have to be in one place before the loop is captured there."""
        return min(_SETTLED << min(self.dropped, _PATIENCE.bit_length()), _PATIENCE)


_seen: OrderedDict[Any, _Seen] = OrderedDict()
_stale = threading.Event()  # graphs have kernels that no longer serve


def run(
    loop: Loop, tensors: Sequence[Tensor | None], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """loop(*tensors, *options), whose outputs are new tensors; by a graph on a GPU where it comes
    again.

    A loop computes the same for the same arguments, does nothing that waits for the GPU, keeps
    nothing and writes to none of its tensors. Given `into`, contiguous tensors shaped as its
    outputs, it computes into those.
    """
    inputs = [t for t in tensors if t is not None]
    # nor in the middle of another call of this thread, by a signal's handler
    if not _possible(inputs[0].device) or _is_inside():
        return loop(*tensors, *options)
    key = (
        loop,
        tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors),
        _hashable(options),
        _stream(inputs[0].device),
    )

    def work(arguments: Sequence[Tensor | None], into: Sequence[Tensor]) -> None:
        loop(*arguments, *options, into=into)

    # Tensors of a graph are none of inference mode, outside of which they could not be written to.
    # And two threads on one stream must not replay between each other's copies.
    with _lock, torch.inference_mode(False), torch.no_grad():
        if _stale.is_set():
            _seen.clear()
            _stale.clear()
        seen = _seen.setdefault(key, _Seen())
        _seen.move_to_end(key)
        seen.calls += 1
        if len(_seen) > CAPACITY + REMEMBERED:  # graphs are CAPACITY at most, and so is the search
            del _seen[next(old for old, other in _seen.items() if other.replay is None)]
        if seen.replay is None:
            with recording.aside() as counts:
                outputs = loop(*tensors, *options)
            recording.repeated(counts)
            seen.counts = counts
            if not seen.plain and seen.calls >= _REPEATED:
                _capture(seen, work, tensors, outputs)
            return outputs
        outputs = tuple(map(_new, seen.outputs))
        place = _place(seen, (*inputs, *outputs))
        if place.replay is None and place.seen >= seen.patience and not seen.moving:
            work(tensors, outputs)
            _capture_there(seen, place, work, tensors, outputs)
        else:
            _replay(seen, place, inputs, outputs)
        return outputs


_new: Callable[[Tensor], Tensor] = torch.empty_like


@recording.on_change
def _recording_changed(_: bool) -> None:
    """Graphs that were captured before know nothing of their calls."""
    forget()


@on_kernels_changed
def forget() -> None:
    """Drop all graphs and their memory: their kernels may no longer be those that serve. Where a
    call has them, the next one does it: who says so holds locks that the call may wait for.
    """
    _stale.set()
    if not _is_inside() and _lock.acquire(blocking=False):
        try:
            _seen.clear()
            _stale.clear()
        finally:
            _lock.release()


def _is_inside() -> bool:
    """Whether this thread is in the middle of a call."""
    return bool(_lock._is_owned())  # type: ignore[attr-defined]  # as threading.Condition asks


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


def _capture(
    seen: _Seen, work: Work, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> None:
    """Capture the loop on buffers of its own, shaped as the tensors of a call are."""
    kept = torch.contiguous_format
    try:
        own = [None if t is None else t.detach().clone(memory_format=kept) for t in tensors]
        into = tuple(torch.empty_like(t, memory_format=kept) for t in outputs)
        recorder = Recorder(outputs[0].device)
        with recording.aside():
            replay = recorder.first(work, own, into)
    except Exception as e:
        seen.plain = True
        callers.warn(
            f"a time loop cannot be captured as a CUDA graph and runs without one: {e}",
            RuntimeWarning,
        )
        return
    seen.recorder, seen.outputs = recorder, into
    seen.inputs = tuple(t for t in own if t is not None)
    sizes = [t.nbytes for t in (*seen.inputs, *seen.outputs)]
    seen.large = tuple(_SMALL * size > sum(sizes) for size in sizes)
    seen.replay = replay  # last: an interrupt before leaves a loop without a graph
    graphs = [key for key, other in _seen.items() if other.replay is not None]
    for key in graphs[: max(0, len(graphs) - CAPACITY)]:
        del _seen[key]


def _place(seen: _Seen, tensors: Sequence[Tensor]) -> _Place:
    """Where the tensors of a call are, by the large ones among them, and what is known of it."""
    addresses = tuple(map(_address, tensors))
    key = tuple(itertools.compress(addresses, seen.large))
    place = seen.places.setdefault(key, _Place(addresses))
    seen.places.move_to_end(key)
    if len(seen.places) > PLACES:
        _, oldest = seen.places.popitem(last=False)
        seen.dropped += oldest.replay is not None
    if any(a not in (_OWN, b) for a, b in zip(place.addresses, addresses, strict=True)):
        seen.dropped += place.replay is not None
        # first: the graph is of the addresses that were
        place.seen, place.replay = 0, None
        settled = zip(place.addresses, addresses, strict=True)
        place.addresses = tuple(a if a == b else _OWN for a, b in settled)
    place.seen += 1
    return place


def _address(t: Tensor) -> int:
    """Where a tensor is, if a graph can work on it there as well as in a buffer of its own."""
    where = t.data_ptr()
    return where if where % _ALIGNED == 0 and t.is_contiguous() else _OWN


def _capture_there(
    seen: _Seen,
    place: _Place,
    work: Work,
    tensors: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
) -> None:
    """Capture the loop on a call's own tensors, and on the first graph's buffers in the stead of
    those that come from several places.
    """
    assert seen.recorder is not None
    addresses, buffers = iter(place.addresses), iter((*seen.inputs, *seen.outputs))

    def chosen(t: Tensor) -> Tensor:
        own = next(buffers)
        return own if next(addresses) == _OWN else t.detach()

    arguments = [None if t is None else chosen(t) for t in tensors]
    try:
        into = [chosen(t) for t in outputs]
        with recording.aside():
            place.replay = seen.recorder.another(work, arguments, into)
    except Exception as e:
        seen.moving = True
        callers.warn(
            "a time loop cannot be captured as a CUDA graph on its callers' memory, and copies its"
            f" inputs and outputs: {e}",
            RuntimeWarning,
        )


def _replay(
    seen: _Seen, place: _Place, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Have a graph compute the outputs, which has whatever is not where it works copied there and
    from there.
    """
    own = [place.replay is None or a == _OWN for a in place.addresses]
    traffic.replays += 1
    _copy(seen.inputs, inputs, own[: len(inputs)])
    replay = place.replay or seen.replay
    assert replay is not None
    replay()
    recording.repeated(seen.counts)
    _copy(outputs, seen.outputs, own[len(inputs) :])


def _copy(to: Sequence[Tensor], tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    """Copy those that are wanted and not empty."""
    pairs = [pair for pair, want in zip(zip(to, tensors, strict=True), wanted, strict=True) if want]
    # an empty one would keep the others from being copied by one launch
    pairs = [pair for pair in pairs if pair[0].numel()]
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)
        traffic.tensors += len(pairs)
        traffic.bytes += sum(t.nbytes for t in targets)


class Recorder:
    """Makes the graphs of a loop, all of which take the memory in between from one pool: they are
    replayed on one stream, one after another, and what is in it is used up with the replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def first(
        self, work: Work, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> Callable[[], None]:
        """A function that has the GPU do again what work(tensors, outputs) does, on the same
        memory, which it does not keep alive.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                # libraries set up on a stream what they may not while it is captured
                work(tensors, outputs)
            current.wait_stream(self._stream)
        return self._recorded(work, tensors, outputs, tidy=True)

    def another(
        self, work: Work, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> Callable[[], None]:
        """The same of other tensors, after this thread has done the work with them. PyTorch's
        allocator is left as it is, so that later calls find their memory where it was.
        """
        return self._recorded(work, tensors, outputs, tidy=False)

    def _recorded(
        self,
        work: Work,
        tensors: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        tidy: bool,
    ) -> Callable[[], None]:
        device = self._device
        with torch.cuda.device(device):
            # other threads of the process may go on calling CUDA meanwhile
            launch = record(
                lambda: work(tensors, outputs), self._stream, "thread_local", self._pool, tidy
            )

        def replay() -> None:
            with torch.cuda.device(device):
                launch()

        return replay


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
