"""Definitions over rows of an LSTM's gates made fit for GPUs: a row is four gates of `hidden`
elements, one after another, and its loop becomes two, over gates and elements.

Then a thread can have the same elements of all four gates, which is all that an element of the cell
needs, and no vector reaches from one gate into the next. How the elements are shared among threads
is in gate_threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lntune import ops
from lntune.architectures import WARP
from lntune.case import MAX_HIDDEN, Case
from lntune.ops.dtypes import sum_of
from lntune.ops.op import RowSum, Term, Total
from lntune.transforms import tir
from lntune.transforms.gpu import threads

GATES = 4
THREADS, WIDTHS = (32, 64, 128, 256, 512, 1024), (1, 2, 4, 8)
"""Values of knobs: threads that share a row, elements of one load or store."""
EXCHANGED = 2
"""Sums that TVM 0.27 lowers to one exchange between threads; of more it says that it has no
matching reducer.
"""


def widest(case: Case) -> int:
    """Elements of the widest vector that divides a row of the cell and is not all of it."""
    width = threads.widest(case)
    return width // 2 if width == case.hidden > 1 else width


def vectors_per_thread(case: Case, threads_per_row: int, vector_width: int) -> int:
    """Vectors of a row of the cell that one thread has."""
    return -(-case.hidden // (vector_width * threads_per_row))


def reason_invalid(case: Case, threads_per_row: int, vector_width: int) -> str | None:
    """Why so many threads cannot share a row of gates in such vectors, whatever else a schedule
    does; None where they can.
    """
    if 4 * case.hidden > MAX_HIDDEN:
        return (
            f"the gates of {case.hidden} elements are {4 * case.hidden}, more than the {MAX_HIDDEN}"
            " that a kernel takes"
        )
    if case.hidden % vector_width:
        return f"vectors of {vector_width} elements do not divide {case.hidden}"
    if vector_width * case.itemsize > threads.WIDEST_BYTES:
        return (
            f"vectors of {vector_width * case.itemsize} bytes; {threads.WIDEST_BYTES} is the most"
        )
    # TVM 0.27 then simplifies the thread's number away, and gives each a stack frame for a warp's
    # gates
    if vector_width == case.hidden > 1:
        return f"a vector would be all of a row of {case.hidden}"
    if threads_per_row > WARP and threads_per_row * vector_width >= 2 * case.hidden:
        return f"half of {threads_per_row} threads would have no part of {case.hidden} elements"
    return None


def row_sum(hidden: int) -> RowSum:
    """The RowSum of these schedules: threads.row_sum, with gates and their elements as two loops
    where the row is one of gates.
    """

    def exchanged_together(rows: Any, expressions: Sequence[Term], name: str) -> list[Total]:
        from tvm import te, tirx

        n = tirx.IntImm("int64", hidden)
        gate, k = (
            te.reduce_axis((0, tirx.IntImm("int64", GATES)), name=f"{name}_gate"),
            te.reduce_axis((0, n), name=f"{name}_k"),
        )
        add = sum_of(len(expressions))

        def body(i: Any) -> Any:
            values = tuple(f(i, gate * n + k) for f in expressions)
            return add(values if len(values) > 1 else values[0], axis=[gate, k])

        sums = te.compute((rows,), body, name=name)
        return [threads.total(tensor) for tensor in (sums if len(expressions) > 1 else [sums])]

    def summed(rows: Any, size: int, expressions: Sequence[Term], name: str) -> list[Total]:
        if size == hidden:
            return threads.row_sum(rows, size, expressions, name)
        cuts = range(0, len(expressions), EXCHANGED)
        return [
            total
            for at in cuts
            for total in exchanged_together(
                rows, expressions[at : at + EXCHANGED], f"{name}{at or ''}"
            )
        ]

    return summed


def split_gates(sch: Any, block: Any, hidden: int) -> None:
    """Make gate and element two loops of a block whose last loop is over a row of gates."""
    _transform_loops(sch, block, lambda *at: (*at[:-1], at[-1] // hidden, at[-1] % hidden))


def with_gates_resolved(mod: Any, kept: Sequence[str] = ()) -> Any:
    """The module, whose stages have gate and element as two loops, with their values in terms of
    both loops: where a value is chosen by gate (gate == 2 ? f(gate) : ...), that gate's number is
    put in.

    Otherwise an index keeps the division that tells gate and element apart, TVM does not see which
    part of a row a thread needs, and gives each thread a stack frame for all of it. Stages `kept`
    choose among functions of the same gate, and keep their choice as it is.
    """
    import tvm
    import tvm_ffi
    from tvm import s_tir, tirx
    from tvm.s_tir.stmt import SBlock

    def choice(value: Any, mutator: Any) -> Any:
        value = mutator.default_mutate(value)
        condition = value.condition
        if not (
            isinstance(condition, tirx.EQ)
            and isinstance(condition.a, tirx.Var)
            and isinstance(condition.b, tirx.IntImm)
        ):
            return value
        chosen = tvm_ffi.structural_map(
            value.true_value, [(tirx.Var, lambda v: condition.b if v.same_as(condition.a) else v)]
        )
        return tirx.Select(condition, chosen, value.false_value)

    def stage(block: Any, mutator: Any) -> Any:
        store = block.body
        if not isinstance(store, tirx.BufferStore) or block.init is not None:
            return mutator.default_mutate(block)
        analyzer = tvm.sym.Analyzer()
        for axis in block.iter_vars:
            analyzer.bind(axis.var, axis.dom)
        value = analyzer.simplify(store.value)
        if block.name_hint not in kept:
            value = analyzer.simplify(tvm_ffi.structural_mutate(value, [(tirx.Select, choice)]))
        body = tirx.BufferStore(store.buffer, value, store.indices)
        buffers = {r.source: r.source for r in (*block.reads, *block.writes)}
        reads, writes, _ = s_tir.analysis.get_sblock_access_region(
            tir.block_with(block, reads=[], writes=[], body=body), buffers
        )
        return tir.block_with(block, reads=reads, writes=writes, body=body)

    return tir.module_with(mod, tvm_ffi.structural_mutate(mod["main"].body, [(SBlock, stage)]))


def row_loop_second(sch: Any, block: Any, hidden: int, of_gates: bool) -> Any:
    """Order the loops of a stage of sums over rows: block, step of the row loop, the rest, [gate],
    element. Returns the row loop.
    """
    names = [str(v.var.name) for v in sch.get(block).iter_vars]
    b, k, step = (
        next(i for i, name in enumerate(names) if name.endswith(of)) for of in ("_b", "_k", "step")
    )

    def order(*at: Any) -> tuple[Any, ...]:
        rest = [value for i, value in enumerate(at) if i not in (b, k, step)]
        element = (at[k] // hidden, at[k] % hidden) if of_gates else (at[k],)
        return (at[b], at[step], *rest, *element)

    _transform_loops(sch, block, order)
    return sch.get_loops(block)[1]


def _transform_loops(sch: Any, block: Any, order: Callable[..., Any]) -> None:
    from tvm.tirx import IndexMap

    sch.transform_block_layout(block, IndexMap.from_func(order, ndim=len(sch.get(block).iter_vars)))


def inputs(sch: Any, block: Any, case: Case) -> list[str]:
    """The operator's matrices and vectors that a block reads, by name."""
    known = {
        a.name for a in ops.get(case.op).arguments(case) if a.role == "in" and a.shape != ("rows",)
    }
    return [name for r in sch.get(block).reads if (name := str(r.source.name)) in known]
