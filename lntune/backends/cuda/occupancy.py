"""How many blocks of a kernel a multiprocessor holds at once, by the limits NVIDIA documents."""

from __future__ import annotations

import msgspec

from lntune.architectures import (
    PARTITIONS,
    REGISTER_UNIT,
    REGISTERS,
    REGISTERS_PER_THREAD,
    THREADS_PER_BLOCK,
    WARP,
    architecture,
)
from lntune.errors import InputError, got_expected

_BARRIERS_LIMIT_FROM = 90
"""From sm_90 on NVIDIA counts named barriers among the limits."""


class Occupancy(msgspec.Struct, frozen=True):
    """Resident blocks and warps of a multiprocessor, and what keeps another block out.

    `limited_by` holds one or more of "warps", "blocks", "registers", "shared memory", "barriers";
    `refused` says why not even one block can run, and is empty otherwise.
    """

    blocks: int
    warps: int
    max_warps: int
    limited_by: tuple[str, ...]
    refused: str = ""

    @property
    def share(self) -> float:
        """Resident warps as a share of the most there can be."""
        return self.warps / self.max_warps


def _up(value: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-value // unit) * unit


def occupancy(
    arch: str,
    registers: int,
    threads: int,
    shared: int = 0,
    dynamic_shared: int = 0,
    barriers: int = 0,
) -> Occupancy:
    """Theoretical occupancy from registers a thread, threads a block, and bytes of static and
    dynamic shared memory a block.

    The limits are those of the table "Technical Specifications per Compute Capability" in the CUDA
    C++ Programming Guide 13.0 (docs.nvidia.com/cuda/cuda-c-programming-guide, chapter Compute
    Capabilities); granularities and the order of rounding are those of
    cudaOccMaxActiveBlocksPerMultiprocessor in cuda_occupancy.h of the same release. Assumed are the
    largest carveout of shared memory, and that a kernel with more than 48 KB of it has been opted
    in (cudaFuncAttributeMaxDynamicSharedMemorySize).

    Raises:
        UnknownNameError: the architecture is not in the table.
        InputError: a number is negative, or there are no threads.
    """
    a = architecture(arch)
    if threads < 1:
        raise InputError(got_expected("threads", threads, "at least 1"))
    for name, value in (
        ("registers", registers),
        ("shared", shared),
        ("dynamic_shared", dynamic_shared),
        ("barriers", barriers),
    ):
        if value < 0:
            raise InputError(got_expected(name, value, "0 or more"))
    warps = -(-threads // WARP)
    per_warp = _up(registers * WARP, REGISTER_UNIT)
    # The hardware checks a launch as if every scheduler got as many warps as the one with most.
    per_block = per_warp * _up(warps, PARTITIONS)
    asked = shared + dynamic_shared
    allocated = _up(asked + a.shared_reserved, a.shared_unit)
    refused = ""
    if threads > THREADS_PER_BLOCK:
        refused = f"{threads} threads a block, at most {THREADS_PER_BLOCK}"
    elif registers > REGISTERS_PER_THREAD:
        refused = f"{registers} registers a thread, at most {REGISTERS_PER_THREAD}"
    elif per_block > REGISTERS:
        refused = (
            f"{threads} threads of {registers} registers need {per_block} a block, at most"
            f" {REGISTERS}"
        )
    elif allocated > a.shared_block + a.shared_reserved:
        refused = f"{asked} bytes of shared memory a block, at most {a.shared_block}"
    if refused:
        return Occupancy(0, 0, a.warps, (), refused)
    limits = {"warps": a.warps // warps, "blocks": a.blocks}
    if per_warp:
        limits["registers"] = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    if allocated:
        limits["shared memory"] = a.shared // allocated
    if barriers and int(a.name.removeprefix("sm_")) >= _BARRIERS_LIMIT_FROM:
        limits["barriers"] = a.barriers // barriers
    blocks = min(limits.values())
    return Occupancy(
        blocks,
        blocks * warps,
        a.warps,
        tuple(name for name, most in limits.items() if most == blocks),
    )
