"""Work on a GPU recorded as a CUDA graph, which leaves PyTorch as it was where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


def record(work: Callable[[], Any], stream: Any, mode: str = "global") -> Callable[[], None]:
    """A function that has the GPU do again what `work` has it do, on the stream that is current then.

    `stream` is a torch.cuda.Stream for the recording, on which `work` was done once before; `mode` is the capture_error_mode of
    torch.cuda.graph.

    Raises:
        Exception: whatever `work`, or the driver because of it, raises. Nothing is recorded then.
    """
    import torch

    current = torch.cuda.current_stream(stream.device)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            work()
    except BaseException:
        # PyTorch leaves the stream current and its allocator as if a capture were under way.
        torch.cuda.set_stream(current)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(Exception):  # private, and already done where the capture itself went well
                getattr(torch._C, name)(stream.device.index, pool)
        raise
    replay: Callable[[], None] = graph.replay
    return replay
