"""LN-LSTM step backward on GPUs: one kernel; blocks of threads loop over the rows, which are the
sequences of the batch, in strides of the grid.

A thread has the same elements of all four gates. The gates are computed again from the forward's
inputs and stay in registers with what is computed of them, as do the thread's own parts of the sums
over rows, which it adds to its block's row of them once, after its last row: no atomics, and the
same bits at every call.

There are as many blocks as rows that a call of the bucket may have, each with a multiprocessor to
itself as far as these go; blocks without a row leave the sums as they are. What registers do not
hold goes to shared memory: first the sums, then the gates after their activations. Rows too long
even for that go through all stages vector by vector, and what is not kept is loaded, and computed,
again.

Left out: a limit to a thread's registers (`max_registers` of the other schedules), since no further
block would come of it; two blocks to a row, as in lnlstm_step.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from lntune import ops
from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK, WARP
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops.lnlstm_step import tokens_of
from lntune.ops.lnlstm_step_backward import sums as sums_of
from lntune.schedule import Schedule
from lntune.transforms.gpu import (
    cuda_math,
    early_start,
    exchange,
    gate_threads,
    gates,
    grid_stride,
    guards,
    phases,
    thread_private,
    threads,
)

OUTPUTS = ("dgates_x", "dgates_h", "dc")
LATE = ("dh", "dc_new", "c")  # what a loop over time steps writes on its way, or puts together
OVER_ROWS = ("sums_gates", "sums_hidden")
STAGES = ("z", "act", "xhat_c", "inner", "tanh_inner", "dinner", "dcell", "dz")
LOW_PRECISION_WIDTH, LOW_PRECISION_THREADS = 4, 256
"""Elements of two bytes to an access by default, and the threads that this may take."""
ROW_SUMS = ("cell", "gates", f"gates{gates.EXCHANGED}")
OF_GATES = ("z", "act", "dz", *ROW_SUMS[1:], "dgates_x", "dgates_h", "sums_gates")


@dataclass(frozen=True)
class Knobs:
    """Knobs of `gated_row_backward`."""

    threads_per_row: int = knob(128, gates.THREADS, "threads that share a row")
    vector_width: int = knob(
        4, gates.WIDTHS, "elements of one load or store, a vector of CUDA's such as float4"
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
    exchange: str = knob(
        "two_barriers",
        ("two_barriers", "one_barrier"),
        "how warps that share a row exchange its sums: the first warp adds what each has and tells"
        " the others, or every warp does",
    )
    early_start: bool = early_start.switch()


def summed(case: Case) -> int:
    """Sums over rows that each element of the cell has part in."""
    return sum(4 if size == "gates" else 1 for size in sums_of(tokens_of(case)).values())


def registers_of(knobs: Knobs, case: Case, device: Device) -> int:
    """32-bit registers that a thread's part of the row and of the sums takes, or one vector
    of it where stages are computed again.
    """
    tokens, registers = tokens_of(case), max(4, knobs.vector_width * case.itemsize) // 4
    raw = "raw" in tokens
    if knobs.intermediates == "recompute":
        return (
            16 + 4 * ("act" not in shared_stages(knobs, case, device)) + 4 * raw
        ) * knobs.vector_width
    # what is added to global memory at each row is short-lived
    kept = {"registers": summed(case), "shared": 0, "global": summed(case) / 2}[knobs.partial_sums]
    matrices = 4 * (1 + raw) + 3 if knobs.row_storage == "registers" else 0
    vectors = 4 * (1 + raw) + 1 if knobs.prefetch else 0
    computed = (
        3 + 4 * raw
        if knobs.intermediates == "shared"
        else 11 + 4 * raw
        if knobs.partial_sums == "shared"
        else 7
    )
    return gates.vectors_per_thread(case, knobs.threads_per_row, knobs.vector_width) * int(
        (kept + computed) * knobs.vector_width + (matrices + vectors) * registers
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
    if reason := gates.reason_invalid(case, knobs.threads_per_row, knobs.vector_width):
        return reason
    if knobs.exchange == "one_barrier" and knobs.threads_per_row <= WARP:
        return "the threads of a warp exchange sums without a barrier"
    if knobs.intermediates == "recompute" and (
        knobs.row_storage != "reload" or knobs.partial_sums == "registers" or knobs.prefetch
    ):
        return (
            "stages that are computed again, vector by vector, hold nothing else of a row in"
            " registers"
        )
    if case.hidden == 1 and "shared" in (knobs.partial_sums, knobs.intermediates):
        return "a cell of one element needs no shared memory"
    if shared_of(knobs, case, device) > device.shared_memory:
        need = shared_of(knobs, case, device)
        return f"{need} bytes of shared memory; a block has {device.shared_memory}"
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
    """Wide vectors, one to a thread if so many threads fit; sums and rows in registers as far as
    these hold them, sums first.

    Sums that they do not hold go to shared memory, then the gates after their activations, too.
    Where that is not enough either, stages are computed again vector by vector, whatever the length
    of the row.

    Elements of two bytes are loaded by fours, unless that takes too many threads: with eight to a
    thread a block, which has a multiprocessor to itself, takes a tenth to a quarter longer by a
    simulation of the machine code, and ptxas 13.0 spills 200 to 300 bytes where the kernel does not
    begin early.
    """
    width = gates.widest(case)
    if case.itemsize < 4 and case.hidden <= LOW_PRECISION_WIDTH * LOW_PRECISION_THREADS:
        width = min(width, LOW_PRECISION_WIDTH)
    most = next((t for t in (32, 64, 128, 256, 512) if t * width >= case.hidden), THREADS_PER_BLOCK)
    fewer = (most, *(t for t in (512, 256, 128) if t < most))
    keeping = [
        Knobs(per_row, width, "registers", sums, prefetch)
        for sums in ("registers", "shared")
        for prefetch in (True, False)
        for per_row in fewer
    ]
    keeping += [
        Knobs(per_row, width, "registers", "shared", prefetch=False, intermediates="shared")
        for per_row in fewer
    ]
    keeping += [
        Knobs(per_row, max(1, width // 2), "registers", "shared", prefetch=False)
        for per_row in fewer
    ]
    recomputing = [
        Knobs(per_row, width, "reload", "shared", prefetch=False, intermediates="recompute")
        for per_row in (512, 256)
    ]
    recomputing = [knobs for knobs in recomputing if shared_stages(knobs, case, device)]
    recomputing += [
        Knobs(per_row, width, "reload", "global", prefetch=False, intermediates="recompute")
        for per_row in (512, 256, 128, 64, 32)
    ]
    candidates = (*keeping, *recomputing)
    return next((k for k in candidates if valid(k, case, device) is None), candidates[-1])


def seeds(case: Case, device: Device) -> list[Knobs]:
    """What is to be tried first beside the default knobs: half the elements to an access and twice
    the threads, the reverse, the other exchange of sums, sums in shared memory, and vectors
    loaded once a row or at each use.
    """
    first = default(case, device)
    threads_per_row, width = first.threads_per_row, first.vector_width
    other = "two_barriers" if first.exchange == "one_barrier" else "one_barrier"
    tried = [
        replace(first, threads_per_row=t, vector_width=v)
        for t, v in ((2 * threads_per_row, width // 2), (threads_per_row // 2, 2 * width))
        if t in gates.THREADS and v in gates.WIDTHS
    ]
    return [
        *tried,
        replace(first, exchange=other),
        replace(first, partial_sums="shared"),
        replace(first, prefetch=not first.prefetch),
    ]


def _padded(knobs: Knobs, case: Case) -> int:
    """Elements of a row of the cell, rounded up to whole vectors of all threads."""
    return (
        gates.vectors_per_thread(case, knobs.threads_per_row, knobs.vector_width)
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
            : max(0, device.shared_memory - threads.SHARED_FOR_SUMS - _sums_bytes(knobs, case))
            // (16 * _padded(knobs, case))
        ]
    return ("act",) if knobs.intermediates == "shared" else ()


def shared_of(knobs: Knobs, case: Case, device: Device) -> int:
    """Bytes of shared memory that a block of threads takes."""
    return (
        threads.SHARED_FOR_SUMS
        + _sums_bytes(knobs, case)
        + 16 * _padded(knobs, case) * len(shared_stages(knobs, case, device))
    )


@functools.lru_cache(maxsize=8)
def _definition(case: Case, blocks: int) -> Any:
    """The definition, which all knobs share; making it takes half as long as all that follows."""
    op = ops.get(case.op)
    func = op.define(case, gates.row_sum(case.hidden), 1, blocks)
    return grid_stride.without_padding(
        cuda_math.with_cuda_functions(grid_stride.named(func, [a.name for a in op.arguments(case)]))
    )


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, with CUDA's activations; gate and element two loops.
    2. Blocks of threads, and all stages in one loop over a block's rows.
    3. What is loaded once for several stages, or before the first of them.
    4. Stages and outputs in registers or shared memory, what they read loaded a vector at a time;
    sums of a row exchanged.
    5. The thread's sums over rows, added to its block's once or at each row.
    6. A wait for the kernel before, behind what can be loaded earlier. What no later stage needs is
    stored early, or all stages go vector by vector; the loop ends where the rows do.
    """
    from tvm import s_tir

    elements = gate_threads.Assignment(case.hidden, knobs.threads_per_row, knobs.vector_width)
    count = case.blocks(device)
    in_shared = shared_stages(knobs, case, device)
    arguments = {a.name: a.shape[-1] for a in ops.get(case.op).arguments(case)}

    # 1.
    sch = s_tir.Schedule(_definition(case, count))
    only_act = knobs.intermediates == "shared"  # z need not be kept where act is
    if only_act:
        sch.compute_inline(sch.get_sblock("z"))
    for name in (*STAGES[only_act:], *OUTPUTS):
        if name in OF_GATES:
            gates.split_gates(sch, sch.get_sblock(name), case.hidden)
    sch = s_tir.Schedule(gates.with_gates_resolved(sch.mod, ("act",) if only_act else ()))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2.
    row_loops = []
    for name, block in blocks.items():
        if name.startswith("sums_"):
            row_loops.append(gates.row_loop_second(sch, block, case.hidden, name in OF_GATES))
        else:
            row_loop, b = sch.split(
                sch.get_loops(block)[0], [None, count], preserve_unit_iters=True
            )
            sch.reorder(b, row_loop)
            row_loops.append(row_loop)
    row_loop = sch.merge(*row_loops)
    b = sch.get_loops(blocks["act"])[0]
    sch.bind(b, "blockIdx.x")

    # 3.
    readers: dict[str, list[Any]] = {}
    for block in blocks.values():
        for name in (str(r.source.name) for r in sch.get(block).reads):
            if name in arguments:
                readers.setdefault(name, []).append(block)
    matrices = {a.name for a in ops.get(case.op).arguments(case) if len(a.shape) > 1}
    # each is placed before those placed so far; what is needed first is to come first
    for name, consumers in reversed(readers.items()):
        if arguments[name] == "rows":
            threads.load_scalar(sch, consumers, name, row_loop)
        elif knobs.row_storage == "registers" if name in matrices else knobs.prefetch:
            elements.to_registers(
                sch, consumers, name, row_loop, of_gates=arguments[name] == "gates"
            )

    # 4.
    for name, block in blocks.items():
        is_gates, thread = name in OF_GATES, None
        if name in OVER_ROWS:
            continue
        if name in OUTPUTS:
            thread = elements.output(sch, block, is_gates)
        elif name in STAGES:
            thread = elements.stage(
                sch, block, is_gates, "shared.dyn" if name in in_shared else "local"
            )
        else:
            thread = elements.compute(sch, block, is_gates) if name in ROW_SUMS else None
            for index in range(len(sch.get(block).writes)):
                sch.set_scope(block, index, "local")
        for read in gates.inputs(sch, block, case) if thread else []:
            elements.vector_to_registers(
                sch, block, read, thread, of_gates=arguments[read] == "gates"
            )

    # 5.
    stores = []
    for name in OVER_ROWS:
        thread = elements.compute(sch, blocks[name], name in OF_GATES)
        for read in gates.inputs(sch, blocks[name], case):
            elements.vector_to_registers(
                sch, blocks[name], read, thread, of_gates=arguments[read] == "gates"
            )
        stores += elements.sums(
            sch,
            blocks[name],
            b,
            row_loop,
            name in OF_GATES,
            "shared.dyn" if knobs.partial_sums == "shared" else "local",
        )

    # 6.
    sch.annotate(row_loop, grid_stride.ROW_LOOP, count)
    mod = sch.mod
    # sums of each row leave nothing behind the loop, where blocks without a row would wait
    waits = knobs.row_storage == "registers" and knobs.partial_sums != "global"
    if knobs.early_start and waits and early_start.possible(device):
        mod = early_start.load_first(mod, LATE, grid_stride.ROW_LOOP)
    mod = guards.only_where_needed(mod, ("local", "shared.dyn"))
    mod = grid_stride.add_to_outputs(mod, stores)
    if knobs.partial_sums == "global":
        mod = grid_stride.sums_of_each_row(mod)
    else:
        mod = grid_stride.end_without_rows(mod)
    if knobs.partial_sums == "shared" or knobs.intermediates != "registers":
        mod = thread_private.declare(mod)
    if knobs.intermediates == "shared":
        mod = grid_stride.move_up(mod, {"sums_hidden_update": "dinner", "dc": "dcell"})
    elif knobs.intermediates == "recompute":
        mod = phases.fuse(mod, grid_stride.ROW_LOOP)
    mod = grid_stride.end_at_last_row(mod)
    return exchange.request(mod) if knobs.exchange == "one_barrier" else mod


SCHEDULES = (
    Schedule(
        "gated_row_backward",
        "lnlstm_step_backward",
        "gpu",
        Knobs,
        default,
        valid,
        apply,
        version=3,
        seeds=seeds,
    ),
)
