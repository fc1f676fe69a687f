"""Layer norm backward on GPUs: dx and partial sums of dgamma and dbeta in one kernel that reads dy
and x once; a small second one adds the sums.

A block of threads loops over rows in strides of the grid. What it has of a row is in registers
until dx is written; the sums over its rows stay in registers or shared memory until its last row
and are written once. Rows too long for that have the partial sums in a kernel of their own, which
reads dy and x again, but needs no sums over a row.

Tried, and not default: launch bounds with the number of blocks that a multiprocessor is to hold
(`max_registers`). Where registers hold so many, ptxas 13.0 takes no fewer for it, and spills where
they do not (4096 in bfloat16, 256 threads, 3 blocks: 110 registers become 80 and 60 bytes of
spills).

Tried and not the default: vectors of 16 bytes for rows that they do not divide. Columns of a thread
are the same in all its rows where blocks are a multiple of the rows after which one begins at the
same place in a vector, so that sums and weight stay in registers. With 256 threads for 5003 in
bfloat16, a simulation of sm_90's machine code has 75 % of a copy's bandwidth for them, as for 5000:
a thread has 24 elements then; and 88 % for 20 single elements, with the next row on its way, the
weight in registers and one barrier, 50 % without these three. It does not know what single elements
cost a card's memory system beside the issue of their loads, so tuning tries both first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK, WARP
from lntune.case import DTYPES, TYPICAL_ROWS, Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops import layer_norm_backward
from lntune.schedule import Schedule
from lntune.transforms.gpu import (
    aligned_rows,
    cache_hints,
    columns,
    exchange,
    grid_stride,
    guards,
    launch_bounds,
    reload,
    row_prefetch,
    threads,
)

EACH = 20  # elements of a row that a thread has by default, at most, where a warp does not do
WARP_EACH = 24  # the same of a row that one warp has: ptxas 13.0 gives it 168 registers
TURNS = (
    8  # rows that a block takes, at least about: fewer, and partial sums are too many beside them
)
THREADS = (8, 16, 32, 64, 128, 256, 512, 1024)
BLOCKS = (1, 2, 3, 4, 6, 8, 16)
WORD = 4  # bytes; arrays in shared memory that are no longer are lost by TVM 0.27


@dataclass(frozen=True)
class Knobs:
    """Knobs of `shared_row_backward`."""

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
        "where a row is kept between its uses; reload: nowhere, it is loaded from global memory"
        " each time",
    )
    partial_sums: str = knob(
        "registers",
        ("registers", "separate_kernel"),
        "where partial sums of dgamma and dbeta are kept; separate_kernel: in registers of a kernel"
        " of their own",
    )
    blocks_per_sm: int = knob(
        2,
        BLOCKS,
        "blocks of threads (and rows of partial sums) for each multiprocessor, as far as there are"
        " rows",
    )
    cache_hints: bool = knob(
        False,
        (False, True),
        "dy and x are loaded and dx stored with the cache hint .cs (accessed once, evict first)",
    )
    prefetch: bool = knob(
        False,
        (False, True),
        "dy, x and the statistics of a block's next row are loaded into registers while it works on"
        " this one",
    )
    exchange: str = knob(
        "two_barriers",
        ("two_barriers", "one_barrier"),
        "how warps that share a row exchange its sums: the first warp adds what each has and tells"
        " the others, or every warp does",
    )
    weight_storage: str = knob(
        "reload",
        ("reload", "registers"),
        "where the weight is kept; reload: nowhere, it is loaded from the cache twice a row;"
        " registers: from a block's first row to its last",
    )
    max_registers: int = launch_bounds.limit()


@functools.lru_cache(maxsize=8)  # a case has thousands of knobs that are to be valid
def _outputs(case: Case) -> tuple[str, ...]:
    return tuple(a.name for a in layer_norm_backward.arguments(case) if a.role == "out")


@functools.lru_cache(maxsize=8)
def _weight(case: Case) -> str:
    """The dtype of the weight, or nothing where there is none."""
    return next((a.dtype for a in layer_norm_backward.arguments(case) if a.name == "weight"), "")


def _sums(case: Case) -> tuple[str, ...]:
    return tuple(name for name in _outputs(case) if name != "dx")


def sums_in_own_kernel(knobs: Knobs, case: Case) -> bool:
    """Whether the partial sums have a kernel of their own."""
    return bool(_sums(case)) and knobs.partial_sums == "separate_kernel"


def loops_over_rows(knobs: Knobs, case: Case) -> bool:
    """Whether a block that makes dx loops over rows, since it also keeps their sums."""
    return "dx" in _outputs(case) and bool(_sums(case)) and knobs.partial_sums == "registers"


def threads_of_columns(knobs: Knobs) -> int:
    """Threads of a row of the block in a separate kernel of partial sums; a warp's loads side by
    side are long enough.
    """
    return min(knobs.threads_per_row, WARP)


def parts_of(knobs: Knobs, case: Case, device: Device) -> int:
    """Blocks of rows that have partial sums; blocks of threads are as many, times those that share
    a row's columns where sums have a kernel of their own.
    """
    if not _sums(case):
        return 1
    most = 1 if case.rows <= 1 else max(1, 2 * TYPICAL_ROWS[case.bucket] // knobs.rows_per_block)
    chunks = (
        -(-case.hidden // (threads_of_columns(knobs) * knobs.vector_width))
        if sums_in_own_kernel(knobs, case)
        else 1
    )
    parts = max(1, min(most, -(-knobs.blocks_per_sm * device.cores // chunks)))
    # all rows of a block begin at the same place of a vector
    together = aligned_rows.period(case.hidden, knobs.vector_width)
    return parts if parts < together else parts // together * together


def registers_of(knobs: Knobs, case: Case) -> int:
    """About the 32-bit registers of a thread that has its part of dy, of x and of sums in them.

    A vector shorter than a register has one to itself. Anything else takes 32, more where the part
    is above 32, what is loaded has places in shared memory, or low precision is widened beside no
    sums; the next row finds most of its room in what that leaves, unless it is loaded in single
    elements. Fitted to what ptxas 13.0 says for sm_90.
    """
    columns = aligned_rows.columns(case.hidden, knobs.vector_width)
    vectors = -(-columns // (knobs.vector_width * knobs.threads_per_row))
    row = 2 * vectors * max(4, knobs.vector_width * case.itemsize) // 4
    part = _kept(knobs, case)
    wide = knobs.vector_width == case.itemsize == 4
    copied = 0 if knobs.row_storage != "shared" else max(10, part // 2 - 16) if wide else 10
    widened = (
        part // 3
        if knobs.row_storage == "registers"
        and knobs.partial_sums == "separate_kernel"
        and case.itemsize < 4
        else 0
    )
    ahead = row * 7 // 8 if knobs.vector_width == 1 else row * 3 // 8
    more = ahead + (knobs.exchange == "one_barrier") if knobs.prefetch else 0
    if knobs.weight_storage == "registers":
        more += vectors * max(4, knobs.vector_width * DTYPES[_weight(case)]) // 4
    return part + 32 + max(0, part - 32) * 5 // 8 + copied + widened + more


def _kept(knobs: Knobs, case: Case) -> int:
    """Registers that a thread's part of dy, of x and of the sums takes."""
    vectors = -(-case.hidden // (knobs.vector_width * knobs.threads_per_row))
    row = 2 * vectors * max(4, knobs.vector_width * case.itemsize) // 4
    sums = len(_sums(case)) * vectors * knobs.vector_width
    return row * (knobs.row_storage == "registers") + sums * (knobs.partial_sums == "registers")


def shared_of(knobs: Knobs, case: Case) -> int:
    """Bytes of shared memory that a block of threads takes."""
    kept = 2 * case.hidden * case.itemsize if knobs.row_storage == "shared" else 0
    sides = (
        case.hidden
        if knobs.partial_sums == "registers"
        else threads_of_columns(knobs) * knobs.vector_width
    )
    return (
        threads.SHARED_FOR_SUMS
        + kept
        + (4 * len(_sums(case)) * sides * knobs.rows_per_block if knobs.rows_per_block > 1 else 0)
    )


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    dx, sums = "dx" in _outputs(case), bool(_sums(case))
    threads_all = (
        max(knobs.threads_per_row, WARP * knobs.rows_per_block)
        if dx and sums_in_own_kernel(knobs, case)
        else knobs.threads_per_row * knobs.rows_per_block
    )
    if knobs.vector_width * case.itemsize > threads.WIDEST_BYTES:
        size = knobs.vector_width * case.itemsize
        return f"vectors of {size} bytes; {threads.WIDEST_BYTES} is the most"
    if why := _reason_across(knobs, case, device):
        return why
    if not WARP <= threads_all <= THREADS_PER_BLOCK or (
        sums_in_own_kernel(knobs, case) and dx and knobs.threads_per_row < WARP
    ):
        return (
            f"{knobs.threads_per_row} x {knobs.rows_per_block} threads; {WARP} to"
            f" {THREADS_PER_BLOCK} fit a block of each kernel"
        )
    if (
        knobs.threads_per_row > WARP
        and knobs.threads_per_row * knobs.vector_width >= 2 * case.hidden
    ):
        return (
            f"half of {knobs.threads_per_row} threads would have no part of a row of {case.hidden}"
        )
    if not sums and (knobs.partial_sums != "registers" or knobs.blocks_per_sm > 1):
        return "there are no sums over rows"
    if not dx and (
        knobs.partial_sums != "separate_kernel"
        or knobs.row_storage != "registers"
        or knobs.threads_per_row > WARP
    ):
        return "without dx no row is summed, and a warp shares its columns"
    if knobs.row_storage == "shared" and case.hidden * case.itemsize <= WORD:
        return f"a row of {case.hidden * case.itemsize} bytes needs no shared memory"
    if case.hidden == 1 and knobs.row_storage == "reload" and sums_in_own_kernel(knobs, case):
        return "a row of one element need not be loaded again"
    if (
        knobs.rows_per_block > 1
        and knobs.row_storage == "shared"
        and not sums_in_own_kernel(knobs, case)
    ):
        return "shared memory is for one row to a block"
    if knobs.prefetch and not (
        loops_over_rows(knobs, case)
        and knobs.row_storage == "registers"
        and knobs.rows_per_block == 1
    ):
        return (
            "the next row is loaded into registers where a block has rows and sums in them, one row"
            " at a time"
        )
    if knobs.exchange == "one_barrier" and (not dx or knobs.threads_per_row <= WARP):
        return "the threads of a warp exchange sums without a barrier"
    if knobs.weight_storage == "registers" and not (loops_over_rows(knobs, case) and _weight(case)):
        return "there is no weight, or no loop over rows that could keep it"
    if shared_of(knobs, case) > device.shared_memory:
        need = shared_of(knobs, case)
        return f"{need} bytes of shared memory; a block has {device.shared_memory}"
    if dx and registers_of(knobs, case) > min(
        REGISTERS_PER_THREAD,
        REGISTERS // (knobs.threads_per_row if sums_in_own_kernel(knobs, case) else threads_all),
    ):
        return f"{registers_of(knobs, case)} registers a thread do not fit {threads_all} threads"
    if knobs.max_registers and not (dx and knobs.partial_sums == "registers"):
        return "registers are limited in a kernel of dx that keeps its sums, or has none"
    if why := launch_bounds.reason_invalid(knobs.max_registers, threads_all, _kept(knobs, case)):
        return why
    if case.rows == 1 and knobs.rows_per_block > 1:
        return "a single row cannot fill a block of several"
    fewer = [n for n in BLOCKS if n < knobs.blocks_per_sm]
    if fewer and parts_of(knobs, case, device) == parts_of(
        replace(knobs, blocks_per_sm=fewer[-1]), case, device
    ):
        return (
            f"{knobs.blocks_per_sm} blocks for each multiprocessor are more than {case.rows} rows"
            " fill"
        )
    if knobs.cache_hints and (
        why := cache_hints.reason_invalid(
            case, device, dx and (knobs.row_storage == "reload" or sums_in_own_kernel(knobs, case))
        )
    ):
        return why
    return None


def _reason_across(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why vectors that do not divide a row do not fit, or None."""
    width = knobs.vector_width
    if not aligned_rows.needed(case.hidden, width):
        return None
    if why := aligned_rows.reason_invalid(case, width):
        return why
    if (
        "dx" not in _outputs(case)
        or sums_in_own_kernel(knobs, case)
        or knobs.row_storage != "registers"
        or knobs.rows_per_block > 1
    ):
        return "rows that vectors do not divide are kept in registers, one to a block at a time"
    together = aligned_rows.period(case.hidden, width)
    if loops_over_rows(knobs, case) and parts_of(knobs, case, device) % together:
        return f"rows begin at one of {together} places in a vector, and blocks are fewer"
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide vectors, and few threads to a row: a warp up to 768 elements, which needs no barrier,
    then 16 elements or more to a thread. A row and its sums are in registers, the row in shared
    memory where that is too much, the sums in a kernel of their own where that is, too.
    """
    width = threads.widest(case)
    if WARP * width <= case.hidden <= WARP * WARP_EACH:
        per_row = WARP
    else:
        each = max(width, EACH if case.hidden > WARP * width else 8)
        per_row = next((t for t in THREADS if t * each >= case.hidden), THREADS_PER_BLOCK)
    if "dx" not in _outputs(case):
        return next(_fitting(WARP, width, "registers", "separate_kernel", case, device))
    for sums in ("registers", "separate_kernel") if _sums(case) else ("registers",):
        # with more registers each, where sums do not keep them
        per_row = min(per_row, 512) if sums == "separate_kernel" else per_row
        nearest = (
            per_row,
            *(t for t in THREADS if t > per_row),
            *(t for t in reversed(THREADS) if t < per_row),
        )
        for storage, fewest, vector_width in (
            ("registers", per_row // 2, width),
            ("shared", per_row // 4, width),
            ("shared", per_row // 4, max(1, width // 2)),
            ("reload", 0, width),
        ):
            for number in (t for t in nearest if t >= fewest):
                for knobs in _fitting(number, vector_width, storage, sums, case, device):
                    return knobs
    return Knobs(WARP, 1, width, "reload", "separate_kernel", 1)


def seeds(case: Case, device: Device) -> list[Knobs]:
    """What is to be tried first beside the default knobs: vectors of 16 bytes where they do not
    divide a row of two bytes an element, half and twice the threads, with as many blocks as fit
    then, a step more and fewer blocks, and the next row on its way, or not.
    """
    first = default(case, device)
    across = replace(first, vector_width=threads.WIDEST_BYTES // case.itemsize)
    tried = [across] if first.vector_width == 1 and case.itemsize == 2 else []
    tried += [
        next(
            _fitting(t, first.vector_width, first.row_storage, first.partial_sums, case, device),
            first,
        )
        for t in (first.threads_per_row // 2, 2 * first.threads_per_row)
    ]
    more = next((n for n in BLOCKS if n > first.blocks_per_sm), first.blocks_per_sm)
    fewer = next((n for n in reversed(BLOCKS) if n < first.blocks_per_sm), first.blocks_per_sm)
    ahead = replace(first, prefetch=not first.prefetch, weight_storage="reload")
    return [*tried, *(replace(first, blocks_per_sm=n) for n in (more, fewer)), ahead]


def _fitting(
    threads_per_row: int,
    vector_width: int,
    row_storage: str,
    partial_sums: str,
    case: Case,
    device: Device,
) -> Iterator[Knobs]:
    """Valid knobs like these, the best first: as many blocks as a multiprocessor holds, but not so
    many that their partial sums are much beside the rows, nor more than the rows fill. A block
    that is alone there has its next row on the way.
    """
    resident, rows_of_block = 0, -(-TYPICAL_ROWS[case.bucket] // device.cores)
    if partial_sums == "separate_kernel":
        per_row, rows, blocks = max(threads_per_row, WARP), 1 if case.rows == 1 else 8, BLOCKS[-1]
        knobs = Knobs(per_row, rows, vector_width, row_storage, partial_sums)
    else:
        one_warp = case.hidden >= WARP * vector_width
        alone = (threads_per_row >= WARP and one_warp) or case.rows == 1 or row_storage == "shared"
        rows = 1 if alone else 128 // threads_per_row
        per_row = max(threads_per_row, WARP) if rows == 1 else threads_per_row
        knobs = Knobs(per_row, rows, vector_width, row_storage, partial_sums)
        resident = REGISTERS // (per_row * rows * registers_of(knobs, case))
        blocks = (
            min(resident, -(-TYPICAL_ROWS[case.bucket] // (TURNS * device.cores)))
            if _sums(case)
            else 1
        )
    for n in reversed(BLOCKS):
        candidate = replace(knobs, blocks_per_sm=n)
        if n > max(1, blocks):
            continue
        # a block that has a multiprocessor to itself, and more than one row to go through
        waits = partial_sums == "registers" and resident == 1 and rows_of_block >= 2
        better = _ahead(candidate, case) if waits else _of_single_elements(candidate, case)
        for one in (*better, candidate):
            if valid(one, case, device) is None:
                yield one


def _of_single_elements(knobs: Knobs, case: Case) -> Iterator[Knobs]:
    """Knobs like these that load the weight once and have one barrier, where rows are loaded in
    single elements, which are most of a block's instructions, and as many blocks are resident.
    """
    if knobs.vector_width == 1 and knobs.threads_per_row > WARP:
        kept = replace(knobs, exchange="one_barrier", weight_storage="registers")
        threads_all = knobs.threads_per_row * knobs.rows_per_block
        if _weight(case) and REGISTERS // (threads_all * registers_of(kept, case)) >= (
            knobs.blocks_per_sm
        ):
            yield kept


def _ahead(knobs: Knobs, case: Case) -> Iterator[Knobs]:
    """Knobs like these, with which a block waits less where nothing else runs meanwhile: its next
    row on the way, one barrier, and the weight kept where it is loaded in single elements.

    Vectors of float32 do without: by the model and a simulation of the machine code such a block
    has memory busy as it is.
    """
    if case.itemsize == 4 and knobs.vector_width == 4:
        return
    ahead = replace(knobs, prefetch=True)
    if knobs.threads_per_row > WARP:
        ahead = replace(ahead, exchange="one_barrier")
    if knobs.vector_width == 1 and _weight(case):
        yield replace(ahead, weight_storage="registers")
    yield ahead


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernels, step by step.

    1. The definition, in blocks of rows, without copies of what is widened.
    2. The kernel of dx, with the partial sums or without.
    3. The kernel of partial sums, where they have one of their own.
    4. What all blocks' partial sums come to.
    5. Where a block has several rows: one guard around all that is stored or summed of a row, or
    guards only around accesses to memory and sums over threads.
    Loops end where the rows do.
    """
    from tvm import s_tir

    # 1. Padded by repeating the last row, so that only stores need guards.
    # Where a block has one row at a time, its loop ends at the last, and nothing needs any.
    parts, own_kernel = parts_of(knobs, case, device), sums_in_own_kernel(knobs, case)
    hidden, width = case.hidden, knobs.vector_width
    across = aligned_rows.needed(hidden, width)
    definition = layer_norm_backward.define(
        case,
        aligned_rows.row_sum(hidden, width) if across else threads.row_sum,
        knobs.rows_per_block,
        parts,
        columns=aligned_rows.columns(hidden, width),
        first_column=(lambda b: aligned_rows.shift(b, hidden, width)) if across else None,
    )
    sch = s_tir.Schedule(
        grid_stride.without_padding(definition)
        if knobs.rows_per_block == 1 and not own_kernel
        else definition
    )
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    for name in ("dy32", "x32", "weight32"):
        if name in blocks:
            sch.compute_inline(blocks.pop(name))

    # 2., 3.
    if own_kernel:
        _columns(sch, blocks["blocks"], knobs)
    if "dx" in blocks:
        _rows(sch, blocks, knobs, 0 if own_kernel else parts)

    # 4.
    if _sums(case):
        columns.totals(sch, blocks, _sums(case), device.cores)

    # 5.
    mod = guards.once_a_row(sch.mod) if knobs.rows_per_block > 1 else sch.mod
    if knobs.rows_per_block > 1 and not own_kernel and guards.fits(case.variant, width):
        mod = guards.only_where_needed(mod)
    if _weight(case) and knobs.weight_storage == "reload":
        mod = reload.after(mod, "c2", "weight")
    mod = grid_stride.end_at_last_row(mod, knobs.rows_per_block)
    if knobs.prefetch:
        mod = row_prefetch.next_row(mod)
    if across:
        # of dy and the weight there are zeros; products of these with x have to be zero, too
        mod = aligned_rows.real(mod, hidden, width, ("x",))
    if knobs.exchange == "one_barrier":
        mod = exchange.request(mod)
    mod = launch_bounds.request(mod, knobs.max_registers)
    return (
        cache_hints.request(mod, ("dy", "x", *(("dx",) if "dx" in blocks else ())))
        if knobs.cache_hints
        else mod
    )


def _rows(sch: Any, blocks: dict[str, Any], knobs: Knobs, parts: int) -> None:
    """The kernel of dx; `parts` is the number of blocks that loop over rows and keep sums,
    or 0.
    """
    row, dx, per_row, width = blocks["row"], blocks["dx"], knobs.threads_per_row, knobs.vector_width
    sums, users = None, [row, dx]
    if not parts:
        outer, at, thread = _exact_rows(sch, blocks, knobs)
    else:
        fused = "blocks" in blocks
        outer = (
            columns.row_loops(sch, row, parts, knobs.rows_per_block)
            if fused
            else sch.split(
                sch.get_loops(row)[0], [None, knobs.rows_per_block], preserve_unit_iters=True
            )
        )
        for name in ("c1", "c2"):
            sch.reverse_compute_at(blocks[name], outer[-1], preserve_unit_loops=True)
        thread = threads.output(sch, dx, outer[-1], per_row, width)
        if fused:
            sums, within = columns.sum_loops(sch, blocks["blocks"], knobs.rows_per_block)
            users.append(sums)
            at = sch.merge(outer[-1], within[-1])
            sch.annotate(at, grid_stride.ROW_LOOP, parts)
            if knobs.prefetch:
                sch.annotate(at, row_prefetch.ANNOTATION, 1)
            outer = sch.get_loops(sums)[: len(within) - 1]
        else:
            at = outer[-1]
    for axis, loop in zip(("blockIdx.x", "threadIdx.y"), outer, strict=False):
        sch.bind(loop, axis)

    # The row and its statistics.
    for name in ("dy", "x"):
        if knobs.row_storage == "registers":
            threads.to_registers(
                sch, users, threads.inputs(sch, row).index(name), at, per_row, width
            )
        elif knobs.row_storage == "shared":
            threads.to_shared(sch, users, threads.inputs(sch, row).index(name), at, per_row, width)
    # with several rows, what reads memory where one is not there would be guarded
    for name in ("mean", "rstd") if knobs.prefetch or knobs.rows_per_block > 1 else ():
        readers = [user for user in users if name in threads.inputs(sch, user)]
        threads.load_scalar(sch, readers, name, at)
    if knobs.weight_storage == "registers":
        threads.to_registers(
            sch, [row, dx], threads.inputs(sch, row).index("weight"), outer[-1], per_row, width
        )
    columns_of = {
        row: threads.one_by_one(sch, row, per_row, width, knobs.row_storage == "registers"),
        dx: thread,
    }
    if sums is not None:
        stores = columns.keep_in_registers(sch, sums, per_row, width)
        columns_of[sums] = threads.one_by_one(sch, sums, per_row, width)
        if knobs.rows_per_block > 1:
            # for as many loops as dx has
            sch.add_unit_loop(threads.loop_around(sch, sums, columns_of[sums]))
        # One vector after the other, so that what both need is short-lived.
        vectors = sch.merge(
            *(
                threads.loop_around(sch, block, loop)
                for block, loop in ((dx, thread), (sums, columns_of[sums]))
            )
        )
        sch.unroll(vectors)
        sch.decompose_reduction(sums, at)
        if knobs.rows_per_block > 1:
            sch.annotate(vectors, guards.OF_ONE_ROW, 1)
        for stored in stores:
            columns.store(sch, stored, outer[-1], per_row, width)
            if knobs.rows_per_block > 1:
                sch.set_scope(stored, 0, "shared.dyn")
        if knobs.rows_per_block > 1:
            columns.add_rows_of_block(
                sch, blocks["blocks"], outer[0], per_row, knobs.rows_per_block, width
            )
    for user, loop in columns_of.items():
        for name in ("dy", "x", "weight"):
            read = threads.inputs(sch, user)
            copied = any(one.startswith(f"{name}_") for one in read)  # x_shared.dyn
            # sums of dy alone read no x
            if (name in read or (copied and name != "weight")) and (
                name == "weight" or knobs.row_storage != "registers"
            ):
                threads.vector_to_registers(
                    sch,
                    user,
                    name,
                    loop,
                    width,
                    knobs.row_storage == "shared" and name != "weight",
                )
    for name in ("row", "c1", "c2"):
        for index in range(len(sch.get(blocks[name]).writes)):
            sch.set_scope(blocks[name], index, "local")


def _exact_rows(sch: Any, blocks: dict[str, Any], knobs: Knobs) -> tuple[list[Any], Any, Any]:
    """A block of threads for each row there is: (its loop, alone; that loop; the loop over threads
    of dx).
    """
    stored = sch.cache_write(blocks["dx"], 0, "local")
    row, thread = (
        sch.get_loops(stored)[0],
        threads.copy(
            sch, stored, knobs.threads_per_row, knobs.vector_width, knobs.row_storage == "registers"
        ),
    )
    sch.compute_at(blocks["dx"], thread, preserve_unit_loops=True)
    sch.unroll(sch.get_loops(blocks["dx"])[-1])
    for name in ("c2", "c1", "row"):
        sch.compute_at(blocks[name], row, preserve_unit_loops=True)
    return [row], row, thread


def _columns(sch: Any, block: Any, knobs: Knobs) -> None:
    """The kernel of partial sums alone: a block of threads for some columns of its rows."""
    per_row, width = threads_of_columns(knobs), knobs.vector_width
    sums, (part, *side, step) = columns.sum_loops(sch, block, knobs.rows_per_block)
    k = sch.get_loops(sums)[-1]
    chunk, thread, elements = sch.split(k, [None, per_row, width], preserve_unit_iters=True)
    sch.reorder(
        part, chunk, thread, *side, step, *([] if side else [sch.get_loops(sums)[2]]), elements
    )
    sch.unroll(elements)
    stores = [sch.cache_write(sums, index, "local") for index in range(len(sch.get(sums).writes))]
    for loop, axis in zip(
        (part, chunk, thread, *side),
        ("blockIdx.y", "blockIdx.x", "threadIdx.x", "threadIdx.y"),
        strict=False,
    ):
        sch.bind(loop, axis)
    for name in threads.inputs(sch, sums):
        if name in ("dy", "x"):
            threads.vector_to_registers(sch, sums, name, step, width)
    sch.decompose_reduction(sums, step)
    if side:
        sch.annotate(elements, guards.OF_ONE_ROW, 1)
    for stored in stores:
        sch.reverse_compute_at(stored, (thread, *side)[-1], preserve_unit_loops=True)
        columns.vectorize(sch, stored)
        if side:
            sch.set_scope(stored, 0, "shared.dyn")
    if side:
        columns.add_rows_of_thread(sch, block, thread, knobs.rows_per_block)


SCHEDULES = (
    Schedule(
        "shared_row_backward",
        "layer_norm_backward",
        "gpu",
        Knobs,
        default,
        valid,
        apply,
        version=5,
        seeds=seeds,
    ),
)
