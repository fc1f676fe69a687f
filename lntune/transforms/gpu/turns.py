"""What GPU schedules do to definitions whose blocks take turns at the rows, and to sums that are
added to; neither TE nor s_tir can say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.transforms.gpu import threads

TURNS = "lntune_turns"
"""Loop annotation: the turns of a block, to be cut to the rows there are. Its value is the number
of blocks.
"""


def unpadded(func: Any) -> Any:
    """A definition without what it does for rows beyond the last: the last row read again (min(row,
    rows - 1)), zeros in sums over rows.

    To be scheduled with a loop annotated TURNS, and trimmed.
    """
    import tvm_ffi
    from tvm import tirx

    rows = _rows(func)
    last = rows - 1

    def least(value: Any) -> Any:
        return value.a if tvm_ffi.structural_equal(value.b, last) else value

    return func.with_body(tvm_ffi.structural_map(_all_there(func.body, rows), [(tirx.Min, least)]))


def trim(mod: Any, together: int = 1) -> Any:
    """The module with the loop annotated TURNS ending at a block's last row; of several `together`,
    which are as many blocks' rows in a turn, at those with the last row, where the definition's
    questions remain.

    A row is turn * blocks + block, so a block has ceil((rows - block) / blocks) turns. Sums across
    threads are lowered before, which TVM no longer recognizes in a loop whose end depends on the
    block.
    """
    import tvm
    import tvm_ffi
    from tvm import s_tir, tirx

    func = s_tir.transform.LowerCrossThreadReduction()(mod)["main"]
    rows = _rows(func)
    block: list[Any] = []

    def cut(loop: Any, mutator: Any) -> Any:
        if loop.thread_binding is not None and str(loop.thread_binding.thread_tag) == "blockIdx.x":
            block.append(loop.loop_var)
        if TURNS not in loop.annotations:
            return mutator.default_mutate(loop)
        count = tirx.IntImm("int64", int(loop.annotations[TURNS]))
        turns = tirx.floordiv(
            rows + (count * together - 1) - block[-1] * together, count * together
        )
        rest = {key: value for key, value in loop.annotations.items() if key != TURNS}
        body = _all_there(loop.body, rows) if together == 1 else loop.body
        return type(loop)(
            loop.loop_var, loop.min, turns, loop.kind, body, loop.thread_binding, rest
        )

    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_mutate(func.body, [(tirx.For, cut)]))}
    )


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
    return tvm_ffi.structural_map(
        func,
        [
            (
                tvm.ir.Var,
                lambda value: next((v for old, v in new.items() if value.same_as(old)), value),
            )
        ],
    )


def _rows(func: Any) -> Any:
    """The variable that is the number of rows."""
    from tvm import tirx

    return next(
        p.ty.shape[0]
        for p in func.params
        if hasattr(p.ty, "shape") and isinstance(p.ty.shape[0], tirx.Var)
    )


def _all_there(body: Any, rows: Any) -> Any:
    """With every question whether a row is there (row < rows) answered."""
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


def each(mod: Any) -> Any:
    """The module with what is before and after the loop annotated TURNS done in each turn: sums
    begun, and added to what they are for.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    def inward(loop: Any, mutator: Any) -> Any:
        parts = list(loop.body.seq) if isinstance(loop.body, tirx.SeqStmt) else []
        at = next(
            (
                i
                for i, part in enumerate(parts)
                if isinstance(part, tirx.For) and TURNS in part.annotations
            ),
            None,
        )
        if at is None:
            return mutator.default_mutate(loop)
        turn = parts[at]
        return threads.like(
            loop, threads.like(turn, tirx.SeqStmt([*parts[:at], *turn.body.seq, *parts[at + 1 :]]))
        )

    func = mod["main"]
    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_mutate(func.body, [(tirx.For, inward)]))}
    )


def add(mod: Any, names: Sequence[str]) -> Any:
    """The module with the copies called `names` adding to what they would overwrite."""
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    left = set(names)

    def adding(block: Any, mutator: Any) -> Any:
        if block.name_hint not in left:
            return mutator.default_mutate(block)
        left.discard(block.name_hint)
        store = block.body
        body = tirx.BufferStore(
            store.buffer, tirx.BufferLoad(store.buffer, store.indices) + store.value, store.indices
        )
        reads = [*block.reads, *block.writes]
        return type(block)(
            block.iter_vars,
            reads,
            block.writes,
            block.name_hint,
            body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            block.annotations,
        )

    func = mod["main"]
    changed = func.with_body(tvm_ffi.structural_mutate(func.body, [(SBlock, adding)]))
    if left:
        raise RuntimeError(f"no copies {sorted(left)} to add with")
    return tvm.IRModule({"main": changed})


def early(mod: Any, moves: dict[str, str]) -> Any:
    """The module with stages of the loop annotated TURNS brought right behind others, by name, so
    that what they need need not be kept.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    def names(statement: Any) -> set[str]:
        found = set[str]()
        tvm_ffi.structural_walk(
            statement, [(SBlock, lambda block: found.add(str(block.name_hint)))]
        )
        return found

    def moved(loop: Any, mutator: Any) -> Any:
        if TURNS not in loop.annotations:
            return mutator.default_mutate(loop)
        parts = list(loop.body.seq)
        for name, behind in moves.items():
            part = next(p for p in parts if name in names(p))
            parts.remove(part)
            at = next(i for i, p in enumerate(parts) if behind in names(p))
            parts.insert(at + 1, part)
        return threads.like(loop, tirx.SeqStmt(parts))

    func = mod["main"]
    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_mutate(func.body, [(tirx.For, moved)]))}
    )
