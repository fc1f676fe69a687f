"""LN-LSTM step backward on GPUs: one kernel; blocks of threads take turns at the rows, which are
the sequences of the batch.

A thread has the same elements of all four gates. The gates are made again and stay in registers
with what comes of them, as do the thread's own shares of the sums over rows, which it adds to its
block's row of them once, after its last turn: no atomics, and the same bits at every call.

There is a block to a multiprocessor, so what registers do not hold goes to shared memory: first the
sums, then the gates after their activations. Rows too long even for that go through all stages
access by access, and what is not kept is read, and made, again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lntune import ops
from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK, WARP
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops.lnlstm_step import tokens_of
from lntune.ops.lnlstm_step_backward import sums as sums_of
from lntune.schedule import Schedule
from lntune.transforms.gpu import functions, gates, phases, private, ragged, threads, turns

OUTPUTS = ("dgates_x", "dgates_h", "dc")
OVER_ROWS = ("sums_gates", "sums_hidden")
STAGES = ("z", "act", "xhat_c", "inner", "tanh_inner", "dinner", "dcell", "dz")
ROW_SUMS = ("cell", "gates", f"gates{gates.EXCHANGED}")
OF_GATES = ("z", "act", "dz", *ROW_SUMS[1:], "dgates_x", "dgates_h", "sums_gates")


@dataclass(frozen=True)
class Knobs:
    """Knobs of `gated_row_backward`."""

    threads_per_row: int = knob(128, (32, 64, 128, 256, 512, 1024), "threads that share a row")
    vector_width: int = knob(
        4, (1, 2, 4, 8), "elements of one load or store, a vector of CUDA's such as float4"
    )
    row_storage: str = knob(
        "registers",
        ("registers", "reload"),
        "where what is read of a row is kept between its uses; reload: nowhere, it is loaded from"
        " global memory each time",
    )
    partial_sums: str = knob(
        "registers",
        ("registers", "shared", "global"),
        "where a block keeps its sums over rows while it loops over them; global: in global memory,"
        " added to at each row",
    )
    prefetch: bool = knob(
        True, (False, True), "gains and biases are loaded once a row, before its first stage"
    )
    intermediates: str = knob(
        "registers",
        ("registers", "shared", "recompute"),
        "where what is computed of a row is kept between its sums; shared: gates in shared memory;"
        " recompute: there, if they fit, the rest computed again",
    )


def summed(case: Case) -> int:
    """Sums over rows that each element of the cell has part in."""
    return sum(4 if size == "gates" else 1 for size in sums_of(tokens_of(case)).values())


def registers_of(knobs: Knobs, case: Case, device: Device) -> int:
    """32-bit registers that a thread's part of the row and of the sums takes, or where stages are
    made again, one access of it.
    """
    tokens, access = tokens_of(case), max(4, knobs.vector_width * case.itemsize) // 4
    raw = "raw" in tokens
    if knobs.intermediates == "recompute":
        return (
            16 + 4 * ("act" not in shared_stages(knobs, case, device)) + 4 * raw
        ) * knobs.vector_width
    # what a turn adds lives shortly
    kept = {"registers": summed(case), "shared": 0, "global": summed(case) / 2}[knobs.partial_sums]
    matrices = 4 * (1 + raw) + 3 if knobs.row_storage == "registers" else 0
    vectors = 4 * (1 + raw) + 1 if knobs.prefetch else 0
    made = (
        3 + 4 * raw
        if knobs.intermediates == "shared"
        else 11 + 4 * raw
        if knobs.partial_sums == "shared"
        else 7
    )
    return gates.turns_of(case, knobs.threads_per_row, knobs.vector_width) * int(
        (kept + made) * knobs.vector_width + (matrices + vectors) * access
    )


def others_of(knobs: Knobs, case: Case, device: Device) -> int:
    """About the registers for anything else, the addresses of twenty tensors among it: fitted to
    what ptxas 13.0 spills and does not.
    """
    newest = 20 * (device.isa in ("sm_100", "sm_120"))  # more than for others
    if knobs.intermediates == "recompute":
        return newest + (70 if case.hidden % (knobs.threads_per_row * knobs.vector_width) else 54)
    if knobs.intermediates == "shared":
        return 80 if newest or case.dtype == "float16" else 60
    return 44 if knobs.partial_sums == "shared" else 100 if knobs.threads_per_row == WARP else 64


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    if reason := gates.misfit(case, knobs.threads_per_row, knobs.vector_width):
        return reason
    if knobs.intermediates == "recompute" and (
        knobs.row_storage != "reload" or knobs.partial_sums == "registers" or knobs.prefetch
    ):
        return (
            "stages that are made again, access by access, hold nothing else of a row in registers"
        )
    if case.hidden == 1 and "shared" in (knobs.partial_sums, knobs.intermediates):
        return "a cell of one element needs no shared memory"
    if shared_of(knobs, case, device) > device.l1:
        return f"{shared_of(knobs, case, device)} bytes of shared memory; a block has {device.l1}"
    room = min(REGISTERS_PER_THREAD, REGISTERS // knobs.threads_per_row)
    others = others_of(knobs, case, device)
    part = registers_of(knobs, case, device)
    if part + others > room:
        return (
            f"{part} registers for a thread's part of the row; with {others} others they do not fit"
            f" {knobs.threads_per_row} threads"
        )
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide accesses, one to a thread if so many threads fit; what registers hold of sums and rows,
    in this order.

    Sums that they do not hold go to shared memory, then the gates after their activations, too.
    Where that is not enough either, stages are made again access by access, whatever the length of
    the row.
    """
    access = gates.widest(case)
    several = next(
        (t for t in (32, 64, 128, 256, 512) if t * access >= case.hidden), THREADS_PER_BLOCK
    )
    fewer = (several, *(t for t in (512, 256, 128) if t < several))
    kept = [
        Knobs(shares, access, "registers", sums, ahead)
        for sums in ("registers", "shared")
        for ahead in (True, False)
        for shares in fewer
    ]
    kept += [
        Knobs(shares, access, "registers", "shared", prefetch=False, intermediates="shared")
        for shares in fewer
    ]
    kept += [
        Knobs(shares, max(1, access // 2), "registers", "shared", prefetch=False)
        for shares in fewer
    ]
    found = next((one for one in kept if valid(one, case, device) is None), None)
    if found is not None:
        return found
    again = [
        Knobs(shares, access, "reload", "shared", prefetch=False, intermediates="recompute")
        for shares in (512, 256)
    ]
    again = [one for one in again if shared_stages(one, case, device)]
    again += [
        Knobs(shares, access, "reload", "global", prefetch=False, intermediates="recompute")
        for shares in (512, 256, 128, 64, 32)
    ]
    return next((one for one in again if valid(one, case, device) is None), again[-1])


def _padded(knobs: Knobs, case: Case) -> int:
    """Elements of the cell, counting all that the threads have turns for."""
    return (
        gates.turns_of(case, knobs.threads_per_row, knobs.vector_width)
        * knobs.threads_per_row
        * knobs.vector_width
    )


def _sums_bytes(knobs: Knobs, case: Case) -> int:
    """Bytes of sums in shared memory."""
    return 4 * summed(case) * _padded(knobs, case) if knobs.partial_sums == "shared" else 0


def shared_stages(knobs: Knobs, case: Case, device: Device) -> tuple[str, ...]:
    """The stages that are in shared memory."""
    if knobs.intermediates == "recompute":
        return ("act", "dz")[
            : max(0, device.l1 - threads.STATIC - _sums_bytes(knobs, case))
            // (16 * _padded(knobs, case))
        ]
    return ("act",) if knobs.intermediates == "shared" else ()


def shared_of(knobs: Knobs, case: Case, device: Device) -> int:
    """Bytes of shared memory that a block of threads takes."""
    return (
        threads.STATIC
        + _sums_bytes(knobs, case)
        + 16 * _padded(knobs, case) * len(shared_stages(knobs, case, device))
    )


@functools.lru_cache(maxsize=8)
def _definition(case: Case, blocks: int) -> Any:
    """What every setting of the knobs begins with; making it takes half as long as all that
    follows.
    """
    op = ops.get(case.op)
    made = op.define(case, gates.row_sum(case.hidden), 1, blocks)
    return turns.unpadded(functions.native(turns.named(made, [a.name for a in op.arguments(case)])))


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, with the device's activations; gate and element two loops.
    2. Blocks of threads and their turns; all stages in one loop over a block's turns.
    3. What is loaded once for several stages, or before its turn.
    4. Stages and outputs in registers or shared memory, each access of what they read loaded at
    once; sums of a row exchanged.
    5. The thread's sums over rows, added to its block's once or at each turn.
    6. What no later stage needs is done early, or all of it access by access; turns end where the
    rows do.
    """
    from tvm import s_tir

    deal, count = (
        gates.Deal(case.hidden, knobs.threads_per_row, knobs.vector_width),
        case.blocks(device.cores),
    )
    in_shared = shared_stages(knobs, case, device)
    arguments = {a.name: a.shape[-1] for a in ops.get(case.op).arguments(case)}

    # 1.
    sch = s_tir.Schedule(_definition(case, count))
    alone = knobs.intermediates == "shared"  # act, that is; z need not be kept for it
    if alone:
        sch.compute_inline(sch.get_sblock("z"))
    for name in (*STAGES[alone:], *OUTPUTS):
        if name in OF_GATES:
            gates.apart(sch, sch.get_sblock(name), case.hidden)
    sch = s_tir.Schedule(gates.settled(sch.mod, ("act",) if alone else ()))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2.
    looped = []
    for name, block in blocks.items():
        if name.startswith("sums_"):
            looped.append(gates.turns_first(sch, block, case.hidden, name in OF_GATES))
        else:
            turn, b = sch.split(sch.get_loops(block)[0], [None, count], preserve_unit_iters=True)
            sch.reorder(b, turn)
            looped.append(turn)
    turn = sch.merge(*looped)
    b = sch.get_loops(blocks["act"])[0]
    sch.bind(b, "blockIdx.x")

    # 3.
    readers: dict[str, list[Any]] = {}
    for block in blocks.values():
        for name in (str(r.source.name) for r in sch.get(block).reads):
            if name in arguments:
                readers.setdefault(name, []).append(block)
    matrices = {a.name for a in ops.get(case.op).arguments(case) if len(a.shape) > 1}
    # each comes before those of before; what is needed first is to be first
    for name, consumers in reversed(readers.items()):
        if arguments[name] == "rows":
            gates.keep_scalar(sch, consumers, name, turn)
        elif knobs.row_storage == "registers" if name in matrices else knobs.prefetch:
            deal.keep(sch, consumers, name, turn, gates=arguments[name] == "gates")

    # 4.
    for name, block in blocks.items():
        wide, thread = name in OF_GATES, None
        if name in OVER_ROWS:
            continue
        if name in OUTPUTS:
            thread = deal.output(sch, block, wide)
        elif name in STAGES:
            thread = deal.stage(sch, block, wide, "shared.dyn" if name in in_shared else "local")
        else:
            thread = deal.loops(sch, block, wide) if name in ROW_SUMS else None
            for index in range(len(sch.get(block).writes)):
                sch.set_scope(block, index, "local")
        for read in gates.inputs(sch, block, case) if thread else []:
            deal.fetch(sch, block, read, thread, gates=arguments[read] == "gates")

    # 5.
    added = []
    for name in OVER_ROWS:
        thread = deal.loops(sch, blocks[name], name in OF_GATES)
        for read in gates.inputs(sch, blocks[name], case):
            deal.fetch(sch, blocks[name], read, thread, gates=arguments[read] == "gates")
        added += deal.sums(
            sch,
            blocks[name],
            b,
            turn,
            name in OF_GATES,
            "shared.dyn" if knobs.partial_sums == "shared" else "local",
        )

    # 6.
    sch.annotate(turn, turns.TURNS, count)
    made = turns.add(ragged.asked_where_it_matters(sch.mod), added)
    made = turns.each(made) if knobs.partial_sums == "global" else made
    if knobs.partial_sums == "shared" or knobs.intermediates != "registers":
        made = private.declare(made)
    if knobs.intermediates == "shared":
        made = turns.early(made, {"sums_hidden_update": "dinner", "dc": "dcell"})
    elif knobs.intermediates == "recompute":
        made = phases.by_access(made, turns.TURNS)
    return turns.trim(made)


SCHEDULES = (
    Schedule(
        "gated_row_backward", "lnlstm_step_backward", "gpu", Knobs, default, valid, apply, version=1
    ),
)
