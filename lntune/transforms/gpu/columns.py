"""Sums over rows in GPU schedules: blocks of threads that share the rows in turns, what they sum,
and what that comes to.

Rows are numbered turn x block x side by side, as in definitions with `together` and `blocks`. A
block of threads keeps one partial sum of each column in registers over all its turns; a second
kernel adds the partial sums of all blocks, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.transforms.gpu import threads

TILE = 32
"""Columns of a block of threads that adds partial sums: a warp's loads lie side by side, and there
are blocks enough.
"""
WAYS = 16
"""Threads that share such a column."""
UNROLLED = 32
"""Turns of such a thread up to which all its loads are made at once."""
VECTOR = 4
"""Elements of float32 in the widest access."""


def rows_in_turns(sch: Any, block: Any, blocks: int, rows: int) -> list[Any]:
    """The loops of a stage over rows as (block, side, turn); without side for one row at a time."""
    turn, *outer = sch.split(
        sch.get_loops(block)[0],
        [None, blocks, rows] if rows > 1 else [None, blocks],
        preserve_unit_iters=True,
    )
    sch.reorder(*outer, turn)
    return [*outer, turn]


def sums_in_turns(sch: Any, block: Any, rows: int) -> tuple[Any, list[Any]]:
    """The same loops of the stage of partial sums (blocks, hidden): (the stage that sums over
    turns, its loops).

    Rows side by side get sums of their own; the stage given adds these from now on, and is left
    where it was.
    """
    sums = sch.rfactor(sch.get_loops(block)[3], 0) if rows > 1 else block
    b, k, turn, side = sch.get_loops(sums)
    if rows > 1:
        sch.reorder(b, side, turn, k)
        return sums, [b, side, turn]
    sch.reorder(b, turn, side, k)
    return sums, [b, turn]


def accumulate(sch: Any, sums: Any, shares: int, access: int) -> list[Any]:
    """Keep sums in registers for all turns, each thread its own side by side; `shares` threads
    share a row. Returns the stages that store them.
    """
    stores = []
    for index in range(len(sch.get(sums).writes)):
        stores.append(sch.cache_write(sums, index, "local"))
        sch.transform_layout(
            sums,
            ("write", index),
            lambda *at: (
                *at[:-1],
                at[-1] // access // shares,
                at[-1] // access % shares,
                at[-1] % access,
            ),
            assume_injective_transform=True,
        )
    return stores


def store(sch: Any, block: Any, at: Any, shares: int, access: int) -> None:
    """Store each thread's sums at loop `at`."""
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    threads.one_by_one(sch, block, shares, access)
    vectorize(sch, block)


def vectorize(sch: Any, block: Any) -> None:
    """Store float32 elements, the innermost loop of a block, in the widest accesses."""
    elements = sch.get_loops(block)[-1]
    extent = int(sch.get(elements).extent)
    if extent > VECTOR:
        outer, elements = sch.split(elements, [None, VECTOR])
        sch.unroll(outer)
    if extent > 1:
        sch.vectorize(elements)


def add_sides(sch: Any, block: Any, at: Any, shares: int, rows: int, access: int) -> None:
    """Add the sums of rows side by side, at loop `at` over blocks; all threads share the
    columns.
    """
    stores = [sch.cache_write(block, index, "local") for index in range(len(sch.get(block).writes))]
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    side, b, k = sch.get_loops(block)[-3:]
    sch.reorder(b, k, side)
    accesses, elements = sch.split(k, [None, min(access, VECTOR)], preserve_unit_iters=True)
    turns, y, x = sch.split(accesses, [None, rows, shares], preserve_unit_iters=True)
    sch.bind(y, "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    sch.unroll(turns)
    sch.unroll(elements)
    sch.unroll(side)
    for stored in stores:
        sch.reverse_compute_at(stored, x, preserve_unit_loops=True)
        vectorize(sch, stored)


def add_sides_within(sch: Any, block: Any, at: Any, rows: int) -> None:
    """The same at loop `at` over threads that share columns, each adding for its own; of those side
    by side the first stores them.
    """
    stores = [sch.cache_write(block, index, "local") for index in range(len(sch.get(block).writes))]
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    side, b, k = sch.get_loops(block)[-3:]
    sch.reorder(b, k, side)
    sch.unroll(k)
    sch.unroll(side)
    for stored in stores:
        sch.reverse_compute_at(stored, at, preserve_unit_loops=True)
        vectorize(sch, stored)
        within = (
            next(
                i
                for i, loop in enumerate(sch.get_loops(stored))
                if sch.get(loop).same_as(sch.get(at))
            )
            + 1
        )
        threads.once(sch, sch.get_loops(stored)[within], rows, "threadIdx.y")


def totals(sch: Any, blocks: dict[str, Any], names: Sequence[str]) -> None:
    """The second kernel: outputs (hidden,) from the partial sums of all blocks; `blocks` has stages
    by name.

    One kernel for all outputs. `{name}_sum` is the stage that sums where the output itself only
    rounds; where there is none, one is made, since what a reduction over threads stores is not kept
    within the columns there are.
    """
    tiles, bound = [], []
    for name in names:
        summed = blocks.get(f"{name}_sum", blocks[name])
        stored = blocks[name] if f"{name}_sum" in blocks else sch.cache_write(summed, 0, "local")
        k, part = sch.get_loops(summed)
        tile, x = sch.split(k, [None, TILE], preserve_unit_iters=True)
        y, each = sch.split(part, [WAYS, None], preserve_unit_iters=True)
        if int(sch.get(each).extent) <= UNROLLED:
            sch.unroll(each)
        sch.set_scope(summed, 0, "local")
        sch.reverse_compute_at(stored, x, preserve_unit_loops=True)
        threads.once(sch, stored, WAYS, "threadIdx.y")
        tiles.append(tile)
        bound.append((x, y))
    # Not before: stages that are brought to a loop made by merging find nothing of where they
    # belong.
    sch.bind(sch.merge(*tiles) if len(tiles) > 1 else tiles[0], "blockIdx.x")
    for x, y in bound:
        sch.bind(x, "threadIdx.x")
        sch.bind(y, "threadIdx.y")
