"""Work on a GPU recorded as a CUDA graph; where that fails, PyTorch is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_failed: list[Any] = []
"""Graphs whose recording broke off, kept for ever: PyTorch's allocator of pinned memory may go on
asking them whether they still record.
"""


def record(
    work: Callable[[], Any],
    stream: Any,
    mode: str = "global",
    pool: Any = None,
    tidy: bool = True,
) -> Callable[[], None]:
    """A function that has the GPU do again what `work` has it do, on the stream that is current
    then.

    `stream` is a torch.cuda.Stream for the recording, on which `work` was done once before; `mode`
    is the capture_error_mode of torch.cuda.graph; `pool` is where `work` allocates, a pool of its
    own by default; not `tidy`, PyTorch's allocator keeps what it has cached for others.

    Raises:
        Exception: whatever `work`, or the driver because of it, raises. Nothing is recorded then.
    """
    import torch

    current = torch.cuda.current_stream(stream.device)
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    recording = torch.cuda.graph if tidy else _recording
    try:
        with recording(graph, pool=pool, stream=stream, capture_error_mode=mode):
            work()
    except BaseException:
        torch.cuda.set_stream(current)  # PyTorch may leave the recording's current
        if not _ended(graph):
            _broke_off(graph, stream.device.index, pool)
        raise
    replay: Callable[[], None] = graph.replay
    return replay


@contextlib.contextmanager
def _recording(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
    """torch.cuda.graph but for its first step, which waits for the GPU and gives all cached memory
    back.
    """
    import torch

    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode=capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()


def _ended(graph: Any) -> bool:
    """True where the recording itself went well and only `work` raised something: the graph then
    gives its memory back when it goes.

    Giving it back a second time would end the process: PyTorch counts, and finds out in a
    destructor.
    """
    try:
        graph.pool()  # refuses before the recording has ended
        return True
    except RuntimeError:
        return False


def _broke_off(graph: Any, device: int, pool: Any) -> None:
    """End what a broken recording leaves behind: an allocator that acts as if it were under way,
    and a pool that is never given back.
    """
    import torch

    _failed.append(graph)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        # private; and the recording may have broken before there was a pool
        with contextlib.suppress(Exception):
            getattr(torch._C, name)(device, pool)
