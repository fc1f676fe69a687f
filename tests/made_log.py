"""A tuning log that is the same every time: two operators, two dtypes, three runs, of which one
found better knobs, one measurement that was disturbed and one of an older schedule.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from typing import Any

from lntune.case import Case
from lntune.device import Device
from lntune.log.records import Record, Setting, Timing
from lntune.versions import Code

DEVICE = Device("cpu", "Made CPU", "x86-64-v3", 4, (), 32 << 10, 1 << 20, 32 << 20)
CASES = [
    Case(op, hidden, dtype, rows)
    for op, sizes in (("layer_norm", (256, 1024)), ("lnlstm_step_backward", (512,)))
    for hidden in sizes
    for dtype in ("bfloat16", "float32")
    for rows in (1, 512)
]
RUNS = ("2026-01-02", "2026-02-03", "2026-03-04")
BETTER, DISTURBED, STALE = CASES[1], CASES[2], CASES[3]
"""The case of which the last run has better knobs, and the others that are special."""
ROUNDS = 40


def timings(generator: random.Random, us: float, faster: float, copy: float) -> dict[str, Timing]:
    """Contenders of a case whose tuned kernel takes `us` and is `faster` times as fast as eager; a
    copy takes a share of it.
    """
    rounds = [generator.gauss(0, 0.03) for _ in range(ROUNDS)]
    times = {"tuned": us, "eager": faster * us, "copy": copy * us, "default": 1.1 * us}
    samples = {
        name: tuple(round(t * (1 + r + generator.gauss(0, 0.01)), 3) for r in rounds)
        for name, t in times.items()
    }
    return {name: Timing(of, statistics.median(of)) for name, of in samples.items()}


def finals(code: Code) -> Iterator[Record]:
    """The finals of all runs, oldest first; `code` is that of schedules today."""
    generator = random.Random(0)
    for number, day in enumerate(RUNS):
        for place, case in enumerate(CASES):
            us = 1 + case.rows * case.hidden / 5000
            copy = 0.6 if case.op == "layer_norm" else 0.05
            better = 1.3 if case == BETTER and number else 1.0
            fields: dict[str, Any] = {"busy": case == DISTURBED and number == len(RUNS) - 1}
            if case == DISTURBED and number < len(RUNS) - 1:
                continue
            yield Record(
                role="final",
                case=case,
                device=DEVICE,
                threads=4,
                schedule="cached_rows" if case.op == "layer_norm" else "blocked_step",
                code=Code("old") if case == STALE else code,
                knobs={"lanes": 8 if better > 1 else 4, "write": "plain"},
                status="ok",
                timings=timings(generator, us / better, (1.4 + place / 10) * better, copy),
                errors={"y": 0.25},
                versus_eager={"y": 1.5},
                default=Setting("cached_rows", {"lanes": 4}),
                versions={"torch": "2.12.0" if number == 0 else "2.13.0"},
                run=f"{number + 1:012x}",
                time=f"{day}T03:{place:02d}:05.000+00:00",
                **fields,
            )
