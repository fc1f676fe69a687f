"""What a time comes to beside what the device can do: bandwidth, shares of a copy's, operations."""

from __future__ import annotations

import math

from lntune import ops
from lntune.case import Case
from lntune.compare.comparison import Measurement
from lntune.compare.sides import Held
from lntune.timing import pairwise


def least(case: Case) -> tuple[int, int]:
    """(bytes that must cross the memory bus, operations) of a case; zeros where its operator is not
    known any more.
    """
    if case.op not in ops.OPS:
        return 0, 0
    op = ops.get(case.op)
    return op.bytes(case), op.flops(case)


def of_copy(case: Case, faster: float | None) -> float | None:
    """The bandwidth of an op as a share of a copy's, from how many times faster it is than a copy
    of one of its tensors.
    """
    if faster is None or case.op not in ops.OPS:
        return faster
    sizes = [
        math.prod(a.sizes(1, case.hidden))
        for a in ops.get(case.op).arguments(case)
        if len(a.shape) > 1
    ]
    return faster * sum(sizes) / (2 * sizes[0])  # the first is what is copied, in and out


def measurement(case: Case, held: Held) -> Measurement:
    """One side of a case with its figures."""
    record, us = held.record, held.timing.median_us
    moved, flops = least(case)
    copy = record.timings.get("copy")
    if held.timing is copy:  # which does not do what the operator does
        moved, flops, copy = 0, 0, None
    return Measurement(
        us=us,
        schedule=held.schedule,
        knobs=held.knobs,
        gbps=moved / us / 1e3 if moved and us else None,
        of_copy=of_copy(case, pairwise(copy, held.timing)),
        gflops=flops / us / 1e3 if flops and us else None,
        instructions=held.instructions,
        run=record.run,
        time=record.time,
    )
