"""Optuna's tree-structured Parzen estimator, a model of which values good candidates have, as a
yardstick that others know (Akiba et al. 2019, arXiv:1907.10902; Watanabe 2023, arXiv:2304.11127).

Optuna is asked and told and calls nothing of ours; its study is in memory, and it logs nothing. It
knows no constraints between knobs: where it suggests what is no candidate, or was tried, the
untried candidate nearest to that is tried in its place, and Optuna is told of that one.
"""

from __future__ import annotations

import importlib.util
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

from lntune.errors import ToolchainError
from lntune.search import in_hand
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

START = 6
"""Candidates that are tried before the model says what comes next."""
FAILED = 1e30
"""What Optuna is told that a failure cost: worse than any time. Its model looks at ranks alone."""
MISSING = (
    "the search 'optuna' needs the package optuna, which is not installed:"
    ' pip install "lntune[search]", or choose another search with --search.'
)


def available() -> None:
    """Complain where Optuna is not installed.

    Raises:
        ToolchainError: with what to do.
    """
    if not installed():
        raise ToolchainError(MISSING)


def installed() -> bool:
    """Whether Optuna is."""
    return importlib.util.find_spec("optuna") is not None


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the first candidate, the seeds and a few random ones, then what Optuna suggests.

    Raises:
        ToolchainError: Optuna is not installed.
    """
    available()
    import optuna
    from optuna.distributions import CategoricalDistribution

    knobs = space.coordinates()
    values: dict[str, dict[Any, None]] = {}
    for of in knobs.values():
        for name, value in of.items():
            values.setdefault(name, {})[value] = None
    distributions: dict[str, Any] = {
        name: CategoricalDistribution(tuple(used)) for name, used in values.items()
    }
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            # of what is experimental in it, which is nothing that a user of ours can change
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            # what is in hand counts as bad meanwhile, so that the next is not beside it
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=0, multivariate=True, constant_liar=True, seed=rng.getrandbits(32)
            )
        study = optuna.create_study(sampler=sampler)
        untried = dict.fromkeys(knobs)
        first = space.first()
        numbers: dict[Any, int] = {}
        state = optuna.trial.TrialState

        def choose(_: Sequence[Any]) -> list[Any]:
            if first:
                candidate = first.pop(0)
            elif len(numbers) < START:
                candidate = rng.choice(list(untried))
            else:
                asked = study.ask(distributions)
                candidate = _nearest(asked.params, knobs, untried, rng)
                study.tell(asked, state=state.FAIL)  # which the model leaves out
            of = knobs[candidate]
            used = {name: distributions[name] for name in of}
            study.add_trial(
                optuna.trial.create_trial(state=state.RUNNING, params=of, distributions=used)
            )
            numbers[candidate] = len(study.get_trials(deepcopy=False)) - 1
            return [candidate]

        def told(candidate: Any, cost: float) -> None:
            study.tell(numbers[candidate], cost if cost < math.inf else FAILED)

        in_hand.search(space, evaluate, budget, untried, choose, told)
    finally:
        optuna.logging.set_verbosity(before)


def _nearest(
    wanted: dict[str, Any],
    knobs: dict[Any, dict[str, Any]],
    untried: dict[Any, None],
    rng: random.Random,
) -> Any:
    """The untried candidate of which most knobs are as wanted, one of them where there are
    several.
    """
    least, nearest = math.inf, list[Any]()
    for candidate in untried:
        others = sum(wanted.get(n) != v for n, v in knobs[candidate].items())
        if others < least:
            least, nearest = others, []
        if others == least:
            nearest.append(candidate)
    return rng.choice(nearest)
