"""A row's stages fused into one loop over a thread's vectors: a loop for each phase, which is what
lies between one sum over threads and the next.

Schedules compute stage after stage, each for all vectors of a thread, which is what s_tir can say;
a thread then holds all of a stage's results before the next stage begins. Here a vector goes
through all stages of its phase before the next vector does; what a later phase needs is kept, or
computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune.transforms import tir

_VECTORS = "_0_0"
"""In the names of loops over a thread's vectors, which come from two splits in threads.py."""


@dataclass
class _Stage:
    """A statement of a row without its loop over vectors (`looped`: it had one), what it reads and
    writes, whether threads exchange sums in it, and its phase.
    """

    statement: Any
    looped: bool
    reads: list[Any]
    writes: list[Any]
    exchange: bool = False
    phase: int = 0


def fuse(mod: Any, annotation: str) -> Any:
    """The module with the body of the loop that has this annotation fused, phase by phase.

    Code and registers are those of one vector, however long the row: what a later phase needs of
    registers is computed again there, from what is in shared and global memory.
    """
    import tvm_ffi
    from tvm import s_tir, tirx

    mod = s_tir.transform.LowerCrossThreadReduction()(mod)
    allocated: list[Any] = []

    def fused(loop: Any, mutator: Any) -> Any:
        if annotation not in loop.annotations:
            return mutator.default_mutate(loop)
        return tir.loop_with(loop, tirx.SeqStmt(_in_phases(list(loop.body.seq), allocated)))

    body = tvm_ffi.structural_mutate(mod["main"].body, [(tirx.For, fused)])
    root = tir.block_with(body.block, alloc_buffers=[*body.block.alloc_buffers, *allocated])
    return tir.module_with(mod, type(body)(body.iter_values, body.predicate, root))


def _in_phases(statements: list[Any], allocated: list[Any]) -> list[Any]:
    """The statements of a row, phase by phase; buffers to be allocated are added to `allocated`."""
    import tvm

    vector = tvm.ir.Var("access", "int64")
    single = [_of_one_vector(part, vector) for s in statements for part in _parts(s)]
    count = next(extent for _, extent in single if extent is not None)
    stages = [_stage(statement, extent is not None) for statement, extent in single]
    phase_of: dict[Any, int] = {}
    for stage in stages:
        stage.phase = max(
            (phase_of.get(buffer, 0) for buffer in (*stage.reads, *stage.writes)), default=0
        )
        phase_of |= dict.fromkeys(stage.writes, stage.phase + stage.exchange)
    ordered: list[Any] = []
    for phase in range(max(stage.phase for stage in stages) + 1):
        current = [stage for stage in stages if stage.phase == phase]
        looped = [s for s in current if s.looped]
        ordered += [s.statement for s in current if not s.exchange and not s.looped]
        if looped:
            ordered.append(_loop(vector, count, _recomputed(stages, looped, phase, allocated)))
        ordered += [s.statement for s in current if s.exchange]
    return ordered


def _parts(statement: Any) -> list[Any]:
    """A sum over threads as its parts, the loop over threads innermost around each; anything else
    as it is.
    """
    from tvm import tirx

    def wrapped(part: Any, thread: Any) -> Any:
        if isinstance(part, tirx.For) and _VECTORS not in str(part.loop_var.name):
            return tir.loop_with(part, wrapped(part.body, thread))
        return (
            tir.loop_with(part, tir.loop_with(thread, part.body))
            if isinstance(part, tirx.For)
            else tir.loop_with(thread, part)
        )

    if (
        isinstance(statement, tirx.For)
        and statement.thread_binding is not None
        and isinstance(statement.body, tirx.SeqStmt)
    ):
        return [wrapped(part, statement) for part in statement.body.seq]
    return [statement]


def _of_one_vector(statement: Any, vector: Any) -> tuple[Any, Any]:
    """(the statement for the vector of that number alone, how many there were); None for the number
    where it has no loop over vectors.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    extents: list[Any] = []

    def take_out(loop: Any, mutator: Any) -> Any:
        if _VECTORS not in str(loop.loop_var.name) or extents or loop.thread_binding is not None:
            return mutator.default_mutate(loop)
        extents.append(loop.extent)
        return tvm_ffi.structural_map(
            loop.body, [(tvm.ir.Var, lambda v: vector if v.same_as(loop.loop_var) else v)]
        )

    changed = tvm_ffi.structural_mutate(statement, [(tirx.For, take_out)])
    return changed, extents[0] if extents else None


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


def _recomputed(
    stages: list[_Stage], looped: list[_Stage], phase: int, allocated: list[Any]
) -> list[Any]:
    """The statements of a phase's loop, before them those of earlier phases' loops whose registers
    they read, which compute these again, in registers of their own.
    """
    writers = {
        w: s
        for s in stages
        if s.looped and s.phase < phase
        for w in s.writes
        if tir.scope(w) == "local"
    }
    needed: list[_Stage] = []
    left = list(looped)
    while left:
        for read in left.pop().reads:
            if read in writers and writers[read] not in needed:
                needed.append(writers[read])
                left.append(writers[read])
    if not needed:
        return [s.statement for s in looped]
    copies = {w: tir.variable_like(w) for s in needed for w in s.writes}
    allocated.extend(copies.values())
    earlier = [s.statement for s in stages if s in needed]
    return [
        tir.with_variables(tir.with_own_variables(statement), copies) for statement in earlier
    ] + [tir.with_variables(s.statement, copies) for s in looped]


def _loop(vector: Any, count: Any, statements: list[Any]) -> Any:
    """A loop over `count` vectors of statements for the vector `vector`."""
    from tvm import tirx

    own = tir.variable_like(vector)
    body = [tir.with_variables(s, {vector: own}) for s in statements]
    return tirx.For(
        own,
        tirx.IntImm("int64", 0),
        count,
        tirx.ForKind.SERIAL,
        tirx.SeqStmt(body) if len(body) > 1 else body[0],
    )
