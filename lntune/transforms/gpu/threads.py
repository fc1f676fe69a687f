"""A row shared among threads: each takes every n-th vector of the row, where n threads share it.

Vector j of thread t is number j * threads + t, so that the loads and stores of a warp's threads lie
side by side in memory (coalesced). Functions here take the number of threads and the elements of a
vector; a vector is what one load or store moves. Rows of an LSTM's gates are in gate_threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.case import Case
from lntune.ops.dtypes import sum_of
from lntune.ops.op import Term, Total

WIDEST_BYTES = 16
"""Bytes of the widest load and store there is on every architecture up to sm_90."""
SHARED_FOR_SUMS = 1024
"""Bytes of static shared memory, at most, in which threads exchange sums."""


def widest(case: Case) -> int:
    """Elements of the widest vector that divides a row."""
    return next(
        width
        for width in (8, 4, 2, 1)
        if case.hidden % width == 0 and width * case.itemsize <= WIDEST_BYTES
    )


def row_sum(rows: Any, hidden: int, expressions: Sequence[Term], name: str) -> list[Total]:
    """The RowSum of GPU schedules: one stage `name`, whatever the number of expressions, so that
    threads exchange all sums at once.
    """
    from tvm import te, tirx

    k = te.reduce_axis((0, tirx.IntImm("int64", hidden)), name=f"{name}_k")
    several = len(expressions) > 1
    add = sum_of(len(expressions))

    def body(i: Any) -> Any:
        values = tuple(f(i, k) for f in expressions)
        return add(values if several else values[0], axis=k)

    sums = te.compute((rows,), body, name=name)
    return [total(tensor) for tensor in (sums if several else [sums])]


def total(tensor: Any) -> Total:
    """The sum of each row that is in a tensor."""
    return lambda i: tensor[i]


def _share(
    sch: Any, loop: Any, threads: int, vector_width: int, unroll: bool = True
) -> tuple[Any, Any]:
    """Share a loop over a row among threads and bind these: (loop over threads, loop over a
    vector's elements). The loop over a thread's vectors is unrolled where it indexes registers.

    The vector is split off first, exactly, so that whole vectors are guarded where the row ends,
    and never their elements.
    """
    vectors, elements = sch.split(loop, [None, vector_width], preserve_unit_iters=True)
    own_vectors, thread = sch.split(vectors, [None, threads], preserve_unit_iters=True)
    sch.bind(thread, "threadIdx.x")
    if unroll:
        sch.unroll(own_vectors)
    return thread, elements


def copy(sch: Any, block: Any, threads: int, vector_width: int, unroll: bool = True) -> Any:
    """Share the innermost loop of a copy among threads, each iteration one vector load or store.
    Returns the loop over threads.
    """
    thread, elements = _share(sch, sch.get_loops(block)[-1], threads, vector_width, unroll)
    if vector_width > 1:
        sch.vectorize(elements)
    return thread


def one_by_one(sch: Any, block: Any, threads: int, vector_width: int, unroll: bool = True) -> Any:
    """Share the innermost loop of a block among threads, which compute the elements of a vector one
    by one; after a row sum they exchange their sums. Returns the loop over threads.
    """
    thread, elements = _share(sch, sch.get_loops(block)[-1], threads, vector_width, unroll)
    sch.unroll(elements)
    return thread


def output(
    sch: Any, block: Any, at: Any, threads: int, vector_width: int, unroll: bool = True
) -> Any:
    """Compute an output's elements in registers, one by one, and store them a vector at a time;
    `block` is moved to loop `at`.

    They are not computed as vectors: for 8 elements TVM 0.27 writes vectors of float32 that CUDA
    does not have. Returns the loop over threads.
    """
    stored = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    thread = one_by_one(sch, block, threads, vector_width, unroll)
    sch.reverse_compute_at(stored, thread, preserve_unit_loops=True)
    if vector_width > 1:
        sch.vectorize(sch.get_loops(stored)[-1])
    return thread


def by_one_thread(sch: Any, block: Any, threads: int, axis: str = "threadIdx.x") -> None:
    """Let only the first of so many threads run a block."""
    _, thread = sch.split(sch.add_unit_loop(block), [None, threads])
    sch.bind(thread, axis)


def to_registers(
    sch: Any,
    consumers: Sequence[Any],
    index: int,
    at: Any,
    threads: int,
    vector_width: int,
    first: bool = False,
) -> None:
    """Load a row, or a vector as long, once, at loop `at`, into the registers of the threads that
    need its elements: the input `index` of the first of `consumers`, for all of them; `first`:
    before all that is in the loop already, not right before its first use.
    """
    loaded = sch.cache_read(consumers[0], index, "local", consumer_blocks=list(consumers))
    sch.compute_at(loaded, at, preserve_unit_loops=True, index=-2 if first else -1)
    # A thread's elements are contiguous, and no more than its own; without this each thread would
    # be given room for the whole row.
    sch.transform_layout(
        loaded,
        ("write", 0),
        lambda *at: (
            at[-1] // vector_width // threads,
            at[-1] // vector_width % threads,
            at[-1] % vector_width,
        ),
        assume_injective_transform=True,
    )
    copy(sch, loaded, threads, vector_width)


def to_shared(
    sch: Any,
    consumers: Sequence[Any],
    index: int,
    at: Any,
    threads: int,
    vector_width: int,
    unroll: bool = True,
) -> None:
    """Load a row once, at loop `at`, into shared memory: the input `index` of the first of
    `consumers`, for all of them.
    """
    loaded = sch.cache_read(consumers[0], index, "shared.dyn", consumer_blocks=list(consumers))
    sch.compute_at(loaded, at, preserve_unit_loops=True)
    copy(sch, loaded, threads, vector_width, unroll)


def vector_to_registers(
    sch: Any, block: Any, source: int | str, thread: Any, vector_width: int, single: bool = False
) -> None:
    """Load a vector of an input into registers right before its elements are used, at the loop over
    threads; `source` is the input's number or name.

    A single element is left to where it is used, unless `single`: TVM 0.27 wants loads from dynamic
    shared memory to stand alone.
    """
    if vector_width == 1 and not single:
        return
    if isinstance(source, str):
        # x_shared.dyn
        source = next(
            i
            for i, name in enumerate(inputs(sch, block))
            if name == source or name.startswith(f"{source}_")
        )
    loaded = sch.cache_read(block, source, "local", consumer_blocks=[block])
    sch.compute_at(loaded, thread, preserve_unit_loops=True)
    sch.transform_layout(
        loaded, ("write", 0), lambda *at: (at[-1] % vector_width,), assume_injective_transform=True
    )
    if vector_width > 1:
        sch.vectorize(sch.get_loops(loaded)[-1])


def load_scalar(sch: Any, consumers: Sequence[Any], name: str, at: Any) -> None:
    """Load a row's scalar at loop `at`, once for all of `consumers`."""
    copy = sch.cache_read(
        consumers[0],
        inputs(sch, consumers[0]).index(name),
        "local",
        consumer_blocks=list(consumers),
    )
    # index=-2: before everything that is in the loop already
    sch.compute_at(copy, at, preserve_unit_loops=True, index=-2)
    # one element, whatever the row's number
    sch.transform_layout(copy, ("write", 0), lambda i: (i % 1,), assume_injective_transform=True)


def loop_around(sch: Any, block: Any, loop: Any) -> Any:
    """The loop directly around a loop of a block."""
    loops = sch.get_loops(block)
    return loops[
        next(i for i, other in enumerate(loops) if sch.get(other).same_as(sch.get(loop))) - 1
    ]


def inputs(sch: Any, block: Any) -> list[str]:
    """The buffers that a block reads, by name."""
    return [str(r.source.name) for r in sch.get(block).reads]
