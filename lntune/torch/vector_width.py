"""Knobs for tensors that are aligned to fewer bytes than a GPU kernel's loads and stores, or whose
rows lie apart while vectors do not divide them: the same schedule with narrower ones.
"""

from __future__ import annotations

from typing import Any

from lntune import backends, knobs
from lntune.case import Case
from lntune.device import Device
from lntune.schedule import Schedule

VECTOR_WIDTH = "vector_width"
"""The knob of GPU schedules for elements to one load or store."""


def narrowed(
    setting: Any,
    schedule: Schedule,
    case: Case,
    device: Device,
    widest: int,
    strided: bool = False,
) -> Any | None:
    """The knobs, or those nearest to them whose accesses have at most `widest` elements; None where
    there are none. `strided`: rows lie apart, so that only vectors that divide a row are aligned in
    all of them.
    """
    if strided:
        widest = min(widest, case.hidden & -case.hidden)
    wanted = knobs.to_dict(setting)
    if not backends.of(device).aligned or int(wanted.get(VECTOR_WIDTH, 1)) <= widest:
        return setting
    fitting = (
        other
        for other in schedule.space(case, device)
        if int(knobs.to_dict(other)[VECTOR_WIDTH]) <= widest
    )

    def likeness(other: Any) -> tuple[int, int]:
        values = knobs.to_dict(other)
        return sum(values[name] == value for name, value in wanted.items()), int(
            values[VECTOR_WIDTH]
        )

    return max(fitting, key=likeness, default=None)
