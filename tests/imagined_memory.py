"""Memory as PyTorch's allocator on a GPU hands it out, for tests that depend on addresses."""

from __future__ import annotations

import ctypes
import heapq
import weakref
from collections import defaultdict

import torch

_GRAIN = 512
"""Bytes of which all that is handed out is a multiple, and to which it is aligned."""


class Memory:
    """What is given back is handed out again, to the next who asks for as much, the lowest address
    first. It is overwritten by NaNs at once: nobody may read there any more.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        self._all = ctypes.create_string_buffer(size + _GRAIN)
        self._end = -(-ctypes.addressof(self._all) // _GRAIN) * _GRAIN
        self._last = self._end + size
        self._free: dict[int, list[int]] = defaultdict(list)
        self.held = 0

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor whose memory comes back when nobody has it, nor a view of it."""
        size = max(1, torch.Size(shape).numel()) * dtype.itemsize
        rounded = -(-size // _GRAIN) * _GRAIN
        if self._free[rounded]:
            start = heapq.heappop(self._free[rounded])
        else:
            start, self._end = self._end, self._end + rounded
            assert self._end <= self._last, "the imagined memory is too small for the test"
        block = type("Block", (ctypes.c_char * size,), {}).from_address(start)
        self.held += 1
        weakref.finalize(block, self._give_back, start, rounded).atexit = False
        return torch.frombuffer(block, dtype=dtype)[: torch.Size(shape).numel()].view(shape)

    def like(self, t: torch.Tensor) -> torch.Tensor:
        """torch.empty_like."""
        return self.empty(*t.shape, dtype=t.dtype)

    def copy(self, t: torch.Tensor) -> torch.Tensor:
        """A contiguous copy, in float32."""
        return self.empty(*t.shape).copy_(t)

    def _give_back(self, start: int, size: int) -> None:
        ctypes.memset(start, 0xFF, size)
        heapq.heappush(self._free[size], start)
        self.held -= 1
