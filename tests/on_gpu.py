"""A GPU for the tests of tests/test_on_gpu_*.py: the real one, or one that is imagined on the CPU.

What only a GPU can show carries the marker `gpu` and is skipped where there is none. But a test
that was never executed is worth little, so each runs on the imagined GPU of tests/fake_gpu.py too,
on sizes that an emulator can bear: that shows that the test itself works, and everything above the
driver. `here.real` tells which it is; streams and graphs, which the imagined GPU does not have, are
then plain calls.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu

from lntune.backends.cuda import launcher
from lntune.case import Case
from lntune.device import Device, usable_cores
from lntune.kernels import cache
from lntune.schedule import Schedule
from lntune.torch import devices, dispatch, graphs


@dataclass
class Here:
    """The GPU: `name` is what PyTorch calls the device of its tensors, `fake` the imagined
    machine.
    """

    name: str
    device: Device
    fake: FakeGpu | None = None

    @property
    def real(self) -> bool:
        """True on a GPU, False on the imagined one."""
        return self.fake is None

    def pick(self, real: Any, imagined: Any) -> Any:
        """One of two sizes, lists of cases, names."""
        return real if self.real else imagined

    def kernels(
        self, cases: Iterable[tuple[Schedule, Case]]
    ) -> Iterator[tuple[Case, Callable[..., None]]]:
        """Each case with its schedule's kernel of default knobs. All are built first, on all cores:
        a GPU's compiler takes seconds for each.
        """
        wanted = [
            (case, plan, plan.default(case, self.device), self.device) for plan, case in cases
        ]
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda one: cache.prepare(*one), wanted))
        for one in wanted:
            yield one[0], cache.kernel(*one)

    def wait(self) -> None:
        """Until everything launched is done; what went wrong in it is raised here."""
        if self.real:
            torch.cuda.synchronize(self.name)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """In the block a new stream is the current one; behind it the default stream waits for
        it.
        """
        return _stream(self.name) if self.real else contextlib.nullcontext()

    def graph(self, call: Callable[[], None]) -> Callable[[], None]:
        """A call recorded as a CUDA graph, to be replayed; what it computes has to go to tensors
        that stay.
        """
        if not self.real:
            return call
        with self.stream():
            for _ in range(3):
                call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def launches(self) -> int:
        """Kernels launched by lntune since it was asked last; only the imagined driver counts them,
        a real one says at least one.
        """
        return (
            1
            if self.fake is None
            else sum(line.startswith("cuLaunchKernel") for line in self.fake.log())
        )


class Recorder:
    """lntune.torch.graphs.Recorder without a GPU: a graph is work done again, on the memory where
    its tensors were when it was captured, whoever holds that now.
    """

    def __init__(self, device: torch.device) -> None:
        """As the real one; all graphs here are the CPU's."""

    def first(
        self,
        work: Callable[..., Any],
        tensors: Sequence[torch.Tensor | None],
        outputs: Sequence[torch.Tensor],
    ) -> Callable[[], None]:
        """A function that does the work again on the same addresses."""
        arguments = [None if t is None else _at_its_address(t) for t in tensors]
        into = [_at_its_address(t) for t in outputs]
        return lambda: work(arguments, into)

    another = first


def _at_its_address(t: torch.Tensor) -> torch.Tensor:
    """A tensor on the same memory, which it does not keep alive."""
    if not t.numel():
        return torch.empty_like(t)
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    memory = (ctypes.c_char * ((last + 1) * t.element_size())).from_address(t.data_ptr())
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, t.stride())


@contextlib.contextmanager
def _stream(name: str) -> Iterator[None]:
    default, stream = torch.cuda.current_stream(name), torch.cuda.Stream(name)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


@pytest.fixture(params=["imagined", pytest.param("cuda", marks=pytest.mark.gpu)])
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """The GPU of the test."""
    with gpu(request, monkeypatch) as place:
        yield place


@contextlib.contextmanager
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """The GPU that a fixture's parameter names. On the imagined one, tensors of the CPU are that
    GPU's: lntune's calls on them go to its kernels.
    """
    if request.param == "cuda":
        torch.cuda.init()
        dispatch.reload()
        yield Here("cuda:0", launcher.device(0))
        torch.cuda.synchronize()
        return
    fake = request.getfixturevalue("fake_gpu")
    device = launcher.device(0)
    monkeypatch.setattr(devices, "_known", lambda kind, index: device if kind == "cpu" else None)
    monkeypatch.setattr(graphs, "Recorder", Recorder)
    dispatch.reload()
    yield Here("cpu", device, fake)
    monkeypatch.undo()
    dispatch.reload()


__all__ = ["Here", "Recorder", "gpu", "here"]
