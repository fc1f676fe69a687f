"""Sums over a row in CPU kernels: in the lanes of several vectors at once, which are then halved
step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lntune.ops.dtypes import sum_of
from lntune.ops.op import RowSum, Term, Total
from lntune.transforms.cpu.prefetch import PREFETCH
from lntune.transforms.cpu.vectors import floor_power, powers

CHUNK = 64
"""Longest chain of adds into one accumulator. Up to here float32 loses about two bits at worst;
rows of 65,536 in one chain would lose ten."""


def chains(hidden: int, lanes: int) -> tuple[int, int, int]:
    """How staged_sum cuts a row: (lanes, at most those asked for; chunks; adds in each chunk's
    chain).
    """
    width = min(lanes, floor_power(hidden))
    groups = hidden // width
    chunks = -(-groups // CHUNK)
    return width, chunks, groups // chunks


def staged_sum(lanes: int, terms: int = 1) -> RowSum:
    """A row sum in `lanes` parallel accumulators, halved stage by stage; the RowSum of CPU
    schedules. So many `terms` in a row have one total.

    Stage `{name}_lanes` sums whole groups, of all expressions in one loop; `{name}{j}_tree{w}` adds
    the halves of the j-th total, and with them the part of the tail that has just this width. Long
    rows are summed in chunks that `{name}_folded` adds up (`{name}_rest` has the groups the chunks
    leave over): the error of a sum grows with the length of its chain, and for equal numbers it
    grows in one direction. One chain of dependent adds would be latency-bound; a single horizontal
    step after it would be `lanes` dependent adds again.
    """

    def row_sum(rows: Any, hidden: int, expressions: Sequence[Term], name: str) -> list[Total]:
        from tvm import te, tirx

        def i64(value: int) -> Any:
            return tirx.IntImm("int64", value)

        width, chunks, each = chains(hidden, lanes)
        groups = hidden // width
        left = groups - chunks * each
        tail: dict[int, int] = {}
        offset = groups * width
        for part in powers(hidden - offset, width):
            tail[part] = offset
            offset += part

        several = len(expressions) > 1

        reducer = sum_of(len(expressions))

        def stage(
            suffix: str, count: int, lead: tuple[Any, ...], term: Callable[..., Any]
        ) -> list[Any]:
            """Sums of term(j, *lead indices, lane) over j < count, one tensor for each
            expression.
            """
            j = te.reduce_axis((0, i64(count)), name=f"{name}_{suffix}")

            def flat(i: Any, lane: Any) -> Any:
                return reducer(term(j, i, lane) if several else term(j, i, lane)[0], axis=j)

            def chunked(i: Any, chunk: Any, lane: Any) -> Any:
                return reducer(
                    term(j, i, chunk, lane) if several else term(j, i, chunk, lane)[0], axis=j
                )

            sums = te.compute(
                (rows, *lead, i64(width)), chunked if lead else flat, name=f"{name}_{suffix}"
            )
            return list(sums) if several else [sums]

        def at(start: Any, i: Any, lane: Any) -> tuple[Any, ...]:
            return tuple(f(i, start * i64(width) + lane) for f in expressions)

        if chunks == 1:
            sums = stage("lanes", groups, (), at)
        else:
            parts = stage(
                "lanes", each, (i64(chunks),), lambda j, i, c, lane: at(c * i64(each) + j, i, lane)
            )
            sums = stage(
                "folded", chunks, (), lambda j, i, lane: tuple(p[i, j, lane] for p in parts)
            )
        rest = (
            stage("rest", left, (), lambda j, i, lane: at(i64(chunks * each) + j, i, lane))
            if left
            else []
        )

        def halved(added: Sequence[Term], before: list[Any], half: int, label: str) -> Any:
            def body(i: Any, lane: Any) -> Any:
                value = before[0][i, lane] + before[0][i, lane + i64(half)]
                for extra in before[1:]:
                    value = value + (extra[i, lane] + extra[i, lane + i64(half)])
                for f in added if half in tail else ():
                    value = value + f(i, lane + i64(tail[half]))
                return value

            return te.compute((rows, i64(half)), body, name=f"{label}_tree{half}")

        def total_of(values: list[Any]) -> Total:
            return lambda i: sum((v[i, i64(0)] for v in values[1:]), values[0][i, i64(0)])

        totals = []
        for index in range(len(expressions) // terms):
            own = slice(index * terms, (index + 1) * terms)
            values, half = [one for tensors in (sums, rest) for one in tensors[own]], width // 2
            while half:
                values = [halved(expressions[own], values, half, f"{name}{index}")]
                half //= 2
            totals.append(total_of(values))
        return totals

    return row_sum


def vectorize_sums(
    sch: Any, blocks: Mapping[str, Any], depth: int, unroll: int, fetching: str | None
) -> None:
    """Vectorize and unroll the stages of staged_sum, and scalars of a row, inside `depth` loops
    over groups of rows.

    Groups of lanes outside, the rows of a group side by side, lanes inside as one wide vector that
    LLVM keeps in registers. `unroll` steps make one iteration; the stage named `fetching` is
    annotated for prefetch_rows.
    """
    for name, block in blocks.items():
        side, *inner = sch.get_loops(block)[depth:]
        if name.endswith(("_lanes", "_folded", "_rest")):
            *chunk, lane, step = inner
            sch.reorder(*chunk, step, side, lane)
            sch.vectorize(lane)
            sch.unroll(side)
            width = int(sch.get(lane).extent)
            whole = width * int(sch.get(step).extent)
            if unroll > 1 and name.endswith("_lanes"):
                step, steps = sch.split(step, [None, unroll])
                sch.unroll(steps)
                width *= unroll
            if name == fetching:  # after the split, which refuses annotated loops
                sch.annotate(step, PREFETCH, width)
                if chunk:
                    sch.annotate(chunk[0], PREFETCH, whole)
            init = sch.get_loops(sch.decompose_reduction(block, step))
            sch.unroll(init[-2])
            sch.vectorize(init[-1])
        else:
            sch.unroll(side)
            if "_tree" in name:
                sch.vectorize(inner[0])


def plain_sum(rows: Any, hidden: int, expressions: Sequence[Term], name: str) -> list[Total]:
    """A row sum in one loop: the RowSum that says nothing about order, for reading a definition."""
    from tvm import te, tirx

    def one(f: Term, stage: str) -> Total:
        k = te.reduce_axis((0, tirx.IntImm("int64", hidden)), name="k")
        total = te.compute((rows,), lambda i: te.sum(f(i, k), axis=k), name=stage)
        return lambda i: total[i]

    return [one(f, f"{name}{index}") for index, f in enumerate(expressions)]
