"""The searches, replayed on made-up cost tables: no kernel is built and no clock is waited for."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usable_searches import USABLE

from lntune import knobs, search
from lntune.errors import ToolchainError, UnknownNameError
from lntune.knobs import knob
from lntune.search import SEARCHES, Budget, Space, bayesian, evolutionary, tpe

without_optuna = pytest.mark.skipif(
    not tpe.installed(), reason='needs optuna: pip install "lntune[search]"'
)
NAMES = [pytest.param(n, marks=without_optuna) if n == "optuna" else n for n in SEARCHES]
"""All searches; one whose package is missing is skipped, and that is said."""
DRAW_NOTHING = {"exhaustive", "ranked"}


@dataclass(frozen=True)
class Rows:
    """Knobs shaped like those of a CPU schedule."""

    lanes: int = knob(4, (1, 2, 4, 8), "vector registers that accumulate a row sum side by side")
    store: int = knob(2, (1, 2, 4), "vector registers of output per step")
    unroll: int = knob(1, (1, 2, 4), "steps of the summing loops in one iteration")
    prefetch: int = knob(1, (0, 1, 2), "rows fetched ahead")
    affine32: bool = knob(False, (False, True), "weight and bias widened once per call")
    parallel: bool = knob(True, (False, True), "rows shared among the threads")


def too_many(setting: Rows) -> str | None:
    """Leaves holes in the space, so that some neighbours are no candidates."""
    return "out of registers" if setting.lanes * setting.unroll > 16 else None


def record_table(seed: int) -> dict[Any, float]:
    """A cost in us for each candidate, the default first, drawn from `seed` and nothing else.

    It has an optimum somewhere, knobs that depend on each other, 10 % ruggedness, and one candidate
    in 15 that fails.
    """
    rng = random.Random(seed)
    values = knobs.values_of(Rows)
    names = list(values)
    best = {name: rng.randrange(len(values[name])) for name in names}
    slope = {name: rng.uniform(0.02, 0.25) for name in names}
    pairs = {
        (a, b, x, y): rng.uniform(0, 0.3)
        for a, b in pairwise(names)
        for x in values[a]
        for y in values[b]
    }
    table = {Rows(): 0.0}
    for setting in knobs.enumerate_space(Rows, too_many):
        cost = 100.0
        for name in names:
            cost *= 1 + slope[name] * abs(values[name].index(getattr(setting, name)) - best[name])
        for a, b in pairwise(names):
            cost *= 1 + pairs[a, b, getattr(setting, a), getattr(setting, b)]
        cost *= 1 + rng.uniform(0, 0.1)
        fails = rng.random() < 1 / 15 and setting != Rows()
        table[setting] = math.inf if fails else cost
    return table


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def replay(
    name: str,
    table: dict[Any, float],
    budget: Budget,
    seed: int = 0,
    *,
    neighbours: Any = knobs.neighbours,
    each: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The candidates the search tried on the table, in order. `each` runs once per trial, as
    measuring would.
    """
    tried = []

    def evaluate(candidate: Any) -> float:
        budget.count()
        tried.append(candidate)
        each()
        return table[candidate]  # a KeyError here is a candidate that is none

    search.get(name)(space_of(table, neighbours), evaluate, budget, random.Random(seed))
    return tried


def space_of(table: dict[Any, float], neighbours: Any = knobs.neighbours, **fields: Any) -> Space:
    """A table's candidates as a space; what is not made of knobs has none."""
    return Space(
        tuple(table),
        neighbours,
        knobs=lambda c: asdict(c) if is_dataclass(c) and not isinstance(c, type) else {},
        scales=knobs.values_of(Rows),
        **fields,
    )


def trials_until_near_best(name: str, table: dict[Any, float], seed: int) -> int:
    """How many trials the search needs to come within 10 % of the table's best."""
    goal = 1.1 * min(table.values())
    tried = replay(name, table, Budget(), seed)
    return next(i for i, candidate in enumerate(tried, 1) if table[candidate] <= goal)


