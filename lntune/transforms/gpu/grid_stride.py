"""Blocks of threads that loop over the rows in strides of the grid (block b takes rows b, b +
blocks, b + 2 * blocks, ...), and the sums that each keeps over its rows.

CUDA calls this a grid-stride loop. Neither TE nor s_tir can say where such a loop ends, nor that an
output is added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.transforms import tir

ROW_LOOP = "lntune_row_loop"
"""Annotation of the loop over a block's rows; its value is the number of blocks. The definition has
it run as often for each block; `end_at_last_row` ends it where the rows do.
"""


def without_padding(func: Any) -> Any:
    """A definition without what it does for rows beyond the last: the last row read again (min(row,
    rows - 1)), zeros in sums over rows.

    For schedules that annotate the row loop and pass the result through `end_at_last_row`.
    """
    import tvm_ffi
    from tvm import tirx

    rows = tir.rows(func)
    last = rows - 1

    def least(value: Any) -> Any:
        return value.a if tvm_ffi.structural_equal(value.b, last) else value

    body = _without_row_checks(func.body, rows)
    return func.with_body(tvm_ffi.structural_map(body, [(tirx.Min, least)]))


def end_at_last_row(mod: Any, rows_at_a_time: int = 1) -> Any:
    """The module with the row loop ending at a block's last row.

    A row is step * blocks + block, so a block has ceil((rows - block) / blocks) steps. Of several
    `rows_at_a_time` the loop ends with the group that has the last row, and the definition's checks
    of each row remain. Sums across threads are lowered before, which TVM no longer recognizes in a
    loop whose end depends on the block.
    """
    import tvm_ffi
    from tvm import s_tir, tirx

    mod = s_tir.transform.LowerCrossThreadReduction()(mod)
    func = mod["main"]
    rows = tir.rows(func)
    block: list[Any] = []

    def shorten(loop: Any, mutator: Any) -> Any:
        if loop.thread_binding is not None and str(loop.thread_binding.thread_tag) == "blockIdx.x":
            block.append(loop.loop_var)
        if ROW_LOOP not in loop.annotations:
            return mutator.default_mutate(loop)
        count = tirx.IntImm("int64", int(loop.annotations[ROW_LOOP]))
        steps = tirx.floordiv(
            rows + (count * rows_at_a_time - 1) - block[-1] * rows_at_a_time,
            count * rows_at_a_time,
        )
        rest = {key: value for key, value in loop.annotations.items() if key != ROW_LOOP}
        body = _without_row_checks(loop.body, rows) if rows_at_a_time == 1 else loop.body
        return type(loop)(
            loop.loop_var, loop.min, steps, loop.kind, body, loop.thread_binding, rest
        )

    return tir.module_with(mod, tvm_ffi.structural_mutate(func.body, [(tirx.For, shorten)]))


def named(func: Any, names: Sequence[str]) -> Any:
    """The PrimFunc with its parameters called `names`: TE has names of its own for the results of
    one stage.
    """
    import tvm
    import tvm_ffi

    new = {
        old: tvm.ir.Var(name, old.ty)
        for old, name in zip(func.params, names, strict=True)
        if str(old.name) != name
    }

    def renamed(var: Any) -> Any:
        return next((v for old, v in new.items() if var.same_as(old)), var)

    return tvm_ffi.structural_map(func, [(tvm.ir.Var, renamed)])


def _without_row_checks(body: Any, rows: Any) -> Any:
    """A statement with every comparison row < rows taken as true."""
    import tvm_ffi
    from tvm import tirx

    def less(value: Any) -> Any:
        return tirx.const(True, "bool") if value.b.same_as(rows) else value

    def select(value: Any) -> Any:
        return (
            value.true_value
            if isinstance(value.condition, tirx.IntImm) and int(value.condition)
            else value
        )

    return tvm_ffi.structural_map(body, [(tirx.LT, less), (tirx.Select, select)])


def sums_of_each_row(mod: Any) -> Any:
    """The module with what comes before and after the row loop moved into it: sums are set to 0,
    and added to the output, for each row anew.
    """
    import tvm_ffi
    from tvm import tirx

    def move_in(loop: Any, mutator: Any) -> Any:
        parts = list(loop.body.seq) if isinstance(loop.body, tirx.SeqStmt) else []
        at = next(
            (
                i
                for i, part in enumerate(parts)
                if isinstance(part, tirx.For) and ROW_LOOP in part.annotations
            ),
            None,
        )
        if at is None:
            return mutator.default_mutate(loop)
        inner = parts[at]
        body = tirx.SeqStmt([*parts[:at], *inner.body.seq, *parts[at + 1 :]])
        return tir.loop_with(loop, tir.loop_with(inner, body))

    return tir.module_with(mod, tvm_ffi.structural_mutate(mod["main"].body, [(tirx.For, move_in)]))


def add_to_outputs(mod: Any, copies: Sequence[str]) -> Any:
    """The module with the blocks named `copies` adding to what they would overwrite.

    Raises:
        RuntimeError: there is no block of one of the names.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    left = set(copies)

    def adding(block: Any, mutator: Any) -> Any:
        if block.name_hint not in left:
            return mutator.default_mutate(block)
        left.discard(block.name_hint)
        store = block.body
        old = tirx.BufferLoad(store.buffer, store.indices)
        body = tirx.BufferStore(store.buffer, old + store.value, store.indices)
        return tir.block_with(block, reads=[*block.reads, *block.writes], body=body)

    changed = tvm_ffi.structural_mutate(mod["main"].body, [(SBlock, adding)])
    if left:
        raise RuntimeError(f"no copies {sorted(left)} to add with")
    return tir.module_with(mod, changed)


