"""Rows brought into the cache while others are worked on, by prefetch instructions in a kernel's
loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from lntune.transforms import tir

PREFETCH = "lntune_prefetch"
"""Loop annotation: the number of elements of a row that one step of the loop covers. Fetching
happens in the innermost annotated loop; the steps of annotated loops around it say where in the row
it is."""


class Prefetch(msgspec.Struct, frozen=True):
    """What the annotated loop fetches: its own part of the row `ahead` groups further on in an
    argument, to read or to write.

    `parameter` is the argument's place among the kernel's, `itemsize` the bytes of its elements.
    """

    parameter: int
    ahead: int
    write: bool
    itemsize: int


def prefetch_rows(
    mod: Any, fetches: Sequence[Prefetch], together: int, shared: bool = False, line: int = 64
) -> Any:
    """The module whose loop annotated with PREFETCH brings other rows into the cache while it sums,
    in groups of `together` rows.

    The outermost loop is over the groups; where they are `shared` it is over blocks, and the next
    is over the groups of a block.

    Hardware prefetchers stop at a page's end, and rows often are a page: each row then starts cold
    while its reduction has nothing to do; and the lines of an output are otherwise asked for one by
    one as they are stored to. Fetching past the last row is harmless; a prefetch never faults.
    """
    from tvm import tirx

    func = mod["main"]
    count = 0

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    def row_of(outer: Sequence[Any], ahead: int, side: int) -> Any:
        group = (
            outer[0].loop_var * outer[1].extent + outer[1].loop_var if shared else outer[0].loop_var
        )
        return (group + i64(ahead)) * i64(together) + i64(side)

    def prefetches(outer: Sequence[Any], annotated: Sequence[tuple[Any, int]]) -> list[Any]:
        """The calls of one step, given the loops around it, the outermost first, and what annotated
        ones step by.
        """
        start = sum((variable * i64(step) for variable, step in annotated), i64(0))
        step = annotated[-1][1]
        calls = []
        for fetch in fetches:
            buffer = func.params[fetch.parameter]
            hidden = int(buffer.shape[-1])
            for side in range(together):
                row = row_of(outer, fetch.ahead, side)
                for offset in range(0, step, max(1, line // fetch.itemsize)):
                    # The address in bytes, not address_of(x[...]), which makes a buffer's address
                    # escape its legalization.
                    place = tirx.handle_add_byte_offset(
                        buffer.data, (row * i64(hidden) + start + i64(offset)) * i64(fetch.itemsize)
                    )
                    # keep it in all levels, data
                    flags = [tirx.IntImm("int32", v) for v in (int(fetch.write), 3, 1)]
                    calls.append(
                        tirx.Evaluate(
                            tirx.call_llvm_intrin("void", "llvm.prefetch.p0", place, *flags)
                        )
                    )
        return calls

    def rebuild(
        stmt: Any, outer: tuple[Any, ...], annotated: tuple[tuple[Any, int], ...]
    ) -> tuple[Any, bool]:
        """A copy of the statement, and whether something in it fetches."""
        nonlocal count
        name = type(stmt).__name__
        if name == "For":
            marked = PREFETCH in stmt.annotations
            inside = (
                (*annotated, (stmt.loop_var, int(stmt.annotations[PREFETCH])))
                if marked
                else annotated
            )
            around = (*outer, stmt)
            body, fetched = rebuild(stmt.body, around, inside)
            if marked and not fetched:
                count += 1
                body = tirx.SeqStmt([*prefetches(around, inside), body])
            rest = {k: v for k, v in stmt.annotations.items() if k != PREFETCH}
            return (
                tirx.For(
                    stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, rest
                ),
                fetched or marked,
            )
        if name == "SeqStmt":
            parts = [rebuild(s, outer, annotated) for s in stmt.seq]
            return tirx.SeqStmt([part for part, _ in parts]), any(f for _, f in parts)
        if name == "SBlockRealize":
            body, fetched = rebuild(stmt.block.body, outer, annotated)
            block = tir.block_with(stmt.block, body=body)
            return type(stmt)(stmt.iter_values, stmt.predicate, block), fetched
        return stmt, False

    changed, _ = rebuild(func.body, (), ())
    if count != 1:
        raise RuntimeError(f"expected one loop annotated for prefetching, found {count}")
    return tir.module_with(mod, changed)
