"""Knobs that a schedule wants tried first: where they stand among a case's candidates, and when a
search tries them.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from lntune import schedule
from lntune.backends import device_of
from lntune.case import Case
from lntune.errors import ScheduleError
from lntune.measure.jobs import Candidate
from lntune.search import Budget, Space, ranked
from lntune.tune.candidates import Candidates

DEVICE = device_of("nvidia/nvidia-h200")


@pytest.mark.parametrize("rows", [1, 32, 4096, 32768])
@pytest.mark.parametrize("hidden", [1, 64, 768, 1024, 5003, 16384, 65536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["shared_row", "shared_row_backward", "gated_row", "gated_row_backward"]
)
def test_shipped_schedules_have_seeds(name: str, hidden: int, dtype: str, rows: int) -> None:
    """For every size there are settings of the knobs, and one that fits besides the default where
    a row is long enough for a choice.
    """
    plan = schedule.get(name)
    case = Case(plan.op, hidden, dtype, rows)
    first, seeds = plan.default(case, DEVICE), plan.first(case, DEVICE)
    fit = {s for s in seeds if s != first and plan.reason_invalid(s, case, DEVICE) is None}
    assert fit or hidden < 768 or hidden > 16384


@pytest.mark.parametrize(
    ("name", "rows", "knobs"),
    [
        ("gated_row", 64, (128, 4, "one_barrier")),
        ("gated_row", 512, (64, 8, "two_barriers")),
        ("gated_row_backward", 64, (128, 4, "two_barriers")),
    ],
)
def test_default_knobs_of_steps(name: str, rows: int, knobs: tuple[int, int, str]) -> None:
    """A step of few rows has four elements to a thread in two bytes, and one barrier to an
    exchange; its backward, with a block to a multiprocessor, four elements whatever the rows.
    """
    plan = schedule.get(name)
    setting = plan.default(Case(plan.op, 512, "bfloat16", rows), DEVICE)
    assert (setting.threads_per_row, setting.vector_width, setting.exchange) == knobs


def test_seeds_come_after_the_default() -> None:
    """A case's candidates are its default knobs, the seeds that fit, and the others, each once;
    half and twice the threads are among the seeds.
    """
    case = Case("layer_norm_backward", 4096, "bfloat16", 32768)
    plan = schedule.get("shared_row_backward")
    candidates = Candidates(case, DEVICE)
    listed = list(candidates)
    default = plan.default(case, DEVICE)
    assert listed[0] == Candidate.of(plan.name, default)
    assert listed[1 : 1 + len(candidates.seeds)] == candidates.seeds
    assert len(set(listed)) == len(listed) == len(candidates)
    per_row = {dict(seed.items)["threads_per_row"] for seed in candidates.seeds}
    assert {default.threads_per_row // 2, default.threads_per_row * 2} <= per_row


def test_a_search_tries_seeds_first() -> None:
    """The ranked search asks for no order before the default and the seeds have been tried; a seed
    that is no candidate is passed over.
    """
    tried: list[int] = []

    def evaluate(candidate: int) -> float:
        tried.append(candidate)
        return float(candidate)

    space = Space(
        tuple(range(10)), lambda c: [c - 1, c + 1], lambda _, others: max(others), (7, 99, 4)
    )
    ranked.search(space, evaluate, Budget(), random.Random(0))
    assert tried[:4] == [0, 7, 4, 9]
    assert sorted(tried) == list(range(10))


def test_a_failing_seed_names_its_schedule() -> None:
    """What a schedule's seeds raise is told with its name."""
    plan = dataclasses.replace(schedule.get("shared_row"), seeds=lambda *_: [math.inf // 0])
    with pytest.raises(ScheduleError, match=r"seeds\(\) of 'shared_row' failed"):
        plan.first(Case("layer_norm", 64, "float32", 1), DEVICE)