def end_without_rows(mod: Any) -> Any:
    """The module whose blocks end after their row loop where they have had no row: what follows it
    would add zeros to sums in memory.

    Calls right behind the loop are for all blocks, such as the wait for the kernel before; see
    early_start.py.
    """
    import tvm_ffi
    from tvm import tirx

    rows = tir.rows(mod["main"])

    def is_row_loop(part: Any) -> bool:
        return isinstance(part, tirx.For) and ROW_LOOP in part.annotations

    def blocks(loop: Any, mutator: Any) -> Any:
        parts = list(loop.body.seq) if isinstance(loop.body, tirx.SeqStmt) else []
        at = next((i + 1 for i, part in enumerate(parts) if is_row_loop(part)), len(parts))
        while at < len(parts) and isinstance(parts[at], tirx.Evaluate):
            at += 1
        if at == len(parts):
            return mutator.default_mutate(loop)
        rest = tirx.IfThenElse(loop.loop_var < rows, tirx.SeqStmt(parts[at:]), None)
        return tir.loop_with(loop, tirx.SeqStmt([*parts[:at], rest]))

    return tir.module_with(mod, tvm_ffi.structural_mutate(mod["main"].body, [(tirx.For, blocks)]))


def move_up(mod: Any, moves: dict[str, str]) -> Any:
    """The module with stages of the row loop moved right behind others, by name, so that what they
    need is not kept longer.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    def names(statement: Any) -> set[str]:
        collected = set[str]()
        tvm_ffi.structural_walk(
            statement, [(SBlock, lambda block: collected.add(str(block.name_hint)))]
        )
        return collected

    def reordered(loop: Any, mutator: Any) -> Any:
        if ROW_LOOP not in loop.annotations:
            return mutator.default_mutate(loop)
        parts = list(loop.body.seq)
        for name, behind in moves.items():
            part = next(p for p in parts if name in names(p))
            parts.remove(part)
            at = next(i for i, p in enumerate(parts) if behind in names(p))
            parts.insert(at + 1, part)
        return tir.loop_with(loop, tirx.SeqStmt(parts))

    return tir.module_with(
        mod, tvm_ffi.structural_mutate(mod["main"].body, [(tirx.For, reordered)])
    )
