"""MetaSchedule's design space of an operator's definition, and the kernel that a choice out of it
stands for.

MetaSchedule asks for shapes that are known, so the space is that of the definition at the typical
rows of the case's bucket. What a choice does to the loops of that twin is done to the definition
with any number of rows: MetaSchedule tiles rows in none of these operators, so that both have the
same loops. A choice of which that is not so does not fit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.errors import ToolchainError, UnfitError, gist
from lntune.ops.dtypes import sum_of
from lntune.ops.op import RowSum, Term, Total
from lntune.transforms import tir
from lntune.transforms.cpu import alignment, row_sums
from lntune.transforms.metaschedule.decisions import Choice, Decision

SUMS = ("lanes", "plain")
"""How the definition sums rows: in vector lanes that are halved stage by stage, as lntune's own
schedules do, or in one loop, as a definition that says nothing of the order.
"""
VECTORS = 4
"""Vectors of lanes that sum side by side."""
_INTRINSICS = "tvm.s_tir.tensor_intrin"
_TILE = "SamplePerfectTile"
_LAST_RULE = "RandomComputeLocation"


def meta_schedule() -> Any:
    """TVM's module of it.

    Raises:
        ToolchainError: the TVM that is here has none.
    """
    try:
        from tvm.s_tir import meta_schedule
    except ImportError as e:
        raise ToolchainError(
            f"TVM's MetaSchedule cannot be imported: {e}. This build of TVM has none, or it has"
            " another name there; tune other schedules, or install apache-tvm 0.27."
        ) from e
    return meta_schedule


@contextlib.contextmanager
def _without_intrinsics() -> Iterator[None]:
    """A tuning context imports all of TVM's tensor intrinsics, which takes a minute of parsing; no
    rule that is used here asks for one.
    """
    known = _INTRINSICS in sys.modules
    sys.modules.setdefault(_INTRINSICS, types.ModuleType(_INTRINSICS))
    try:
        yield
    finally:
        if not known:
            del sys.modules[_INTRINSICS]


def _in_one_loop(rows: Any, hidden: int, terms: Sequence[Term], name: str) -> list[Total]:
    """A RowSum that says nothing about the order: all terms in one loop over the row."""
    from tvm import te, tirx

    k = te.reduce_axis((0, tirx.IntImm("int64", hidden)), name="k")
    add = sum_of(len(terms))

    def total(i: Any) -> Any:
        values = tuple(term(i, k) for term in terms)
        return add(values if len(values) > 1 else values[0], axis=k)

    totals = te.compute((rows,), total, name=name)
    return [
        functools.partial(lambda one, i: one[i], one)
        for one in (totals if len(terms) > 1 else [totals])
    ]


def _row_sum(sums: str, device: Device) -> RowSum:
    if sums == "plain":
        return _in_one_loop
    return row_sums.staged_sum(VECTORS * device.vector_bytes // 4)


class Space:
    """The space of a case and a way to sum. `kept` are the stages of the definition that are not
    inlined, where an expression would become so large that TVM takes minutes for it; `blocks` of
    rows have sums over rows of their own, where the operator has such.

    Raises:
        ToolchainError: there is no MetaSchedule.
    """

    def __init__(
        self, case: Case, sums: str, device: Device, kept: Sequence[str], blocks: int | None
    ) -> None:
        more = {} if blocks is None else {"blocks": blocks, "contiguous": True}
        self.definition = ops.get(case.op).define(case, _row_sum(sums, device), **more)
        self.cores = device.cores
        self._shared = blocks is not None
        self.twin = _kept(_twin(self.definition, case.typical.rows), kept)
        ms = meta_schedule()
        # LLVM's rules are those of every CPU: what TVM has besides for some is for integers
        rules = ms.schedule_rule.ScheduleRule.create("llvm")
        self._generator = ms.space_generator.PostOrderApply(
            sch_rules=[rule for rule in rules if type(rule).__name__ != _LAST_RULE],
            postprocs="llvm",
            mutator_probs="llvm",
        )
        self._last = next(rule for rule in rules if type(rule).__name__ == _LAST_RULE)
        self.context = self.tuning(None, 1)
        self._begun = list(self.context.generate_design_space())
        self._stages = _blocks(self.twin)
        self._sketches: dict[int, Any] = {}
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """How many sketches there are."""
        return len(self._begun)

    def sketch(self, number: int) -> Any:
        """One of the sketches, as a schedule of TVM's whose decisions are still to be made. The
        last of the rules, by which a sketch takes longest, is applied to those that are asked for.
        """
        if number not in self._sketches:
            schedule = self._begun[number].copy()
            for name in reversed(self._stages):
                with contextlib.suppress(Exception):  # it was inlined
                    block = schedule.get_sblock(name)
                    (schedule,) = self._last.apply(schedule, block)
            self._sketches[number] = schedule
            self._numbers[_instructions(schedule.trace.simplified(True))] = number
        return self._sketches[number]

    def fits(self, number: int) -> bool:
        """Whether a sketch can be done to any number of rows, as far as decisions do not matter:
        not where it sums rows in parts of a fixed number.
        """
        if not self._shared:
            return True
        choice = self.choice(self.sketch(number).trace)
        try:
            self.module(choice)
        except UnfitError:
            return False
        return choice is not None

    def tuning(self, strategy: Any, seed: int) -> Any:
        """A tuning context of TVM's for the twin, with a search strategy or none."""
        import tvm

        target = tvm.target.Target({"kind": "llvm", "num-cores": self.cores})
        with _without_intrinsics():
            return meta_schedule().TuneContext(
                mod=self.twin,
                target=target,
                space_generator=self._generator.clone(),
                search_strategy=strategy,
                num_threads=1,  # several take seeds as they come, and no two runs agree
                rand_state=seed,
            )

    def choice(self, trace: Any) -> Choice | None:
        """The choice that one of TVM's traces stands for; None where it is of no sketch here."""
        trace = trace.simplified(True)
        number = self._numbers.get(_instructions(trace))
        return None if number is None else Choice(number, _decisions(trace))

    def replayed(self, choice: Choice) -> Any:
        """The schedule of the twin that a choice stands for, after MetaSchedule's postprocessors.

        Raises:
            UnfitError: the space has no such sketch, or the sketch does not take the decisions.
        """
        from tvm import s_tir

        trace = self._decided(choice)
        schedule = s_tir.Schedule(self.twin)
        try:
            trace.apply_to_schedule(schedule, remove_postproc=True)
        except Exception as e:
            raise _unfit(choice, gist(e)) from e
        taken = _decisions(schedule.trace.simplified(True))
        if taken != choice.decisions:  # TVM mends decisions that cannot be
            raise _unfit(choice, f"the sketch takes {Choice(choice.sketch, taken)} instead")
        for processor in self.context.space_generator.postprocs:
            if not processor.apply(schedule):
                raise _unfit(choice, f"{type(processor).__name__} refuses what comes of it")
        return schedule

    def module(self, choice: Choice | None) -> Any:
        """The IRModule of a choice, for any number of rows; of None the definition as it is.

        Raises:
            UnfitError: as replayed, or it cannot be done to any number of rows.
        """
        from tvm import s_tir

        if choice is None:
            return s_tir.Schedule(alignment.element_aligned(self.definition)).mod
        trace = self.replayed(choice).trace
        tiled: set[Any] = set()
        while True:
            schedule = s_tir.Schedule(alignment.element_aligned(self.definition))
            asking: list[Any] = []

            def note(
                instruction: Any, inputs: Any, attrs: Any, decision: Any, to: Any = asking
            ) -> Any:
                to.append(instruction)
                return decision

            try:
                _any_rows(trace, tiled).apply_to_schedule(schedule, False, note)
            except Exception as e:
                # the tile of a loop over the rows: TVM cannot replay one of an unknown number
                last = asking[-1] if asking else None
                if last is None or str(last.kind.name) != _TILE or last in tiled:
                    raise _unfit(choice, f"it asks for a known number of rows: {gist(e)}") from e
                tiled.add(last)
            else:
                return schedule.mod

    def _decided(self, choice: Choice) -> Any:
        """The sketch's trace with the decisions of a choice, as far as they can be looked at before
        it is replayed.
        """
        from tvm.s_tir.schedule import Trace

        if choice.sketch >= len(self):
            raise _unfit(choice, f"the space has {len(self)} sketches, numbered from 0 on")
        sketch = self.sketch(choice.sketch).trace.simplified(True)
        asked = [one for one in sketch.insts if one in sketch.decisions]
        if len(asked) != len(choice.decisions):
            counts = f"{len(asked)} decisions, and it has {len(choice.decisions)}"
            raise _unfit(choice, f"its sketch asks for {counts}")
        for instruction, decision in zip(asked, choice.decisions, strict=True):
            if reason := _refused(instruction, decision):
                raise _unfit(choice, reason)
        return Trace(
            list(sketch.insts),
            {
                one: list(decision) if isinstance(decision, tuple) else decision
                for one, decision in zip(asked, choice.decisions, strict=True)
            },
        )