def test_the_test_bed_is_rugged() -> None:
    """The recorded tables are no easy game: holes, failures, and a default more than 10 % from the
    best in most of them.
    """
    tables = [record_table(seed) for seed in range(10)]
    assert all(len(t) < math.prod(len(v) for v in knobs.values_of(Rows).values()) for t in tables)
    assert all(10 < sum(map(math.isinf, t.values())) < 60 for t in tables)
    assert sum(t[Rows()] > 1.1 * min(t.values()) for t in tables) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_default_comes_first(name: str) -> None:
    """Every search tries space.candidates[0], the schedule's default, before anything else."""
    assert replay(name, record_table(1), Budget(trials=3))[0] == Rows()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_without_limit_every_candidate_is_tried_once(name: str, seed: int) -> None:
    """With an unlimited budget each candidate is tried exactly once, so the best of the table is
    found.
    """
    table = record_table(seed)
    tried = replay(name, table, Budget(), seed)
    assert len(tried) == len(table)
    assert set(tried) == set(table)
    assert min(table[c] for c in tried) == min(table.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trials", [0, 1, 2, 17, 100])
def test_stops_after_the_trials_of_the_budget(name: str, trials: int) -> None:
    """Exactly the budgeted number of distinct candidates is tried, none of them twice."""
    tried = replay(name, record_table(2), Budget(trials=trials))
    assert len(tried) == len(set(tried)) == trials


@pytest.mark.parametrize("name", NAMES)
def test_stops_when_the_time_is_over(name: str) -> None:
    """No trial starts after the budget's seconds: at 2 s each, 7 s are enough for the fourth to
    start and no more.
    """
    clock = FakeClock()

    def pass_time() -> None:
        clock.now += 2.0

    budget = Budget(seconds=7.0, clock=clock)
    assert len(replay(name, record_table(3), budget, each=pass_time)) == 4
    assert budget.spent
    assert budget.fraction == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_trials(name: str) -> None:
    """A seed fixes the order of the trials completely."""
    table = record_table(4)
    assert replay(name, table, Budget(trials=120), seed=9) == replay(
        name, table, Budget(trials=120), seed=9
    )


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_other_trials(name: str) -> None:
    """A search that draws takes another way with another seed; the others the same."""
    table = record_table(4)
    one, other = (replay(name, table, Budget(trials=60), seed=seed) for seed in (1, 2))
    assert (one == other) == (name in DRAW_NOTHING)


def test_exhaustive_keeps_the_order() -> None:
    """The exhaustive search tries candidates as they are listed."""
    table = record_table(5)
    assert replay("exhaustive", table, Budget()) == list(table)


@pytest.mark.parametrize("seed", range(8))
def test_local_is_near_the_best_after_a_third(seed: int) -> None:
    """The local search comes within 10 % of the best in a third of the trials the whole space
    takes.
    """
    table = record_table(100 + seed)
    assert trials_until_near_best("local", table, seed) <= len(table) // 3


def test_local_needs_half_the_trials_of_random() -> None:
    """Over 60 runs the local search's median way to within 10 % of the best is less than half of
    the random search's.
    """
    runs = [(record_table(seed), seed) for seed in range(60)]
    local, drawn = (
        statistics.median(trials_until_near_best(name, table, seed) for table, seed in runs)
        for name in ("local", "random")
    )
    assert local < drawn / 2


def test_local_walks_downhill() -> None:
    """On a chain with one valley the local search goes there on foot: it tries no far candidate
    before it has arrived.
    """
    table = {5: 45.0, **{i: float((i - 9) ** 2) + 29.0 for i in range(200)}, 9: 1.0}
    tried = replay("local", table, Budget(), seed=0, neighbours=lambda c: (c - 1, c + 1))
    way = tried[: tried.index(9) + 1]
    assert tried[0] == 5
    assert max(way) <= 9
    assert min(way) >= 3


def test_local_leaves_a_local_optimum() -> None:
    """Where every neighbour of the default is worse, a restart still finds the better valley
    elsewhere.
    """
    table = {
        i: 10.0 + abs(i - 50) if i < 100 else 1.0 + abs(i - 150)
        for i in [50, *range(50), *range(51, 200)]
    }
    tried = replay("local", table, Budget(trials=120), seed=3, neighbours=lambda c: (c - 1, c + 1))
    assert 150 in tried


@pytest.mark.parametrize("name", NAMES)
def test_one_candidate(name: str) -> None:
    """A space of one candidate is tried once and the search ends, whatever its neighbours are said
    to be.
    """
    assert replay(name, {Rows(): 3.0}, Budget()) == [Rows()]


@pytest.mark.parametrize("name", NAMES)
def test_no_candidates(name: str) -> None:
    """A space without candidates is no error: nothing is tried."""
    assert replay(name, {}, Budget()) == []


@pytest.mark.parametrize("name", NAMES)
def test_all_candidates_fail(name: str) -> None:
    """Where everything fails the search still ends, having tried each candidate once."""
    table = dict.fromkeys(record_table(6), math.inf)
    tried = replay(name, table, Budget())
    assert len(tried) == len(set(tried)) == len(table)


@pytest.mark.parametrize("name", NAMES)
def test_failing_default(name: str) -> None:
    """A default that fails does not keep the search from finding the best."""
    table = {**record_table(7), Rows(): math.inf}
    assert min(table[c] for c in replay(name, table, Budget())) == min(table.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_listed_twice_is_tried_once(name: str) -> None:
    """Repetitions among the candidates cost no second trial."""
    tried: list[int] = []

    def evaluate(candidate: int) -> float:
        tried.append(candidate)
        return 1.0

    search.get(name)(
        Space((1, 2, 1, 3, 3), lambda c: (c - 1, c + 1, c + 1)),
        evaluate,
        Budget(),
        random.Random(0),
    )
    assert sorted(tried) == [1, 2, 3]


@settings(deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(USABLE)), seed=st.integers(0, 2**32))
def test_any_space_any_budget(data: st.DataObject, name: str, seed: int) -> None:
    """On any costs, neighbourhood and budget: the default first, only candidates, none twice, as
    many as the limits allow.

    A neighbourhood may be one-sided and name strangers.
    """
    costs = st.floats(0, 1e6) | st.just(math.inf)
    table = data.draw(st.dictionaries(st.integers(0, 30), costs, min_size=1, max_size=25))
    around = data.draw(
        st.dictionaries(st.integers(0, 30), st.lists(st.integers(-2, 33), max_size=6))
    )
    trials = data.draw(st.none() | st.integers(0, 30))
    tried = replay(name, table, Budget(trials=trials), seed, neighbours=lambda c: around.get(c, ()))
    assert len(tried) == (len(table) if trials is None else min(trials, len(table)))
    assert len(set(tried)) == len(tried)
    assert tried[:1] == (list(table)[:1] if trials != 0 else [])


@settings(deadline=None)
@given(
    name=st.sampled_from(USABLE),
    seed=st.integers(0, 2**32),
    at_once=st.integers(1, 5),
    trials=st.none() | st.integers(0, 12),
)
def test_candidates_in_hand(name: str, seed: int, at_once: int, trials: int | None) -> None:
    """A search begins no more candidates than may be in hand, nor than may be tried, and evaluates
    them in the order in which it began them; it tries as many as it would one by one.
    """
    costs = random.Random(seed)
    table = {c: costs.choice((costs.random(), math.inf)) for c in range(10)}
    begun, tried, most = list[int](), list[int](), 0
    budget = Budget(trials=trials)

    def begin(candidate: int) -> None:
        nonlocal most
        begun.append(candidate)
        most = max(most, len(begun) - len(tried))

    def evaluate(candidate: int) -> float:
        assert candidate in begun
        budget.count()
        tried.append(candidate)
        return table[candidate]

    space = space_of(table, lambda c: (c - 1, c + 1, c + 3), at_once=at_once, begin=begin)
    search.get(name)(space, evaluate, budget, random.Random(seed))
    assert tried == begun and len(set(tried)) == len(tried)
    assert len(tried) == min(len(table), len(table) if trials is None else trials)
    assert most <= at_once
    if name != "local" and tried:  # a climb may have to wait for where it goes
        assert most == min(at_once, len(tried))


def test_those_in_hand_leave_less_to_be_found_out() -> None:
    """Before it is known what comes of them there is as little to be found out as afterwards, so
    that what is next lies elsewhere; nothing is remembered of that.
    """
    table = record_table(3)
    process = bayesian._Process(space_of(table), random.Random(0))
    untried = list(table)
    for _ in range(6):
        process.add(candidate := untried.pop(0), table[candidate])
    before = process.most_promising(untried), process._variance.copy()
    in_hand = [untried.pop(40), untried.pop(80)]
    variance = process._variance_with(in_hand)
    assert (variance < before[1]).any()
    untried.remove(before[0])
    assert process.most_promising(untried, [before[0]]) != before[0]
    assert process.most_promising([before[0], *untried]) == before[0]
    assert (process._variance == before[1]).all()
    for candidate in in_hand:
        process.add(candidate, table[candidate])
    assert process._variance == pytest.approx(variance)


def test_a_climb_waits_for_its_starts() -> None:
    """Where the climb begins is not known before all starts are; neighbours that are in hand when a
    better one is found are steps, too.
    """
    table = dict(enumerate((9.0, 8.0, 7.0, 1.0, 6.0, 5.0)))
    begun: list[tuple[int, int]] = []
    tried: list[int] = []

    def evaluate(candidate: int) -> float:
        tried.append(candidate)
        return table[candidate]

    space = Space(
        tuple(table),
        lambda c: (c + 1, c + 2),
        seeds=(1,),
        at_once=4,
        begin=lambda c: begun.append((c, len(tried))),
    )
    search.get("local")(space, evaluate, Budget(trials=6), random.Random(1))
    assert begun[:2] == [(0, 0), (1, 0)]
    assert sorted(begun[2:4]) == [(2, 2), (3, 2)], "the better start's neighbours, once it is known"
    assert sorted(tried) == list(table)


def test_unknown_search_names_the_near_miss() -> None:
    """A mistyped search is answered with the name that was meant and those there are."""
    with pytest.raises(
        UnknownNameError, match=r"'exaustive'.*Did you mean 'exhaustive'.*local, optuna, random"
    ):
        search.get("exaustive")


def test_searches_stand_alone() -> None:
    """Importing the searches reaches neither TVM nor PyTorch, nor anything of lntune but the
    errors.
    """
    code = (
        "import sys, lntune.search; print(*sorted(m for m in sys.modules if m.split('.')[0] in"
        " ('tvm', 'tvm_ffi', 'torch', 'lntune')))"
    )
    root = Path(search.__file__).parents[2]
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) - {"lntune", "lntune.errors"} == {
        m for m in loaded if m.startswith("lntune.search")
    }


