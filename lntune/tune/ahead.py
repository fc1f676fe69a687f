"""Builders for a search: the next candidates are built while the current ones are measured."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from lntune.case import Case
from lntune.errors import BuildError
from lntune.measure.jobs import Build, Candidate, Outcome
from lntune.tune import ranking
from lntune.tune.builders import Builders, Key

FIRST, NEXT = 3, 2
"""Candidates for each two builders: of the case in hand, before any of the next one is built; and
of that, before the others in hand are. A case may end long before all its thousands are built, and
the next must not begin by waiting for its first.
"""


class Ahead(Builders):
    """Builders that are given one case's candidates after the other, rank what they have built, and
    wait for more until they are closed.

    `job` is what they do with each candidate. `count` is how many builders there are: by default
    the cores but two.
    """

    @functools.cached_property
    def _scores(self) -> dict[Key, float]:
        """The static score of each that is built."""
        return {}

    def _ready(self) -> bool:
        return bool(self._queue) or self._closed

    def _keep(self, key: Key, outcome: Outcome) -> None:
        if self._job is Build and outcome.status == "run":  # nothing was run but the compiler
            outcome = msgspec.structs.replace(outcome, status="compile")
        super()._keep(key, outcome)
        good = outcome.status == "ok" and outcome.facts is not None and not outcome.facts.problems
        # What failed or is not worth measuring comes first: to note that takes no time.
        self._scores[key] = (
            ranking.score(outcome.facts, key[0], self._device)
            if good and outcome.facts
            else math.inf
        )

    def begin(
        self,
        case: Case,
        candidates: Iterable[Candidate],
        following: tuple[Case, Sequence[Candidate]] | None = None,
    ) -> None:
        """From now on build the candidates of this case, in this order, and after the first of them
        the first of the `following` case's; nothing else.
        """
        own = [(case, c) for c in candidates]
        early = max(4, FIRST * self.count // 2)
        cases, next_ones = [case], list[Key]()
        if following:
            cases.append(following[0])
            few = following[1][: max(2, NEXT * self.count // 2)]
            next_ones = [(following[0], c) for c in few]
        order = [*own[:early], *next_ones, *own[early:]]
        with self._changed:
            for key in [k for k in self._outcomes if k[0] not in cases]:
                del self._outcomes[key], self._scores[key]
            self._queue = deque(
                k for k in order if k not in self._outcomes and k not in self._flying
            )
            self._changed.notify_all()

    def also(self, case: Case, candidates: Iterable[Candidate]) -> None:
        """Build these, too, those that nobody had asked for before all others."""
        with self._changed:
            known = {*self._outcomes, *self._flying, *self._queue}
            new = [(case, c) for c in candidates if (case, c) not in known]
            self._queue.extendleft(reversed(new))
            self._changed.notify_all()

    def hurry(self, case: Case, candidates: Iterable[Candidate]) -> None:
        """Build these next."""
        with self._changed:
            first = {(case, c) for c in candidates}
            self._queue = deque(sorted(self._queue, key=lambda k: k not in first))

    def outcome(self, case: Case, candidate: Candidate) -> Outcome:
        """What came of building a candidate for the case that was begun; waits for it.

        Raises:
            BuildError: the builders do not come up.
        """
        self.also(case, [candidate])
        self.hurry(case, [candidate])
        with self._changed:
            self._wait_for([(case, candidate)])
            return self._outcomes[case, candidate]

    def built(self, case: Case) -> dict[Candidate, Outcome]:
        """All that is built of a case so far."""
        with self._changed:
            return {c: outcome for (own, c), outcome in self._outcomes.items() if own == case}

    def score(self, case: Case, candidate: Candidate) -> float:
        """The static score of what is built; infinite for what is not to be measured."""
        return self._scores[case, candidate]

    def choose(
        self, case: Case, preferred: Sequence[Candidate], others: Sequence[Candidate]
    ) -> Candidate:
        """Of what is built the best by rank: among the preferred, and where none of these is built,
        among the others; waits for one.

        Raises:
            BuildError: the builders do not come up.
        """
        self.hurry(case, preferred)
        with self._changed:
            self._wait_for([(case, c) for c in (*preferred, *others)])
            for candidates in (preferred, others):
                ready = [c for c in candidates if (case, c) in self._outcomes]
                if ready:
                    return max(ready, key=lambda c: self._scores[case, c])
        raise BuildError("no candidate was built.")  # pragma: no cover (_wait_for has raised)
