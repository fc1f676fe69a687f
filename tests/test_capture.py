"""Recording work as a CUDA graph, with a PyTorch that is imagined: it keeps account of streams,
recordings and pools as PyTorch's own does.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lntune.backends.cuda import capture

DEVICE = SimpleNamespace(index=0)


class Imagined:
    """What torch.cuda and its allocator know; `count` has for each pool how many graphs use it, as
    CUDACachingAllocator.cpp does.
    """

    def __init__(self) -> None:
        self.current: Any = "default"
        self.recording: list[int] = []
        self.count: dict[int, int] = {}
        self.pools = self.tidied = 0
        self.breaks = self.refuses = False

    def handle(self) -> int:
        self.pools += 1
        return self.pools

    def end(self, _: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, _: int, pool: int) -> None:
        if pool not in self.count:
            raise RuntimeError("no such pool")
        self.count[pool] -= 1

    def graph_type(self) -> type:
        """torch.cuda.CUDAGraph: pools are taken when a recording begins and given back with the
        graph whose recording ended well.
        """
        outer = self

        class Graph:
            used = 0
            ended = False
            replays = 0

            def capture_begin(self, pool: int, capture_error_mode: str = "global") -> None:
                if outer.refuses:
                    raise RuntimeError("CUDA graphs must be captured on a non-default stream")
                outer.count[pool] = outer.count.get(pool, 0) + 1
                outer.recording.append(pool)
                self.used = pool

            def capture_end(self) -> None:
                if outer.breaks:
                    raise RuntimeError(
                        "CUDA error: operation failed due to a previous error during capture"
                    )
                outer.end(0, self.used)
                self.ended = True

            def pool(self) -> int:
                if not self.ended:
                    raise RuntimeError(
                        "Called CUDAGraph::pool() without a preceding successful capture."
                    )
                return self.used

            def replay(self) -> None:
                self.replays += 1

            def __del__(self) -> None:
                if self.ended:
                    outer.release(0, self.used)

        return Graph

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """torch.cuda.graph: like it, this restores the stream only after a recording that ended
        well.
        """
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self.tidied += 1
        before, self.current = self.current, stream
        graph.capture_begin(pool)
        try:
            yield
        finally:
            graph.capture_end()
            self.current = before


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> Iterator[Imagined]:
    """In the place of torch.cuda's functions that are used."""
    fake = Imagined()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: fake.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(fake, "current", stream))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.graph_type())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", fake.handle)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release, raising=False)
    monkeypatch.setattr(capture, "_failed", [])
    yield fake
    capture._failed.clear()
    gc.collect()
    assert fake.current == "default"
    assert fake.recording == []
    assert set(fake.count.values()) <= {0}  # each pool given back, and once


def stream() -> Any:
    """A stream to record on."""
    return SimpleNamespace(device=DEVICE)


def test_a_recording(imagined: Imagined) -> None:
    """Work is done once, on the stream given; what comes back replays it, and its memory stays
    until that is gone.
    """
    seen: list[Any] = []
    chosen = stream()
    replay: Callable[[], None] | None = capture.record(
        lambda: seen.append(imagined.current), chosen
    )
    assert replay is not None and seen == [chosen]
    assert imagined.count == {1: 1}
    replay()
    assert replay.__self__.replays == 1  # type: ignore[attr-defined]
    del replay


def fails() -> None:
    """Work that goes wrong without CUDA's noticing."""
    raise ValueError("wrong shape")


def test_work_that_fails_in_python(imagined: Imagined) -> None:
    """The recording itself ends well; the graph gives its pool back, and nobody else does: PyTorch
    would end the process for that.
    """
    with pytest.raises(ValueError, match="wrong shape"):
        capture.record(fails, stream())
    assert capture._failed == []


@pytest.mark.parametrize("work", [fails, lambda: None], ids=["and Python's", "CUDA's alone"])
def test_a_recording_that_breaks_off(imagined: Imagined, work: Callable[[], None]) -> None:
    """Where CUDA gives the recording up PyTorch gives nothing back: that is done here, and the
    graph is kept, since it may be asked later.
    """
    imagined.breaks = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture.record(work, stream())
    assert len(capture._failed) == 1
    imagined.breaks = False
    capture.record(lambda: None, stream())


def test_a_recording_that_does_not_begin(imagined: Imagined) -> None:
    """A refusal before there is a pool leaves the current stream as it was."""
    imagined.refuses = True
    with pytest.raises(RuntimeError, match="non-default stream"):
        capture.record(lambda: None, stream())


@pytest.mark.parametrize("breaks", [False, True])
def test_two_recordings_of_one_pool(imagined: Imagined, breaks: bool) -> None:
    """Each counts as a user of the pool, and one that breaks off gives back its own share. What is
    not tidy leaves the allocator's cache alone.
    """
    pool, chosen = imagined.handle(), stream()
    first: Callable[[], None] | None = capture.record(lambda: None, chosen, pool=pool)
    assert imagined.tidied == 1
    imagined.breaks = breaks
    try:
        second = capture.record(lambda: None, chosen, "thread_local", pool, tidy=False)
    except RuntimeError:
        assert breaks
        second = None
    assert imagined.tidied == 1 and imagined.current == "default"
    assert imagined.count == {pool: 1 + (second is not None)}
    del second
    assert imagined.count == {pool: 1}
    del first
