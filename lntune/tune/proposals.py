"""Candidates of schedules that propose their knobs: their search runs in a process of its own,
which is asked for some candidates at a time and told what came of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import msgspec

from lntune import knobs
from lntune import schedule as schedules
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, ScheduleError, ToolchainError, gist
from lntune.measure import serving, worker
from lntune.measure.jobs import Candidate, Outcome
from lntune.schedule.contract import Proposals, Told
from lntune.search import Budget, Evaluate
from lntune.words import counted

_PATIENCE = 600.0
"""Seconds that a batch of proposals may take where the run has no limit."""
_SHORTEST = 1.0


class Ask(msgspec.Struct, frozen=True):
    """Some knobs of a schedule, please. `told` is what came of others since the last time, or since
    ever where this is the first for the case: knobs and microseconds, None where they failed.
    """

    case: Case
    device: Device
    schedule: str
    seed: int
    first: bool
    told: tuple[tuple[dict[str, knobs.Value], float | None], ...] = ()


class Proposed(msgspec.Struct, frozen=True):
    """Knobs to try, none at the end; or why there are none."""

    settings: tuple[dict[str, knobs.Value], ...] = ()
    note: str = ""
    error: str = ""
    missing: bool = False
    """The error is something that the machine lacks."""


class Proposer(worker.Worker):
    """The process of the searches. Use as a context manager."""

    program = (
        "import sys; sys.path[:] = sys.argv[3:]; from lntune.tune.proposals import main;"
        " main(int(sys.argv[1]), int(sys.argv[2]))"
    )

    def __enter__(self) -> Proposer:
        return self

    def ask(self, job: Ask, seconds: float) -> Proposed:
        """What is proposed within `seconds`; an error that begins with "no answer" where nothing
        is.
        """
        raw = self.answer(job, seconds)
        if isinstance(raw, Outcome):
            return Proposed(error=raw.message)
        return msgspec.json.decode(raw, type=Proposed)


class Course:
    """The proposals of one schedule for one case, tried until the budget is spent."""

    def __init__(
        self,
        proposer: Proposer,
        case: Case,
        device: Device,
        name: str,
        seed: int,
    ) -> None:
        self._proposer = proposer
        self._case, self._device, self._name, self._seed = case, device, name, seed
        self.asking = 0.0
        """Seconds that the proposals took."""
        self.tried = 0
        self.note = ""
        self.end = ""
        """Why it ended before the budget was spent."""

    def __str__(self) -> str:
        """What is said of it at the end of a run."""
        name = f"{self._name}, {self.note}" if self.note else self._name
        early = f"; it ended early: {self.end}" if self.end else ""
        took = counted(round(self.asking), "second")
        return f"{name}: its own search took {took} for {counted(self.tried, 'candidate')}{early}"

    def search(self, evaluate: Evaluate, budget: Budget, known: Mapping[Candidate, float]) -> None:
        """Try what is proposed. `known` is what earlier runs have tried.

        Raises:
            ToolchainError: the machine lacks what the schedule proposes with.
        """
        told = [(c.knobs, us) for c, us in known.items() if c.schedule == self._name]
        first = True
        while not budget.spent:
            begun = time.monotonic()
            job = Ask(
                self._case,
                self._device,
                self._name,
                self._seed,
                first,
                tuple((given, us if math.isfinite(us) else None) for given, us in told),
            )
            limit = max(_SHORTEST, min(_PATIENCE, budget.seconds_left))
            proposed = self._proposer.ask(job, limit)
            self.asking += time.monotonic() - begun
            self.note = proposed.note or self.note
            if proposed.missing:
                raise ToolchainError(proposed.error)
            if proposed.error:
                late = limit < _PATIENCE and time.monotonic() - begun >= limit
                self.end = "" if late else proposed.error
                return
            if not proposed.settings:
                self.end = "its search found nothing more to try"
                return
            first, told = False, []
            for setting in proposed.settings:
                if budget.spent:
                    return
                candidate = Candidate(self._name, tuple(setting.items()))
                told.append((setting, evaluate(candidate)))
                self.tried += 1


class Answers:
    """What the process does: one search at a time, of the case that was asked for last."""

    def __init__(self) -> None:
        self._of: tuple[Case, str] | None = None
        self._proposals: Proposals | None = None

    def do(self, job: Ask) -> Proposed:
        """Answer one request."""
        try:
            proposals = self._current(job)
            schedule = schedules.get(job.schedule)
            told = [
                Told(schedule.setting(given), math.inf if us is None else us)
                for given, us in job.told
            ]
            proposals.tell(told)
            settings = tuple(knobs.to_dict(setting) for setting in proposals.ask())
        except ToolchainError as e:
            return Proposed(error=str(e), missing=True)
        except LntuneError as e:
            return Proposed(error=str(e))
        except Exception as e:
            return Proposed(error=f"{type(e).__name__}: {gist(e)}")
        return Proposed(settings, proposals.note)

    def _current(self, job: Ask) -> Proposals:
        key = job.case, job.schedule
        if job.first or self._of != key or self._proposals is None:
            schedule = schedules.get(job.schedule)
            if schedule.propose is None:
                raise ScheduleError(f"schedule {schedule.name!r} proposes no knobs.")
            self._proposals, self._of = schedule.propose(job.case, job.device, job.seed), key
        return self._proposals


def main(answers: int, threads: int) -> None:
    """The process."""
    jobs, own = msgspec.json.Decoder(Ask), Answers()
    serving.serve(
        answers, threads, lambda content: msgspec.json.encode(own.do(jobs.decode(content))), _ready
    )


def _ready() -> None:
    """The compiler."""
    from lntune.kernels import compiler

    compiler.warm_up()
