"""The GPU architectures code is generated for, with what one of their multiprocessors holds."""

from __future__ import annotations

import msgspec

from lntune.errors import unknown

WARP = 32
THREADS_PER_BLOCK = 1024
REGISTERS = 65536
"""32-bit registers of a multiprocessor, and the most one block may have."""
REGISTERS_PER_THREAD = 255
REGISTER_UNIT = 256
"""Registers are given to a warp in multiples of this."""
PARTITIONS = 4
"""A multiprocessor's registers are split among this many schedulers; a warp stays with one."""

_KB = 1024


class Architecture(msgspec.Struct, frozen=True):
    """One architecture: `warps`, `blocks`, `shared` and `barriers` are what a multiprocessor holds
    at once.

    `shared_block` is the most one block may ask for (beyond 48 KB it has to be dynamic and opted
    into); `shared_unit` is the granularity of its allocation, `shared_reserved` what the system
    takes of each block. Bytes all.
    """

    name: str
    family: str
    warps: int
    blocks: int
    shared: int
    shared_block: int
    shared_unit: int
    shared_reserved: int
    barriers: int

    @property
    def virtual(self) -> str:
        """The architecture its PTX is written for."""
        return self.name.replace("sm_", "compute_")

    @property
    def threads(self) -> int:
        """Threads a multiprocessor holds at once."""
        return self.warps * WARP


# The first four numbers are from the table "Technical Specifications per Compute Capability" of the
# CUDA C++ Programming Guide 13.0, the last three from cuda_occupancy.h of the same release, which
# also agrees on the first four.
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_75", "Turing", 32, 16, 64 * _KB, 64 * _KB, 256, 0, 32),
        Architecture("sm_80", "Ampere", 64, 32, 164 * _KB, 163 * _KB, 128, _KB, 64),
        Architecture("sm_86", "Ampere", 48, 16, 100 * _KB, 99 * _KB, 128, _KB, 16),
        Architecture("sm_89", "Ada", 48, 24, 100 * _KB, 99 * _KB, 128, _KB, 24),
        Architecture("sm_90", "Hopper", 64, 32, 228 * _KB, 227 * _KB, 128, _KB, 64),
        Architecture("sm_100", "Blackwell", 64, 32, 228 * _KB, 227 * _KB, 128, _KB, 64),
        Architecture("sm_120", "Blackwell", 48, 24, 100 * _KB, 99 * _KB, 128, _KB, 24),
    )
}
"""Name -> architecture, in the order of compute capability."""


def architecture(name: str) -> Architecture:
    """The architecture of a name such as "sm_90".

    Raises:
        UnknownNameError: it is not in the table.
    """
    if name not in ARCHITECTURES:
        raise unknown("CUDA architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