# --- what evolution, the model and Optuna are for


@pytest.mark.parametrize(
    ("name", "part"),
    [("evolutionary", 2 / 3), ("bayesian", 1 / 2), pytest.param("optuna", 1, marks=without_optuna)],
)
def test_needs_a_part_of_the_trials_of_random(name: str, part: float) -> None:
    """Over ten tables the median way to within 10 % of the best is shorter than the random
    search's by this much.
    """
    runs = [(record_table(seed), seed) for seed in range(10)]
    clever, drawn = (
        statistics.median(trials_until_near_best(n, table, seed) for table, seed in runs)
        for n in (name, "random")
    )
    assert clever < drawn * part


@pytest.mark.parametrize("name", sorted(set(USABLE) - {"exhaustive", "random"}))
def test_seeds_come_right_after_the_first(name: str) -> None:
    """What is known to be promising is tried after the default, in its order; seeds that are no
    candidates, or named twice, are passed over.
    """
    table = record_table(8)
    listed = list(table)
    seeds = (listed[300], listed[0], Rows(lanes=8, unroll=4), listed[17], listed[300])
    tried: list[Any] = []

    def evaluate(candidate: Any) -> float:
        budget.count()
        tried.append(candidate)
        return table[candidate]

    budget = Budget(trials=12)
    search.get(name)(space_of(table, seeds=seeds), evaluate, budget, random.Random(0))
    assert tried[:3] == [listed[0], listed[300], listed[17]]
    assert len(set(tried)) == len(tried) == 12


