"""LN-LSTM step forward on GPUs: one kernel, a block of threads to a row, which is one sequence of
the batch.

A thread has the same elements of all four gates, so that threads exchange nothing but the sums of
both layer norms. The gates stay in registers between their three uses; those of rows too long for
that are loaded again, vector by vector. What else a row needs can be loaded before the first sum,
so that loading it and exchanging sums overlap: with a batch of a few rows to a multiprocessor that
time is most of the kernel's.

Tried and left out: several rows to a block of threads (LSTMs of fewer than 128 elements, which a
warp takes, are small anyway). Not tried: two blocks to a row, as a cluster that exchanges sums
through each other's shared memory. At batch 64 it would give half of an H200's idle multiprocessors
work, but the launcher has no clusters, nor has the emulator that proves kernels without a GPU.
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
from lntune.schedule import Schedule
from lntune.transforms.gpu import (
    cuda_math,
    early_start,
    exchange,
    gate_threads,
    gates,
    guards,
    launch_bounds,
    phases,
    thread_private,
    threads,
)

ROW_LOOP = "lntune_row"  # annotation of the loop over rows
LATE = ("gates_h", "c")  # what a loop over time steps writes on its way
# registers of a thread for anything but its part of the row: fitted to what ptxas 13.0 spills and
# does not
OTHERS = 36
OTHERS_RAW = 74  # the same where two rows of gates are normalized, and widened or computed again
FEW_ROWS = 128  # fewer than these are about a row to a multiprocessor, whose own time counts
FEW_ROWS_WIDTH = 4  # elements of an access then, unless that takes more threads than
FEW_ROWS_THREADS = 256


@dataclass(frozen=True)
class Knobs:
    """Knobs of `gated_row`."""

    threads_per_row: int = knob(128, gates.THREADS, "threads that share a row")
    vector_width: int = knob(
        4, gates.WIDTHS, "elements of one load or store, a vector of CUDA's such as float4"
    )
    row_storage: str = knob(
        "registers",
        ("registers", "reload"),
        "where gates that are normalized are kept between their three uses; reload: nowhere, they"
        " are loaded from global memory each time",
    )
    prefetch: bool = knob(
        True,
        (False, True),
        "cell, gains, biases and gates that need no sum are loaded before the first sum",
    )
    intermediates: str = knob(
        "registers",
        ("registers", "recompute"),
        "where what is computed of a row is kept between its sums; recompute: z in shared memory,"
        " if it fits, the rest computed again, vector by vector",
    )
    exchange: str = knob(
        "two_barriers",
        ("two_barriers", "one_barrier"),
        "how warps that share a row exchange its sums: the first warp adds what each has and tells"
        " the others, or every warp does",
    )
    early_start: bool = early_start.switch()
    max_registers: int = launch_bounds.limit()


def shared_of(knobs: Knobs, case: Case, device: Device) -> int:
    """Bytes of shared memory that z takes of a block of threads, or 0 where it is not there."""
    whole = (
        16
        * gates.vectors_per_thread(case, knobs.threads_per_row, knobs.vector_width)
        * knobs.threads_per_row
        * knobs.vector_width
    )
    return (
        whole
        if knobs.intermediates == "recompute"
        and whole + threads.SHARED_FOR_SUMS <= device.shared_memory
        else 0
    )


def registers_of(knobs: Knobs, case: Case) -> int:
    """32-bit registers that a thread's part of the row takes, or one vector of it where stages are
    computed again.
    """
    tokens, registers = tokens_of(case), max(4, knobs.vector_width * case.itemsize) // 4
    of_gates = 4 * ("raw" in tokens) + 4 if knobs.row_storage == "registers" else 0
    of_rest = 4 * (2 + ("bias" in tokens)) + 2 + ("bias_c" in tokens) if knobs.prefetch else 0
    if knobs.intermediates == "recompute":
        return (10 + 4 * ("raw" in tokens)) * knobs.vector_width
    # what is computed of the gates takes their place, but not at once
    computed = 4 * knobs.vector_width + of_gates * registers // (2 if "raw" in tokens else 4)
    return gates.vectors_per_thread(case, knobs.threads_per_row, knobs.vector_width) * max(
        (of_gates + of_rest) * registers, computed
    )


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    if reason := gates.reason_invalid(case, knobs.threads_per_row, knobs.vector_width):
        return reason
    if knobs.exchange == "one_barrier" and knobs.threads_per_row <= WARP:
        return "the threads of a warp exchange sums without a barrier"
    if knobs.intermediates == "recompute" and (knobs.row_storage == "registers" or knobs.prefetch):
        return (
            "stages that are computed again, vector by vector, hold nothing else of a row in"
            " registers"
        )
    others = (
        OTHERS_RAW
        if "raw" in tokens_of(case) and (case.itemsize < 4 or knobs.intermediates == "recompute")
        else OTHERS
    )
    if registers_of(knobs, case) + others > min(
        REGISTERS_PER_THREAD, REGISTERS // knobs.threads_per_row
    ):
        return (
            f"{registers_of(knobs, case)} registers for a thread's part of the row; with {others}"
            f" others they do not fit {knobs.threads_per_row} threads"
        )
    if knobs.max_registers and knobs.intermediates == "recompute":
        return "stages that are computed again have shared memory for one block only"
    return launch_bounds.reason_invalid(
        knobs.max_registers, knobs.threads_per_row, registers_of(knobs, case)
    )


def default(case: Case, device: Device) -> Knobs:
    """Wide vectors, one to a thread if so many threads fit; everything loaded before the first sum
    where registers hold it.

    Few rows have fewer elements to a thread, in two bytes, and exchange sums with one barrier: then
    a multiprocessor has a row or none, and the kernel takes as long as that.
    """
    width, few = gates.widest(case), case.rows < FEW_ROWS
    if few and case.hidden <= FEW_ROWS_WIDTH * FEW_ROWS_THREADS:
        width = min(width, FEW_ROWS_WIDTH)
    most = next((t for t in (32, 64, 128, 256, 512) if t * width >= case.hidden), THREADS_PER_BLOCK)
    for prefetch in (True, False):
        for per_row in (most, *(t for t in (512, 256, 128) if t < most)):
            knobs = Knobs(per_row, width, "registers", prefetch)
            if few and per_row > WARP:
                knobs = replace(knobs, exchange="one_barrier")
            if valid(knobs, case, device) is None:
                return knobs
    recomputing = [
        Knobs(per_row, width, "reload", prefetch=False, intermediates="recompute")
        for per_row in (512, 256, 128, 64, 32)
    ]
    return next((k for k in recomputing if valid(k, case, device) is None), recomputing[-1])


def seeds(case: Case, device: Device) -> list[Knobs]:
    """What is to be tried first beside the default knobs: the other exchange of sums, half the
    elements to an access and twice the threads, the reverse, and half and twice the threads alone.
    """
    first = default(case, device)
    threads_per_row, width = first.threads_per_row, first.vector_width
    other = "two_barriers" if first.exchange == "one_barrier" else "one_barrier"
    tried = [
        replace(first, threads_per_row=t, vector_width=v)
        for t, v in (
            (2 * threads_per_row, width // 2),
            (threads_per_row // 2, 2 * width),
            (threads_per_row // 2, width),
            (2 * threads_per_row, width),
        )
        if t in gates.THREADS and v in gates.WIDTHS
    ]
    return [replace(first, exchange=other), *tried]


@functools.lru_cache(maxsize=8)
def _definition(case: Case) -> Any:
    """The definition, which all knobs share; making it takes as long as all that follows."""
    return cuda_math.with_cuda_functions(ops.get(case.op).define(case, gates.row_sum(case.hidden)))


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, with CUDA's activations; gate and element two loops.
    2. A block of threads for each row; everything about the row inside it.
    3. What is loaded once for several stages, or before the first sum.
    4. Stages and outputs in registers, what they read loaded a vector at a time; sums exchanged.
    5. The scalars of a row in registers of every thread; one thread stores the statistics.
    6. A wait for the kernel before, behind what can be loaded earlier. Guards only where memory is
    accessed and sums are exchanged; rows too long for registers go through all stages vector by
    vector.
    """
    from tvm import s_tir

    elements = gate_threads.Assignment(case.hidden, knobs.threads_per_row, knobs.vector_width)
    of_gates = {a.name for a in ops.get(case.op).arguments(case) if a.shape[-1:] == ("gates",)}

    # 1.
    sch = s_tir.Schedule(_definition(case))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    gates.split_gates(sch, blocks["z"], case.hidden)

    # 2.
    row = sch.merge(*(sch.get_loops(block)[0] for block in blocks.values()))
    sch.bind(row, "blockIdx.x")
    sch.annotate(row, ROW_LOOP, 1)

    # 3.
    normalized = {
        f"gates_{of}": [blocks[f"{of}_sum"], blocks[f"{of}_centred"], blocks["z"]]
        for of in ("h", "x")
        if f"{of}_sum" in blocks
    }
    users = normalized if knobs.row_storage == "registers" else {}
    if knobs.prefetch:
        early = {
            name: [blocks[stage]]
            for stage in ("z", "cell", "inner")
            for name in gates.inputs(sch, blocks[stage], case)
        }
        users = (
            {**early, **users}
            if knobs.row_storage == "registers"
            else {name: stages for name, stages in early.items() if name not in normalized}
        )
    # each is placed before those placed so far; what the first sum needs is to come first
    for name, consumers in reversed(users.items()):
        elements.to_registers(sch, consumers, name, row, of_gates=name in of_gates)

    # 4.
    stages, outputs = ("z", "cell", "inner"), ("h", "c_new")
    for name, block in blocks.items():
        is_gates = name == "z" or name.startswith(("h_", "x_"))
        if name in outputs:
            elements.output(sch, block, is_gates)
        elif name in stages or name.endswith(("_sum", "_centred")):
            scope = "shared.dyn" if name == "z" and shared_of(knobs, case, device) else "local"
            thread = (
                elements.stage(sch, block, is_gates, scope)
                if name in stages
                else elements.compute(sch, block, is_gates)
            )
            for read in gates.inputs(sch, block, case):
                elements.vector_to_registers(sch, block, read, thread, of_gates=read in of_gates)

    # 5.
    for name, block in blocks.items():
        if name.startswith(("mean_", "rstd_")):
            threads.by_one_thread(sch, block, knobs.threads_per_row)
        elif name not in (*outputs, *stages):
            for index in range(len(sch.get(block).writes)):
                sch.set_scope(block, index, "local")

    # 6.
    mod = sch.mod
    if knobs.early_start and knobs.prefetch and early_start.possible(device):
        mod = early_start.load_first(mod, LATE, ROW_LOOP)
    mod = guards.only_where_needed(mod, ("local", "shared.dyn"))
    if knobs.intermediates == "recompute":
        mod = phases.fuse(thread_private.declare(mod), ROW_LOOP)
    mod = exchange.request(mod) if knobs.exchange == "one_barrier" else mod
    return launch_bounds.request(mod, knobs.max_registers)


SCHEDULES = (
    Schedule(
        "gated_row", "lnlstm_step", "gpu", Knobs, default, valid, apply, version=2, seeds=seeds
    ),
)
