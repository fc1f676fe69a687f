"""How a final was decided, as its record has it; what decides is in tune/decide.py."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lntune import bounds
from lntune.certainty import Verdict


class Advantage(msgspec.Struct, frozen=True):
    """How many times as fast a winner is as another contender: the median of the ratios within
    rounds, and the bounds between which it lies but for a chance of 5 %, None where the samples do
    not tell.
    """

    ratio: bounds.Ratio
    low: bounds.Ratio | None
    high: bounds.Ratio | None
    verdict: Verdict


class Decision(msgspec.Struct, frozen=True):
    """How a final was decided, and how certain that is.

    `verdict`: the winner is certainly "better" than the runner-up; "tied" with it; "likely" better,
    which was measured and is not certain; or "alone". `by`: it was the fastest ("time"), or of
    those that are tied with the fastest the one that stays fast with a cold cache ("cold"), or of
    these the simplest ("simplicity"). `runner_up` is the place among the record's rivals of the
    fastest of them, `tied` are the places of those that are tied with the fastest finalist.
    `over_eager` and `over_default` are over these, `training` is what a step of training made by
    kernels is over one of eager mode's.
    """

    verdict: Literal["better", "tied", "likely", "alone"]
    by: Literal["time", "cold", "simplicity"]
    over_runner_up: Advantage | None = None
    runner_up: bounds.Count | None = None
    tied: Annotated[tuple[bounds.Count, ...], bounds.FEW] = ()
    over_eager: Advantage | None = None
    over_default: Advantage | None = None
    training: Advantage | None = None
