"""Layer norm forward on GPUs: one kernel, a row in the registers of the threads that share it.

x is read once where it can be kept. How many threads share a row decides how many bytes are in
flight, which is what a kernel bound by memory is about; the two exchanges of sums between them are
all the synchronization there is.

All loops over a thread's part of the row are unrolled, since registers have no addresses.

Tried and left out: a row kept as float32 instead of as it came (twice the registers in low
precision, to spare conversions that memory-bound code has time for).

Tried and not the default: vectors of 16 bytes for rows that they do not divide (5003 in bfloat16:
5 loads and 5 stores of them in place of 40 each of single elements, but 1,018 instructions, those
of a row's ends among them, in place of 774, and 73 registers in place of 59: weight and bias meet
another element of a vector in each row, and are still loaded one by one). A simulation of sm_90's
machine code has 92 % of a copy's bandwidth for them and the whole of it for single elements, a
model 82 and 94 % (`lntune inspect --knob vector_width=8`); neither knows what single elements cost
a card's memory system beside the issue of their loads, so tuning tries both first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK, WARP
from lntune.case import DTYPES, Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops import layer_norm
from lntune.schedule import Schedule
from lntune.transforms.gpu import (
    aligned_rows,
    cache_hints,
    exchange,
    guards,
    launch_bounds,
    threads,
)

OTHERS = 28  # registers of a thread for anything but its part of the row
THREADS = (8, 16, 32, 64, 128, 256, 512, 1024)
EACH = 40  # elements of a row that a thread has by default, at most
FEW_ROWS_EACH = 20  # the same where rows are so few that the time of a single one counts
MANY_ROWS = 128
LONG_BYTES = 32_768  # a row of these is worth a try in shared memory
WIDENED = 36  # elements of low precision that 64 registers hold: ptxas 13.0 keeps them as float32


@dataclass(frozen=True)
class Knobs:
    """Knobs of `shared_row`."""

    threads_per_row: int = knob(128, THREADS, "threads that share a row")
    rows_per_block: int = knob(
        1, (1, 2, 4, 8, 16, 32), "rows that a block of threads works on at a time"
    )
    vector_width: int = knob(
        4,
        (1, 2, 4, 8),
        "elements of one load or store, a vector of CUDA's such as float4; of 16 bytes also where"
        " they do not divide a row: then a row's first and last elements are accessed one by one",
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
    prefetch: bool = knob(
        False, (False, True), "weight and bias are loaded before the first sum, into registers"
    )
    exchange: str = knob(
        "two_barriers",
        ("two_barriers", "one_barrier"),
        "how warps that share a row exchange its sums: the first warp adds what each has and tells"
        " the others, or every warp does",
    )
    max_registers: int = launch_bounds.limit()


def vectors_per_thread(knobs: Knobs, case: Case) -> int:
    """Vectors of a row that one thread has."""
    columns = aligned_rows.columns(case.hidden, knobs.vector_width)
    return -(-columns // (knobs.vector_width * knobs.threads_per_row))


def _affine(case: Case) -> dict[str, str]:
    """The vectors that rows are multiplied by and added to, with their dtypes."""
    return {a.name: a.dtype for a in layer_norm.arguments(case) if a.name in ("weight", "bias")}


def registers_of(knobs: Knobs, case: Case) -> int:
    """32-bit registers that a thread's part of the row takes, and of weight and bias where they are
    loaded early; a vector shorter than that has one to itself.
    """
    early = [DTYPES[dtype] for dtype in _affine(case).values()] if knobs.prefetch else []
    return vectors_per_thread(knobs, case) * sum(
        max(4, knobs.vector_width * size) // 4 for size in (case.itemsize, *early)
    )


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    threads_all = knobs.threads_per_row * knobs.rows_per_block
    if knobs.vector_width * case.itemsize > threads.WIDEST_BYTES:
        size = knobs.vector_width * case.itemsize
        return f"vectors of {size} bytes; {threads.WIDEST_BYTES} is the most"
    if aligned_rows.needed(case.hidden, knobs.vector_width) and (
        why := aligned_rows.reason_invalid(case, knobs.vector_width)
        or (
            "rows that vectors do not divide are kept in registers, one to a block"
            if knobs.row_storage != "registers" or knobs.rows_per_block > 1
            else None
        )
    ):
        return why
    if not WARP <= threads_all <= THREADS_PER_BLOCK:
        return f"{threads_all} threads in a block; {WARP} to {THREADS_PER_BLOCK} fit"
    if (
        knobs.threads_per_row > WARP
        and knobs.threads_per_row * knobs.vector_width >= 2 * case.hidden
    ):
        return (
            f"half of {knobs.threads_per_row} threads would have no part of a row of {case.hidden}"
        )
    if knobs.prefetch and (knobs.row_storage != "registers" or not _affine(case)):
        return "weight or bias are loaded early, into registers, where the row is in them, too"
    if knobs.exchange == "one_barrier" and knobs.threads_per_row <= WARP:
        return "the threads of a warp exchange sums without a barrier"
    if knobs.row_storage == "registers" and registers_of(knobs, case) + OTHERS > min(
        REGISTERS_PER_THREAD, REGISTERS // threads_all
    ):
        return (
            f"{registers_of(knobs, case)} registers for a thread's part of the row; with {OTHERS}"
            f" others they do not fit {threads_all} threads"
        )
    if knobs.row_storage == "registers" and knobs.rolled:
        return "a row in registers takes unrolled loops"
    if vectors_per_thread(knobs, case) == 1 and knobs.rolled:
        return "a thread has one vector of the row, and no loop"
    if knobs.row_storage == "shared" and knobs.rows_per_block > 1:
        return "shared memory is for one row to a block"
    row = case.hidden * case.itemsize
    if knobs.row_storage == "shared" and threads.SHARED_FOR_SUMS + row > device.shared_memory:
        return (
            f"a row of {row} bytes does not fit the {device.shared_memory} bytes of shared memory,"
            f" of which {threads.SHARED_FOR_SUMS} are for sums"
        )
    if case.rows == 1 and knobs.rows_per_block > 1:
        return "a single row cannot fill a block of several"
    kept = registers_of(knobs, case) if knobs.row_storage == "registers" else 0
    if why := launch_bounds.reason_invalid(knobs.max_registers, threads_all, kept):
        return why
    if knobs.cache_hints and (
        why := cache_hints.reason_invalid(case, device, knobs.row_storage == "reload")
    ):
        return why
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide vectors, and few threads to a row: what a thread has beside its elements, and the
    exchanges of sums, are paid once for all of them. A row that registers do not hold is kept in
    shared memory, or loaded each time.

    A warp to a row up to 1024 elements, which needs no barrier; several rows to a block where a
    warp has more threads than the row has vectors, and of several rows three vectors to a thread
    at most: for four ptxas 13.0 gives it a stack frame of 8 bytes. Loops that load a row each time
    are not unrolled, nor those over wide vectors of long rows in low precision: ptxas would keep
    what they load after all, and spill it.
    """
    width = threads.widest(case)
    if case.hidden >= WARP * width:
        each = FEW_ROWS_EACH if case.rows < MANY_ROWS and case.hidden > WARP * EACH else EACH
        per_row = next((t for t in THREADS if t * each >= case.hidden), THREADS_PER_BLOCK)
        per_row, rows = max(per_row, WARP), 1
        if per_row == THREADS_PER_BLOCK and case.hidden <= 512 * width * 6:
            # six vectors; a block of 1024 threads leaves each 64 registers, of which ptxas 13.0
            # takes 32 and spills
            per_row = 512
    else:
        per_row = next(t for t in THREADS if t * width * 4 >= case.hidden)
        per_row = per_row * 2 if per_row * width * 4 <= case.hidden else per_row
        rows = 1 if case.rows == 1 else 128 // per_row
        per_row = WARP if per_row * rows < WARP else per_row
    for storage in ("registers", "shared", "reload"):
        per_row = min(per_row, 512) if storage == "reload" else per_row
        for number in (
            per_row,
            *(t for t in (256, 512, 1024) if t > per_row),
            *(t for t in (16, 8) if t < per_row),
        ):
            knobs = Knobs(number, rows, width, storage)
            widened = (
                case.itemsize < 4
                and number == THREADS_PER_BLOCK
                and vectors_per_thread(knobs, case) * width > WIDENED
            )
            if widened and storage == "registers":
                continue
            rolled = storage == "reload" or (storage == "shared" and widened and width > 2)
            knobs = replace(knobs, rolled=rolled and vectors_per_thread(knobs, case) > 1)
            if valid(knobs, case, device) is None:
                return knobs
    return Knobs(32, 1, width, "reload", rolled=True)


