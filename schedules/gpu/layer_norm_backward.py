"""Layer norm backward on GPUs: dx and partial sums of dgamma and dbeta in one kernel that reads dy
and x once; a small second one adds the sums.

A block of threads takes rows in turns. What it has of a row is in registers until dx is written;
the sums over its rows stay in registers or shared memory over all turns and are written once. Rows
too long for that have the partial sums in a kernel of their own, which reads dy and x again, but
needs no sums over a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lntune.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK, WARP
from lntune.case import TYPICAL_ROWS, Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.ops import layer_norm_backward
from lntune.schedule import Schedule
from lntune.transforms.gpu import columns, hints, threads, turns

EACH = 8  # elements of a row that a thread has by default
THREADS = (8, 16, 32, 64, 128, 256, 512, 1024)
BLOCKS = (1, 2, 3, 4, 6, 8, 16)
WORD = 4  # bytes; arrays in shared memory that are no longer are lost by TVM 0.27


@dataclass(frozen=True)
class Knobs:
    """Knobs of `shared_row_backward`."""

    threads: int = knob(128, THREADS, "threads that share a row")
    rows: int = knob(1, (1, 2, 4, 8, 16, 32), "rows to a block of threads, side by side")
    access: int = knob(4, (1, 2, 4, 8), "elements of one load or store")
    keep: str = knob(
        "registers",
        ("registers", "shared", "again"),
        "where a row is kept between its uses; again: read from memory each time",
    )
    sums: str = knob(
        "registers",
        ("registers", "apart"),
        "where partial sums of dgamma and dbeta are kept; apart: in a kernel of their own",
    )
    blocks: int = knob(
        2, BLOCKS, "blocks of partial sums for each multiprocessor, as far as there are rows"
    )
    once: bool = knob(
        False,
        (False, True),
        "dy, x and dx are the first to leave the cache, since they are accessed once",
    )


@functools.lru_cache(maxsize=8)  # a case has thousands of knobs that are to be valid
def _outputs(case: Case) -> tuple[str, ...]:
    return tuple(a.name for a in layer_norm_backward.arguments(case) if a.role == "out")


def _sums(case: Case) -> tuple[str, ...]:
    return tuple(name for name in _outputs(case) if name != "dx")


def apart(knobs: Knobs, case: Case) -> bool:
    """Whether the partial sums have a kernel of their own."""
    return bool(_sums(case)) and knobs.sums == "apart"


def shares_of(knobs: Knobs) -> int:
    """Threads side by side in a kernel of partial sums of its own; a warp's accesses are long
    enough.
    """
    return min(knobs.threads, WARP)


def parts_of(knobs: Knobs, case: Case, device: Device) -> int:
    """Blocks of rows that have partial sums; blocks of threads are as many, times those that share
    a row's columns where sums are apart.
    """
    if not _sums(case):
        return 1
    most = 1 if case.rows <= 1 else max(1, 2 * TYPICAL_ROWS[case.bucket] // knobs.rows)
    chunks = -(-case.hidden // (shares_of(knobs) * knobs.access)) if apart(knobs, case) else 1
    return max(1, min(most, -(-knobs.blocks * device.cores // chunks)))


def registers_of(knobs: Knobs, case: Case) -> int:
    """About the 32-bit registers of a thread that has its part of dy, of x and of sums in them.

    An access shorter than a register has one to itself. Anything else takes 32, more where the part
    is above 32, what is loaded has places in shared memory, or low precision is widened beside no
    sums: fitted to what ptxas 13.0 says for sm_90.
    """
    turns = -(-case.hidden // (knobs.access * knobs.threads))
    part = 2 * turns * max(4, knobs.access * case.itemsize) // 4 if knobs.keep == "registers" else 0
    part += len(_sums(case)) * turns * knobs.access if knobs.sums == "registers" else 0
    wide = knobs.access == case.itemsize == 4
    copied = 0 if knobs.keep != "shared" else max(10, part // 2 - 16) if wide else 10
    widened = (
        part // 3
        if knobs.keep == "registers" and knobs.sums == "apart" and case.itemsize < 4
        else 0
    )
    return part + 32 + max(0, part - 32) * 5 // 8 + copied + widened


def shared_of(knobs: Knobs, case: Case) -> int:
    """Bytes of shared memory that a block of threads takes."""
    kept = 2 * case.hidden * case.itemsize if knobs.keep == "shared" else 0
    sides = case.hidden if knobs.sums == "registers" else shares_of(knobs) * knobs.access
    return (
        threads.STATIC + kept + (4 * len(_sums(case)) * sides * knobs.rows if knobs.rows > 1 else 0)
    )


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    dx, sums = "dx" in _outputs(case), bool(_sums(case))
    threads_all = (
        max(knobs.threads, WARP * knobs.rows)
        if dx and apart(knobs, case)
        else knobs.threads * knobs.rows
    )
    if case.hidden % knobs.access:
        return f"accesses of {knobs.access} elements do not divide a row of {case.hidden}"
    if knobs.access * case.itemsize > threads.ACCESS:
        return f"accesses of {knobs.access * case.itemsize} bytes; {threads.ACCESS} is the most"
    if not WARP <= threads_all <= THREADS_PER_BLOCK or (
        apart(knobs, case) and dx and knobs.threads < WARP
    ):
        return (
            f"{knobs.threads} x {knobs.rows} threads; {WARP} to {THREADS_PER_BLOCK} fit a block of"
            " each kernel"
        )
    if knobs.threads > WARP and knobs.threads * knobs.access >= 2 * case.hidden:
        return f"half of {knobs.threads} threads would have no part of a row of {case.hidden}"
    if not sums and (knobs.sums != "registers" or knobs.blocks > 1):
        return "there are no sums over rows"
    if not dx and (knobs.sums != "apart" or knobs.keep != "registers" or knobs.threads > WARP):
        return "without dx no row is summed; a warp side by side takes its columns"
    if knobs.keep == "shared" and case.hidden * case.itemsize <= WORD:
        return f"a row of {case.hidden * case.itemsize} bytes needs no shared memory"
    if case.hidden == 1 and knobs.keep == "again" and apart(knobs, case):
        return "a row of one element need not be read again"
    if knobs.rows > 1 and knobs.keep == "shared" and not apart(knobs, case):
        return "shared memory is for one row to a block"
    if shared_of(knobs, case) > device.l1:
        return f"{shared_of(knobs, case)} bytes of shared memory; a block has {device.l1}"
    if dx and registers_of(knobs, case) > min(
        REGISTERS_PER_THREAD, REGISTERS // (knobs.threads if apart(knobs, case) else threads_all)
    ):
        return f"{registers_of(knobs, case)} registers a thread do not fit {threads_all} threads"
    if case.rows == 1 and knobs.rows > 1:
        return "a single row cannot fill a block of several"
    fewer = [n for n in BLOCKS if n < knobs.blocks]
    if fewer and parts_of(knobs, case, device) == parts_of(
        replace(knobs, blocks=fewer[-1]), case, device
    ):
        return f"{knobs.blocks} blocks for each multiprocessor are more than {case.rows} rows fill"
    if knobs.once and (
        why := hints.misfit(case, device, dx and (knobs.keep == "again" or apart(knobs, case)))
    ):
        return why
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide accesses, eight elements to a thread; a row and its sums in registers, the row in shared
    memory where that is too much, the sums apart where that is, too.
    """
    access = threads.widest(case)
    least = next((t for t in THREADS if t * max(access, EACH) >= case.hidden), THREADS_PER_BLOCK)
    if "dx" not in _outputs(case):
        return next(_fitting(WARP, access, "registers", "apart", case, device))
    for where in ("registers", "apart") if _sums(case) else ("registers",):
        # with more registers each, where sums do not keep them
        least = min(least, 512) if where == "apart" else least
        nearest = (
            least,
            *(t for t in THREADS if t > least),
            *(t for t in reversed(THREADS) if t < least),
        )
        narrow = max(1, access // 2)
        for keep, fewest, each in (
            ("registers", least // 2, access),
            ("shared", least // 4, access),
            ("shared", least // 4, narrow),
            ("again", 0, access),
        ):
            for shares in (t for t in nearest if t >= fewest):
                for found in _fitting(shares, each, keep, where, case, device):
                    return found
    return Knobs(WARP, 1, access, "again", "apart", 1)


def _fitting(
    shares: int, access: int, keep: str, where: str, case: Case, device: Device
) -> Iterator[Knobs]:
    """Valid knobs like these, the best first: as many blocks as a multiprocessor holds, but not so
    many that their partial sums are much beside the rows, nor more than the rows fill.
    """
    if where == "apart":
        found, blocks = (
            Knobs(max(shares, WARP), 1 if case.rows == 1 else 8, access, keep, where),
            BLOCKS[-1],
        )
    else:
        rows = 1 if shares >= 64 or case.rows == 1 or keep == "shared" else 128 // shares
        found = Knobs(max(shares, WARP) if rows == 1 else shares, rows, access, keep, where)
        resident = REGISTERS // (found.threads * rows * registers_of(found, case))
        blocks = (
            min(resident, TYPICAL_ROWS[case.bucket] * 3 * case.itemsize // (64 * device.cores))
            if _sums(case)
            else 1
        )
    for n in reversed(BLOCKS):
        one = replace(found, blocks=n)
        if n <= max(1, blocks) and valid(one, case, device) is None:
            yield one


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernels, step by step.

    1. The definition, in blocks of rows, without copies of what is widened.
    2. The kernel of dx, with the partial sums or without.
    3. Partial sums apart.
    4. What all blocks' partial sums come to.
    """
    from tvm import s_tir

    # 1. Padded by repeating the last row, so that only stores ask whether a row is there.
    # Where a block has one at a time, its turns end at the last, and nothing asks.
    parts, alone = parts_of(knobs, case, device), apart(knobs, case)
    definition = layer_norm_backward.define(case, threads.row_sum, knobs.rows, parts)
    sch = s_tir.Schedule(
        turns.unpadded(definition) if knobs.rows == 1 and not alone else definition
    )
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    for name in ("dy32", "x32", "weight32"):
        if name in blocks:
            sch.compute_inline(blocks.pop(name))

    # 2., 3.
    if alone:
        _columns(sch, blocks["blocks"], knobs)
    if "dx" in blocks:
        _rows(sch, blocks, knobs, 0 if alone else parts)

    # 4.
    if _sums(case):
        columns.totals(sch, blocks, _sums(case))
    made = sch.mod
    if "weight" in (a.name for a in layer_norm_backward.arguments(case)):
        made = threads.load_again(made, "c2", "weight")
    made = turns.trim(made, knobs.rows)
    return (
        hints.request(made, ("dy", "x", *(("dx",) if "dx" in blocks else ())))
        if knobs.once
        else made
    )


def _rows(sch: Any, blocks: dict[str, Any], knobs: Knobs, parts: int) -> None:
    """The kernel of dx; `parts` is the number of blocks that take turns and keep sums, or 0."""
    row, dx, shares, access = blocks["row"], blocks["dx"], knobs.threads, knobs.access
    sums, users = None, [row, dx]
    if not parts:
        outer, at, thread = _exact_rows(sch, blocks, knobs)
    else:
        fused = "blocks" in blocks
        outer = (
            columns.rows_in_turns(sch, row, parts, knobs.rows)
            if fused
            else sch.split(sch.get_loops(row)[0], [None, knobs.rows], preserve_unit_iters=True)
        )
        for name in ("c1", "c2"):
            sch.reverse_compute_at(blocks[name], outer[-1], preserve_unit_loops=True)
        thread = threads.output(sch, dx, outer[-1], shares, access)
        if fused:
            sums, within = columns.sums_in_turns(sch, blocks["blocks"], knobs.rows)
            users.append(sums)
            at = sch.merge(outer[-1], within[-1])
            sch.annotate(at, turns.TURNS, parts)
            outer = sch.get_loops(sums)[: len(within) - 1]
        else:
            at = outer[-1]
    for axis, loop in zip(("blockIdx.x", "threadIdx.y"), outer, strict=False):
        sch.bind(loop, axis)

    # The row and its statistics.
    for name in ("dy", "x"):
        if knobs.keep == "registers":
            threads.keep(sch, users, threads.sources(sch, row).index(name), at, shares, access)
        elif knobs.keep == "shared":
            threads.stage(sch, users, threads.sources(sch, row).index(name), at, shares, access)
    columns_of = {
        row: threads.one_by_one(sch, row, shares, access, knobs.keep == "registers"),
        dx: thread,
    }
    if sums is not None:
        stores = columns.accumulate(sch, sums, shares, access)
        columns_of[sums] = threads.one_by_one(sch, sums, shares, access)
        if knobs.rows > 1:
            # for as many loops as dx has
            sch.add_unit_loop(threads.around(sch, sums, columns_of[sums]))
        # Access by access, so that what both need is short-lived.
        sch.unroll(
            sch.merge(
                *(
                    threads.around(sch, block, loop)
                    for block, loop in ((dx, thread), (sums, columns_of[sums]))
                )
            )
        )
        sch.decompose_reduction(sums, at)
        for stored in stores:
            columns.store(sch, stored, outer[-1], shares, access)
            if knobs.rows > 1:
                sch.set_scope(stored, 0, "shared.dyn")
        if knobs.rows > 1:
            columns.add_sides(sch, blocks["blocks"], outer[0], shares, knobs.rows, access)
    for user, loop in columns_of.items():
        for name in ("dy", "x", "weight"):
            if (name == "weight" and "weight" in threads.sources(sch, user)) or (
                name != "weight" and knobs.keep != "registers"
            ):
                threads.fetch(
                    sch, user, name, loop, access, knobs.keep == "shared" and name != "weight"
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
        threads.copy(sch, stored, knobs.threads, knobs.access, knobs.keep == "registers"),
    )
    sch.compute_at(blocks["dx"], thread, preserve_unit_loops=True)
    sch.unroll(sch.get_loops(blocks["dx"])[-1])
    for name in ("c2", "c1", "row"):
        sch.compute_at(blocks[name], row, preserve_unit_loops=True)
    return [row], row, thread


def _columns(sch: Any, block: Any, knobs: Knobs) -> None:
    """The kernel of partial sums alone: a block of threads for some columns of its rows."""
    shares, access = shares_of(knobs), knobs.access
    sums, (part, *side, turn) = columns.sums_in_turns(sch, block, knobs.rows)
    k = sch.get_loops(sums)[-1]
    chunk, thread, elements = sch.split(k, [None, shares, access], preserve_unit_iters=True)
    sch.reorder(
        part, chunk, thread, *side, turn, *([] if side else [sch.get_loops(sums)[2]]), elements
    )
    sch.unroll(elements)
    stores = [sch.cache_write(sums, index, "local") for index in range(len(sch.get(sums).writes))]
    for loop, axis in zip(
        (part, chunk, thread, *side),
        ("blockIdx.y", "blockIdx.x", "threadIdx.x", "threadIdx.y"),
        strict=False,
    ):
        sch.bind(loop, axis)
    for name in threads.sources(sch, sums):
        if name in ("dy", "x"):
            threads.fetch(sch, sums, name, turn, access)
    sch.decompose_reduction(sums, turn)
    for stored in stores:
        sch.reverse_compute_at(stored, (thread, *side)[-1], preserve_unit_loops=True)
        columns.vectorize(sch, stored)
        if side:
            sch.set_scope(stored, 0, "shared.dyn")
    if side:
        columns.add_sides_within(sch, block, thread, knobs.rows)


SCHEDULES = (
    Schedule(
        "shared_row_backward", "layer_norm_backward", "gpu", Knobs, default, valid, apply, version=1
    ),
)