def test_evolution_changes_what_does_well() -> None:
    """After its start most offspring of a population share all knobs but one with one of the best
    that were tried before them, or have each knob of one of two of them.
    """
    table = record_table(9)
    tried = replay("evolutionary", table, Budget(trials=60), seed=1)
    of = {c: asdict(c) for c in tried}
    bred = 0
    for i in range(evolutionary.START, len(tried)):
        best = sorted(tried[:i], key=lambda c: table[c])[: evolutionary.POPULATION]
        child = of[tried[i]]
        changed = any(sum(child[n] != of[p][n] for n in child) == 1 for p in best)
        mixed = any(
            all(child[n] in (of[a][n], of[b][n]) for n in child) for a in best for b in best
        )
        bred += changed or mixed
    assert bred > 0.9 * (len(tried) - evolutionary.START)


def test_optuna_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the search says what to install, before anything was tried."""
    monkeypatch.setattr(tpe, "installed", lambda: False)
    with pytest.raises(ToolchainError, match=r'pip install "lntune\[search\]"'):
        replay("optuna", record_table(1), Budget(trials=3))


@without_optuna
def test_optuna_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of Optuna's is printed, no file is left, and its own verbosity is as it was."""
    import optuna

    before = optuna.logging.get_verbosity()
    replay("optuna", record_table(1), Budget(trials=12))
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before