@functools.lru_cache(maxsize=4)
def of(
    case: Case, sums: str, device: Device, kept: tuple[str, ...] = (), blocks: int | None = None
) -> Space:
    """The space of a case; the same for all rows of a bucket."""
    return Space(case.typical, sums, device, kept, blocks)


def _any_rows(trace: Any, tiled: set[Any]) -> Any:
    """The trace with some tiles that are not sampled: their loops are split by the inner extents
    that were chosen, into as many parts as it takes.

    Raises:
        ValueError: the last part, which may be short, is summed by itself: TVM forgets then that it
            is short.
    """
    from tvm.s_tir.schedule import Instruction, Trace

    if not tiled:
        return trace
    extents: dict[Any, Any] = {}
    parts: set[Any] = set()
    instructions = []
    for one in trace.insts:
        if one in tiled:
            chosen = list(trace.decisions[one])
            extents |= dict(zip(one.outputs, [None, *chosen[1:]], strict=True))
            continue
        if str(one.kind.name) == "Split":
            inputs = [extents.get(given, given) for given in one.inputs]
            if any(given in extents for given in one.inputs):
                parts.update(one.outputs)
            one = Instruction(one.kind, inputs, one.attrs, one.outputs)  # noqa: PLW2901
        if str(one.kind.name) == "RFactor" and one.inputs[0] in parts:
            raise ValueError("rows are summed in parts of a fixed number")
        instructions.append(one)
    return Trace(instructions, {k: v for k, v in trace.decisions.items() if k not in tiled})


