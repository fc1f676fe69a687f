"""Guards (bounds checks) of rows that do not fill all threads, and of rows that are not there: kept
only where memory is accessed or something is summed, or one around all of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.transforms import tir

FLOAT4 = 4
"""Elements of CUDA's widest vector of float32."""
OF_ONE_ROW = "lntune_of_one_row"
"""Annotation of a loop that `once_a_row` puts behind one guard."""


def fits(variant: str, vector_width: int) -> bool:
    """Whether `only_where_needed` can be had: TVM 0.27 writes zeros for a vector of more than four
    float32, as an affine of float32 beside rows of two bytes has, in a form that does not compile.
    """
    return vector_width <= FLOAT4 or "32" not in variant


def only_where_needed(mod: Any, own: Sequence[str] = ("local",)) -> Any:
    """The module with guards only around accesses to memory that threads share, sums over threads,
    and reductions of several statements. `own` are the scopes in which a thread has room of its own
    for all that it computes.

    A row that is no whole number of vectors for each thread leaves some threads without a last one,
    and the last block of several rows may have fewer; s_tir guards every element of every stage
    against that. Here what is computed in registers is computed by all threads, of zeros where a
    thread has no element. With all guards nvcc 13.0 keeps their order, and with it more values
    alive at a time than a thread has registers: for an LSTM's step backward 255 and spills instead
    of 170. Each of them is a comparison and a branch, too: layer norm of 1024 float32, four rows to
    a block, has 678 instructions with them and 469 without.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlockRealize

    func = mod["main"]
    threads: list[Any] = []

    def collect_thread(loop: Any) -> None:
        if loop.thread_binding is not None and str(loop.thread_binding.thread_tag).startswith(
            "threadIdx"
        ):
            threads.append(loop.loop_var)

    tvm_ffi.structural_walk(func.body, [(tirx.For, collect_thread)])

    def sums_over_threads(realize: Any) -> bool:
        """Whether a block sums over threads."""
        reduced = [
            value
            for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
            if axis.iter_type == tirx.IterVar.CommReduce
        ]
        used: list[Any] = []

        def collect_use(var: Any) -> None:
            if any(var.same_as(thread) for thread in threads):
                used.append(var)

        for value in reduced:
            tvm_ffi.structural_walk(value, [(tvm.ir.Var, collect_use)])
        return bool(used)

    def adds(store: Any) -> bool:
        """Whether a store puts back what was there with something added."""
        loads: list[Any] = []
        tvm_ffi.structural_walk(store.value, [(tvm.ir.TensorLoad, loads.append)])
        return any(load.source.same_as(store.buffer) for load in loads)

    def of_this_block(predicate: Any) -> Any:
        """A predicate without what is asked of the number of rows alone: without rows there is no
        block, or none takes a step.
        """
        if isinstance(predicate, tirx.And):
            sides = [of_this_block(side) for side in (predicate.a, predicate.b)]
            asked = [side for side in sides if not isinstance(side, tirx.IntImm)]
            return tirx.And(*asked) if len(asked) > 1 else (asked or sides)[0]
        used: list[Any] = []
        tvm_ffi.structural_walk(predicate, [(tvm.ir.Var, used.append)])
        alone = used and all(var.same_as(used[0]) and var.name == "rows" for var in used)
        return tirx.const(True, "bool") if alone else predicate

    def without_guard(realize: Any, mutator: Any) -> Any:
        block, store = realize.block, realize.block.body
        in_registers = (
            isinstance(store, tirx.BufferStore)
            and all(tir.scope(w.source) in own for w in block.writes)
            and not sums_over_threads(realize)
        )
        if not in_registers or isinstance(realize.predicate, tirx.IntImm):
            return mutator.default_mutate(realize)
        body = store
        if any(tir.scope(r.source) not in own for r in block.reads):
            zero = tirx.BufferStore(store.buffer, tirx.const(0, store.buffer.dtype), store.indices)
            asked = of_this_block(realize.predicate)
            if not isinstance(asked, tirx.IntImm):
                guarded = tirx.IfThenElse(asked, store, None)
                # what is added to stays what it is
                body = guarded if adds(store) else tirx.SeqStmt([zero, guarded])
        return SBlockRealize(
            realize.iter_values, tirx.const(True, "bool"), tir.block_with(block, body=body)
        )

    return tir.module_with(
        mod, tvm_ffi.structural_mutate(func.body, [(SBlockRealize, without_guard)])
    )


def once_a_row(mod: Any) -> Any:
    """The scheduled module with annotated loops behind one guard each, which asks whether their row
    is there, and nothing in them that asks it again.

    Rows that share a block are not all there in its last turn. What stores and adds up elements of
    one is guarded element by element otherwise, sums by a choice between what is added and zero:
    layer norm's backward of 1024 float32, four rows to a block of 128 threads, has 806 instructions
    a turn with all of these and 433 with one, in machine code for sm_90.

    Raises:
        RuntimeError: an annotated loop asks for no row, or for a row of its own turns.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlockRealize

    func = mod["main"]
    rows = tir.rows(func)

    def asks(expression: Any) -> bool:
        """Whether an expression depends on the number of rows."""
        used: list[Any] = []
        tvm_ffi.structural_walk(expression, [(tvm.ir.Var, used.append)])
        return any(var.same_as(rows) for var in used)

    def conditions(loop: Any) -> list[Any]:
        """What a loop asks of rows, by the variables of the loops around its blocks."""
        asked: list[Any] = []

        def collect(realize: Any) -> None:
            axes = [axis.var for axis in realize.block.iter_vars]
            values = dict(zip(axes, realize.iter_values, strict=True))
            found: list[Any] = []
            for part in (realize.predicate, realize.block.body):
                tvm_ffi.structural_walk(part, [(tirx.LT, found.append)])
            asked.extend(tir.with_variables(c, values) for c in found if c.b.same_as(rows))

        tvm_ffi.structural_walk(loop, [(SBlockRealize, collect)])
        return asked

    def unasked(predicate: Any) -> Any:
        """A predicate without what it asks of rows."""
        if isinstance(predicate, tirx.And):
            sides = [unasked(side) for side in (predicate.a, predicate.b)]
            left = [side for side in sides if not isinstance(side, tirx.IntImm)]
            return tirx.And(*left) if len(left) > 1 else (left or sides)[0]
        return tirx.const(True, "bool") if asks(predicate) else predicate

    def without(realize: Any) -> Any:
        return SBlockRealize(realize.iter_values, unasked(realize.predicate), realize.block)

    def chosen(value: Any) -> Any:
        return value.true_value if asks(value.condition) else value

    def guarded(loop: Any, mutator: Any) -> Any:
        if OF_ONE_ROW not in loop.annotations:
            return mutator.default_mutate(loop)
        inside: list[Any] = []
        tvm_ffi.structural_walk(loop, [(tirx.For, lambda one: inside.append(one.loop_var))])
        asked = conditions(loop)
        used: list[Any] = []
        for condition in asked[:1]:
            tvm_ffi.structural_walk(condition, [(tvm.ir.Var, used.append)])
        if not asked or any(var.same_as(own) for var in used for own in inside):
            raise RuntimeError(f"the loop {loop.loop_var.name} is not of one row")
        body = tvm_ffi.structural_map(
            tir.loop_with(loop, loop.body, OF_ONE_ROW),
            [(SBlockRealize, without), (tirx.Select, chosen)],
        )
        return tirx.IfThenElse(asked[0], body, None)

    return tir.module_with(mod, tvm_ffi.structural_mutate(func.body, [(tirx.For, guarded)]))
