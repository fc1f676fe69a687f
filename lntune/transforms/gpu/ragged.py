"""Rows that do not fill their threads' turns: who asks whether a thread has a part in the last
one.
"""

from __future__ import annotations

from typing import Any

from lntune.transforms.gpu.threads import scope


def asked_where_it_matters(mod: Any) -> Any:
    """The module with the question asked only where memory is read or written, or sums are made
    over threads, or several over rows.

    What is computed in registers is computed by all threads, of zeros where a thread has no part.
    TVM asks at each element of each stage, and nvcc 13.0 then keeps the order of the questions, and
    with it more values alive at a time than a thread has registers: for an LSTM's step backward 255
    and spills instead of 170.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock, SBlockRealize

    func = mod["main"]
    threads: list[Any] = []

    def bound(loop: Any) -> None:
        if loop.thread_binding is not None and str(loop.thread_binding.thread_tag).startswith(
            "threadIdx"
        ):
            threads.append(loop.loop_var)

    tvm_ffi.structural_walk(func.body, [(tirx.For, bound)])

    def over_threads(one: Any) -> bool:
        """Whether a block sums over threads."""
        sums = [
            value
            for axis, value in zip(one.block.iter_vars, one.iter_values, strict=True)
            if axis.iter_type == tirx.IterVar.CommReduce
        ]
        found: list[Any] = []
        for value in sums:
            tvm_ffi.structural_walk(
                value,
                [
                    (
                        tvm.ir.Var,
                        lambda v: found.append(v) if any(v.same_as(t) for t in threads) else None,
                    )
                ],
            )
        return bool(found)

    def realized(one: Any, mutator: Any) -> Any:
        block, store = one.block, one.block.body
        free = (
            isinstance(store, tirx.BufferStore)
            and all(scope(w.source) != "global" for w in block.writes)
            and not over_threads(one)
        )
        if not free or isinstance(one.predicate, tirx.IntImm):
            return mutator.default_mutate(one)
        body = store
        if any(scope(r.source) == "global" for r in block.reads):
            nothing = tirx.BufferStore(
                store.buffer, tirx.const(0, store.buffer.dtype), store.indices
            )
            body = tirx.SeqStmt([nothing, tirx.IfThenElse(one.predicate, store, None)])
        rest = (
            block.name_hint,
            body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            block.annotations,
        )
        return SBlockRealize(
            one.iter_values,
            tirx.const(True, "bool"),
            SBlock(block.iter_vars, block.reads, block.writes, *rest),
        )

    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_mutate(func.body, [(SBlockRealize, realized)]))}
    )
