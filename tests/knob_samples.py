"""Few of a schedule's knobs in which every value of every knob occurs."""

from __future__ import annotations

import random
from typing import Any

from grids import covering

from lntune import knobs
from lntune.case import Case
from lntune.device import Device
from lntune.schedule import Schedule


def sample(plan: Schedule, case: Case, device: Device, count: int = 4) -> list[Any]:
    """Some of the valid knobs, the same every time: few in which every value of every knob occurs,
    and at least `count`.
    """
    space = plan.space(case, device)
    random.Random(f"{plan.name} {case}").shuffle(space)
    values = [set(knobs.to_dict(setting).items()) for setting in space]
    chosen = covering(values)
    rest = [i for i in range(len(space)) if i not in chosen]
    return [space[i] for i in (chosen + rest)[: max(count, len(chosen))]]
