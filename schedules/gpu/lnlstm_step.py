"""LN-LSTM step forward on GPUs: one kernel, a block of threads to a row, which is one sequence of
the batch.

A thread has the same elements of all four gates, so that a cell is its own business; only the sums
of both layer norms are exchanged. The gates stay in registers between their three uses; rows too
long for that are read again, access by access. What else a row needs can be asked for before the
first sum, so that its way through memory and the exchanges overlap: with a batch of a few rows to a
multiprocessor that time is most of the kernel's.

Tried and left out: several rows to a block of threads (LSTMs of fewer than 128 elements, which a
warp takes, are small anyway).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lntune import ops
from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops.lnlstm_step import tokens_of
from lntune.schedule import Schedule
from lntune.transforms.gpu import functions, gates, phases, private, ragged, threads

PHASES = "lntune_row"  # annotation of the loop over rows
# registers of a thread for anything but its part of the row: fitted to what ptxas 13.0 spills and
# does not
OTHERS = 36
OTHERS_RAW = 74  # the same where two rows of gates are normalized, and widened or made again


@dataclass(frozen=True)
class Knobs:
    """Knobs of `gated_row`."""

    threads_per_row: int = knob(128, (32, 64, 128, 256, 512, 1024), "threads that share a row")
    vector_width: int = knob(
        4, (1, 2, 4, 8), "elements of one load or store, a vector of CUDA's such as float4"
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
        "where what is computed of a row is kept between its sums; recompute: z in shared memory, "
        "if it fits, the rest computed again, vector by vector",
    )


def shared_of(knobs: Knobs, case: Case, device: Device) -> int:
    """Bytes of shared memory that a block of threads has z in, or 0."""
    whole = (
        16
        * gates.turns_of(case, knobs.threads_per_row, knobs.vector_width)
        * knobs.threads_per_row
        * knobs.vector_width
    )
    return (
        whole if knobs.intermediates == "recompute" and whole + threads.STATIC <= device.l1 else 0
    )


def registers_of(knobs: Knobs, case: Case) -> int:
    """32-bit registers that a thread's part of the row takes, or where stages are made again, one
    access of it.
    """
    tokens, access = tokens_of(case), max(4, knobs.vector_width * case.itemsize) // 4
    of_gates = 4 * ("raw" in tokens) + 4 if knobs.row_storage == "registers" else 0
    of_rest = 4 * (2 + ("bias" in tokens)) + 2 + ("bias_c" in tokens) if knobs.prefetch else 0
    if knobs.intermediates == "recompute":
        return (10 + 4 * ("raw" in tokens)) * knobs.vector_width
    # what comes of the gates takes their place, but not at once
    made = 4 * knobs.vector_width + of_gates * access // (2 if "raw" in tokens else 4)
    return gates.turns_of(case, knobs.threads_per_row, knobs.vector_width) * max(
        (of_gates + of_rest) * access, made
    )


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    if reason := gates.misfit(case, knobs.threads_per_row, knobs.vector_width):
        return reason
    if knobs.intermediates == "recompute" and (knobs.row_storage == "registers" or knobs.prefetch):
        return (
            "stages that are made again, access by access, hold nothing else of a row in registers"
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
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide accesses, one to a thread if so many threads fit; everything asked for at once where
    registers hold it.
    """
    access = gates.widest(case)
    several = next(
        (t for t in (32, 64, 128, 256, 512) if t * access >= case.hidden), THREADS_PER_BLOCK
    )
    for ahead in (True, False):
        for shared in (several, *(t for t in (512, 256, 128) if t < several)):
            found = Knobs(shared, access, "registers", ahead)
            if valid(found, case, device) is None:
                return found
    again = [
        Knobs(shared, access, "reload", prefetch=False, intermediates="recompute")
        for shared in (512, 256, 128, 64, 32)
    ]
    return next((one for one in again if valid(one, case, device) is None), again[-1])


@functools.lru_cache(maxsize=8)
def _definition(case: Case) -> Any:
    """What every setting of the knobs begins with; making it takes as long as all that follows."""
    return functions.native(ops.get(case.op).define(case, gates.row_sum(case.hidden)))


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, with the device's activations; gate and element two loops.
    2. A block of threads for each row; everything about the row inside it.
    3. What is loaded once for several stages, or before its turn.
    4. Stages and outputs in registers, each access of what they read loaded at once; sums
    exchanged.
    5. The scalars of a row in registers of every thread; one thread gives the statistics.
    6. Of a ragged row only memory and sums ask who has a part; rows too long for registers go
    through all stages access by access.
    """
    from tvm import s_tir

    deal = gates.Deal(case.hidden, knobs.threads_per_row, knobs.vector_width)
    of_gates = {a.name for a in ops.get(case.op).arguments(case) if a.shape[-1:] == ("gates",)}

    # 1.
    sch = s_tir.Schedule(_definition(case))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    gates.apart(sch, blocks["z"], case.hidden)

    # 2.
    row = sch.merge(*(sch.get_loops(block)[0] for block in blocks.values()))
    sch.bind(row, "blockIdx.x")
    sch.annotate(row, PHASES, 1)

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
            else {name: its for name, its in early.items() if name not in normalized}
        )
    # each comes before those of before; what the first sum needs is to be first
    for name, consumers in reversed(users.items()):
        deal.keep(sch, consumers, name, row, gates=name in of_gates)

    # 4.
    stages, outputs = ("z", "cell", "inner"), ("h", "c_new")
    for name, block in blocks.items():
        wide = name == "z" or name.startswith(("h_", "x_"))
        if name in outputs:
            deal.output(sch, block, wide)
        elif name in stages or name.endswith(("_sum", "_centred")):
            place = "shared.dyn" if name == "z" and shared_of(knobs, case, device) else "local"
            thread = (
                deal.stage(sch, block, wide, place)
                if name in stages
                else deal.loops(sch, block, wide)
            )
            for read in gates.inputs(sch, block, case):
                deal.fetch(sch, block, read, thread, gates=read in of_gates)

    # 5.
    for name, block in blocks.items():
        if name.startswith(("mean_", "rstd_")):
            threads.once(sch, block, knobs.threads_per_row)
        elif name not in (*outputs, *stages):
            for index in range(len(sch.get(block).writes)):
                sch.set_scope(block, index, "local")

    # 6.
    made = ragged.asked_where_it_matters(sch.mod)
    return (
        phases.by_access(private.declare(made), PHASES)
        if knobs.intermediates == "recompute"
        else made
    )


SCHEDULES = (Schedule("gated_row", "lnlstm_step", "gpu", Knobs, default, valid, apply, version=1),)
