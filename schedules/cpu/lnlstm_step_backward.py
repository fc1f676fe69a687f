"""CPU schedule for the LN-LSTM step, backward.

`blocked_step`: the rows (sequences of the batch) are shared among as many blocks as the machine has
cores; a row goes through all stages, the gates computed again first, while it is in the cache, and
adds to its block's own sums for the gains and biases, which stay where they are from one time step
to the next. Rows side by side share the read-modify-write of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lntune import ops
from lntune.case import MAX_HIDDEN, Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import accumulate, alignment, row_sums, vectors

SERIAL_LIMIT = 1 << 13
"""Elements of the cell above which one thread is never worth trying; each costs five exponentials
and all that follows.
"""
PARALLEL_ELEMENTS = 1 << 10
"""Elements of the cell above which all threads are the better guess."""


@dataclass(frozen=True)
class Step:
    """Knobs. A vector is a full vector register of float32."""

    together: int = knob(2, (1, 2, 4), "rows worked on side by side")
    lanes: int = knob(2, (1, 2, 4), "vectors that accumulate a row sum side by side")
    store: int = knob(2, (1, 2, 4), "vectors of the gates and of the outputs per step")
    parallel: bool = knob(True, (False, True), "blocks of rows shared among the threads")


def valid(knobs: Step, case: Case, device: Device) -> str | None:
    """What the schedule refuses."""
    width = max(knobs.lanes, knobs.store) * device.vector_bytes // 4
    if 4 * case.hidden > MAX_HIDDEN:
        return (
            f"the gates of {case.hidden} elements are {4 * case.hidden}, more than the {MAX_HIDDEN}"
            " that a kernel takes"
        )
    if max(knobs.lanes, knobs.store) > 1 and width > case.hidden:
        return f"{width} lanes are more than the {case.hidden} elements of a cell"
    if knobs.together * case.blocks(device) > max(case.rows, 1):
        return (
            f"{case.blocks(device)} blocks of {knobs.together} rows are more than the"
            f" {case.rows} rows"
        )
    if knobs.parallel and case.blocks(device) == 1:
        return "one block cannot be shared among threads"
    if not knobs.parallel and case.blocks(device) > 1 and case.rows * case.hidden > SERIAL_LIMIT:
        return f"{case.rows} x {case.hidden} elements leave the other threads idle"
    return None


def default(case: Case, device: Device) -> Step:
    """Enough accumulators to hide the latency of an add; small work stays on one thread."""
    whole_vectors = vectors.floor_power(max(1, case.hidden * 4 // device.vector_bytes))
    blocks = case.blocks(device)
    return Step(
        together=2 if case.rows >= 2 * blocks else 1,
        lanes=min(2, whole_vectors),
        store=min(2, whole_vectors),
        parallel=blocks > 1 and case.rows * case.hidden > PARALLEL_ELEMENTS,
    )


def seeds(case: Case, device: Device) -> list[Step]:
    """What wins most often beside the default knobs: more rows side by side, of wider steps or not;
    one accumulator.
    """
    first = default(case, device)
    return [
        replace(first, together=4, store=4),
        replace(first, together=4),
        replace(first, lanes=1),
    ]


def apply(case: Case, knobs: Step, device: Device) -> Any:
    """Steps: 1 define, 2 rows by block, 3 one loop over blocks and their rows, 4 stages, 5 outputs
    and sums over rows.
    """
    from tvm import s_tir

    vector, blocks_of_rows = device.vector_bytes // 4, case.blocks(device)
    step = knobs.store * vector

    # 1. The definition, summed in lanes; arguments at any address an element may have.
    definition = ops.get(case.op).define(
        case,
        row_sums.staged_sum(knobs.lanes * vector),
        knobs.together,
        blocks_of_rows,
        contiguous=True,
    )
    sch = s_tir.Schedule(alignment.element_aligned(definition))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2. Rows as block x group x row of the group. Outputs and sums over rows of one size share a
    # loop over their elements, with the rows side by side inside.
    outputs = {"dgates_x": "gates", "dgates_h": "gates", "dc": "hidden"}
    elements: dict[str, list[Any]] = {"gates": [], "hidden": []}
    for name, block in blocks.items():
        if name.startswith("sums_"):
            b, k, group, side = sch.get_loops(block)
            sch.reorder(b, group, k, side)
            elements[name.removeprefix("sums_")].append(k)
        else:
            # of stages the predicates are dropped in the end, and would take most of the time here
            by_block = [blocks_of_rows, None, knobs.together]
            guarded = name in outputs
            loop = sch.get_loops(block)[0]
            _, _, side = sch.split(loop, by_block, disable_predication=not guarded)
            if guarded:
                k = sch.get_loops(block)[3]
                sch.reorder(k, side)
                elements[outputs[name]].append(k)

    # 3. All stages in one loop.
    shared = {size: sch.merge(*loops) for size, loops in elements.items()}
    last = {size: next(name for name in blocks if name == f"sums_{size}") for size in shared}
    stages = {
        name: block
        for name, block in blocks.items()
        if name not in outputs and not name.startswith("sums_")
    }
    group_loops = [sch.get_loops(block)[1] for block in stages.values()] + [
        sch.get_loops(blocks[name])[1] for name in last.values()
    ]
    sch.merge(*group_loops)
    if knobs.parallel:
        sch.parallel(sch.get_loops(blocks["z"])[0])

    # 4. Stages by whole vectors, cut at the gates where these differ; sums and scalars of a row.
    elementwise = ("z", "act", "xhat_c", "inner", "tanh_inner", "dinner", "dcell", "dz")
    row_sums.vectorize_sums(
        sch, {name: block for name, block in stages.items() if name not in elementwise}, 2, 1, None
    )
    for name in elementwise:
        k = sch.get_loops(blocks[name])[3]
        if name in ("act", "dz"):
            gate, k = sch.split(k, [4, None])
            sch.unroll(gate)
        vectors.exact_vectors(sch, k, step)

    # 5. Outputs, and what the rows add to the sums; the rows side by side are added in registers.
    for size, k in shared.items():
        sch.annotate(k, vectors.VECTORS, step)
        for name, block in blocks.items():
            if name == f"sums_{size}" or outputs.get(name) == size:
                sch.unroll(sch.get_loops(block)[-1])
    mod = vectors.drop_predicates(sch.mod, tuple(outputs))
    return vectors.split_vectors(accumulate.add_to_outputs(mod, ("sums_gates", "sums_hidden")))


SCHEDULES = (
    Schedule(
        "blocked_step",
        "lnlstm_step_backward",
        "cpu",
        Step,
        default,
        valid,
        apply,
        version=2,
        seeds=seeds,
    ),
)
