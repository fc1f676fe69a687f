"""The registers and memory that a kernel takes, from the log of ptxas -v."""

from __future__ import annotations

import re
from itertools import zip_longest

import msgspec


class Resources(msgspec.Struct, frozen=True):
    """Registers of a thread, memory in bytes, and barriers of one kernel.

    The stack frame is each thread's: arrays indexed by what is only known at run time, spilled
    registers, calls. The bytes of spills are instructions times their width, so they may exceed the
    frame. Constant memory counts all banks, and so the arguments; ptxas 13 reports it up to sm_89
    only, and beyond it is None.
    """

    kernel: str
    arch: str
    registers: int
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    constant_bytes: int | None = None
    barriers: int = 0

    @property
    def spilled_bytes(self) -> int:
        """Bytes that are spilled: what is stored is loaded again, once or more often."""
        return max(self.spill_store_bytes, self.spill_load_bytes)


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
# Old releases write "4096+16 bytes smem": what the source declares, and what the system adds.
_AMOUNT = r"(\d+)(?:\+(\d+))? bytes "


def _sum(what: str, text: str) -> int:
    """All bytes of a kind on a line."""
    return sum(int(a) + int(b or 0) for a, b in re.findall(_AMOUNT + what, text))


def parse(log: str) -> dict[str, Resources]:
    """Kernel -> its resources, from the log of ptxas -v (nvcc's or NVRTC's) for one architecture.

    Functions a kernel calls are listed after it: their spills are added to the kernel's, and its
    stack is the deepest that is reported. Lines of another form are passed over, and a kernel whose
    registers are not reported is left out.
    """
    parsed: dict[str, Resources] = {}
    # Everything up to the next entry belongs to one kernel.
    starts = [*_ENTRY.finditer(log)]
    for entry, following in zip_longest(starts, starts[1:]):
        text = log[entry.end() : following.start() if following else len(log)]
        used = _USED.search(text)
        if not used:
            continue
        line = text[used.start() :].partition("\n")[0]
        frames = [tuple(map(int, m)) for m in _FRAME.findall(text)]
        barriers = re.search(r"used (\d+) barriers", line)
        parsed[entry[1]] = Resources(
            kernel=entry[1],
            arch=entry[2],
            registers=int(used[1]),
            stack_bytes=max([_sum("cumulative stack size", line), *(f[0] for f in frames)]),
            spill_store_bytes=sum(f[1] for f in frames),
            spill_load_bytes=sum(f[2] for f in frames),
            shared_bytes=_sum("smem", line),
            constant_bytes=_sum(r"cmem\[\d+\]", line) if "cmem" in line else None,
            barriers=int(barriers[1]) if barriers else 0,
        )
    return parsed
