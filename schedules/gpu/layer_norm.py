"""Layer norm forward on GPUs: one kernel, a row in the registers of the threads that share it.

x is read once where it can be kept. How many threads share a row decides how many bytes are in
flight, which is what a kernel bound by memory is about; the two exchanges of sums between them are
all the synchronization there is.

All loops over a thread's part of the row are unrolled, since registers have no addresses.

Tried and left out: a row kept as float32 instead of as it came (twice the registers in low
precision, to spare conversions that memory-bound code has time for).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK, WARP
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops import layer_norm
from lntune.schedule import Schedule
from lntune.transforms.gpu import hints, threads

OTHERS = 28  # registers of a thread for anything but its part of the row
WIDENED = 36  # elements of low precision that 64 registers hold: ptxas 13.0 keeps them as float32


@dataclass(frozen=True)
class Knobs:
    """Knobs of `shared_row`."""

    threads_per_row: int = knob(
        128, (8, 16, 32, 64, 128, 256, 512, 1024), "threads that share a row"
    )
    rows_per_block: int = knob(
        1, (1, 2, 4, 8, 16, 32), "rows that a block of threads works on at a time"
    )
    vector_width: int = knob(
        4, (1, 2, 4, 8), "elements of one load or store, a vector of CUDA's such as float4"
    )
    row_storage: str = knob(
        "registers",
        ("registers", "shared", "reload"),
        "where a row is kept between its three uses; reload: nowhere, it is loaded from global"
        " memory each time",
    )
    rolled: bool = knob(
        False,
        (False, True),
        "a thread's loop over its vectors of a row stays a loop and is not unrolled; not for"
        " registers, which have no addresses",
    )
    cache_hints: bool = knob(
        False,
        (False, True),
        "x is loaded and y stored with the cache hint .cs (accessed once, evict first)",
    )


def turns_of(knobs: Knobs, case: Case) -> int:
    """Accesses that one thread makes to pass over a row."""
    return -(-case.hidden // (knobs.vector_width * knobs.threads_per_row))


def registers_of(knobs: Knobs, case: Case) -> int:
    """32-bit registers that a thread's part of the row takes; an access shorter than that has one
    to itself.
    """
    return turns_of(knobs, case) * max(4, knobs.vector_width * case.itemsize) // 4


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    threads_all = knobs.threads_per_row * knobs.rows_per_block
    if case.hidden % knobs.vector_width:
        return f"accesses of {knobs.vector_width} elements do not divide a row of {case.hidden}"
    if knobs.vector_width * case.itemsize > threads.ACCESS:
        return (
            f"accesses of {knobs.vector_width * case.itemsize} bytes; {threads.ACCESS} is the most"
        )
    if not WARP <= threads_all <= THREADS_PER_BLOCK:
        return f"{threads_all} threads in a block; {WARP} to {THREADS_PER_BLOCK} fit"
    if (
        knobs.threads_per_row > WARP
        and knobs.threads_per_row * knobs.vector_width >= 2 * case.hidden
    ):
        return (
            f"half of {knobs.threads_per_row} threads would have no part of a row of {case.hidden}"
        )
    if knobs.row_storage == "registers" and registers_of(knobs, case) + OTHERS > min(
        REGISTERS_PER_THREAD, REGISTERS // threads_all
    ):
        return (
            f"{registers_of(knobs, case)} registers for a thread's part of the row; with {OTHERS}"
            f" others they do not fit {threads_all} threads"
        )
    if knobs.row_storage == "registers" and knobs.rolled:
        return "a row in registers takes unrolled turns"
    if turns_of(knobs, case) == 1 and knobs.rolled:
        return "there is one turn"
    if knobs.row_storage == "shared" and knobs.rows_per_block > 1:
        return "shared memory is for one row to a block"
    row = case.hidden * case.itemsize
    if knobs.row_storage == "shared" and threads.STATIC + row > device.l1:
        return (
            f"a row of {row} bytes does not fit the {device.l1} bytes of shared memory, of which"
            f" {threads.STATIC} are for sums"
        )
    if case.rows == 1 and knobs.rows_per_block > 1:
        return "a single row cannot fill a block of several"
    if knobs.cache_hints and (why := hints.misfit(case, device, knobs.row_storage == "reload")):
        return why
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide accesses, four to a thread; where registers do not hold the row, shared memory, else
    reading again.

    One row to a block from 64 accesses on, since the stores of several rows are guarded; and of
    several rows three accesses to a thread at most: for four ptxas 13.0 gives it a stack frame of 8
    bytes. Turns that read again are a loop, and wide ones of long rows in low precision: ptxas
    would keep what they read after all, and spill it.
    """
    access = threads.widest(case)
    wanted = -(-case.hidden // (access * 4))
    several = next((t for t in (8, 16, 32, 64, 128, 256, 512) if t >= wanted), THREADS_PER_BLOCK)
    for fewest in (64, 128):
        several = max(several, fewest) if case.hidden >= fewest * access else several
    several = several * 2 if several < 64 and several * access * 4 <= case.hidden else several
    if several == THREADS_PER_BLOCK and case.hidden <= 512 * access * 6:
        # six accesses; a block of 1024 threads leaves each 64 registers, of which ptxas 13.0 takes
        # 32 and spills
        several = 512
    rows = 1 if several >= 64 or case.rows == 1 else 128 // several
    if several * rows < 32:
        several = 32
    for keep in ("registers", "shared", "reload"):
        several = min(several, 512) if keep == "reload" else several
        for s in (
            several,
            *(t for t in (256, 512, 1024) if t > several),
            *(t for t in (16, 8) if t < several),
        ):
            found = Knobs(s, rows, access, keep)
            widened = (
                case.itemsize < 4
                and s == THREADS_PER_BLOCK
                and turns_of(found, case) * access > WIDENED
            )
            if widened and keep == "registers":
                continue
            rolled = keep == "reload" or (keep == "shared" and widened and access > 2)
            found = replace(found, rolled=rolled and turns_of(found, case) > 1)
            if valid(found, case, device) is None:
                return found
    return Knobs(32, 1, access, "reload", rolled=True)


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, in groups of rows, without copies of what is widened.
    2. A block of threads for each group of rows; everything about a row inside it.
    3. The row, where it is kept.
    4. Sums and outputs shared among the threads; the scalars of a row in registers of every thread
    that needs them.
    """
    from tvm import s_tir

    # 1. Padded by repeating the last row, so that only stores ask whether a row is there.
    sch = s_tir.Schedule(layer_norm.define(case, threads.row_sum, knobs.rows_per_block))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    for name in ("x32", "weight32", "bias32"):
        if name in blocks:
            sch.compute_inline(blocks.pop(name))

    # 2. By way of the first stage over rows.
    group, row = sch.split(
        sch.get_loops(blocks["sum"])[0], [None, knobs.rows_per_block], preserve_unit_iters=True
    )
    sch.bind(group, "blockIdx.x")
    sch.bind(row, "threadIdx.y")
    for name, block in blocks.items():
        if name not in ("sum", "y"):
            sch.reverse_compute_at(block, row, preserve_unit_loops=True)
    y = threads.output(
        sch, blocks["y"], row, knobs.threads_per_row, knobs.vector_width, not knobs.rolled
    )

    # 3.
    users = [blocks[name] for name in ("sum", "centred", "y")]
    if knobs.row_storage == "registers":
        threads.keep(sch, users, 0, row, knobs.threads_per_row, knobs.vector_width)
    elif knobs.row_storage == "shared":
        threads.stage(
            sch, users, 0, row, knobs.threads_per_row, knobs.vector_width, not knobs.rolled
        )

    # 4.
    for name in ("sum", "centred"):
        thread = threads.one_by_one(
            sch, blocks[name], knobs.threads_per_row, knobs.vector_width, not knobs.rolled
        )
        if knobs.row_storage != "registers":
            threads.fetch(sch, blocks[name], 0, thread, knobs.vector_width)
    if knobs.row_storage != "registers":
        threads.fetch(sch, blocks["y"], 0, y, knobs.vector_width)
    for vector in [
        n for n in ("weight", "bias") if any(a.name == n for a in layer_norm.arguments(case))
    ]:
        threads.fetch(sch, blocks["y"], vector, y, knobs.vector_width)
    for name in ("mean", "rstd"):
        if name in blocks:
            threads.once(sch, blocks[name], knobs.threads_per_row)
    for name in ("sum", "mean0", "centred", "delta", "variance", "scale", "shift"):
        for index in range(len(sch.get(blocks[name]).writes)):
            sch.set_scope(blocks[name], index, "local")
    return hints.request(sch.mod, ("x", "y")) if knobs.cache_hints else sch.mod


SCHEDULES = (Schedule("shared_row", "layer_norm", "gpu", Knobs, default, valid, apply, version=1),)
