"""The next row of a grid-stride loop loaded while a block of threads works on this one: registers
hold a row that is on its way beside the row that is worked on.

A block otherwise waits for memory at the beginning of each row, and memory for the block while it
exchanges sums. Several blocks to a multiprocessor hide that in one another; where a block has one
to itself, nothing does.
"""

from __future__ import annotations

from typing import Any

from lntune.architectures import WARP
from lntune.transforms import tir

ANNOTATION = "lntune_row_prefetch"
"""Annotation of the row loop (see grid_stride.py) whose rows `next_row` loads ahead."""


def next_row(mod: Any) -> Any:
    """The module, whose row loops end with the rows, with what they copy from arguments to
    registers loaded a step ahead, in loops that are annotated.

    Before the loop its first row is loaded. A step takes over what was loaded, has the loads of the
    next step under way, and then does what it did before; the last step loads nothing, so that each
    row is still read once. Nothing is exchanged between threads: a thread loads for itself alone
    what it has used itself, so there is no barrier in it and none is needed.

    Raises:
        RuntimeError: an annotated loop copies nothing to registers.
    """
    import tvm_ffi
    from tvm import tirx

    allocated: list[Any] = []

    def row_loop(loop: Any, mutator: Any) -> Any:
        if ANNOTATION not in loop.annotations:
            return mutator.default_mutate(loop)
        return tirx.SeqStmt(_ahead(loop, allocated))

    def flat(sequence: Any, mutator: Any) -> Any:
        parts = [mutator.mutate(part) for part in sequence.seq]
        lists = (list(part.seq) if isinstance(part, tirx.SeqStmt) else [part] for part in parts)
        return tirx.SeqStmt([part for listed in lists for part in listed])

    kinds = [(tirx.For, row_loop), (tirx.SeqStmt, flat)]
    body = tvm_ffi.structural_mutate(mod["main"].body, kinds)
    root = tir.block_with(body.block, alloc_buffers=[*body.block.alloc_buffers, *allocated])
    return tir.module_with(mod, type(body)(body.iter_values, body.predicate, root))


def _ahead(loop: Any, allocated: list[Any]) -> list[Any]:
    """A row loop as the loads of its first row and the loop; buffers to be allocated are added to
    `allocated`.
    """
    from tvm import tirx

    parts = list(loop.body.seq) if isinstance(loop.body, tirx.SeqStmt) else [loop.body]
    copies = [part for part in parts if copied(part) is not None]
    if not copies:
        raise RuntimeError(f"the loop {loop.loop_var.name} copies nothing to registers")
    first, following, taken = [], [], []
    for copy in copies:
        kept = copied(copy).body.buffer
        coming = tir.variable_like(kept, f"{kept.name}_next")
        allocated.append(coming)
        load = tir.with_variables(copy, {kept: coming})
        alike = not _thread_loops(copy)
        if alike:
            load = _by_first_lanes(load, _thread_loops(loop)[0])
        first.append(tir.with_own_variables(tir.with_variables(load, {loop.loop_var: loop.min})))
        following.append(
            tir.with_own_variables(tir.with_variables(load, {loop.loop_var: loop.loop_var + 1}))
        )
        taken.append(_taking(copy, coming, alike))
    others = [part for part in parts if copied(part) is None]
    # the same for all threads of a block, so that warps stay together
    another = tirx.IfThenElse(loop.loop_var + 1 < loop.extent, _of(following), None)
    inner = tir.loop_with(loop, tirx.SeqStmt([*taken, another, *others]), ANNOTATION)
    return [tirx.IfThenElse(loop.min < loop.extent, _of(first), None), inner]


def _of(statements: list[Any]) -> Any:
    from tvm import tirx

    return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]


def copied(statement: Any) -> Any:
    """The block of a statement that does nothing but copy from global memory to registers, or
    None.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    blocks: list[Any] = []
    tvm_ffi.structural_walk(statement, [(SBlock, blocks.append)])
    if len(blocks) != 1:
        return None
    (block,) = blocks
    store = block.body
    copies = (
        isinstance(store, tirx.BufferStore)
        and isinstance(store.value, tvm.ir.TensorLoad)
        and tir.scope(store.buffer) == "local"
        and tir.scope(store.value.source) == "global"
    )
    return block if copies else None


def _thread_loops(statement: Any) -> list[Any]:
    """The loops over threadIdx.x in a statement."""
    import tvm_ffi
    from tvm import tirx

    loops: list[Any] = []

    def collect(loop: Any) -> None:
        if loop.thread_binding is not None and str(loop.thread_binding.thread_tag) == "threadIdx.x":
            loops.append(loop)

    tvm_ffi.structural_walk(statement, [(tirx.For, collect)])
    return loops


def _by_first_lanes(load: Any, thread_loop: Any) -> Any:
    """What all threads would load alike, loaded by the first lane of each warp.

    ptxas 13.0 knows that such a value is the same in all lanes and moves it to a uniform register,
    for which it waits on the spot: the whole way to memory at each row.
    """
    from tvm import tirx

    lane = thread_loop.loop_var % WARP
    guarded = tirx.IfThenElse(tirx.EQ(lane, tirx.IntImm("int64", 0)), load, None)
    return tir.loop_with(thread_loop, guarded)


def _taking(copy: Any, coming: Any, alike: bool) -> Any:
    """A copy from memory as one of what was loaded ahead into `coming`; `alike`: by the first lanes
    for their warps.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    def block_of(block: Any) -> Any:
        store = block.body
        value = tirx.BufferLoad(coming, store.indices)
        if alike:
            mask = tirx.const(0xFFFFFFFF, "uint32")
            value = tirx.op.tvm_warp_shuffle(mask, value, 0, WARP, WARP)
        reads = [tirx.BufferRegion(coming, write.region) for write in block.writes]
        body = tirx.BufferStore(store.buffer, value, store.indices)
        return tir.block_with(block, reads=reads, body=body)

    return tvm_ffi.structural_map(copy, [(SBlock, block_of)])
