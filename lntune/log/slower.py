"""When eager mode or the default knobs serve in the place of the kernel that won a final, and how
both passes of a step of training are decided together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from lntune.log.records import Record

if TYPE_CHECKING:
    from lntune.case import Case
    from lntune.log.decision import Advantage
    from lntune.log.select import Choice, Tier

MARGIN = 1.02
"""Eager mode, and the default knobs where others were tuned, take over when they measured faster by
more than this, or by less and with certainty (see records.Decision); ties go to the tuned kernel.
"""


def behind(tuned: float | None, other: float | None, over: Advantage | None = None) -> bool:
    """Whether medians say that a kernel is slower by more than MARGIN, or `over` says it is
    certainly slower.
    """
    if tuned and other and tuned > other * MARGIN:
        return True
    return over is not None and over.verdict == "SLOWER"


def than(record: Record, contender: Literal["eager", "default"]) -> bool:
    """Whether the best finalist was slower than a contender: by more than MARGIN or certainly."""
    decision = record.decision
    over = None
    if decision is not None:
        over = decision.over_eager if contender == "eager" else decision.over_default
    return behind(record.median(), record.median(contender), over)


def trained(record: Record) -> bool:
    """Whether a record tells what a step of training takes by kernels and in eager mode."""
    return record.training.keys() >= {"tuned", "eager"}


def step_us(record: Record) -> tuple[float, float]:
    """What a step of training takes by kernels and in eager mode, of a record that tells."""
    return record.training["tuned"].median_us, record.training["eager"].median_us


def in_training(record: Record) -> bool:
    """Whether a step of training by kernels was slower than eager mode's: by more than MARGIN or
    certainly; False where a record does not tell.
    """
    if not trained(record):
        return False
    tuned, eager = step_us(record)
    return behind(tuned, eager, record.decision.training if record.decision else None)


def eager_serves(record: Record) -> bool:
    """Whether calls of a record's case go to eager mode, as far as the record alone tells."""
    return in_training(record) if trained(record) else than(record, "eager")


def both_passes(case: Case, alone: Choice, backward: Choice) -> Choice:
    """What serves the forward of a step of training, given what would serve it `alone`, on the
    forward's own records, and what serves its backward.

    Where the record of the backward tells what a whole step takes, both of its passes are of one
    kind, kernels or eager mode's: a mixture would pay for what one has to make of the other's
    statistics, and eager mode's own backward goes with its own forward only.
    """
    record = backward.record
    if record is None or not trained(record):
        return alone
    tuned, eager = step_us(record)
    of = f"record of {record.case} ({record.time})"
    if in_training(record):
        step = f"training: eager's step was faster, {eager:.2f} us against {tuned:.2f} us"
        return msgspec.structs.replace(
            alone,
            tier="eager",
            schedule="",
            knobs={},
            record=record,
            steps=(*alone.steps, f"{step}, {of}"),
            stale=backward.stale,
            beaten=None,
        )
    if alone.beaten is None or alone.record is None:
        return alone
    step = f"training: kernels made the step in {tuned:.2f} us, eager in {eager:.2f} us"
    return msgspec.structs.replace(
        alone,
        tier=_tier_of(case, alone.record),
        schedule=alone.beaten.schedule,
        knobs=dict(alone.beaten.knobs),
        steps=(*alone.steps, f"{step}, {of}"),
        beaten=None,
    )


def _tier_of(case: Case, record: Record) -> Tier:
    """The tier in which a record serves a case."""
    if record.case.hidden != case.hidden:
        return "near"
    return "exact" if record.case.bucket == case.bucket else "bucket"
