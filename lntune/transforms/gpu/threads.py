"""Loop transformations of GPU schedules: a row shared among threads, in accesses of several
elements each.

A row's elements are dealt out in turns: access j of thread t is number j * threads + t, so that a
warp's accesses lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.case import Case
from lntune.ops.dtypes import sum_of
from lntune.ops.op import Term, Total

ACCESS = 16
"""Bytes of the widest load and store there is on every architecture up to sm_90."""
STATIC = 1024
"""Bytes of shared memory, at most, for sums that threads exchange."""


def widest(case: Case) -> int:
    """Elements of the widest access that divides a row."""
    return next(a for a in (8, 4, 2, 1) if case.hidden % a == 0 and a * case.itemsize <= ACCESS)


def row_sum(rows: Any, hidden: int, expressions: Sequence[Term], name: str) -> list[Total]:
    """The RowSum of GPU schedules: one stage `name`, whatever the number of expressions, so that
    one exchange between threads serves all.
    """
    from tvm import te, tirx

    k = te.reduce_axis((0, tirx.IntImm("int64", hidden)), name=f"{name}_k")
    several = len(expressions) > 1
    add = sum_of(len(expressions))

    def body(i: Any) -> Any:
        values = tuple(f(i, k) for f in expressions)
        return add(values if several else values[0], axis=k)

    made = te.compute((rows,), body, name=name)
    return [total(tensor) for tensor in (made if several else [made])]


def total(tensor: Any) -> Total:
    """The sum of each row that is in a tensor."""
    return lambda i: tensor[i]


def _dealt(sch: Any, loop: Any, threads: int, access: int, unroll: bool = True) -> tuple[Any, Any]:
    """(threads, elements of an access) of a loop over a row, dealt out in turns, the threads bound;
    turns that index registers are unrolled.

    The access is split off first, exactly, so that whole accesses are guarded where the row ends,
    and never their elements.
    """
    accesses, elements = sch.split(loop, [None, access], preserve_unit_iters=True)
    turns, thread = sch.split(accesses, [None, threads], preserve_unit_iters=True)
    sch.bind(thread, "threadIdx.x")
    if unroll:
        sch.unroll(turns)
    return thread, elements


def copy(sch: Any, block: Any, threads: int, access: int, unroll: bool = True) -> Any:
    """Deal the innermost loop of a copy out to threads; an access is a vector. Returns the loop
    over threads.
    """
    thread, elements = _dealt(sch, sch.get_loops(block)[-1], threads, access, unroll)
    if access > 1:
        sch.vectorize(elements)
    return thread


def one_by_one(sch: Any, block: Any, threads: int, access: int, unroll: bool = True) -> Any:
    """Deal the innermost loop of a block out to threads, which compute the elements of an access
    one by one; after a row sum they exchange their sums. Returns the loop over threads.
    """
    thread, elements = _dealt(sch, sch.get_loops(block)[-1], threads, access, unroll)
    sch.unroll(elements)
    return thread


def output(sch: Any, block: Any, at: Any, threads: int, access: int, unroll: bool = True) -> Any:
    """Compute an output's elements in registers, one by one, and store an access of them at once;
    `block` is not in its place at `at` yet.

    Not one vector of all: for 8 elements TVM 0.27 writes vectors of float32 that CUDA does not
    have. Returns the loop over threads.
    """
    stored = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    thread = one_by_one(sch, block, threads, access, unroll)
    sch.reverse_compute_at(stored, thread, preserve_unit_loops=True)
    if access > 1:
        sch.vectorize(sch.get_loops(stored)[-1])
    return thread


def once(sch: Any, block: Any, threads: int, axis: str = "threadIdx.x") -> None:
    """Let only the first of so many threads run a block, once."""
    _, thread = sch.split(sch.add_unit_loop(block), [None, threads])
    sch.bind(thread, axis)


def keep(
    sch: Any, consumers: Sequence[Any], index: int, at: Any, threads: int, access: int
) -> None:
    """Load a row once, at loop `at`, into the registers of the threads that need its elements: the
    input `index` of the first of `consumers`, for all of them.
    """
    kept = sch.cache_read(consumers[0], index, "local", consumer_blocks=list(consumers))
    sch.compute_at(kept, at, preserve_unit_loops=True)
    # What a thread holds is contiguous, and as long as its turns; without this each thread would be
    # given room for the whole row.
    sch.transform_layout(
        kept,
        ("write", 0),
        lambda i, k: (k // access // threads, k // access % threads, k % access),
        assume_injective_transform=True,
    )
    copy(sch, kept, threads, access)


def stage(
    sch: Any,
    consumers: Sequence[Any],
    index: int,
    at: Any,
    threads: int,
    access: int,
    unroll: bool = True,
) -> None:
    """Load a row once, at loop `at`, into shared memory; the input `index` of the first of
    `consumers`, for all of them.
    """
    staged = sch.cache_read(consumers[0], index, "shared.dyn", consumer_blocks=list(consumers))
    sch.compute_at(staged, at, preserve_unit_loops=True)
    copy(sch, staged, threads, access, unroll)


def around(sch: Any, block: Any, loop: Any) -> Any:
    """The loop around a loop of a block."""
    loops = sch.get_loops(block)
    return loops[
        next(i for i, other in enumerate(loops) if sch.get(other).same_as(sch.get(loop))) - 1
    ]


def sources(sch: Any, block: Any) -> list[str]:
    """The buffers that a block reads, by name."""
    return [str(r.source.name) for r in sch.get(block).reads]


def fetch(
    sch: Any, block: Any, source: int | str, thread: Any, access: int, single: bool = False
) -> None:
    """Bring the elements of one access of an input into registers at once, at the loop over
    threads; `source` is its number or name.

    A single element is left to where it is used, unless `single`: TVM 0.27 wants loads from dynamic
    shared memory to stand alone.
    """
    if access == 1 and not single:
        return
    if isinstance(source, str):
        # x_shared.dyn
        source = next(
            i
            for i, name in enumerate(sources(sch, block))
            if name == source or name.startswith(f"{source}_")
        )
    fetched = sch.cache_read(block, source, "local", consumer_blocks=[block])
    sch.compute_at(fetched, thread, preserve_unit_loops=True)
    sch.transform_layout(
        fetched, ("write", 0), lambda *at: (at[-1] % access,), assume_injective_transform=True
    )
    if access > 1:
        sch.vectorize(sch.get_loops(fetched)[-1])


def like(loop: Any, body: Any) -> Any:
    """The loop with another body."""
    return type(loop)(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        body,
        loop.thread_binding,
        dict(loop.annotations),
    )


def scope(buffer: Any) -> str:
    """Where a buffer lies: "global", "local", "shared.dyn"."""
    return str(buffer.scope())


AGAIN = "lntune_again"


def load_again(mod: Any, stage: str, name: str) -> Any:
    """The module with the argument `name` loaded again, from cache, by what follows the stage.

    Otherwise the compiler keeps what it has loaded before in registers, which what follows needs
    more.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    func = mod["main"]
    argument = next(p for p in func.params if str(p.name) == name)

    def behind(block: Any) -> Any:
        if block.name_hint != stage:
            return block
        body = tirx.SeqStmt(
            [block.body, tirx.Evaluate(tirx.call_extern("int32", AGAIN, argument.data))]
        )
        return type(block)(
            block.iter_vars,
            block.reads,
            block.writes,
            block.name_hint,
            body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            block.annotations,
        )

    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_map(func.body, [(SBlock, behind)]))}
    )
