"""Reductions that add to what their outputs hold, which neither TE nor s_tir can say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def accumulate(mod: Any, names: Sequence[str]) -> Any:
    """The module with the reduction blocks called `names` adding to their outputs: without the init
    that would set these to 0.
    """
    import tvm

    left = set(names)

    def walk(stmt: Any) -> Any:
        name = type(stmt).__name__
        if name == "For":
            return type(stmt)(
                stmt.loop_var,
                stmt.min,
                stmt.extent,
                stmt.kind,
                walk(stmt.body),
                stmt.thread_binding,
                dict(stmt.annotations),
            )
        if name == "SeqStmt":
            return type(stmt)([walk(s) for s in stmt.seq])
        if name == "SBlockRealize":
            b = stmt.block
            init = None if b.name_hint in left else b.init
            left.discard(b.name_hint)
            block = type(b)(
                b.iter_vars,
                b.reads,
                b.writes,
                b.name_hint,
                walk(b.body),
                init,
                b.alloc_buffers,
                b.match_buffers,
                b.annotations,
            )
            return type(stmt)(stmt.iter_values, stmt.predicate, block)
        return stmt

    func = mod["main"]
    changed = func.with_body(walk(func.body))
    if left:
        raise RuntimeError(f"no blocks {sorted(left)} to accumulate in")
    return tvm.IRModule({"main": changed})
