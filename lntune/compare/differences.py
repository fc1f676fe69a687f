"""What two ways to do the same differ in: schedules and knobs."""

from __future__ import annotations

from lntune.compare.comparison import Measurement


def differences(a: Measurement, b: Measurement) -> list[str]:
    """What A has otherwise than B, as `name A -> B`: the schedule, and the knobs that both have.
    Nothing of eager mode and others that have no schedule.
    """
    if not a.schedule or not b.schedule:
        return []
    found = [f"{a.schedule} -> {b.schedule}"] if a.schedule != b.schedule else []
    found += [
        f"{name} {_said(a.knobs[name])} -> {_said(b.knobs[name])}"
        for name in a.knobs
        if name in b.knobs and a.knobs[name] != b.knobs[name]
    ]
    return found


def _said(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