def seeds(case: Case, device: Device) -> list[Knobs]:
    """What is to be tried first beside the default knobs: vectors of 16 bytes where they do not
    divide a row of two bytes an element, half and twice the threads, several rows to a block where
    a warp holds one, and a long row in shared memory.
    """
    first = default(case, device)
    across = replace(first, vector_width=threads.WIDEST_BYTES // case.itemsize)
    tried = [across] if first.vector_width == 1 and case.itemsize == 2 else []
    tried += [
        replace(first, threads_per_row=t)
        for t in (first.threads_per_row // 2, 2 * first.threads_per_row)
    ]
    if first.threads_per_row == WARP and first.rows_per_block == 1:
        tried += [replace(first, rows_per_block=rows) for rows in (4, 2)]
    if case.hidden * case.itemsize >= LONG_BYTES:
        tried += [
            replace(first, threads_per_row=t, row_storage="shared", rolled=False)
            for t in (512, 256)
        ]
    return tried


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, in groups of rows, without copies of what is widened.
    2. A block of threads for each group of rows; everything about a row inside it.
    3. The row, where it is kept.
    4. Sums and outputs shared among the threads; the scalars of a row in registers of every thread
    that needs them.
    5. Where a block has several rows: guards only around loads, stores and sums over threads.
    Where vectors do not divide a row: those of the matrix.
    """
    from tvm import s_tir

    # 1. Padded by repeating the last row, so that only stores need guards.
    width = knobs.vector_width
    across = aligned_rows.needed(case.hidden, width)
    sch = s_tir.Schedule(
        layer_norm.define(
            case,
            aligned_rows.row_sum(case.hidden, width) if across else threads.row_sum,
            knobs.rows_per_block,
            aligned_rows.columns(case.hidden, width),
            aligned_rows.inside(case.hidden, width) if across else None,
        )
    )
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

    # 3. What is placed first comes last; x is to come first, from far away.
    users = [blocks[name] for name in ("sum", "centred", "y")]
    for vector in reversed(_affine(case)) if knobs.prefetch else ():
        threads.to_registers(
            sch,
            [blocks["y"]],
            threads.inputs(sch, blocks["y"]).index(vector),
            row,
            knobs.threads_per_row,
            knobs.vector_width,
            first=True,
        )
    if knobs.row_storage == "registers":
        threads.to_registers(
            sch, users, 0, row, knobs.threads_per_row, knobs.vector_width, first=knobs.prefetch
        )
    elif knobs.row_storage == "shared":
        threads.to_shared(
            sch, users, 0, row, knobs.threads_per_row, knobs.vector_width, not knobs.rolled
        )

    # 4.
    for name in ("sum", "centred"):
        thread = threads.one_by_one(
            sch, blocks[name], knobs.threads_per_row, knobs.vector_width, not knobs.rolled
        )
        if knobs.row_storage != "registers":
            threads.vector_to_registers(sch, blocks[name], 0, thread, knobs.vector_width)
    if knobs.row_storage != "registers":
        threads.vector_to_registers(sch, blocks["y"], 0, y, knobs.vector_width)
    for vector in _affine(case) if not knobs.prefetch else ():
        threads.vector_to_registers(sch, blocks["y"], vector, y, knobs.vector_width)
    for name in ("mean", "rstd"):
        if name in blocks:
            threads.by_one_thread(sch, blocks[name], knobs.threads_per_row)
    for name in ("sum", "mean0", "centred", "delta", "variance", "scale", "shift"):
        for index in range(len(sch.get(blocks[name]).writes)):
            sch.set_scope(blocks[name], index, "local")

    # 5.
    several = knobs.rows_per_block > 1 and guards.fits(case.variant, knobs.vector_width)
    mod = guards.only_where_needed(sch.mod) if several else sch.mod
    mod = aligned_rows.real(mod, case.hidden, width) if across else mod
    mod = exchange.request(mod) if knobs.exchange == "one_barrier" else mod
    mod = launch_bounds.request(mod, knobs.max_registers)
    return cache_hints.request(mod, ("x", "y")) if knobs.cache_hints else mod


SCHEDULES = (
    Schedule(
        "shared_row", "layer_norm", "gpu", Knobs, default, valid, apply, version=2, seeds=seeds
    ),
)
