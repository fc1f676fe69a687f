"""Knobs for tensors that are not aligned as well as knobs would have it: the same schedule with
narrower accesses.
"""

from __future__ import annotations

from typing import Any

from lntune import knobs
from lntune.case import Case
from lntune.device import Device
from lntune.schedule import Schedule

VECTOR_WIDTH = "vector_width"
"""The knob of GPU schedules for elements to one load or store."""


def narrowed(setting: Any, plan: Schedule, case: Case, device: Device, widest: int) -> Any | None:
    """The knobs, or those nearest to them whose accesses have at most `widest` elements; None where
    there are none.
    """
    wanted = knobs.to_dict(setting)
    if device.kind != "gpu" or int(wanted.get(VECTOR_WIDTH, 1)) <= widest:
        return setting
    fitting = (
        other
        for other in plan.space(case, device)
        if int(knobs.to_dict(other)[VECTOR_WIDTH]) <= widest
    )

    def likeness(other: Any) -> tuple[int, int]:
        its = knobs.to_dict(other)
        return sum(its[name] == value for name, value in wanted.items()), int(its[VECTOR_WIDTH])

    return max(fitting, key=likeness, default=None)
