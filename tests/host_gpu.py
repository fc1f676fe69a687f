"""A GPU for measuring that is this machine: the clock is the CPU's, a graph is its calls, and
nothing is cached that must not be.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from lntune.system.surroundings import Notice

broken: list[str] = []
"""What an imagined GPU's context was broken by; every later wait says so, as CUDA does."""


class HostGpu:
    """Stands in the place of device_timing.Cuda where kernels run in the emulator."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal

    def active(self) -> contextlib.AbstractContextManager[None]:
        """It always is."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Everything is done when it was called."""
        if broken:
            raise RuntimeError(f"CUDA error: {broken[0]}")

    def event(self) -> Any:
        """Now."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two events."""
        return float(end - start)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The calls, made now as a recording would not, and at every replay."""
        return work

    def clock(self) -> int | None:
        """An imagined clock."""
        return 1980

    def limits(self) -> tuple[Notice, ...]:
        """Nothing."""
        return ()

    def others(self) -> float | None:
        """Nobody else."""
        return 0.0
