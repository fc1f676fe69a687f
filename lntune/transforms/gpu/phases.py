"""A row's stages access by access: what is between two sums over threads, its phases, becomes one
loop over a thread's accesses each.

Schedules make stage after stage, each for all accesses of a thread, which is what TVM can say. That
has a thread hold all of a stage before the next begins. Here an access goes through all stages of
its phase before the next access; what a later phase needs is kept, or made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune.transforms.gpu import threads

_ACCESSES = "_0_0"
"""In the names of loops over a thread's accesses, from threads.one_by_one and threads.copy."""


@dataclass
class _Stage:
    """A statement of a row, with the loop over accesses taken out, and the phase it belongs to."""

    statement: Any
    looped: bool
    reads: list[Any]
    writes: list[Any]
    exchange: bool = False
    phase: int = 0


def by_access(mod: Any, annotation: str) -> Any:
    """The module with the body of the loop that is annotated so in phases.

    Code and registers are those of one access, however long the row: what a later phase needs of
    registers is made again there, from what is in shared memory and in memory.
    """
    import tvm
    import tvm_ffi
    from tvm import s_tir, tirx

    func = s_tir.transform.LowerCrossThreadReduction()(mod)["main"]
    new: list[Any] = []

    def ordered(loop: Any, mutator: Any) -> Any:
        if annotation not in loop.annotations:
            return mutator.default_mutate(loop)
        body = tirx.SeqStmt(_in_phases(list(loop.body.seq), new))
        return threads.like(loop, body)

    body = tvm_ffi.structural_mutate(func.body, [(tirx.For, ordered)])
    root = body.block
    rest = (
        root.name_hint,
        root.body,
        root.init,
        [*root.alloc_buffers, *new],
        root.match_buffers,
        root.annotations,
    )
    whole = type(root)(root.iter_vars, root.reads, root.writes, *rest)
    return tvm.IRModule(
        {"main": func.with_body(type(body)(body.iter_values, body.predicate, whole))}
    )


def _in_phases(statements: list[Any], new: list[Any]) -> list[Any]:
    """The statements in phases; `new` gets buffers to be allocated."""
    import tvm

    t = tvm.ir.Var("access", "int64")
    taken = [_taken_out(part, t) for statement in statements for part in _parts(statement)]
    count = next(extent for _, extent in taken if extent is not None)
    stages = [_stage(statement, extent is not None) for statement, extent in taken]
    known: dict[Any, int] = {}
    for stage in stages:
        stage.phase = max(
            (known.get(buffer, 0) for buffer in (*stage.reads, *stage.writes)), default=0
        )
        known |= dict.fromkeys(stage.writes, stage.phase + stage.exchange)
    made: list[Any] = []
    for phase in range(max(stage.phase for stage in stages) + 1):
        its = [stage for stage in stages if stage.phase == phase]
        inside = [s for s in its if s.looped]
        made += [s.statement for s in its if not s.exchange and not s.looped]
        made += [_loop(t, count, _made_again(stages, inside, phase, new))] if inside else []
        made += [s.statement for s in its if s.exchange]
    return made


def _parts(statement: Any) -> list[Any]:
    """A sum over threads as its parts, the loop over threads innermost around each; anything else
    as it is.
    """
    from tvm import tirx

    def wrapped(part: Any, thread: Any) -> Any:
        if isinstance(part, tirx.For) and _ACCESSES not in str(part.loop_var.name):
            return threads.like(part, wrapped(part.body, thread))
        return (
            threads.like(part, threads.like(thread, part.body))
            if isinstance(part, tirx.For)
            else threads.like(thread, part)
        )

    if (
        isinstance(statement, tirx.For)
        and statement.thread_binding is not None
        and isinstance(statement.body, tirx.SeqStmt)
    ):
        return [wrapped(part, statement) for part in statement.body.seq]
    return [statement]


def _taken_out(statement: Any, t: Any) -> tuple[Any, Any]:
    """The statement for access `t` alone, and how many there were; None where it has no loop over
    accesses.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    found: list[Any] = []

    def take(loop: Any, mutator: Any) -> Any:
        if _ACCESSES not in str(loop.loop_var.name) or found or loop.thread_binding is not None:
            return mutator.default_mutate(loop)
        found.append(loop.extent)
        return tvm_ffi.structural_map(
            loop.body, [(tvm.ir.Var, lambda v: t if v.same_as(loop.loop_var) else v)]
        )

    made = tvm_ffi.structural_mutate(statement, [(tirx.For, take)])
    return made, found[0] if found else None


def _stage(statement: Any, looped: bool) -> _Stage:
    import tvm_ffi
    from tvm.s_tir.stmt import SBlock

    reads: list[Any] = []
    writes: list[Any] = []
    names: list[str] = []

    def visit(block: Any) -> None:
        reads.extend(r.source for r in block.reads if r.source not in reads)
        writes.extend(w.source for w in block.writes if w.source not in writes)
        names.append(str(block.name_hint))

    tvm_ffi.structural_walk(statement, [(SBlock, visit)])
    return _Stage(
        statement,
        looped,
        reads,
        writes,
        any(name.endswith(("_cross_thread", "_write_back")) for name in names),
    )


def _made_again(
    stages: list[_Stage], inside: list[_Stage], phase: int, new: list[Any]
) -> list[Any]:
    """The statements of a phase's loop, before them those of earlier phases' loops whose registers
    they read, in registers of their own.
    """
    makers = {
        w: s
        for s in stages
        if s.looped and s.phase < phase
        for w in s.writes
        if threads.scope(w) == "local"
    }
    needed: list[_Stage] = []
    left = list(inside)
    while left:
        for read in left.pop().reads:
            if read in makers and makers[read] not in needed:
                needed.append(makers[read])
                left.append(makers[read])
    if not needed:
        return [s.statement for s in inside]
    renewed = {w: _renewed(w) for s in needed for w in s.writes}
    new.extend(renewed.values())
    again = [s.statement for s in stages if s in needed]
    return [_with(renewed, _fresh(statement)) for statement in again] + [
        _with(renewed, s.statement) for s in inside
    ]


def _with(renewed: dict[Any, Any], statement: Any) -> Any:
    import tvm
    import tvm_ffi

    return tvm_ffi.structural_map(statement, [(tvm.ir.Var, lambda v: renewed.get(v, v))])


def _fresh(statement: Any) -> Any:
    """A copy with loop variables of its own."""
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    own: dict[Any, Any] = {}

    def loop_of(loop: Any) -> None:
        own[loop.loop_var] = _renewed(loop.loop_var)

    def axes_of(block: Any) -> None:
        own.update({axis.var: _renewed(axis.var) for axis in block.iter_vars})

    tvm_ffi.structural_walk(statement, [(tirx.For, loop_of), (SBlock, axes_of)])
    return _with(own, statement)


def _renewed(var: Any) -> Any:
    import tvm

    return tvm.ir.Var(str(var.name), var.ty)


def _loop(t: Any, count: Any, statements: list[Any]) -> Any:
    from tvm import tirx

    own = _renewed(t)
    its = [_with({t: own}, s) for s in statements]
    return tirx.For(
        own,
        tirx.IntImm("int64", 0),
        count,
        tirx.ForKind.SERIAL,
        tirx.SeqStmt(its) if len(its) > 1 else its[0],
    )
