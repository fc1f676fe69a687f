"""Schedules for GPUs that go wrong, each in its own way, for the tests of tuning on a GPU.

`sound` is right: the shipped schedule with its default knobs. All have the same two knobs, of which
the others take the default values alone, so that each goes wrong once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lntune import ops, schedule
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.gpu import threads


@dataclass(frozen=True)
class Knobs:
    """Knobs without effect, so that there is something to search."""

    first: int = knob(1, (1, 2), "nothing")
    second: bool = knob(False, (False, True), "nothing")


def sound(case: Case, knobs: Knobs, device: Device) -> Any:
    """Right."""
    plan = schedule.get("shared_row")
    return plan.apply(case, plan.default(case, device), device)


def crashes(case: Case, knobs: Knobs, device: Device) -> Any:
    """As a failed assertion in the compiler does."""
    os.abort()


def stalls(case: Case, knobs: Knobs, device: Device) -> Any:
    """A pass that never ends."""
    time.sleep(3600)


def _simple(case: Case, row_sum: Any) -> Any:
    """A thread for a row, with everything in its registers; `row_sum` says how rows are summed."""
    from tvm import s_tir

    sch = s_tir.Schedule(ops.get(case.op).define(case, row_sum))
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    named = {sch.get(b).name_hint: b for b in blocks}
    for name in ("x32", "weight32", "bias32"):
        if name in named:
            sch.compute_inline(named.pop(name))
    row = sch.get_loops(named["sum"])[0]
    _, row = sch.split(row, [None, 1], preserve_unit_iters=True)
    sch.bind(sch.get_loops(named["sum"])[0], "blockIdx.x")
    sch.bind(row, "threadIdx.x")
    for name, block in named.items():
        if name != "sum":
            sch.reverse_compute_at(block, row, preserve_unit_loops=True)
    for name in ("sum", "mean0", "centred", "delta", "variance", "scale", "shift"):
        for index in range(len(sch.get(named[name]).writes)):
            sch.set_scope(named[name], index, "local")
    return sch.mod


def misses(case: Case, knobs: Knobs, device: Device) -> Any:
    """Sums that are a thousandth too large."""
    from tvm import tirx

    def row_sum(rows: Any, hidden: int, expressions: Any, name: str) -> Any:
        return [
            lambda i, s=s: s(i) * tirx.const(1.001, "float32")
            for s in threads.row_sum(rows, hidden, expressions, name)
        ]

    return _simple(case, row_sum)


def strays(case: Case, knobs: Knobs, device: Device) -> Any:
    """Right for far longer rows, and so it reads behind these: what breaks a GPU's context."""
    return _simple(
        Case(case.op, 64 * case.hidden, case.dtype, case.rows, case.variant), threads.row_sum
    )


def _schedule(apply: Callable[[Case, Knobs, Device], Any]) -> Schedule:
    return Schedule(
        apply.__name__,
        "layer_norm",
        "gpu",
        Knobs,
        lambda case, device: Knobs(),
        lambda knobs, case, device: (
            None if apply is sound or knobs == Knobs() else "one way to go wrong is enough"
        ),
        apply,
    )


SCHEDULES = tuple(_schedule(apply) for apply in (crashes, stalls, misses, strays, sound))
