"""How time is measured on a GPU: on a GPU of the tests' own, whose time only contenders move."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lntune.backends.cuda import timing as device_timing
from lntune.backends.cuda.nvml import Nvml
from lntune.backends.cuda.timing import (
    FEW,
    MOST,
    SAMPLE_SECONDS,
    TIMES,
    Cuda,
    copies,
    copy_bandwidth,
    measure,
)
from lntune.system import toolchain
from lntune.system.surroundings import Notice

LAUNCH = 5e-6
"""What a call from Python costs this GPU: it waits for it."""
MB = 1 << 20


class Machine:
    """A GPU that takes as long as contenders say, and at least LAUNCH for a call that is not part
    of a graph.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[tuple[str, int]] = []
        self.recording: list[float] | None = None
        self.graphs: list[int] = []
        self.waits = 0
        self.shares: list[float | None] = [0.0, 0.0]
        self.clocks = iter([1200, 1980, 1950])
        self.slowed: tuple[Notice, ...] = ()
        self.in_use = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """It is in use."""
        self.in_use = True
        yield
        self.in_use = False

    def contender(
        self, name: str, takes: float | Callable[[], float], count: int = 1, capturable: bool = True
    ) -> list[Callable[[], Any]]:
        """A call for each of `count` copies of the inputs, each returning what tells it."""

        def bind(number: int) -> Callable[[], Any]:
            def call() -> Any:
                assert self.in_use
                seconds = takes() if callable(takes) else takes
                if self.recording is not None:
                    if not capturable:
                        raise RuntimeError("operation not permitted when stream is capturing")
                    self.recording.append(seconds)
                else:
                    self.calls.append((name, number))
                    self.now += max(seconds, LAUNCH)
                return SimpleNamespace(name=name, number=number)

            return call

        return [bind(i) for i in range(count)]

    def wait(self) -> None:
        """Nothing is under way."""
        self.waits += 1

    def event(self) -> float:
        """Now."""
        return self.now

    def seconds(self, start: float, end: float) -> float:
        """Between two events."""
        return end - start

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` would take, all at once and without launches."""
        self.recording = []
        try:
            work()
            taken = list(self.recording)
        finally:
            self.recording = None
        self.graphs.append(len(taken))
        name = f"graph of {len(taken)}"

        def replay() -> None:
            self.calls.append((name, len(self.graphs)))
            self.now += sum(taken)

        return replay

    def clock(self) -> int | None:
        """The next of `clocks`."""
        return next(self.clocks, None)

    def limits(self) -> tuple[Notice, ...]:
        """`slowed`."""
        return self.slowed

    def others(self) -> float | None:
        """The next of `shares`."""
        return self.shares.pop(0)


@pytest.fixture
def gpu() -> Machine:
    """The GPU of the test."""
    return Machine()


# --- copies


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, FEW),
        (100_000, FEW),
        (500_000, MOST),
        (2 * MB, 75),
        (40 * MB, 4),
        (50 * MB, TIMES),
        (150 * MB, 1),
        (1 << 33, 1),
    ],
)
def test_copies_fill_the_cache(size: int, count: int) -> None:
    """There are so many copies that together they are TIMES the L2 cache; as many as can be
    recorded where these still fill it, few where nothing would; and one where one is enough.
    """
    assert copies(size, 50 * MB) == count
    if count not in (1, FEW, MOST):
        assert count * size >= TIMES * 50 * MB > (count - 1) * size
    if count == MOST:
        assert count * size > 50 * MB


def test_every_copy_has_its_turn(gpu: Machine) -> None:
    """Calls go through the copies in order, turn after turn, and what they return is held for a
    turn: outputs rotate, too.
    """
    alive: list[int] = []
    held: set[int] = set()
    most = 0

    class Output:
        def __init__(self, number: int) -> None:
            self.number = number
            held.add(id(self))
            nonlocal most
            most = max(most, len(held))

        def __del__(self) -> None:
            held.discard(id(self))

    def bind(number: int) -> Callable[[], Any]:
        def call() -> Any:
            alive.append(number)
            gpu.now += 1e-2  # long: nothing is recorded
            return Output(number)

        return call

    measure({"a": [bind(i) for i in range(4)]}, 0.0, gpu, rounds=3)
    assert alive == [0, 1, 2, 3] * (len(alive) // 4)
    assert 4 <= most <= 5  # a turn's outputs, and the one that takes the oldest's place
    assert gpu.graphs == []


# --- graphs


@pytest.mark.parametrize(
    ("takes", "count"), [(2e-6, 1), (2e-6, 64), (1e-5, 10), (3e-4, 3), (1.9e-3, 1)]
)
def test_a_short_kernel_is_a_graph(gpu: Machine, takes: float, count: int) -> None:
    """What is reported is the kernel's time and not the launch's; a sample is a replay of whole
    turns, long against the clock.
    """
    measured = measure({"a": gpu.contender("a", takes, count)}, 0.0, gpu, rounds=5)
    assert measured.timings["a"].samples_us == pytest.approx([takes * 1e6] * 5, abs=1e-4)
    assert measured.uncaptured == ()
    nodes = gpu.graphs[-1]
    assert nodes % count == 0
    assert nodes * takes >= min(SAMPLE_SECONDS / 2, device_timing.NODES // count * count * takes)
    assert nodes <= device_timing.NODES


def test_a_graph_of_one_call_too_quick_is_made_longer(gpu: Machine) -> None:
    """Launches hide how short a kernel is: when the first graph turns out to be too short a longer
    one is recorded, once.
    """
    measure({"a": gpu.contender("a", 2e-7)}, 0.0, gpu, rounds=1)
    first, second = gpu.graphs
    assert first == pytest.approx(SAMPLE_SECONDS / LAUNCH, abs=1)
    assert second == pytest.approx(SAMPLE_SECONDS / 2e-7, abs=1)


def test_a_long_kernel_is_called(gpu: Machine) -> None:
    """A kernel that is long against its launch is not recorded, which is no lack."""
    measured = measure({"a": gpu.contender("a", 5e-3, 2)}, 0.0, gpu, rounds=3)
    assert (gpu.graphs, measured.uncaptured) == ([], ())
    assert measured.timings["a"].samples_us == pytest.approx([5000.0] * 3)


def test_what_cannot_be_recorded_is_called(gpu: Machine) -> None:
    """A contender that cannot be part of a graph is timed all the same, launches included, and is
    named; the others are not affected.
    """
    contenders = {
        "a": gpu.contender("a", 2e-6, 4),
        "b": gpu.contender("b", 2e-6, 4, capturable=False),
    }
    measured = measure(contenders, 0.0, gpu, rounds=4)
    assert measured.uncaptured == ("b",)
    assert measured.timings["a"].median_us == pytest.approx(2.0)
    assert measured.timings["b"].median_us == pytest.approx(LAUNCH * 1e6)
    assert gpu.waits == 1  # what went wrong in the recording is waited for


def test_what_breaks_the_gpu_is_raised(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the GPU's own is not taken for a contender that cannot be recorded."""

    def wait() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "wait", wait)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure({"a": gpu.contender("a", 2e-6, capturable=False)}, 0.0, gpu)


def test_an_error_of_a_contender_is_raised(gpu: Machine) -> None:
    """What a contender raises when it is called is the caller's to know."""

    def fails() -> Any:
        raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        measure({"a": [fails]}, 0.0, gpu)


# --- rounds


def test_every_round_has_every_contender_once_in_a_new_order(gpu: Machine) -> None:
    """Each contender gives a sample a round, right after untimed work of its own; the order
    changes, and the seed alone decides it.
    """

    def order(seed: int) -> list[tuple[str, ...]]:
        gpu.calls.clear()
        gpu.shares = [0.0, 0.0]
        measured = measure(
            {name: gpu.contender(name, 5e-3) for name in "abcd"}, 0.0, gpu, rounds=12, seed=seed
        )
        assert {len(t.samples_us) for t in measured.timings.values()} == {12}
        sampled = [name for name, _ in gpu.calls[-2 * 4 * 12 :]]
        assert sampled[::2] == sampled[1::2]
        return [tuple(sampled[i : i + 8 : 2]) for i in range(0, len(sampled), 8)]

    rounds = order(1)
    assert all(set(r) == set("abcd") for r in rounds)
    assert len(set(rounds)) > 6
    assert order(1) == rounds
    assert order(2) != rounds


def test_medians_of_all_samples(gpu: Machine) -> None:
    """All samples are kept, and the median is theirs."""
    pattern = iter([5e-3, 5e-3, *[4e-3, 4e-3, 9e-3, 9e-3, 6e-3, 6e-3, 3e-3, 3e-3, 7e-3, 7e-3]])
    timing = measure({"a": gpu.contender("a", lambda: next(pattern))}, 0.0, gpu, rounds=5).timings[
        "a"
    ]
    assert timing.samples_us == pytest.approx((4000.0, 9000.0, 6000.0, 3000.0, 7000.0))
    assert timing.median_us == pytest.approx(statistics.median(timing.samples_us))


def test_it_goes_on_for_its_seconds(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds go on until the time is over, and there are at least as many as asked for."""
    monkeypatch.setattr(device_timing, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    assert len(
        measure({"a": gpu.contender("a", 5e-3)}, 1.0, gpu, rounds=2).timings["a"].samples_us
    ) in (100, 101)


@pytest.mark.parametrize(
    ("shares", "others", "busy"),
    [
        ([0.9, 0.0], 0.0, False),
        ([0.0, 0.14], 0.14, False),
        ([0.0, 0.16], 0.16, True),
        ([None, None], None, None),
    ],
)
def test_others_on_the_gpu(
    gpu: Machine, shares: list[float | None], others: float | None, busy: bool | None
) -> None:
    """Others' use of the GPU in the measurement marks it busy; what they did before does not, and
    what nobody tells is not known.
    """
    gpu.shares = shares
    measured = measure({"a": gpu.contender("a", 5e-3)}, 0.0, gpu, rounds=1)
    assert (measured.others, measured.busy) == (others, busy)


def test_clocks_are_kept(gpu: Machine) -> None:
    """The clock before, in and after the measurement is among its facts, and nothing where it is
    not told.
    """
    assert measure({"a": gpu.contender("a", 5e-3)}, 0.0, gpu, rounds=2).clocks == (1200, 1980, 1950)
    gpu.shares = [0.0, 0.0]
    assert measure({"a": gpu.contender("a", 5e-3)}, 0.0, gpu, rounds=2).clocks == ()


def test_the_bandwidth_of_a_copy(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read and written over the median time of a copy."""
    import torch

    monkeypatch.setattr(device_timing, "COPY_BYTES", 8 * MB)
    copy = torch.Tensor.copy_

    def timed(self: Any, other: Any) -> Any:
        gpu.now += 4e-3
        assert self.numel() == other.numel() == 4 * MB
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", timed)
    assert copy_bandwidth("cpu", 0.0, gpu) == pytest.approx(8 * MB / 4e-3)


# --- a real one


@pytest.mark.gpu
def test_a_kernel_on_a_gpu() -> None:
    """On a GPU a copy of 64 MB is recorded and its bandwidth is between what the slowest card has
    and what none has; the clock is told.
    """
    import torch

    gpu = Cuda(0)
    x = [torch.ones(16 * MB, device="cuda:0") for _ in range(4)]
    y = [torch.empty_like(t) for t in x]
    measured = measure(
        {"copy": [lambda a=a, b=b: b.copy_(a) for a, b in zip(x, y, strict=True)]}, 0.05, gpu
    )
    assert measured.uncaptured == ()
    assert 50e9 < 2 * 64 * MB / measured.timings["copy"].median_us * 1e6 < 50e12
    assert all(100 < clock < 5000 for clock in measured.clocks)


@pytest.mark.gpu
def test_after_a_failed_recording_on_a_gpu() -> None:
    """A call that waits for the GPU cannot be recorded; it is timed all the same, and what comes
    after it is recorded as ever.
    """
    import torch

    gpu, x = Cuda(0), torch.ones(1 * MB, device="cuda:0")
    for _ in range(2):
        measured = measure(
            {"waits": [lambda: (x * 2).sum().item()], "plain": [lambda: x * 2]}, 0.0, gpu
        )
        assert measured.uncaptured == ("waits",)
        assert measured.timings["plain"].median_us > 0
    assert float((x * 2).sum()) == 2 * MB


@pytest.mark.gpu
def test_a_backward_of_autograds_is_recorded_on_a_gpu() -> None:
    """What autograd records while the GPU is active can be part of a graph."""
    import torch

    gpu = Cuda(0)
    with gpu.active():
        x = torch.ones(1024, 1024, device="cuda:0", requires_grad=True)
        y = torch.nn.functional.layer_norm(x, (1024,)).tanh()
        dy = torch.ones_like(y)
    measured = measure(
        {"backward": [lambda: torch.autograd.grad(y, x, dy, retain_graph=True)]}, 0.0, gpu
    )
    assert measured.uncaptured == ()


# --- what the driver's management library tells

LIBRARY = """
    #include <string.h>
    typedef struct { unsigned pid; unsigned long long memory; unsigned gi, ci; } Process;
    typedef struct {
      unsigned pid;
      unsigned long long time;
      unsigned sm, memory, encoder, decoder;
    } Used;
    static unsigned pids[8], count, mhz;
    static Used used[8];
    static unsigned used_count;
    static int fails;
    static unsigned long long since;
    void fake(unsigned new_mhz, unsigned n, const unsigned *list, int new_fails) {
      mhz = new_mhz, count = n, fails = new_fails, used_count = 0;
      for (unsigned i = 0; i < n; ++i) pids[i] = list[i];
    }
    void fake_used(unsigned pid, unsigned sm, unsigned long long time) {
      used[used_count++] = (Used){pid, time, sm, 0, 0, 0};
    }
    unsigned long long fake_since(void) { return since; }
    int nvmlInit_v2(void) { return 0; }
    int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
      *device = &mhz;
      return strcmp(uuid, "GPU-known") ? 6 : 0;
    }
    int nvmlDeviceGetClockInfo(void *device, int type, unsigned *clock) {
      *clock = mhz;
      return device == &mhz && type == 1 ? fails : 2;
    }
    int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, Process *found) {
      (void)device;
      for (unsigned i = 0; i < count && i < *n; ++i) found[i].pid = pids[i];
      *n = count;
      return fails;
    }
    int nvmlDeviceGetProcessUtilization(void *device, Used *found, unsigned *n,
                                        unsigned long long last) {
      (void)device;
      since = last;
      memcpy(found, used, sizeof used);
      *n = used_count;
      return used_count ? 0 : 6;
    }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that says what a test tells it to say."""
    folder = tmp_path_factory.mktemp("nvml")
    source, path = folder / "nvml.c", folder / "libnvml.so"
    source.write_text(textwrap.dedent(LIBRARY))
    toolchain.run_compiler(["-x", "c", "-shared", "-fPIC", str(source)], path)
    return path


@pytest.mark.parametrize(
    ("uuid", "name"), [("GPU-unknown", "library"), ("GPU-known", "libno-such-thing.so")]
)
def test_nothing_is_made_up(uuid: str, name: str, library: Path) -> None:
    """Without the library, or for a GPU it does not know, every answer is None."""
    nvml = Nvml(uuid, str(library) if name == "library" else name)
    assert (nvml.clock(), nvml.others()) == (None, None)


def test_the_clock(library: Path) -> None:
    """The multiprocessors' clock in MHz; None when the library refuses to say."""
    calls, nvml = ctypes.CDLL(str(library)), Nvml("GPU-known", str(library))
    calls.fake(1755, 0, None, 0)
    assert nvml.clock() == 1755
    calls.fake(1755, 0, None, 3)
    assert nvml.clock() is None
    assert nvml.others() is None


@pytest.mark.parametrize(
    ("running", "used", "others"),
    [
        ([], [], 0.0),
        (["me"], [], 0.0),
        ([77], [], 0.0),  # in a container: this process under another name
        ([77, 78], [], None),  # and here nobody knows which
        (["me", 77], [], 0.0),  # idle
        (["me", 77], [("me", 90), (77, 40)], 0.4),
        # the busiest of a process's samples, together no more than all
        (["me", 77, 78], [(77, 40), (77, 20), (78, 90)], 1.0),
        (["me", 77], [(77, 4_000_000_000)], 0.0),  # rubbish
    ],
)
def test_who_else_is_there(
    running: list[Any], used: list[tuple[Any, int]], others: float | None, library: Path
) -> None:
    """The share of the multiprocessors that other processes use, as far as it can be told from this
    one's.
    """
    calls, nvml = ctypes.CDLL(str(library)), Nvml("GPU-known", str(library))
    pids = [os.getpid() if p == "me" else p for p in running]
    calls.fake(1000, len(pids), (ctypes.c_uint * 8)(*pids), 0)
    for i, (pid, share) in enumerate(used):
        calls.fake_used(
            os.getpid() if pid == "me" else pid, ctypes.c_uint(share), ctypes.c_ulonglong(1000 + i)
        )
    assert nvml.others() == (None if others is None else pytest.approx(others))


def test_only_what_was_used_since_the_last_question(library: Path) -> None:
    """Each question is about the time since the one before."""
    calls, nvml = ctypes.CDLL(str(library)), Nvml("GPU-known", str(library))
    calls.fake_since.restype = ctypes.c_ulonglong
    calls.fake(1000, 2, (ctypes.c_uint * 8)(os.getpid(), 77), 0)
    calls.fake_used(77, 50, ctypes.c_ulonglong(123_456))
    nvml.others()
    assert calls.fake_since() == 0
    nvml.others()
    assert calls.fake_since() == 123_456
