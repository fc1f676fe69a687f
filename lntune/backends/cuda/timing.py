"""How time is measured on a GPU.

As in `timing`, contenders are interleaved: every round times each of them once, in a new random
order, after as much untimed work of its own; what is reported is the median over rounds, with all
samples kept, and the garbage collector is off. What differs:

- The clock is the GPU's: events around a sample's calls. The untimed work before keeps the GPU busy
  while the sample is being enqueued, so the sample has no gap at its beginning.
- The L2 cache is cold. A contender brings a call for each of several copies of its inputs, together
  larger than the cache, and they are called in turn; what they return is held for a turn, so
  outputs rotate, too. What is so small that MOST copies do not fill the cache is measured warm.
- Short kernels are recorded as a graph of many calls and replayed, so that launches from Python
  cost nothing. What cannot be recorded (a call that waits for the GPU) is called as it is, and pays
  for its launches; `Measured.uncaptured` names it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from lntune.backends.cuda.capture import record
from lntune.backends.cuda.nvml import Nvml
from lntune.log.records import Timing
from lntune.system.surroundings import Notice, clock_changed
from lntune.timing import Enough, Measured, disturbed, within

Call = Callable[[], Any]

TIMES = 3
"""Copies of the inputs fill the L2 cache so many times: it does not replace the oldest line
strictly.
"""
MOST, FEW = 128, 8
"""Copies at most, since more would take longer to record than to measure; and where even these
would leave the cache warm.
"""
SAMPLE_SECONDS = 4e-4
"""What a sample takes at least, in seconds: events resolve half a microsecond."""
LONG_SECONDS = 2e-3
"""From here on a call is long against its launch and is not recorded."""
NODES = 2048
"""Calls of one graph, at most."""
COPY_BYTES = 512 << 20
"""What `copy_bandwidth` copies: beyond every cache."""


class Gpu(Protocol):
    """What measuring asks of a GPU."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """In the block the GPU is PyTorch's current device, with a stream that can be recorded;
        calls on it are to be bound there, too.
        """

    def wait(self) -> None:
        """Until everything enqueued is done; raises what went wrong in it."""

    def event(self) -> Any:
        """A mark behind everything enqueued so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a graph; the answer replays it. Raises whatever keeps it from being one."""

    def clock(self) -> int | None:
        """MHz the multiprocessors run at now, None where that is not known."""

    def limits(self) -> tuple[Notice, ...]:
        """What keeps the clocks down now; nothing where that is not known."""

    def others(self) -> float | None:
        """Share of the multiprocessors' time that other processes used since the last question;
        None where that is not known.
        """


class Cuda:
    """A GPU by PyTorch's number, through torch.cuda and NVML; starts nothing on it before it is
    asked to.
    """

    def __init__(self, ordinal: int) -> None:
        import torch

        self._torch, self._device = torch, torch.device("cuda", ordinal)

    @functools.cached_property
    def _nvml(self) -> Nvml:
        return Nvml(
            f"GPU-{getattr(self._torch.cuda.get_device_properties(self._device), 'uuid', '')}"
        )

    @functools.cached_property
    def _stream(self) -> Any:
        return self._torch.cuda.Stream(self._device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """See Gpu. Autograd runs a backward on its forward's stream, so what is recorded has to
        begin on the stream of the recording.
        """
        with self._torch.cuda.device(self._device), self._torch.cuda.stream(self._stream):
            self._stream.wait_stream(self._torch.cuda.default_stream(self._device))
            yield

    def wait(self) -> None:
        """See Gpu."""
        self._torch.cuda.synchronize(self._device)

    def event(self) -> Any:
        """See Gpu."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """See Gpu."""
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Gpu."""
        return record(work, self._stream)

    def clock(self) -> int | None:
        """See Gpu."""
        return self._nvml.clock()

    def limits(self) -> tuple[Notice, ...]:
        """See Gpu."""
        return self._nvml.limits()

    def others(self) -> float | None:
        """See Gpu."""
        return self._nvml.others()


def copies(size: int, l2: int) -> int:
    """How many copies of the tensors of a call, `size` bytes, are to be called in turn on a GPU
    with so much L2 cache.
    """
    wanted = max(1, math.ceil(TIMES * l2 / max(size, 1)))
    return wanted if wanted <= MOST else MOST if MOST * size > l2 else FEW


