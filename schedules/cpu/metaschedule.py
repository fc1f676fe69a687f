"""TVM's own tuner as a contender: kernels out of MetaSchedule's design space of each operator,
proposed by its evolutionary search.

A setting is a sketch of the space with its decisions, as a text (`lntune.transforms.metaschedule`),
and how the definition sums. It is tuned only where it is named (`--schedule metaschedule`), since
there is no list of settings to search, and is built, checked, timed, logged and compared as all
others are. What it is and what it is not, measured: bench/README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob, open_knob
from lntune.schedule import Schedule
from lntune.schedule.contract import Told
from lntune.transforms.cpu import accumulate
from lntune.transforms.metaschedule import decisions, proposals, space

SHARED = ("layer_norm_backward", "lnlstm_step_backward")
"""Operators with sums over rows, which blocks of rows share."""
KEPT = {
    "lnlstm_step": ("cell",),
    "lnlstm_step_backward": ("act", "tanh_inner"),
}
"""Stages that are not inlined, since they hold sigmoids and tanhs: MetaSchedule's own rule spares
exp, which is what TVM has in their place, being made once for each stage that reads it.
"""


@dataclass(frozen=True)
class Traced:
    """Knobs."""

    sums: str = knob(
        "lanes", space.SUMS, "how the definition sums: in vector lanes, or in one loop"
    )
    trace: str = open_knob(
        "", decisions.refusal, "a sketch and its decisions; nothing: the definition as it is"
    )


def default(case: Case, device: Device) -> Traced:
    """The definition as it is: MetaSchedule has no kernel without a search."""
    return Traced()


def valid(knobs: Traced, case: Case, device: Device) -> str | None:
    """Whether the space has the trace is known once it is replayed."""
    return None


def _space(case: Case, sums: str, device: Device) -> space.Space:
    blocks = case.blocks(device) if case.op in SHARED else None
    return space.of(case.typical, sums, device, KEPT.get(case.op, ()), blocks)


def apply(case: Case, knobs: Traced, device: Device) -> Any:
    """Steps: 1 the space of the case, 2 the trace replayed on the definition, 3 sums that are added
    to what an output holds.
    """
    module = _space(case, knobs.sums, device).module(decisions.parse(knobs.trace))
    return accumulate.add_to_sums(module, case)


class Proposals:
    """Settings that MetaSchedule's search proposes for a case."""

    def __init__(self, case: Case, device: Device, seed: int) -> None:
        self._turns = proposals.Turns(
            {
                # the plain one is TVM's own way, and found sooner
                sums: functools.partial(_space, case, sums, device)
                for sums in reversed(space.SUMS)
            },
            seed,
        )
        self.note = f"TVM's {proposals.cost_model_name()} cost model"

    def ask(self) -> Sequence[Traced]:
        """See Schedule.propose."""
        return [Traced(sums, str(choice)) for sums, choice in self._turns.ask()]

    def tell(self, told: Sequence[Told]) -> None:
        """See Schedule.propose."""
        for setting, microseconds in told:
            if choice := decisions.parse(setting.trace):
                self._turns.tell(setting.sums, choice, microseconds * 1e-6)


def _schedule(name: str, op: str, version: int = 1) -> Schedule:
    return Schedule(name, op, "cpu", Traced, default, valid, apply, version, propose=Proposals)


SCHEDULES = (
    _schedule("metaschedule", "layer_norm"),
    _schedule("metaschedule_backward", "layer_norm_backward"),
    _schedule("metaschedule_step", "lnlstm_step", version=2),
    _schedule("metaschedule_step_backward", "lnlstm_step_backward", version=2),
)
