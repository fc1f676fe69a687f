"""Sums over the rows of a matrix (dgamma and dbeta of layer norm): partial sums of each block of
threads, and a second kernel that adds these.

Rows are numbered step x block x row of the block, as in definitions with `together` and `blocks`. A
block of threads keeps one partial sum of each column in registers while it loops over its rows; the
second kernel adds the partial sums of all blocks, always in the same order, so that the same call
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.architectures import WARP
from lntune.transforms.gpu import threads

COLUMNS = (32, 16, 8)
"""Columns of a block of threads that adds partial sums: a warp's loads lie side by side, or, where
that gives fewer blocks than there are multiprocessors, are whole sectors of 32 bytes.
"""
THREADS_PER_COLUMN = 16
"""Threads that share such a column; more where a block has fewer columns, if there are partial sums
for them.
"""
UNROLLED = 32
"""Partial sums of such a thread up to which its loop is unrolled, so that all are loaded at
once.
"""
VECTOR = 4
"""Elements of float32 in the widest load or store."""
SHARING = WARP * VECTOR
"""Threads that share a column where each loads vectors: a warp for each column of the block."""


def row_loops(sch: Any, block: Any, blocks: int, rows: int) -> list[Any]:
    """The loops of a stage over rows as (block, row of the block, step); for one row at a time
    (block, step).
    """
    step, *outer = sch.split(
        sch.get_loops(block)[0],
        [None, blocks, rows] if rows > 1 else [None, blocks],
        preserve_unit_iters=True,
    )
    sch.reorder(*outer, step)
    return [*outer, step]


def sum_loops(sch: Any, block: Any, rows: int) -> tuple[Any, list[Any]]:
    """The same loops of the stage of partial sums (blocks, hidden): (the stage that sums over
    steps, its loops).

    Each of several `rows` at a time gets sums of its own; the stage given adds these from now on,
    and is left where it was.
    """
    sums = sch.rfactor(sch.get_loops(block)[3], 0) if rows > 1 else block
    b, k, step, row = sch.get_loops(sums)
    if rows > 1:
        sch.reorder(b, row, step, k)
        return sums, [b, row, step]
    sch.reorder(b, step, row, k)
    return sums, [b, step]


def keep_in_registers(sch: Any, sums: Any, threads_per_row: int, vector_width: int) -> list[Any]:
    """Keep a stage's sums in registers over all steps, each thread those of its own columns.
    Returns the stages that store them.
    """
    stores = []
    for index in range(len(sch.get(sums).writes)):
        stores.append(sch.cache_write(sums, index, "local"))
        sch.transform_layout(
            sums,
            ("write", index),
            lambda *at: (
                *at[:-1],
                at[-1] // vector_width // threads_per_row,
                at[-1] // vector_width % threads_per_row,
                at[-1] % vector_width,
            ),
            assume_injective_transform=True,
        )
    return stores


def store(sch: Any, block: Any, at: Any, threads_per_row: int, vector_width: int) -> None:
    """Store each thread's sums at loop `at`."""
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    threads.one_by_one(sch, block, threads_per_row, vector_width)
    vectorize(sch, block)


def vectorize(sch: Any, block: Any) -> None:
    """Store float32 elements, the innermost loop of a block, in the widest vectors."""
    elements = sch.get_loops(block)[-1]
    extent = int(sch.get(elements).extent)
    if extent > VECTOR:
        outer, elements = sch.split(elements, [None, VECTOR])
        sch.unroll(outer)
    if extent > 1:
        sch.vectorize(elements)


