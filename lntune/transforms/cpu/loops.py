"""Loop transformations for row kernels that s_tir lacks or gets wrong.

All of them avoid predicates. A split that does not divide leaves a predicate on its block;
`reverse_compute_at` drops such a predicate without a word (the kernel then reads past the row), and
the vectorizer gives up on the ones that survive. Here a size is cut into whole groups and a tail of
falling powers of two, so every vector is full.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from lntune.ops.dtypes import sum_of
from lntune.ops.op import RowSum, Term, Total


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


def staged_sum(lanes: int) -> RowSum:
    """A row sum in `lanes` parallel accumulators, halved stage by stage; the RowSum of CPU
    schedules.

    Stage `{name}_lanes` sums whole groups, of all expressions in one loop; `{name}{j}_tree{w}` adds
    the halves of the j-th, and with them the part of the tail that has just this width. Long rows
    are summed in chunks that `{name}_folded` adds up (`{name}_rest` has the groups the chunks leave
    over): the error of a sum grows with the length of its chain, and for equal numbers it grows in
    one direction. One chain of dependent adds would be latency-bound; a single horizontal step
    after it would be `lanes` dependent adds again.
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

            made = te.compute(
                (rows, *lead, i64(width)), chunked if lead else flat, name=f"{name}_{suffix}"
            )
            return list(made) if several else [made]

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

        def halved(f: Term, before: list[Any], half: int, label: str) -> Any:
            def body(i: Any, lane: Any) -> Any:
                value = before[0][i, lane] + before[0][i, lane + i64(half)]
                for extra in before[1:]:
                    value = value + (extra[i, lane] + extra[i, lane + i64(half)])
                return value + f(i, lane + i64(tail[half])) if half in tail else value

            return te.compute((rows, i64(half)), body, name=f"{label}_tree{half}")

        def total_of(values: list[Any]) -> Total:
            return lambda i: sum((v[i, i64(0)] for v in values[1:]), values[0][i, i64(0)])

        totals = []
        for index, f in enumerate(expressions):
            values, half = [tensors[index] for tensors in (sums, rest) if tensors], width // 2
            while half:
                values = [halved(f, values, half, f"{name}{index}")]
                half //= 2
            totals.append(total_of(values))
        return totals

    return row_sum


def element_aligned(func: Any) -> Any:
    """The PrimFunc with its parameters' alignment lowered to one element.

    By default TVM promises LLVM 64-byte alignment of every argument and checks nothing; a view that
    starts elsewhere then dies of an aligned vector move. Unaligned moves of aligned data cost
    nothing on any CPU of the last ten years. TVM has no call for this, so the field is set in its
    JSON form.
    """
    import tvm
    from tvm_ffi import serialization

    graph = json.loads(tvm.ir.save_json(func))
    nodes = graph["nodes"]
    params = nodes[nodes[graph["root_index"]]["data"]["params"]]["data"]
    changed = 0
    for param in params:
        kind = nodes[nodes[param]["data"]["ty"]]
        if kind["type"] == "tirx.BufferType":
            kind["data"]["data_alignment"] = 2  # the smallest element of any dtype here
            changed += 1
    if not changed:
        raise RuntimeError("the JSON form of a PrimFunc changed: no buffer parameter found in it")
    # tvm.ir.load_json does the same eight times slower
    return serialization.from_json_graph_str(json.dumps(graph))


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


