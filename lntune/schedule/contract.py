"""What a schedule is: a way to turn an operator's definition into code, with knobs to set."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from lntune import knobs
from lntune.case import Case
from lntune.device import Device
from lntune.errors import ScheduleError
from lntune.system import paths
from lntune.versions import Code


class Told(NamedTuple):
    """What came of knobs: microseconds a call, infinite where they failed."""

    setting: Any
    microseconds: float


class Proposals(Protocol):
    """A search of a schedule's own. `note` is said of it at the end of a run."""

    note: str

    def ask(self) -> Sequence[Any]:
        """Some knobs to try next, none of them twice; none at the end."""

    def tell(self, told: Sequence[Told]) -> None:
        """What came of knobs, of these and of what earlier runs have tried."""


@dataclass(frozen=True)
class Schedule:
    """One way to turn an operator's definition into code."""

    name: str
    op: str
    kind: str
    """Device kind: "cpu" or "gpu"."""
    knobs: type
    """Frozen dataclass made of `knobs.knob` fields."""
    default: Callable[[Case, Device], Any]
    """(case, device) -> knobs that are valid and good without any tuning."""
    valid: Callable[[Any, Case, Device], str | None]
    """(knobs, case, device) -> why they do not fit, or None."""
    apply: Callable[[Case, Any, Device], Any]
    """(case, knobs, device) -> the scheduled IRModule. Pure: the same arguments give the same
    code.
    """
    version: int = 0
    """Raised when the code that `apply` makes changes; 0 where none is declared, and a hash of the
    file serves instead.
    """
    seeds: Callable[[Case, Device], Sequence[Any]] = field(default=lambda *_: (), compare=False)
    """(case, device) -> knobs to be tried first beside the default ones, the most promising first;
    those that do not fit are passed over.
    """
    propose: Callable[[Case, Device, int], Proposals] | None = field(default=None, compare=False)
    """(case, device, seed) -> what proposes knobs, where there are too many to list. Such a
    schedule is tuned only where it is named, and serves no call that nothing is tuned for.
    """
    apart: Callable[[Any], Any] = field(default=lambda setting: setting, compare=False)
    """knobs -> those nearest to them that take matrices whose rows lie anywhere in memory."""
    path: Path = field(default=Path(), compare=False)
    code: Code = field(default=Code(), compare=False)
    """What tells the code it makes from that of other versions; filled in by the loader."""

    @property
    def shipped(self) -> bool:
        """True for a schedule that comes with lntune, whose tests ask it all there is to ask."""
        return self.path.is_relative_to(paths.content("schedules"))

    def untuned(self, case: Case, device: Device) -> Any:
        """The default knobs for a case.

        Raises:
            ScheduleError: `default` fails or gives something else.
        """
        try:
            setting = self.default(case, device)
        except Exception as e:
            self._failed("default", case, e)
        if not isinstance(setting, self.knobs):
            raise ScheduleError(
                f"{self.path}: default() of {self.name!r} gave {setting!r} for {case}, expected"
                f" {self.knobs.__name__}."
            )
        return setting

    def first(self, case: Case, device: Device) -> list[Any]:
        """The knobs to be tried first beside the default ones.

        Raises:
            ScheduleError: `seeds` fails.
        """
        try:
            return list(self.seeds(case, device))
        except Exception as e:
            self._failed("seeds", case, e)

    def setting(self, given: Mapping[str, Any]) -> Any:
        """The knobs that a dictionary stands for, as a log or another process has it.

        Raises:
            UnknownNameError: a name that is no knob of this schedule.
            InputError: a value the knob may not take.
        """
        return knobs.from_dict(self.knobs, given)

    def reason_invalid(self, setting: Any, case: Case, device: Device) -> str | None:
        """Why the knobs do not fit, or None.

        Raises:
            ScheduleError: `valid` fails or gives something else.
        """
        try:
            reason = self.valid(setting, case, device)
        except Exception as e:
            self._failed("valid", case, e)
        if reason is not None and not isinstance(reason, str):
            expected = "why the knobs do not fit, or None"
            raise ScheduleError(
                f"{self.path}: valid() of {self.name!r} gave {reason!r} for {case}, expected"
                f" {expected}."
            )
        return reason

    def space(self, case: Case, device: Device) -> list[Any]:
        """Every valid knob setting for the case, but for other values of knobs that are tried last.

        Raises:
            ScheduleError: the settings cannot be made, or `valid` fails.
        """
        try:
            return list(
                knobs.enumerate_space(self.knobs, lambda k: self.reason_invalid(k, case, device))
            )
        except ScheduleError:
            raise
        except Exception as e:
            self._failed(self.knobs.__name__, case, e)

    def refined(self, setting: Any, case: Case, device: Device) -> list[Any]:
        """The valid settings that differ from one in knobs that are tried last.

        Raises:
            ScheduleError: `valid` fails.
        """
        return [k for k in knobs.refined(setting) if self.reason_invalid(k, case, device) is None]

    def _failed(self, function: str, case: Case, e: Exception) -> NoReturn:
        raise ScheduleError(
            f"{self.path}: {function}() of {self.name!r} failed on {case}{self.line(e)}:"
            f" {type(e).__name__}: {e}"
        ) from e

    def line(self, e: Exception) -> str:
        """Where in the schedule's file an error comes from, as " in line 12"; empty where it comes
        from elsewhere.
        """
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if Path(frame.filename) == self.path
        ]
        return f" in line {lines[-1]}" if lines else ""
