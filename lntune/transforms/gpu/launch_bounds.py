"""Fewer registers for a thread than the compiler would take, so that a multiprocessor holds more
blocks.

How many blocks fit follows from a thread's registers in steps, and between two steps fewer
registers win nothing. So the compiler is told the blocks (`__launch_bounds__(threads, blocks)`,
which nvcc and NVRTC of every release take), as many as fit with so many registers. What it then
cannot keep it spills, or computes again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD
from lntune.knobs import knob

ATTRIBUTE = "lntune_max_registers"
"""Attribute of a scheduled PrimFunc: registers of a thread of its first kernel, at most about."""
VALUES = (0, 64, 80, 96, 128, 168)
"""For knobs; 0 leaves it to the compiler."""
_GRANULE = 8  # registers of a thread are a multiple of this


def limit() -> Any:
    """The knob of schedules whose kernels may be limited."""
    return knob(
        0,
        VALUES,
        "registers of a thread, at most about: as few as it takes for as many blocks to a"
        " multiprocessor as would fit with so many; 0: as the compiler likes",
        last=True,
    )


def allowed(most: int, threads: int) -> int:
    """The registers that the compiler may take where as many blocks of threads are to fit as would
    with `most` registers each.
    """
    blocks = max(1, REGISTERS // (threads * most)) if most else 1
    return min(REGISTERS_PER_THREAD, REGISTERS // (threads * blocks) // _GRANULE * _GRANULE)


def reason_invalid(
    most: int, threads: int, needed: int, values: Sequence[int] = VALUES
) -> str | None:
    """Why a thread's registers should not be limited to `most`, or None; `needed` are those that it
    has to have in any case.
    """
    if not most:
        return None
    if needed > most:
        return f"{needed} registers for a thread's part of the row alone; {most} are to be the most"
    if allowed(most, threads) >= allowed(0, threads):
        return f"{threads} threads do not leave room for a second block with {most} registers each"
    alike = max(value for value in values if value <= allowed(most, threads))
    if alike != most:
        return f"with {most} registers a thread as many blocks fit as with {alike}"
    return None


def request(module: Any, most: int) -> Any:
    """The scheduled IRModule whose first kernel is compiled for as many blocks as `most` registers
    a thread allow; 0 leaves it as it is.
    """
    return type(module)({"main": module["main"].with_attr(ATTRIBUTE, most)}) if most else module


def apply(module: Any, source: str, kernel: str) -> str:
    """CUDA source of a module, whose first kernel is `kernel`, with what was requested."""
    attributes = module["main"].attrs
    if not attributes or ATTRIBUTE not in attributes:
        return source
    most = int(attributes[ATTRIBUTE])

    def bounds(match: re.Match[str]) -> str:
        return f"__launch_bounds__({match[1]}, {REGISTERS // (int(match[1]) * most)})"

    return re.sub(rf"__launch_bounds__\((\d+)\)(?= {kernel}\()", bounds, source)
