"""Made-up records, searches and comparisons, for tests of pages."""

from __future__ import annotations

import math
import random
from typing import Any

from lntune import ops
from lntune.case import DTYPES, TYPICAL_ROWS, Case
from lntune.compare.comparison import Comparison, Measurement, Missing, Result
from lntune.device import Device
from lntune.log.records import Record, Timing

CPU = Device("cpu", "Some CPU", "x86-64-v3", 4)
GPU = Device("gpu", "NVIDIA H200", "sm_90", 132)
CASE = Case("layer_norm", 1024, "float32", 512)
TIMES = {"tuned": 50.0, "eager": 100.0, "copy": 40.0, "default": 60.0}


def record(case: Case = CASE, device: Device = CPU, role: str = "final", **fields: Any) -> Record:
    """A record of a case, by default a final with twice eager's speed."""
    times = fields.pop("times", TIMES if role == "final" else {"tuned": TIMES["tuned"]})
    values: dict[str, Any] = {
        "role": role,
        "threads": 4,
        "schedule": "shared_row" if device.kind == "gpu" else "cached_rows",
        "knobs": {"lanes": 4, "write": "plain"},
        "status": "ok",
        "versions": {"lntune": "0.1.0", "torch": "2.13.0"},
        "run": "r1",
        "time": "2026-01-02T03:04:05+00:00",
    } | fields
    timings = {name: Timing((us,) * 5, us) for name, us in times.items()}
    return Record(case=case, device=device, timings=timings, **values)


def search(times: list[float | None], case: Case = CASE, **fields: Any) -> list[Record]:
    """The trials of a search, by their times; None of one that failed."""
    return [
        record(case, role="trial", times={} if us is None else {"tuned": us}, **fields)
        if us is not None
        else record(case, role="trial", times={}, **{**fields, "status": "wrong", "message": "y"})
        for us in times
    ]


def knob_trials(searches: int, effect: float, seed: int = 0) -> list[Record]:
    """Searches of 8 trials in which `lanes` changes the logarithm of the time by `effect`, and
    `unroll` nothing; each case has a speed of its own, and noise has a deviation of 0.1.
    """
    draw = random.Random(seed)
    made = []
    for number in range(searches):
        case = Case("layer_norm", 64 * (number + 1), "float32", 512)
        for _ in range(8):
            lanes, unroll = draw.choice((1, 2)), draw.choice((1, 2, 4))
            log = number + effect * (lanes == 2) + draw.gauss(0, 0.1)
            knobs = {"lanes": lanes, "unroll": unroll, "write": "plain"}
            made.append(record(case, role="trial", times={"tuned": math.exp(log)}, knobs=knobs))
    return made


def many(count: int, device: Device = CPU) -> list[Record]:
    """Finals of so many cases, each with a search of five trials."""
    hidden = [64 * i for i in range(1, 100)]
    every = [
        Case(o, h, d, r) for h in hidden for o in ops.OPS for d in DTYPES for r in TYPICAL_ROWS
    ]
    made = []
    for number, case in enumerate(every[:count]):
        us = 1.0 + number
        made += search([3 * us, 2 * us, us, None, us], case)
        made.append(record(case, device, times={"tuned": us, "eager": 2 * us, "copy": us}))
    return made


def comparison(case: Case = CASE, verdict: str = "FASTER", **fields: Any) -> Comparison:
    """A comparison of a case, by default B twice as fast."""
    a, b = Measurement(100.0, "cached_rows", {"lanes": 4}), Measurement(50.0, "widened_rows")
    values = {"ratio": 2.0, "low": 1.9, "high": 2.1, "p": 0.001, "method": "paired", **fields}
    return Comparison(device="some-cpu", case=case, a=a, b=b, verdict=verdict, **values)


def result(*cases: Comparison, missing: tuple[Missing, ...] = ()) -> Result:
    """Some comparisons of two schedules."""
    return Result("cached_rows", "widened_rows", list(cases), list(missing))
