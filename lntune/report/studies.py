"""What a study of searches found, as a table and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lntune.report.columns import KEY, Column, Table
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.commands.search_study import Result, Study


def table(results: Sequence[Result]) -> Table:
    """A row for each case and search: the regret after some trials, and the trials until the best
    is near.
    """
    after = list(results[0].regret) if results else []
    columns = [
        Column("case", right=False, shared=True),
        Column("on", right=False, shared=True),
        Column("of", right=False, shared=True),
        Column("default", right=False, shared=True),
        Column("search", right=False),
        *(Column(f"after {n}", KEY if n == after[-1] else 2) for n in after),
        *(Column(f"{n}: 90 %", 3) for n in after),
        Column("trials to 5 %"),
        Column("90 %", 2),
        Column("of space", 1),
    ]
    title = "regret: slower than the best of all by, median over seeds"
    found = Table(title, columns, grouped=True)
    for r in results:
        found.add(
            str(r.case),
            r.device,
            counted(r.candidates, "candidate"),
            f"default {regret(r.default_regret)}",
            named(r),
            *map(regret, r.regret.values()),
            *map(regret, r.regret_90.values()),
            _trials(r.trials_to_near),
            _trials(r.trials_to_near_90),
            regret(r.share_to_near),
        )
    return found


def named(result: Result) -> str:
    """A search, and whether it was given winners of other cases."""
    return f"{result.search}, given" if result.given else result.search


def regret(value: float | None) -> str:
    """A share in percent, with a digit; never what failed."""
    return "never" if value is None else f"{100 * value:.1f}%"


def _trials(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def lines(found: Study) -> list[str]:
    """How many cases each search gets near to in time, and which cases are left out."""
    text = []
    by_search: dict[str, list[Result]] = {}
    for result in found.results:
        by_search.setdefault(named(result), []).append(result)
    for name, results in by_search.items():
        near = sum(r.near_in_time for r in results)
        cases = counted(len(results), "case")
        text.append(f"{name}: within 5 % of the best after 10 % of the trials in {near} of {cases}")
    text += [f"left out: {u.case} on {u.device}: {u.reason}" for u in found.uncovered]
    return text
