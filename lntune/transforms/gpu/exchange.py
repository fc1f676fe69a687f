"""Sums exchanged between the warps that share a row with one barrier, where TVM has two.

TVM 0.27 has every warp leave its part in shared memory, the first warp add the parts up and leave
the total there, and everybody read it: a barrier after each half. Here every warp adds the parts up
for itself, in the same order and so to the same bits, and nobody waits a second time. That costs
the other warps log2(warps) shuffles a sum. Barriers are most of what a block waits for where it has
a multiprocessor to itself, or a row is all there is to do.

Why one barrier is enough: parts lie in two places by turns. A thread that writes to a place has
passed the barrier of the exchange before, which all threads reached only after they had read that
place in the exchange before that; a barrier also orders what was read and written around it. No
shuffle is relied on to order memory, and the warps are whole: schedules have blocks of a multiple
of 32 threads, and no thread leaves before the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lntune.transforms import tir

ATTRIBUTE = "lntune_one_barrier"
"""Attribute of a scheduled PrimFunc whose kernels exchange sums with one barrier."""
WARP = 32
_ALL_LANES = 0xFFFFFFFF


def request(mod: Any) -> Any:
    """The scheduled IRModule whose kernels exchange sums with one barrier when it is compiled."""
    return type(mod)(
        {name: func.with_attr(ATTRIBUTE, True) for name, func in mod.functions_items()}
    )


@dataclass(frozen=True)
class _Place:
    """What is around a statement of a kernel: the threads of a block by tag ("threadIdx.x") as
    variable and number, the loops that are loops when the kernel runs, and whether a condition is.
    """

    threads: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    loops: tuple[Any, ...] = ()
    conditional: bool = False


@dataclass(frozen=True)
class _Sum:
    """A sum over threads: what each thread adds of each value, where the totals go, and its
    place.
    """

    values: tuple[Any, ...]
    totals: tuple[Any, ...]
    place: _Place

    @property
    def warps(self) -> int:
        """Warps that share a row."""
        return int(self.place.threads["threadIdx.x"][1]) // WARP

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return int(self.place.threads.get("threadIdx.y", (None, 1))[1])


Change = Callable[[Any, _Place], Any]


def with_one_barrier(func: Any) -> Any:
    """The PrimFunc, before TVM lowers sums over threads, with those that its kernels exchange
    between warps lowered to one barrier each; others are left to TVM.

    Where sums are exchanged in a loop, all of a kernel are to be in the same one, which all threads
    go through as often; otherwise they are left, too.
    """
    return func.with_body(_rebuilt(func.body, _Place(), lambda statement, _: statement))


def _rebuilt(statement: Any, place: _Place, change: Change) -> Any:
    """A statement with sums over threads changed; a kernel is changed as one."""
    from tvm import tirx

    if isinstance(statement, tirx.AttrStmt):
        key = str(statement.attr_key)
        if key == "reduce_scope":
            return change(statement, place)
        if key == "thread_extent":
            if not place.threads:
                return _kernel(statement)
            place = _with_threads(place, statement)
        body = _rebuilt(statement.body, place, change)
        return tirx.AttrStmt(statement.node, key, statement.value, body)
    if isinstance(statement, tirx.SeqStmt):
        return _sequence([_rebuilt(part, place, change) for part in statement.seq])
    if isinstance(statement, tirx.For):
        inner = replace(place, loops=(*place.loops, statement.loop_var))
        return tir.loop_with(statement, _rebuilt(statement.body, inner, change))
    if isinstance(statement, tirx.IfThenElse):
        inner = replace(place, conditional=True)
        other = statement.else_case
        return tirx.IfThenElse(
            statement.condition,
            _rebuilt(statement.then_case, inner, change),
            None if other is None else _rebuilt(other, inner, change),
        )
    return statement


def _sequence(parts: list[Any]) -> Any:
    """Statements one after another, those of sequences among them for themselves."""
    from tvm import tirx

    flat = []
    for part in parts:
        flat += list(part.seq) if isinstance(part, tirx.SeqStmt) else [part]
    return tirx.SeqStmt(flat) if len(flat) > 1 else flat[0]


def _with_threads(place: _Place, statement: Any) -> _Place:
    tag = str(statement.node.thread_tag)
    return replace(place, threads={**place.threads, tag: (statement.node.var, statement.value)})


def _kernel(statement: Any) -> Any:
    """A kernel, which begins with the statement, with its sums over warps changed."""
    from tvm import tirx

    first = _with_threads(_Place(), statement)
    found: list[_Sum] = []

    def collect(one: Any, place: _Place) -> Any:
        if (summed := _between_warps(one, place)) is not None:
            found.append(summed)
        return one

    _rebuilt(statement.body, first, collect)
    if not found or len({one.place.loops for one in found}) > 1 or len(found[0].place.loops) > 1:
        return statement
    size = max(len(one.values) * one.warps * one.rows for one in found)
    parts = tirx.decl_buffer((2 * size,), "float32", name="warp_sums", scope="shared")
    done = 0

    def exchanged(one: Any, place: _Place) -> Any:
        nonlocal done
        summed = _between_warps(one, place)
        if summed is None:
            return one
        turn = tirx.const(done % 2, "int32")
        if place.loops and len(found) % 2:  # the last of a turn has the place of the next's first
            turn = (turn + tirx.Cast("int32", place.loops[0])) & 1
        done += 1
        return _exchange(summed, parts, turn * size)

    body = _rebuilt(statement.body, first, exchanged)
    return tirx.AttrStmt(
        statement.node,
        statement.attr_key,
        statement.value,
        _sequence([tirx.AllocBuffer(parts), body]),
    )


def _between_warps(statement: Any, place: _Place) -> _Sum | None:
    """The sum over threads that a statement is, where these are more than a warp of threadIdx.x
    and all of a block come to it; else None.
    """
    from tvm import tirx

    if "threadIdx.x" not in place.threads or place.conditional:
        return None
    reducer, call = statement.node, statement.body.value
    count = int(call.args[0])
    values, (always, *rest) = call.args[1 : 1 + count], call.args[1 + count :]
    totals, over = rest[:count], rest[count:]
    variable, number = place.threads["threadIdx.x"]
    adds = all(
        isinstance(result, tirx.Add) and result.a.same_as(left) and result.b.same_as(right)
        for result, left, right in zip(reducer.result, reducer.lhs, reducer.rhs, strict=True)
    )
    fits = (
        adds
        and [axis.same_as(variable) for axis in over] == [True]
        and isinstance(always, tirx.IntImm)
        and int(always) == 1
        and all(str(value.ty) == "float32" for value in values)
        and int(number) in (64, 128, 256, 512, 1024)
    )
    return _Sum(tuple(values), tuple(totals), place) if fits else None


def _exchange(summed: _Sum, parts: Any, begin: Any) -> Any:
    """The statements of a sum; `begin` is where its parts lie in the buffer `parts`."""
    from tvm import tirx

    x, y = (
        tirx.Cast("int32", found[0]) if (found := summed.place.threads.get(tag)) else 0
        for tag in ("threadIdx.x", "threadIdx.y")
    )
    warps, totals = summed.warps, summed.totals
    mask = tirx.const(_ALL_LANES, "uint32")

    def set_to(total: Any, value: Any) -> Any:
        return tirx.BufferStore(total.source, value, total.indices)

    def among_lanes(lanes: int) -> list[Any]:
        # all lanes come to the same bits: a pair adds the same two numbers
        return [
            set_to(
                total, total + tirx.op.tvm_warp_shuffle_xor(mask, total, lanes >> step, WARP, WARP)
            )
            for step in range(1, lanes.bit_length())
            for total in totals
        ]

    def place(number: int, warp: Any) -> list[Any]:
        return [begin + (y * len(totals) + number) * warps + warp]

    own = [
        tirx.BufferStore(parts, total, place(number, x // WARP))
        for number, total in enumerate(totals)
    ]
    return _sequence(
        [
            *(set_to(t, value) for t, value in zip(totals, summed.values, strict=True)),
            *among_lanes(WARP),
            tirx.IfThenElse(tirx.EQ(x % WARP, 0), _sequence(own), None),
            tirx.Evaluate(tirx.op.tvm_storage_sync("shared")),
            *(
                set_to(t, tirx.BufferLoad(parts, place(number, x % warps)))
                for number, t in enumerate(totals)
            ),
            *among_lanes(warps),
        ]
    )