def _unfit(choice: Choice, reason: str) -> UnfitError:
    return UnfitError(f"trace {choice} does not fit: {reason}.", reason)


def _twin(definition: Any, rows: int) -> Any:
    """The definition for a known number of rows, and without numbers among its arguments, of which
    MetaSchedule takes none.
    """
    from tvm import tirx

    count = tir.rows(definition)
    matrix = next(p for p in definition.params if _rows_of(p) is not None)
    shape = [tirx.IntImm("int64", rows) if one.same_as(count) else one for one in matrix.ty.shape]
    numbers = {
        p: tirx.const(1e-5, str(p.ty.dtype))
        for p in definition.params
        if not hasattr(p.ty, "shape")
    }
    twin = definition.specialize({matrix: tirx.decl_buffer(shape, matrix.ty.dtype)})
    for number, value in numbers.items():
        twin = twin.specialize({number: value})
    return twin


def _kept(twin: Any, stages: Sequence[str]) -> Any:
    """The twin with stages that MetaSchedule does not inline."""
    from tvm import s_tir

    schedule = s_tir.Schedule(twin)
    for name in stages:
        schedule.annotate(schedule.get_sblock(name), "meta_schedule.inline_rule", "disable")
    return schedule.mod["main"]


def _blocks(twin: Any) -> list[str]:
    """The names of the definition's stages, in order."""
    from tvm import s_tir

    whole = s_tir.Schedule(twin)
    return [str(whole.get(b).name_hint) for b in whole.get_child_blocks(whole.get_sblock("root"))]


def _rows_of(parameter: Any) -> Any:
    """The variable in the first place of a buffer's shape, None where there is none."""
    from tvm import tirx

    shape: Sequence[Any] = getattr(parameter.ty, "shape", ())
    return shape[0] if shape and isinstance(shape[0], tirx.Var) else None


def _instructions(trace: Any) -> str:
    """What a trace does, without its decisions."""
    return json.dumps(trace.as_json()[0], default=str)


def _decisions(trace: Any) -> tuple[Decision, ...]:
    decided = (trace.decisions[one] for one in trace.insts if one in trace.decisions)
    return tuple(tuple(map(int, one)) if isinstance(one, Sequence) else int(one) for one in decided)


def _refused(instruction: Any, decision: Decision) -> str | None:
    """Why an instruction cannot take a decision, as far as that is known before it is replayed."""
    kind, attributes = str(instruction.kind.name), instruction.attrs
    if kind == _TILE:
        count, innermost = int(attributes[0]), int(attributes[1])
        if not isinstance(decision, tuple) or len(decision) != count or min(decision) < 1:
            return f"a tile has {count} extents from 1 on"
        if 0 < innermost < decision[-1]:
            return f"the innermost extent of a tile is {innermost} at most"
    elif kind == "SampleCategorical":
        values = len(attributes[0])
        if not isinstance(decision, int) or not 0 <= decision < values:
            return f"one of {values} values is chosen by 0 to {values - 1}"
    elif kind == "SampleComputeLocation":
        if not isinstance(decision, int):
            return "the place of a block is one number"
    else:
        return f"{kind} is not known here"
    return None