class _Prepared:
    """A contender ready for samples: `work()` is one, made of `calls` calls."""

    def __init__(self, gpu: Gpu, calls: Sequence[Call]) -> None:
        self._gpu, self._calls = gpu, calls
        self._held: list[Any] = [None] * len(calls)
        self.captured = False  # a graph?
        self._turn()  # the first calls may load, build or allocate
        each = self._timed(self._turn) / len(calls)
        turns = self._turns_per_sample(each)
        self.work: Callable[[], None] = functools.partial(self._several, turns)
        self.calls = turns * len(calls)
        self.long = each >= LONG_SECONDS
        if not self.long:
            self._record(turns)

    def _turn(self) -> None:
        held = self._held
        for i, call in enumerate(self._calls):
            held[i] = call()

    def _several(self, turns: int) -> None:
        for _ in range(turns):
            self._turn()

    def _turns_per_sample(self, each: float) -> int:
        """Turns that take a sample's time when a call takes `each` seconds."""
        wanted = math.ceil(SAMPLE_SECONDS / max(each, 1e-9) / len(self._calls))
        return max(1, min(wanted, NODES // len(self._calls)))

    def _record(self, turns: int) -> None:
        """As a graph; a longer one where the calls turn out to be quicker without their
        launches.
        """
        try:
            for _ in range(2):
                replay = self._gpu.capture(functools.partial(self._several, turns))
                replay()  # the first puts the graph on the device
                self.work, self.calls, self.captured = replay, turns * len(self._calls), True
                more = self._turns_per_sample(self._timed(replay) / self.calls)
                if more < 2 * turns:
                    break
                turns = more
        except Exception:  # whatever is wrong with the call itself shows when it is called as it is
            self._gpu.wait()

    def _timed(self, work: Callable[[], None]) -> float:
        start = self._gpu.event()
        work()
        return self._gpu.seconds(start, self._gpu.event())

    def sample(self) -> float:
        """Microseconds of one call."""
        self.work()
        return self._timed(self.work) / self.calls * 1e6


@contextlib.contextmanager
def _not_collecting() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def measure(
    contenders: Mapping[str, Sequence[Call]],
    seconds: float,
    gpu: Gpu,
    rounds: int = 5,
    seed: int = 0,
    enough: Enough | None = None,
) -> Measured:
    """Time the contenders on a GPU for about `seconds` in all, at least `rounds` rounds; after
    these until `enough` says so, where that is given.

    A contender is the same call bound to each copy of its inputs (see `copies`), to be called in
    turn.

    Raises:
        Exception: whatever a contender, or the GPU on its behalf, raises.
    """
    with gpu.active():
        return _measured(contenders, gpu, rounds, random.Random(seed), enough or within(seconds))


def _measured(
    contenders: Mapping[str, Sequence[Call]],
    gpu: Gpu,
    rounds: int,
    order: random.Random,
    enough: Enough,
) -> Measured:
    names = list(contenders)
    prepared = {name: _Prepared(gpu, contenders[name]) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    gpu.others()
    clocks = [gpu.clock()]
    with _not_collecting():
        start = time.perf_counter()
        done = 0
        while done < rounds or not enough(samples, time.perf_counter() - start):
            order.shuffle(names)
            for name in names:
                samples[name].append(prepared[name].sample())
            done += 1
            if done == 1:
                clocks.append(gpu.clock())  # warm by now
    clocks.append(gpu.clock())
    others = gpu.others()
    # the first clock is of a GPU that may have slept
    known = [c for c in clocks[1:] if c]
    notices = [*(clock_changed(known[0], known[-1]) if known else ()), *gpu.limits()]
    timings = {
        name: Timing(tuple(round(v, 4) for v in values), round(statistics.median(values), 4))
        for name, values in samples.items()
    }
    return Measured(
        timings,
        others,
        disturbed(timings, others, notices),
        tuple(c for c in clocks if c is not None),
        tuple(sorted(name for name, p in prepared.items() if not p.captured and not p.long)),
        tuple(n.text for n in notices),
    )


def copy_bandwidth(
    place: str = "cuda:0", seconds: float = 0.2, gpu: Gpu | None = None, size: int | None = None
) -> float:
    """Bytes a second, read and written, of a plain copy of `size` bytes, by default COPY_BYTES / 2,
    on a device of PyTorch's: what any kernel may hope for.
    """
    import torch

    size = COPY_BYTES // 2 if size is None else size
    source = torch.empty(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    source.fill_(1)
    measured = measure(
        {"copy": [lambda: target.copy_(source)]},
        seconds,
        gpu or Cuda(torch.device(place).index or 0),
        rounds=9,
    )
    return 2 * size / measured.timings["copy"].median_us * 1e6
