"""Groups of rows side by side that are all there worked on without guards, in code of their own."""

from __future__ import annotations

from typing import Any

from lntune.transforms import tir
from lntune.transforms.cpu.vectors import VECTORS

_AROUND = 2
"""Loops around the elements: over blocks, and over the groups of a block."""


def without_guards(mod: Any, together: int) -> Any:
    """The module whose loops over the elements of `together` rows, annotated with VECTORS inside
    those over blocks of groups and over the groups of a block, are there twice: for groups whose
    rows are all there, without what guards against others, and as they are for the rest.

    A guard between two uses of an element, such as that around the store of one row, keeps LLVM
    from widening the element once for both; and a product that a guard may replace by 0 is not
    fused with the sum that it is added to.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir import SBlockRealize
    from tvm.tirx import Select

    func = mod["main"]
    rows, always, copies = tir.rows(func), tirx.IntImm("bool", 1), 0

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    def unguarded(stage: Any, mutator: Any) -> Any:
        stage = mutator.default_mutate(stage)
        return type(stage)(stage.iter_values, always, stage.block)

    def chosen(select: Any, mutator: Any) -> Any:
        select = mutator.default_mutate(select)
        condition = select.condition
        guards = type(condition).__name__ == "LT" and condition.b.same_as(rows)
        return select.true_value if guards else select

    def walk(stmt: Any, outer: tuple[Any, ...]) -> Any:
        nonlocal copies
        name = type(stmt).__name__
        if name == "For" and VECTORS in stmt.annotations and len(outer) == _AROUND:
            copies += 1
            blocks, groups = outer
            group = blocks.loop_var * groups.extent + groups.loop_var
            fast = tvm_ffi.structural_mutate(
                tir.with_own_variables(stmt), [(SBlockRealize, unguarded), (Select, chosen)]
            )
            return tirx.IfThenElse((group + i64(1)) * i64(together) <= rows, fast, stmt)
        if name == "For":
            return tir.loop_with(stmt, walk(stmt.body, (*outer, stmt)))
        if name == "SeqStmt":
            return tirx.SeqStmt([walk(s, outer) for s in stmt.seq])
        if name == "SBlockRealize" and not outer:
            block = tir.block_with(stmt.block, body=walk(stmt.block.body, outer))
            return type(stmt)(stmt.iter_values, stmt.predicate, block)
        return stmt

    body = walk(func.body, ())
    if not copies:
        raise RuntimeError("no loop over the elements of rows side by side was found")
    return tir.module_with(mod, body)