def vectorize_sums(
    sch: Any, blocks: Mapping[str, Any], depth: int, unroll: int, fetching: str | None
) -> None:
    """Give the stages of staged_sum, and scalars of a row, their form inside `depth` loops over
    groups of rows.

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


VECTORS = "lntune_vectors"
"""Loop annotation: the width of the vectors that split_vectors is to make of the blocks in this
loop.
"""


def split_vectors(mod: Any) -> Any:
    """Vectorize what is in the loops annotated with VECTORS, tails by falling powers of two;
    innermost, whatever is between.

    For loops that exact_vectors cannot have: over blocks that update what they read (a reduction
    whose init was taken out of the loop), which the schedule refuses to partition or vectorize, and
    loops that several blocks share.
    """
    import tvm
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
        made = type(realize)(bound, realize.predicate, realize.block)
        return (
            tirx.For(lane, i64(0), i64(width), tirx.ForKind.VECTORIZED, made, None, {})
            if width > 1
            else made
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
            return tirx.For(
                stmt.loop_var,
                stmt.min,
                stmt.extent,
                stmt.kind,
                walk(stmt.body, inside),
                stmt.thread_binding,
                dict(stmt.annotations),
            )
        if name == "SeqStmt":
            return tirx.SeqStmt([walk(s, inside) for s in stmt.seq])
        if name == "SBlockRealize" and inside:
            return leaf(stmt, *inside)
        if name == "SBlockRealize":
            b = stmt.block
            block = type(b)(
                b.iter_vars,
                b.reads,
                b.writes,
                b.name_hint,
                walk(b.body, None),
                b.init,
                b.alloc_buffers,
                b.match_buffers,
                b.annotations,
            )
            return type(stmt)(stmt.iter_values, stmt.predicate, block)
        return stmt

    func = mod["main"]
    return tvm.IRModule({"main": func.with_body(walk(func.body, None))})


def drop_predicates(mod: Any, kept: Collection[str]) -> Any:
    """Take the predicates from all stages but those named in `kept`.

    For rows shared among blocks, each of as many groups as there turn out to be: whoever pads the
    rows to whole groups knows that every row of a stage is there, and a schedule, for which the
    number of groups is a symbol, guards each stage against one that is not.
    """
    import tvm
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

    func = mod["main"]
    return tvm.IRModule(
        {"main": func.with_body(tvm_ffi.structural_map(func.body, [(SBlockRealize, unguarded)]))}
    )


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
    """Let the loop annotated with PREFETCH bring other rows into the cache while it sums, in groups
    of `together` rows.

    The outermost loop is over the groups; where they are `shared` it is over blocks, and the next
    is over the groups of a block.

    Hardware prefetchers stop at a page's end, and rows often are a page: each row then starts cold
    while its reduction has nothing to do; and the lines of an output are otherwise asked for one by
    one as they are stored to. Fetching past the last row is harmless; a prefetch never faults.
    """
    import tvm
    from tvm import tirx

    func = mod["main"]
    done = 0

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
        nonlocal done
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
                done += 1
                body = tirx.SeqStmt([*prefetches(around, inside), body])
            rest = {k: v for k, v in stmt.annotations.items() if k != PREFETCH}
            return (
                tirx.For(
                    stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, rest
                ),
                fetched or marked,
            )
        if name == "SeqStmt":
            made = [rebuild(s, outer, annotated) for s in stmt.seq]
            return tirx.SeqStmt([m for m, _ in made]), any(f for _, f in made)
        if name == "SBlockRealize":
            b = stmt.block
            body, fetched = rebuild(b.body, outer, annotated)
            block = type(b)(
                b.iter_vars,
                b.reads,
                b.writes,
                b.name_hint,
                body,
                b.init,
                b.alloc_buffers,
                b.match_buffers,
                b.annotations,
            )
            return type(stmt)(stmt.iter_values, stmt.predicate, block), fetched
        return stmt, False

    changed = func.with_body(rebuild(func.body, (), ())[0])
    if done != 1:
        raise RuntimeError(f"expected one loop annotated for prefetching, found {done}")
    return tvm.IRModule({"main": changed})


def plain_sum(rows: Any, hidden: int, expressions: Sequence[Term], name: str) -> list[Total]:
    """A row sum in one loop: the RowSum that says nothing about order, for reading a definition."""
    from tvm import te, tirx

    def one(f: Term, stage: str) -> Total:
        k = te.reduce_axis((0, tirx.IntImm("int64", hidden)), name="k")
        total = te.compute((rows,), lambda i: te.sum(f(i, k), axis=k), name=stage)
        return lambda i: total[i]

    return [one(f, f"{name}{index}") for index, f in enumerate(expressions)]