# --- a space that knows something of its candidates


def ranked(
    table: dict[Any, float], rank: Callable[[Any], float], trials: int | None = None
) -> list[Any]:
    """What the ranked search tries of a table when the space prefers a low rank."""
    tried = []

    def evaluate(candidate: Any) -> float:
        budget.count()
        tried.append(candidate)
        return table[candidate]

    budget = Budget(trials=trials)
    space = Space(
        tuple(table), knobs.neighbours, lambda preferred, others: min(preferred or others, key=rank)
    )
    search.get("ranked")(space, evaluate, budget, random.Random(0))
    return tried


def test_a_right_rank_is_followed() -> None:
    """With the true costs as rank the best candidate is tried right after the default."""
    table = record_table(3)
    best = min(table, key=lambda c: table[c])
    assert ranked(table, lambda c: table[c], 2) == [Rows(), best]


def test_a_wrong_rank_costs_half_of_the_trials() -> None:
    """With a rank that puts the worst first every other trial is a step from the best found, so the
    search gets there nevertheless.
    """
    for seed in range(5):
        table = record_table(seed)
        tried = ranked(table, lambda c, table=table: -min(table[c], 1e9), 120)  # type: ignore[misc]
        steps = [
            c
            for i, c in enumerate(tried)
            if i and c in set(knobs.neighbours(min(tried[:i], key=lambda c: table[c])))
        ]
        assert len(steps) >= 20
        assert (
            min(table[c] for c in tried)
            < 1.5 * min(table.values())
            < sorted(table.values())[len(table) // 2]
        )


def test_the_space_decides_between_the_surroundings_and_the_rest() -> None:
    """The space is offered the untried neighbours of the best so far, or none, and all that is
    untried.
    """
    table = record_table(5)
    offered: list[tuple[list[Any], list[Any]]] = []
    tried: list[Any] = []

    def choose(preferred: Any, others: Any) -> Any:
        offered.append((list(preferred), list(others)))
        return others[-1]

    def evaluate(candidate: Any) -> float:
        tried.append(candidate)
        budget.count()
        return table[candidate]

    budget = Budget(trials=20)
    search.get("ranked")(
        Space(tuple(table), knobs.neighbours, choose), evaluate, budget, random.Random(0)
    )
    for i, (preferred, others) in enumerate(offered, 1):
        done = tried[:i]
        assert set(others) == set(table) - set(done)
        around = set(knobs.neighbours(min(done, key=lambda c: table[c]))) & set(table) - set(done)
        assert set(preferred) == (set() if i % 2 else around)
