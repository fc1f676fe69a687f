"""Loop transformations for row kernels that s_tir lacks or gets wrong.

All of them avoid predicates. A split that does not divide leaves a predicate on its block; `reverse_compute_at` drops such
a predicate without a word (the kernel then reads past the row), and the vectorizer gives up on the ones that survive.
Here a size is cut into whole groups and a tail of falling powers of two, so every vector is full.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from lntune.ops.op import RowSum, Term, Total


def powers(size: int, below: int) -> list[int]:
    """The binary digits of `size` that are smaller than `below`, largest first: 40 -> [32, 8]."""
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1 and 1 << bit < below]


def floor_power(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def staged_sum(lanes: int) -> RowSum:
    """A row sum in `lanes` parallel accumulators, halved stage by stage; the RowSum of CPU schedules.

    Stage `{name}_lanes` sums whole groups, of all expressions in one loop; `{name}{j}_tree{w}` adds the halves of the j-th,
    and with them the part of the tail that has just this width. One chain of dependent adds would be latency-bound; a single horizontal step after it would be
    `lanes` dependent adds again.
    """

    def row_sum(rows: Any, hidden: int, expressions: Sequence[Term], name: str) -> list[Total]:
        from tvm import te, tirx

        def i64(value: int) -> Any:
            return tirx.IntImm("int64", value)

        width = min(lanes, floor_power(hidden))
        groups = hidden // width
        tail: dict[int, int] = {}
        offset = groups * width
        for part in powers(hidden - offset, width):
            tail[part] = offset
            offset += part

        q = te.reduce_axis((0, i64(groups)), name=f"{name}_group")
        several = len(expressions) > 1

        def add(left: Any, right: Any) -> Any:
            """Elementwise sum; TE passes tuples when one reduction carries several values, plain expressions for one."""
            return tuple(a + b for a, b in zip(left, right, strict=True)) if several else left + right

        def zero(*dtypes: str) -> Any:
            return tuple(tirx.const(0.0, d) for d in dtypes) if several else tirx.const(0.0, dtypes[0])

        reducer = te.comm_reducer(add, zero, name="add")

        def lane_body(i: Any, lane: Any) -> Any:
            terms = tuple(f(i, q * i64(width) + lane) for f in expressions)
            return reducer(terms if several else terms[0], axis=q)

        lanes_of = te.compute((rows, i64(width)), lane_body, name=f"{name}_lanes")

        def halved(f: Term, before: Any, half: int, stage: str) -> Any:
            def body(i: Any, lane: Any) -> Any:
                value = before[i, lane] + before[i, lane + i64(half)]
                return value + f(i, lane + i64(tail[half])) if half in tail else value

            return te.compute((rows, i64(half)), body, name=f"{stage}_tree{half}")

        def total_of(values: Any) -> Total:
            return lambda i: values[i, i64(0)]

        totals = []
        for index, f in enumerate(expressions):
            values, half = lanes_of[index] if several else lanes_of, width // 2
            while half:
                values = halved(f, values, half, f"{name}{index}")
                half //= 2
            totals.append(total_of(values))
        return totals

    return row_sum


def element_aligned(func: Any) -> Any:
    """The PrimFunc with its parameters' alignment lowered to one element.

    By default TVM promises LLVM 64-byte alignment of every argument and checks nothing; a view that starts elsewhere then
    dies of an aligned vector move. Unaligned moves of aligned data cost nothing on any CPU of the last ten years. TVM has
    no call for this, so the field is set in its JSON form.
    """
    import tvm

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
    return tvm.ir.load_json(json.dumps(graph))


def exact_vectors(sch: Any, loop: Any, width: int) -> Any:
    """Vectorize `loop` by `width`, its tail by falling powers of two; returns the loop over whole groups (or None)."""
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


PREFETCH = "lntune_prefetch"
"""Loop annotation: the number of elements of a row that one step of the loop covers."""


class Prefetch(msgspec.Struct, frozen=True):
    """What the annotated loop fetches: its own part of the row `ahead` groups further on in the `parameter`-th argument,
    to be read or to be written."""

    parameter: int
    ahead: int
    write: bool
    itemsize: int


def prefetch_rows(mod: Any, fetches: Sequence[Prefetch], together: int, line: int = 64) -> Any:
    """Let the loop annotated with PREFETCH bring other rows into the cache while it sums, in groups of `together` rows.

    Hardware prefetchers stop at a page's end, and rows often are a page: each row then starts cold while its reduction
    has nothing to do; and the lines of an output are otherwise asked for one by one as they are stored to. Fetching past
    the last row is harmless; a prefetch never faults.
    """
    import tvm
    from tvm import tirx

    func = mod["main"]
    done = 0

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    def with_prefetch(loop: Any, group: Any) -> Any:
        step = int(loop.annotations[PREFETCH])
        calls = []
        for fetch in fetches:
            buffer = func.params[fetch.parameter]
            hidden = int(buffer.shape[-1])
            for side in range(together):
                row = (group + i64(fetch.ahead)) * i64(together) + i64(side)
                for offset in range(0, step, max(1, line // fetch.itemsize)):
                    # The address in bytes, not address_of(x[...]), which makes a buffer's address escape its legalization.
                    element = row * i64(hidden) + loop.loop_var * i64(step) + i64(offset)
                    place = tirx.handle_add_byte_offset(buffer.data, element * i64(fetch.itemsize))
                    flags = [tirx.IntImm("int32", v) for v in (int(fetch.write), 3, 1)]  # keep it in all levels, data
                    calls.append(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", place, *flags)))
        rest = {k: v for k, v in loop.annotations.items() if k != PREFETCH}
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, tirx.SeqStmt([*calls, loop.body]), loop.thread_binding, rest)

    def rebuild(stmt: Any, row: Any) -> Any:
        """A copy of the statement with the annotated loop changed; `row` is the outermost loop's variable."""
        nonlocal done
        name = type(stmt).__name__
        if name == "For":
            body = rebuild(stmt.body, row if row is not None else stmt.loop_var)
            loop = tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, stmt.annotations)
            if PREFETCH in stmt.annotations:
                done += 1
                return with_prefetch(loop, row)
            return loop
        if name == "SeqStmt":
            return tirx.SeqStmt([rebuild(s, row) for s in stmt.seq])
        if name == "SBlockRealize":
            b = stmt.block
            block = type(b)(b.iter_vars, b.reads, b.writes, b.name_hint, rebuild(b.body, row), b.init, b.alloc_buffers, b.match_buffers, b.annotations)
            return type(stmt)(stmt.iter_values, stmt.predicate, block)
        return stmt

    changed = func.with_body(rebuild(func.body, None))
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
