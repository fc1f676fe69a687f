"""Which candidates for a GPU to measure first, by what is known of them without it.

A guess, made to be overruled by the first measurement: these kernels are bound by memory, and a
kernel reaches the memory's bandwidth when enough bytes are under way at any moment (Little's law),
in wide accesses, on all multiprocessors until the end. The score is the product of

- bytes in flight: what the resident blocks of a multiprocessor have to read, no more than their
  registers and shared memory can hold, as a share of IN_FLIGHT;
- width: the mean width of global accesses as a share of 16 bytes, weighing half;
- balance: the share of the multiprocessors' time that is not spent waiting for the last wave of
  blocks;
- occupancy, weighing a tenth, since other warps hide the exchange of sums;
- a loss of 2 % for each doubling of a block's threads beyond a warp: its barriers.

None of it has been fitted to measurements. It does not exclude: see
candidate_facts.Facts.problems for what does.
"""

from __future__ import annotations

import math

from lntune import ops
from lntune.architectures import WARP
from lntune.case import Case
from lntune.device import Device
from lntune.kernels.candidate_facts import Facts

IN_FLIGHT = 40_000
"""Bytes under way that keep one multiprocessor's share of the memory busy: 8 TB/s x 0.8 us / 148 on
a B200, the most there is; 18,000 on an H100.
"""
WIDEST = 128
"""Bits of an access."""


def score(facts: Facts, case: Case, device: Device) -> float:
    """0 (cannot run) to 1; of several kernels, that of the one with most blocks, which has most to
    do.
    """
    number = max(
        range(len(facts.kernels)), key=lambda i: facts.blocks[i] * facts.kernels[i].threads
    )
    kernel, blocks = facts.kernels[number], facts.blocks[number]
    resident = kernel.occupancy.blocks
    if not resident or not blocks:
        return 0.0
    per_block = ops.get(case.op).bytes(case) / 2 / blocks
    held = (
        kernel.resources.registers * 4 * kernel.threads / 2
        + kernel.resources.shared_bytes
        + kernel.dynamic_shared
    )
    present = min(resident, math.ceil(blocks / device.cores))
    flight = min(1.0, present * min(per_block, held) / IN_FLIGHT)
    waves = blocks / (device.cores * resident)
    balance = waves / math.ceil(waves)
    if waves < 1:  # one wave: what counts is how many multiprocessors have something to do
        balance = min(1.0, blocks / device.cores)
    loss = 1 - 0.02 * math.log2(max(1.0, kernel.threads / WARP))
    return (
        flight * (0.5 + 0.5 * _width(facts)) * balance * (0.9 + 0.1 * kernel.occupancy.share) * loss
    )


def _width(facts: Facts) -> float:
    """Mean width of the accesses to global memory, weighed by their bits, as a share of the
    widest.
    """
    counts = [
        item
        for k in facts.kernels
        for widths in (k.code.global_loads, k.code.global_stores)
        for item in widths.items()
    ]
    bits = sum(width * count for width, count in counts)
    return (
        min(1.0, sum(width * width * count for width, count in counts) / bits / WIDEST)
        if bits
        else 1.0
    )
