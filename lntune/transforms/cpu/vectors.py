"""Loops of CPU kernels cut into whole vectors and a tail of falling powers of two, so that every
vector is full and no predicates are needed.

A split that does not divide leaves a predicate on its block; `reverse_compute_at` drops such a
predicate without a word (the kernel then reads past the row), and the vectorizer gives up on the
ones that survive.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lntune.transforms import tir


def powers(size: int, below: int) -> list[int]:
    """The binary digits of `size` that are smaller than `below`, largest first: 40 -> [32, 8]."""
    return [
        1 << bit
        for bit in reversed(range(size.bit_length()))
        if size >> bit & 1 and 1 << bit < below
    ]


def floor_power(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def exact_vectors(sch: Any, loop: Any, width: int) -> Any:
    """Vectorize `loop` by `width`, its tail by falling powers of two; returns the loop over whole
    groups (or None).
    """
    extent = int(sch.get(loop).extent)
    width = min(width, floor_power(extent))
    whole = extent // width * width
    cuts = [whole, *powers(extent - whole, width)]
    parts = sch.loop_partition(loop, [*cuts[:-1], None]) if len(cuts) > 1 else [loop]
    groups = None
    if whole > width:
        groups, inner = sch.split(parts[0], [None, width])
        sch.vectorize(inner)
    else:
        sch.vectorize(parts[0])
    for part in parts[1:]:
        sch.vectorize(part)
    return groups


VECTORS = "lntune_vectors"
"""Loop annotation: the width of the vectors that split_vectors is to make of the blocks in this
loop.
"""


def split_vectors(mod: Any) -> Any:
    """The module with the loops annotated with VECTORS vectorized, as innermost loops, whatever
    loops are inside them; tails by falling powers of two.

    For loops that exact_vectors cannot have: over blocks that update what they read (a reduction
    whose init was taken out of the loop), which the schedule refuses to partition or vectorize, and
    loops that several blocks share.
    """
    from tvm import tirx

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    def leaf(realize: Any, loop: Any, start: Any, width: int) -> Any:
        """The block at `width` consecutive values of the loop's variable; only its bindings know of
        it.
        """
        lane = tirx.Var("lane", "int64")
        at = start + lane if width > 1 else start
        bound = [at if value.same_as(loop) else value for value in realize.iter_values]
        body = type(realize)(bound, realize.predicate, realize.block)
        return (
            tirx.For(lane, i64(0), i64(width), tirx.ForKind.VECTORIZED, body, None, {})
            if width > 1
            else body
        )

    def walk(stmt: Any, inside: tuple[Any, Any, int] | None) -> Any:
        name = type(stmt).__name__
        if name == "For" and VECTORS in stmt.annotations:
            extent = int(stmt.extent)
            width = min(int(stmt.annotations[VECTORS]), floor_power(extent))
            groups, parts = extent // width, []
            if groups > 1:
                group = tirx.Var("group", "int64")
                body = walk(stmt.body, (stmt.loop_var, group * i64(width), width))
                parts.append(
                    tirx.For(group, i64(0), i64(groups), tirx.ForKind.SERIAL, body, None, {})
                )
            else:
                parts.append(walk(stmt.body, (stmt.loop_var, i64(0), width)))
            start = groups * width
            for part in powers(extent - start, width):
                parts.append(walk(stmt.body, (stmt.loop_var, i64(start), part)))
                start += part
            return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]
        if name == "For":
            return tir.loop_with(stmt, walk(stmt.body, inside))
        if name == "SeqStmt":
            return tirx.SeqStmt([walk(s, inside) for s in stmt.seq])
        if name == "SBlockRealize" and inside:
            return leaf(stmt, *inside)
        if name == "SBlockRealize":
            block = tir.block_with(stmt.block, body=walk(stmt.block.body, None))
            return type(stmt)(stmt.iter_values, stmt.predicate, block)
        return stmt

    return tir.module_with(mod, walk(mod["main"].body, None))


def drop_predicates(mod: Any, kept: Collection[str]) -> Any:
    """The module with no predicates on stages but those named in `kept`.

    For rows shared among blocks of equally many groups: a definition that pads the rows to whole
    groups knows that every row of a stage is there, while s_tir, for which the number of groups is
    a symbol, guards each stage against rows beyond the last.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir import SBlockRealize

    always = tirx.IntImm("bool", 1)

    def unguarded(stage: Any) -> Any:
        return (
            stage
            if stage.block.name_hint in kept
            else type(stage)(stage.iter_values, always, stage.block)
        )

    return tir.module_with(
        mod, tvm_ffi.structural_map(mod["main"].body, [(SBlockRealize, unguarded)])
    )
