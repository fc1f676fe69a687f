"""CPU schedule for the LN-LSTM step, forward.

`fused_step`: a row (one sequence of the batch) goes through all stages while it is in the L1 cache:
the moments of its gates in vector lanes, the cell, the cell's moments, h. The exponentials are
arithmetic and run in full vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lntune import ops
from lntune.case import MAX_HIDDEN, Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import alignment, row_sums, vectors

SERIAL_LIMIT = 1 << 14
"""Elements of the cell above which one thread is never worth trying; each costs five
exponentials.
"""
PARALLEL_ELEMENTS = 1 << 11
"""Elements of the cell above which all threads are the better guess."""
SHORT_ROW = 32
"""Vectors of the cell up to which one accumulator often sums the gates soonest."""


@dataclass(frozen=True)
class Step:
    """Knobs. A vector is a full vector register of float32."""

    lanes: int = knob(4, (1, 2, 4, 8), "vectors that accumulate a row sum side by side")
    store: int = knob(2, (1, 2, 4), "vectors of the cell and of the outputs per step")
    unroll: int = knob(1, (1, 2), "steps of the summing loops in one iteration")
    parallel: bool = knob(True, (False, True), "rows shared among the threads")


def valid(knobs: Step, case: Case, device: Device) -> str | None:
    """What the schedule refuses."""
    vector = device.vector_bytes // 4
    width = max(knobs.lanes, knobs.store) * vector
    if 4 * case.hidden > MAX_HIDDEN:
        return (
            f"the gates of {case.hidden} elements are {4 * case.hidden}, more than the {MAX_HIDDEN}"
            " that a kernel takes"
        )
    if max(knobs.lanes, knobs.store) > 1 and width > case.hidden:
        return f"{width} lanes are more than the {case.hidden} elements of a cell"
    if knobs.unroll > 1:
        for size in (case.hidden, 4 * case.hidden):
            if row_sums.chains(size, knobs.lanes * vector)[2] % knobs.unroll:
                return (
                    f"the steps of sums of {size} elements are not a multiple of {knobs.unroll} to"
                    " unroll"
                )
    if knobs.parallel and case.rows == 1:
        return "one row cannot be shared among threads"
    if not knobs.parallel and device.cores > 1 and case.rows * case.hidden > SERIAL_LIMIT:
        return f"{case.rows} x {case.hidden} elements leave the other threads idle"
    return None


def default(case: Case, device: Device) -> Step:
    """Enough accumulators to hide the latency of an add; small work stays on one thread."""
    whole_vectors = vectors.floor_power(max(1, case.hidden * 4 // device.vector_bytes))
    elements = case.rows * case.hidden
    return Step(
        lanes=min(4, whole_vectors),
        store=min(2, whole_vectors),
        parallel=case.rows > 1 and (elements > PARALLEL_ELEMENTS or device.cores == 1),
    )


def seeds(case: Case, device: Device) -> list[Step]:
    """What wins most often beside the default knobs: fewer accumulators, one where rows are short,
    more of the outputs at a time.
    """
    first = default(case, device)
    short = case.hidden * 4 <= SHORT_ROW * device.vector_bytes
    return [
        replace(first, lanes=n, store=s)
        for n, s in (((1, 2),) if short else ()) + ((2, 2), (2, 4), (4, 4))
    ]


def apply(case: Case, knobs: Step, device: Device) -> Any:
    """Steps: 1 define, 2 one loop over rows, 3 sums and scalars, 4 the cell and the outputs."""
    from tvm import s_tir

    vector = device.vector_bytes // 4

    # 1. The definition, summed in lanes; arguments at any address an element may have.
    sch = s_tir.Schedule(
        alignment.element_aligned(
            ops.get(case.op).define(case, row_sums.staged_sum(knobs.lanes * vector))
        )
    )
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2. All stages into one loop over rows (in groups of one, the form that vectorize_sums
    # expects).
    rows = sch.merge(
        *(sch.split(sch.get_loops(block)[0], [None, 1])[0] for block in blocks.values())
    )
    if knobs.parallel:
        sch.parallel(rows)

    # 3. Sums and scalars.
    elementwise = ("z", "cell", "inner", "h", "c_new")
    row_sums.vectorize_sums(
        sch,
        {name: block for name, block in blocks.items() if name not in elementwise},
        1,
        knobs.unroll,
        None,
    )

    # 4. The rest by whole vectors.
    for name in elementwise:
        vectors.exact_vectors(sch, sch.get_loops(blocks[name])[2], knobs.store * vector)
    return sch.mod


SCHEDULES = (
    Schedule(
        "fused_step", "lnlstm_step", "cpu", Step, default, valid, apply, version=1, seeds=seeds
    ),
)
