"""How many threads share the work of this thread, PyTorch's operators and kernels alike.

What a check computes beside the kernel takes a thread a few milliseconds; shared by a team of
OpenMP's on a machine that others use, it waits at the end of each operator for those of the team
whose turn has not come, which may take seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

Whole = Callable[[], contextlib.AbstractContextManager[None]]
"""A block in which all of a thread's team work again."""


@contextlib.contextmanager
def alone() -> Iterator[Whole]:
    """In the block this thread works alone, but for the blocks `with whole():` of what it gives.

    OpenMP has a number for each thread. torch.set_num_threads sets it, and also the number that
    threads begin with which start, or do their first work, meanwhile: so OpenMP itself is told.
    Where PyTorch does not share its OpenMP with the process, nothing changes.
    """
    import torch

    several, put = torch.get_num_threads(), _setter()
    if put is None or several == 1:
        yield contextlib.nullcontext
        return

    @contextlib.contextmanager
    def number(inside: int, after: int) -> Iterator[None]:
        put(inside)
        try:
            yield
        finally:
            put(after)

    with number(1, several):
        yield lambda: number(several, 1)


def of(threads: int) -> None:
    """Have so many threads share the work of this thread, where that can be had without a change
    for others.
    """
    import torch

    torch.get_num_threads()  # has PyTorch look at its own number for the last time
    if (put := _setter()) is not None:
        put(threads)


def _setter() -> Callable[[int], Any] | None:
    """OpenMP's function, for this thread alone; None where the process has none."""
    try:
        return ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows
        return None
