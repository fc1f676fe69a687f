"""MetaSchedule's evolutionary search, asked for kernels and told what they take: lntune builds,
checks and times them as it does others, in the place of TVM's builder and runner.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from lntune.transforms.metaschedule import space as spaces
from lntune.transforms.metaschedule.decisions import Choice
from lntune.transforms.metaschedule.space import Space

POPULATION, GENERATIONS = 32, 2
"""TVM's own 512 and 4 would take minutes for a batch: each of them is replayed several times."""
BATCH = 16
"""Kernels proposed at a time."""
SKETCHES = 9
"""Of a space at most, drawn anew for each search: a sketch takes up to a second to be made."""
_ENDLESS = 1 << 20
_DUPLICATES = 3
"""Batches of nothing new after which a search is over."""


@functools.cache
def cost_model_name() -> str:
    """TVM's cost model for the search: "xgb", which is its default, where xgboost is installed,
    else "random".
    """
    try:
        import xgboost  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except Exception:  # half an installation
        return "random"
    return "xgb"


class Search:
    """A search of one space. `ask` for choices, `tell` what they took."""

    def __init__(self, space: Space, seed: int) -> None:
        import numpy

        ms = spaces.meta_schedule()
        self._space = space
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION,
            init_min_unmeasured=POPULATION // 4,
            genetic_num_iters=GENERATIONS,
        )
        self._context = space.tuning(strategy, seed + 1)
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(self._context.mod)
        name, state = cost_model_name(), numpy.random.get_state()
        if name == "random":
            self._model = ms.cost_model.RandomModel(seed=seed)
        else:
            self._model = ms.cost_model.XGBModel(num_warmup_samples=BATCH, num_tuning_cores=1)
        numpy.random.set_state(state)
        order = random.Random(seed).sample(range(len(space)), len(space))
        drawn = list(itertools.islice(filter(space.fits, order), SKETCHES))
        self._context.pre_tuning(
            _ENDLESS,
            BATCH,
            [space.sketch(number) for number in sorted(drawn)],
            self._database,
            self._model,
        )
        self._asked: dict[Choice, Any] = {}
        self._results: dict[Choice, float] = {}
        self._known: set[Choice] = set()

    def ask(self) -> list[Choice]:
        """The next kernels to try; none at the end."""
        for _ in range(_DUPLICATES):
            self._learn()
            candidates = self._context.generate_measure_candidates()
            if candidates is None:
                return []
            self._asked = {
                choice: candidate
                for candidate in candidates
                if (choice := self._space.choice(candidate.sch.trace)) and choice not in self._known
            }
            self._known.update(self._asked)
            if self._asked:
                return list(self._asked)
        return []

    def tell(self, choice: Choice, seconds: float) -> None:
        """What a kernel took, infinite where it failed; asked for or not."""
        self._known.add(choice)
        if choice in self._asked:
            self._results[choice] = seconds
        elif math.isfinite(seconds):
            self._keep(self._space.replayed(choice), seconds)

    def _keep(self, schedule: Any, seconds: float) -> None:
        """Put a kernel into the database from whose best the next population is bred."""
        ms = spaces.meta_schedule()
        record = ms.database.TuningRecord(
            schedule.trace,
            self._workload,
            [seconds],
            self._context.target,
            ms.arg_info.ArgInfo.from_entry_func(schedule.mod, remove_preproc=True),
        )
        self._database.commit_tuning_record(record)

    def _learn(self) -> None:
        """Hand on to TVM what came of the last batch."""
        if not self._asked:
            return
        result = spaces.meta_schedule().runner.RunnerResult
        worked = {c: t for c, t in self._results.items() if math.isfinite(t)}
        for choice, seconds in worked.items():
            self._keep(self._asked[choice].sch, seconds)
        if worked:
            self._model.update(
                self._context,
                [self._asked[choice] for choice in worked],
                [result([seconds], None) for seconds in worked.values()],
            )
        self._context.notify_runner_results(
            list(self._asked.values()),
            [
                result([worked[c]], None) if c in worked else result(None, "failed")
                for c in self._asked
            ],
        )
        self._asked, self._results = {}, {}


class Turns:
    """Searches of several spaces by turns, a batch each, by the names of the spaces; a space is
    made when its first turn comes, since that takes seconds.
    """

    def __init__(self, all_spaces: Mapping[str, Callable[[], Space]], seed: int) -> None:
        self._spaces, self._seed = all_spaces, seed
        self._searches: dict[str, Search] = {}
        self._told: list[tuple[str, Choice, float]] = []
        self._left = list(all_spaces)

    def ask(self) -> list[tuple[str, Choice]]:
        """The next batch, as (space, choice); empty when all searches are at their end."""
        while self._left:
            name = self._left.pop(0)
            if name not in self._searches:
                self._searches[name] = Search(self._spaces[name](), self._seed)
            of_others = []
            for told in self._told:
                if told[0] in self._searches:
                    self._searches[told[0]].tell(*told[1:])
                else:
                    of_others.append(told)
            self._told = of_others
            if batch := self._searches[name].ask():
                self._left.append(name)
                return [(name, choice) for choice in batch]
        return []

    def tell(self, name: str, choice: Choice, seconds: float) -> None:
        """What a kernel took, see Search.tell; handed on when its search is there."""
        self._told.append((name, choice, seconds))
