"""Loop transformations of GPU schedules for rows of an LSTM's gates: four parts of `hidden`
elements, one after another.

The definition has an axis of 4 hidden elements. Here it becomes two, gate and element, so that a
thread has the same elements of all gates, which is what makes a cell, and so that an access never
reaches from one gate into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lntune import ops
from lntune.architectures import WARP
from lntune.case import MAX_HIDDEN, Case
from lntune.ops.dtypes import sum_of
from lntune.ops.op import RowSum, Term, Total
from lntune.transforms.gpu import threads

GATES = 4
EXCHANGED = 2
"""Sums that TVM 0.27 lowers to one exchange between threads; of more it says that it has no
matching reducer.
"""
VECTOR = 4
"""Elements of float32 in the widest access."""


def widest(case: Case) -> int:
    """Elements of the widest access that divides a row and is not all of it."""
    access = threads.widest(case)
    return access // 2 if access == case.hidden > 1 else access


def turns_of(case: Case, shared: int, access: int) -> int:
    """Accesses that one thread makes to pass over a row of the cell."""
    return -(-case.hidden // (access * shared))


def misfit(case: Case, shared: int, access: int) -> str | None:
    """Why `shared` threads cannot share a row of gates in such accesses, whatever else a schedule
    does; None where they can.
    """
    if 4 * case.hidden > MAX_HIDDEN:
        return (
            f"the gates of {case.hidden} elements are {4 * case.hidden}, more than the {MAX_HIDDEN}"
            " that a kernel takes"
        )
    if case.hidden % access:
        return f"accesses of {access} elements do not divide {case.hidden}"
    if access * case.itemsize > threads.ACCESS:
        return f"accesses of {access * case.itemsize} bytes; {threads.ACCESS} is the most"
    # TVM 0.27 then simplifies the thread's number away, and gives each a stack frame for a warp's
    # gates
    if access == case.hidden > 1:
        return f"an access would be all of a row of {case.hidden}"
    if shared > WARP and shared * access >= 2 * case.hidden:
        return f"half of {shared} threads would have no part of {case.hidden} elements"
    return None


def row_sum(hidden: int) -> RowSum:
    """The RowSum of these schedules: threads.row_sum, with gates and their elements as two loops
    where the row is one of gates.
    """

    def together(rows: Any, expressions: Sequence[Term], name: str) -> list[Total]:
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

        made = te.compute((rows,), body, name=name)
        return [threads.total(tensor) for tensor in (made if len(expressions) > 1 else [made])]

    def summed(rows: Any, size: int, expressions: Sequence[Term], name: str) -> list[Total]:
        if size == hidden:
            return threads.row_sum(rows, size, expressions, name)
        cuts = range(0, len(expressions), EXCHANGED)
        return [
            total
            for at in cuts
            for total in together(rows, expressions[at : at + EXCHANGED], f"{name}{at or ''}")
        ]

    return summed


def apart(sch: Any, block: Any, hidden: int) -> None:
    """Make gate and element two loops of a block whose last loop is over a row of gates."""
    _reordered(sch, block, lambda *at: (*at[:-1], at[-1] // hidden, at[-1] % hidden))


def settled(mod: Any, alike: Sequence[str] = ()) -> Any:
    """The module, gate and element two loops of its stages, with their values in terms of both:
    what is chosen for one gate is said of it.

    Otherwise an index keeps the division that tells gate and element apart, TVM does not see which
    part of a row a thread needs, and gives each thread a stack frame for all of it. Stages `alike`
    choose among functions of the same gate, and keep their choice as it is.
    """
    import tvm
    import tvm_ffi
    from tvm import s_tir, tirx
    from tvm.s_tir.stmt import SBlock

    def choice(value: Any, mutator: Any) -> Any:
        value = mutator.default_mutate(value)
        asked = value.condition
        if not (
            isinstance(asked, tirx.EQ)
            and isinstance(asked.a, tirx.Var)
            and isinstance(asked.b, tirx.IntImm)
        ):
            return value
        said = tvm_ffi.structural_map(
            value.true_value, [(tirx.Var, lambda v: asked.b if v.same_as(asked.a) else v)]
        )
        return tirx.Select(asked, said, value.false_value)

    def stage(block: Any, mutator: Any) -> Any:
        store = block.body
        if not isinstance(store, tirx.BufferStore) or block.init is not None:
            return mutator.default_mutate(block)
        known = tvm.sym.Analyzer()
        for axis in block.iter_vars:
            known.bind(axis.var, axis.dom)
        value = known.simplify(store.value)
        if block.name_hint not in alike:
            value = known.simplify(tvm_ffi.structural_mutate(value, [(tirx.Select, choice)]))
        rest = (
            block.name_hint,
            tirx.BufferStore(store.buffer, value, store.indices),
            None,
            block.alloc_buffers,
            block.match_buffers,
        )
        buffers = {r.source: r.source for r in (*block.reads, *block.writes)}
        reads, writes, _ = s_tir.analysis.get_sblock_access_region(
            SBlock(block.iter_vars, [], [], *rest, block.annotations), buffers
        )
        return SBlock(block.iter_vars, reads, writes, *rest, block.annotations)

    func = mod["main"]
    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_mutate(func.body, [(SBlock, stage)]))}
    )


def turns_first(sch: Any, block: Any, hidden: int, gates: bool) -> Any:
    """Put the loops of sums over rows in order: block, turn, the rest, [gate], element. Returns the
    loop over turns.
    """
    names = [str(v.var.name) for v in sch.get(block).iter_vars]
    b, k, turn = (
        next(i for i, name in enumerate(names) if name.endswith(of)) for of in ("_b", "_k", "step")
    )

    def place(*at: Any) -> tuple[Any, ...]:
        rest = [value for i, value in enumerate(at) if i not in (b, k, turn)]
        return (at[b], at[turn], *rest, *((at[k] // hidden, at[k] % hidden) if gates else (at[k],)))

    _reordered(sch, block, place)
    return sch.get_loops(block)[1]


def _reordered(sch: Any, block: Any, place: Callable[..., Any]) -> None:
    from tvm.tirx import IndexMap

    sch.transform_block_layout(block, IndexMap.from_func(place, ndim=len(sch.get(block).iter_vars)))


@dataclass(frozen=True)
class Deal:
    """How the elements of a row, or of each gate's part of it, are shared: `hidden` of them among
    `threads` in accesses of `access`.
    """

    hidden: int
    threads: int
    access: int

    def loops(self, sch: Any, block: Any, gates: bool) -> Any:
        """Deal the innermost loop of a block out, to be computed one by one; one gate after the
        other. Returns the loop over threads.
        """
        thread = threads.one_by_one(sch, block, self.threads, self.access)
        if gates:
            sch.unroll(sch.get_loops(block)[-4])
        return thread

    def held(self, sch: Any, block: Any, index: int, scope: str = "local") -> None:
        """Lay a buffer that a block writes out so that what a thread holds of a row is as long as
        its turns: contiguous in registers; in shared memory side by side with what other threads
        hold, so that single elements are accessed without conflicts.
        """

        def place(*at: Any) -> tuple[Any, ...]:
            *lead, k = at
            turn, thread, element = (
                k // self.access // self.threads,
                k // self.access % self.threads,
                k % self.access,
            )
            return (
                (*lead, turn, thread, element)
                if scope == "local"
                else (*lead, turn, element, thread)
            )

        sch.transform_layout(block, ("write", index), place, assume_injective_transform=True)

    def stage(self, sch: Any, block: Any, gates: bool, scope: str = "local") -> Any:
        """Compute a stage in registers, or in shared memory. Returns the loop over threads."""
        sch.set_scope(block, 0, scope)
        if gates:
            self._by_gate(sch, block, 0)
        self.held(sch, block, 0, scope)
        return self.loops(sch, block, gates)

    def keep(self, sch: Any, consumers: Sequence[Any], name: str, at: Any, gates: bool) -> None:
        """Load a row, or vector, at loop `at` into the registers of the threads that need its
        elements, for all of `consumers`.
        """
        copy = sch.cache_read(
            consumers[0], _reads(sch, consumers[0], name), "local", consumer_blocks=list(consumers)
        )
        if gates:
            apart(sch, copy, self.hidden)
            self._by_gate(sch, copy, 0)
        sch.compute_at(copy, at, preserve_unit_loops=True, index=-2)  # the first place there is
        self.held(sch, copy, 0)
        threads.copy(sch, copy, self.threads, self.access)
        if gates:
            sch.unroll(sch.get_loops(copy)[-4])

    def fetch(self, sch: Any, block: Any, name: str, thread: Any, gates: bool) -> None:
        """Load the elements of one access into registers at once, at the loop over threads."""
        if self.access == 1:
            return
        copy = sch.cache_read(block, _reads(sch, block, name), "local", consumer_blocks=[block])
        if gates:
            apart(sch, copy, self.hidden)
            self._by_gate(sch, copy, 0)
        sch.compute_at(copy, thread, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(copy)[-1])

    def output(self, sch: Any, block: Any, gates: bool) -> Any:
        """Compute an output in registers, one by one, and store an access of elements at once.
        Returns the loop over threads.

        Single elements are stored as they are made; TVM loses the question whether there is one
        where the output has but one element.
        """
        if self.access == 1:
            return self.loops(sch, block, gates)
        copy = sch.cache_write(block, 0, "local")
        if gates:
            apart(sch, copy, self.hidden)
            self._by_gate(sch, block, 0)
        thread = self.loops(sch, block, gates)
        sch.reverse_compute_at(copy, thread, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(copy)[-1])
        return thread

    def sums(
        self, sch: Any, block: Any, at: Any, turn: Any, gates: bool, scope: str = "local"
    ) -> list[str]:
        """Sum over rows in registers, or in places of shared memory that are each one thread's,
        from 0 before loop `turn`, and store the sums at loop `at` after it. Returns the stores'
        names.
        """
        copies = [
            sch.cache_write(block, index, scope) for index in range(len(sch.get(block).writes))
        ]
        for index, copy in enumerate(copies):
            if gates:
                apart(sch, copy, self.hidden)
                self._by_gate(sch, block, index)
        for index, copy in enumerate(copies):
            sch.reverse_compute_at(copy, at, preserve_unit_loops=True)
            self.held(sch, block, index, scope)
            self.loops(sch, copy, gates)
            if self.access > 1:
                _, elements = sch.split(
                    sch.get_loops(copy)[-1],
                    [None, min(self.access, VECTOR)],
                    preserve_unit_iters=True,
                )
                sch.vectorize(elements)
        sch.decompose_reduction(block, turn)
        return [str(sch.get(copy).name_hint) for copy in copies]

    def _by_gate(self, sch: Any, block: Any, index: int) -> None:
        """Gate and element as two dimensions of a local buffer that a block writes, so that where a
        gate ends is seen.
        """
        sch.transform_layout(
            block,
            ("write", index),
            lambda *at: (*at[:-1], at[-1] // self.hidden, at[-1] % self.hidden),
        )


def keep_scalar(sch: Any, consumers: Sequence[Any], name: str, at: Any) -> None:
    """Load a row's scalar at loop `at`, once for all of `consumers`."""
    copy = sch.cache_read(
        consumers[0], _reads(sch, consumers[0], name), "local", consumer_blocks=list(consumers)
    )
    sch.compute_at(copy, at, preserve_unit_loops=True, index=-2)


def inputs(sch: Any, block: Any, case: Case) -> list[str]:
    """The operator's matrices and vectors that a block reads, by name."""
    known = {
        a.name for a in ops.get(case.op).arguments(case) if a.role == "in" and a.shape != ("rows",)
    }
    return [name for r in sch.get(block).reads if (name := str(r.source.name)) in known]


def _reads(sch: Any, block: Any, name: str) -> int:
    """The number of an input among a block's reads."""
    return [str(r.source.name) for r in sch.get(block).reads].index(name)
