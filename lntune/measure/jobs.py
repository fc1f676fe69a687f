"""What a tuning run asks of the process that builds, checks and times kernels, and what that
answers: plain data that crosses between processes as JSON.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lntune import knobs
from lntune import schedule as schedules
from lntune.case import Case
from lntune.device import Device
from lntune.kernels.candidate_facts import Facts
from lntune.log.records import Record, Rival, Setting, Status, Timing
from lntune.schedule import Schedule


class Candidate(msgspec.Struct, frozen=True):
    """A schedule with its knobs, as plain data: hashable, and ready to cross to another process."""

    schedule: str
    items: tuple[tuple[str, knobs.Value], ...]

    @classmethod
    def of(cls, name: str, setting: Any) -> Candidate:
        """The candidate of a schedule's name and a knob dataclass."""
        return cls(name, tuple(knobs.to_dict(setting).items()))

    @classmethod
    def of_record(cls, record: Record) -> Candidate:
        """The candidate that was measured."""
        return cls(record.schedule, tuple(record.knobs.items()))

    @classmethod
    def of_rival(cls, rival: Rival) -> Candidate:
        """The candidate that a finalist was."""
        return cls(rival.schedule, tuple(rival.knobs.items()))

    @property
    def as_setting(self) -> Setting:
        """The same as a record has it."""
        return Setting(self.schedule, self.knobs)

    @property
    def knobs(self) -> dict[str, knobs.Value]:
        """The knobs as a dictionary, as the log has them."""
        return dict(self.items)

    def resolved(self, op: str) -> tuple[Schedule, Any]:
        """The schedule, of an operator's, and its knobs as the dataclass that it takes.

        Raises:
            LntuneError: there is no such schedule, or no such knob.
        """
        return schedules.resolve(self.schedule, op, self.knobs)


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Make the device ready, and say what keeps it from working. The device has to be here."""

    device: Device


class Build(msgspec.Struct, frozen=True, tag="build"):
    """Put a kernel into the cache, as far as it is worth it; the device need not be here."""

    case: Case
    device: Device
    candidate: Candidate


class Check(msgspec.Struct, frozen=True, tag="check"):
    """Build a kernel and check its outputs; the device need not be here: a GPU's kernel runs in the
    emulator, on rows as short as its knobs allow.
    """

    case: Case
    device: Device
    candidate: Candidate


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Build a kernel and check its outputs on one thread, as is done while other processes do the
    same; a Try of the same case and candidate that comes next has both done.
    """

    case: Case
    device: Device
    candidate: Candidate


class Try(msgspec.Struct, frozen=True, tag="try"):
    """Build a kernel, check its outputs, and time it for about `seconds`; where `best_us` says what
    the best of the case so far took, shorter when it is far behind and longer when it may be the
    best, see timing.race. In the same rounds as `reference`, where that is given and can be built,
    which is right and takes `unit_us`: `best_us` is at that pace, see log/pace.py.
    """

    case: Case
    device: Device
    candidate: Candidate
    seconds: float
    seed: int = 0
    best_us: float | None = None
    reference: Candidate | None = None
    unit_us: float | None = None


class Heat(msgspec.Struct, frozen=True, tag="heat"):
    """Time candidates that were tried, and are right, against each other for about `seconds`, with
    their outputs given: all of them for a part of the time, the better half for another, and so on.
    """

    case: Case
    device: Device
    candidates: tuple[Candidate, ...]
    seconds: float
    seed: int = 0


class Final(msgspec.Struct, frozen=True, tag="final"):
    """Time finalists for about `seconds` against each other, against `default` (what serves the
    case where nothing is tuned), eager mode and a copy; where that is wanted, also against
    torch.compile, which takes seconds to make. For about `beside_seconds` more with the other cache
    (see Backend.beside).

    `retry_seconds` may be spent besides, to measure again what other work on the machine disturbed.
    Where the ratios of candidates, and of `sides` (of "default", "eager", "compile"), to each other
    are not precise enough after `seconds`, it takes up to `most_seconds`.
    """

    case: Case
    device: Device
    candidates: tuple[Candidate, ...]
    seconds: float
    retry_seconds: float = 0.0
    seed: int = 0
    default: Candidate | None = None
    with_compile: bool = False
    beside_seconds: float = 0.0
    most_seconds: float = 0.0
    sides: tuple[str, ...] = ()


class Training(msgspec.Struct, frozen=True, tag="training"):
    """Time a step of training, a forward and a backward as autograd runs them for a user, against
    eager mode's for about `seconds`: `case` and `candidate` are its backward, `forward` makes the
    forward. What other work disturbs is measured again as long as `retry_seconds` allow it.
    """

    case: Case
    device: Device
    candidate: Candidate
    forward: Candidate
    seconds: float
    retry_seconds: float = 0.0
    seed: int = 0


Job = Open | Build | Check | Prepare | Try | Heat | Final | Training


class Outcome(msgspec.Struct, frozen=True):
    """What came of a job.

    `timings` has "tuned": what was tried, or of finalists the fastest, whose place among the job's
    candidates is `winner`; in a final also "eager", "copy", and "default" where that is given and
    works, and "compile" where it was wanted and works (`message` says why not); `rivals` are the
    finalists that did not win. `errors` and `versus_eager` are those of the same kernel, see
    records.Record, as are `cold`, `warm`, `training`, `forward` and `noticed`. `order` are the
    places of a heat's candidates, the best first.

    `facts` are what a job that only builds or checks found out about a GPU's kernel, and `seconds`
    what building took it; `clocks` a GPU's in MHz; `blameless` says that the machine kept it from
    being built (a full disk), not anything about the candidate; `lost` says that the process can do
    no more: its GPU's context is broken. `instructions` are as in records.Record.
    """

    status: Status
    message: str = ""
    timings: dict[str, Timing] = {}
    errors: dict[str, float] = {}
    versus_eager: dict[str, float] = {}
    busy: bool | None = None
    winner: int | None = None
    rivals: tuple[Rival, ...] = ()
    clocks: tuple[int, ...] = ()
    facts: Facts | None = None
    seconds: float = 0.0
    blameless: bool = False
    lost: bool = False
    instructions: float | None = None
    cold: dict[str, Timing] = {}
    warm: dict[str, Timing] = {}
    noticed: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    training: dict[str, Timing] = {}
    forward: Setting | None = None


def record_fields(source: Outcome | Record) -> dict[str, Any]:
    """What came of a job, or what a record holds of one, as the fields of a new record."""
    return {
        name: getattr(source, name)
        for name in (
            *("status", "message", "timings", "errors", "versus_eager"),
            *("busy", "rivals", "clocks", "instructions", "cold", "warm", "noticed"),
            *("training", "forward"),
        )
    }