def add_rows_of_block(
    sch: Any, block: Any, at: Any, threads_per_row: int, rows: int, vector_width: int
) -> None:
    """Add the sums of a block's rows, at loop `at` over blocks; all its threads share the
    columns.
    """
    stores = [sch.cache_write(block, index, "local") for index in range(len(sch.get(block).writes))]
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    row, b, k = sch.get_loops(block)[-3:]
    sch.reorder(b, k, row)
    vectors, elements = sch.split(k, [None, min(vector_width, VECTOR)], preserve_unit_iters=True)
    own_vectors, y, x = sch.split(vectors, [None, rows, threads_per_row], preserve_unit_iters=True)
    sch.bind(y, "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    sch.unroll(own_vectors)
    sch.unroll(elements)
    sch.unroll(row)
    for stored in stores:
        sch.reverse_compute_at(stored, x, preserve_unit_loops=True)
        vectorize(sch, stored)


def add_rows_of_thread(sch: Any, block: Any, at: Any, rows: int) -> None:
    """Add the sums of a block's rows, at loop `at` over threads that share columns: each adds those
    of its own, and of the threads that have the same columns the first stores them.
    """
    stores = [sch.cache_write(block, index, "local") for index in range(len(sch.get(block).writes))]
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    row, b, k = sch.get_loops(block)[-3:]
    sch.reorder(b, k, row)
    sch.unroll(k)
    sch.unroll(row)
    for stored in stores:
        sch.reverse_compute_at(stored, at, preserve_unit_loops=True)
        vectorize(sch, stored)
        loops = sch.get_loops(stored)
        outer = next(i for i, loop in enumerate(loops) if sch.get(loop).same_as(sch.get(at)))
        threads.by_one_thread(sch, loops[outer + 1], rows, "threadIdx.y")


def columns_of(hidden: int, parts: int, cores: int) -> tuple[int, int]:
    """(columns of a block of threads, threads that share a column) for the totals of so many
    columns and partial sums on a device of `cores` multiprocessors.
    """
    columns = next((n for n in COLUMNS if -(-hidden // n) >= cores), COLUMNS[-1])
    most = THREADS_PER_COLUMN * COLUMNS[0] // columns
    wanted = 1 << (parts - 1).bit_length()
    return columns, max(THREADS_PER_COLUMN, min(most, wanted))


def totals(sch: Any, blocks: dict[str, Any], names: Sequence[str], cores: int) -> None:
    """The second kernel: outputs (hidden,) from the partial sums of all blocks; `blocks` has stages
    by name, `cores` are the device's multiprocessors.

    One kernel for all outputs. `{name}_sum` is the stage that sums where the output itself only
    rounds; where there is none, one is added, since TVM does not guard what a reduction over
    threads stores where the columns end.
    """
    tiles, bound = [], []
    for name in names:
        summed = blocks.get(f"{name}_sum", blocks[name])
        stored = blocks[name] if f"{name}_sum" in blocks else sch.cache_write(summed, 0, "local")
        k, part = sch.get_loops(summed)
        hidden, parts = (int(sch.get(loop).extent) for loop in (k, part))
        columns, sharing = columns_of(hidden, parts, cores)
        if hidden % columns == 0 and parts >= SHARING:
            tiles += _in_vectors(sch, summed, stored, columns)
            continue
        tile, x = sch.split(k, [None, columns], preserve_unit_iters=True)
        y, own_parts = sch.split(part, [sharing, None], preserve_unit_iters=True)
        if int(sch.get(own_parts).extent) <= UNROLLED:
            sch.unroll(own_parts)
        sch.set_scope(summed, 0, "local")
        sch.reverse_compute_at(stored, x, preserve_unit_loops=True)
        threads.by_one_thread(sch, stored, sharing, "threadIdx.y")
        tiles.append(tile)
        bound.append((x, y))
    # Not before: stages that are brought to a loop made by merging find nothing of where they
    # belong.
    sch.bind(sch.merge(*tiles) if len(tiles) > 1 else tiles[0], "blockIdx.x")
    for x, y in bound:
        sch.bind(x, "threadIdx.x")
        sch.bind(y, "threadIdx.y")


def _in_vectors(sch: Any, summed: Any, stored: Any, columns: int) -> list[Any]:
    """The totals of whole blocks of `columns`, of which a thread loads a vector of 16 bytes at a
    time; a warp to a column adds up what the threads leave in shared memory. Returns the loops over
    blocks.

    There are partial sums for all threads, or those without any would leave what was there.
    """
    k, part = sch.get_loops(summed)
    sch.split(k, [None, columns], preserve_unit_iters=True)
    _, sharing = sch.split(part, [None, SHARING], preserve_unit_iters=True)
    sums = sch.rfactor(sharing, 0)

    # What a thread has of the partial sums, in registers, then in shared memory.
    of_sums, k, own, sharing = sch.get_loops(sums)
    warp, lanes = sch.split(sharing, [columns, None])
    vector, element = sch.split(k, [None, VECTOR])
    sch.reorder(warp, lanes, vector, own, element)
    lane = sch.fuse(lanes, vector)
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    left = sch.cache_write(sums, 0, "local")
    sch.set_scope(left, 0, "shared")
    # or a warp's lanes, which read a column of it, would find its rows in the same banks
    sch.storage_align(left, 0, 0, 2 * VECTOR, VECTOR)
    threads.vector_to_registers(sch, sums, 0, own, VECTOR)
    if int(sch.get(own).extent) <= UNROLLED:
        sch.unroll(own)
    sch.unroll(element)
    sch.reverse_compute_at(left, lane, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(left)[-1])

    # A warp for each column.
    of_totals, column, sharing = sch.get_loops(summed)
    rounds, among = sch.split(sharing, [None, WARP])
    sch.reorder(among, rounds)
    sch.unroll(rounds)
    sch.bind(column, "threadIdx.y")
    sch.bind(among, "threadIdx.x")
    sch.set_scope(summed, 0, "local")
    sch.reverse_compute_at(stored, column, preserve_unit_loops=True)
    threads.by_one_thread(sch, stored, WARP)
    return [of_sums, of_totals]
