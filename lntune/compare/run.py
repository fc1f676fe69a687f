"""A comparison from the names of its sides to its results."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lntune.case import Case
from lntune.certainty import SMALLEST
from lntune.compare import judge, sides
from lntune.compare.comparison import Result
from lntune.compare.pairs import operators
from lntune.compare.sides import Contender, Side
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log import caches, records
from lntune.log.records import Record, Role
from lntune.log.wanted import ALL, Wanted
from lntune.system import paths

CPU = "cpu"


class Options(msgspec.Struct, frozen=True):
    """Where contenders are looked up: in the logs of a folder (None: wherever logs are), for the
    device of a target or `all_devices`. `across_devices` compares measurements of different
    devices; a difference below `smallest`, as a share, does not matter. `cold`:
    compared is what was measured with a cold cache.
    """

    target: str = CPU
    log_dir: Path | None = None
    all_devices: bool = False
    across_devices: bool = False
    smallest: float = SMALLEST
    cold: bool = False

    @property
    def device(self) -> Device:
        """The target's device."""
        from lntune.backends import device_of

        return device_of(self.target)

    @property
    def folders(self) -> list[Path]:
        """The folders of logs."""
        return paths.log_dirs() if self.log_dir is None else [self.log_dir]

    @property
    def text(self) -> str:
        """As a command has them, as far as they say where measurements are and go."""
        target = "" if self.target == CPU else f" --target {self.target}"
        return target + (f" --log-dir {shlex.quote(str(self.log_dir))}" if self.log_dir else "")


HERE = Options()


def parse(names: Sequence[str | Path], options: Options) -> list[Side]:
    """The sides of a comparison.

    Raises:
        InputError, UnknownNameError, LogError: see `sides.parse`; or there are fewer than two.
    """
    if len(names) < 2:  # noqa: PLR2004
        expected = "two or more: schedules, default, eager, compile, folders or files"
        raise InputError(got_expected("sides", len(names), expected))
    return [sides.parse(name, options.device.kind, options.folders) for name in names]


def compare_sides(
    compared: Sequence[Side],
    wanted: Wanted = ALL,
    options: Options = HERE,
    asked: Sequence[Case] = (),
) -> list[Result]:
    """Each side but the first against the first; what is missing is also told of cases `asked` for.

    Raises:
        InputError: there is no case that the first and another have, or they are of different
            devices or operators.
    """
    wanted = wanted._replace(ops=wanted.ops or operators(compared))
    if options.cold:
        compared = [_cold(side) for side in compared]
    log = read_log(compared, wanted, options)
    if not log and all(isinstance(side, Contender) for side in compared):
        raise _empty(wanted, options)
    results = judge.compare_records(
        compared,
        log,
        wanted,
        options.across_devices,
        options.smallest,
        asked,
        options.text,
    )
    if not any(result.cases for result in results):
        raise _nothing(results[0], compared, options)
    return results


def read_log(
    compared: Sequence[Side], wanted: Wanted = ALL, options: Options = HERE
) -> list[Record]:
    """The records in which contenders are looked up, oldest first; none where there is no
    contender.
    """
    contenders = [side for side in compared if isinstance(side, Contender)]
    if not contenders:
        return []
    roles: tuple[Role, ...] = ("final", "comparison")
    if any(side.word == "compile" for side in contenders):
        roles = (*roles, "bench")  # a final does not measure it
    device = None if options.all_devices else options.device
    read = records.read(options.folders, wanted.op, device, roles)
    return [*filter(None, map(caches.cold, read))] if options.cold else read


def _cold(side: Side) -> Side:
    """A side with what was measured with a cold cache; of a contender that is in the log."""
    if isinstance(side, Contender):
        return side
    found = [*filter(None, map(caches.cold, side.records))]
    return msgspec.structs.replace(side, records=found)


def _empty(wanted: Wanted, options: Options) -> InputError:
    """The error that says that nothing was measured yet."""
    whose = "this device" if options.target == CPU else options.target
    whose = "any device" if options.all_devices else whose
    cold = " with a cold cache" if options.cold else ""
    where = ", ".join(map(str, options.folders))
    got = f"no measurements{cold} of {whose} in {where}"
    ops = "".join(f" {op}" for op in wanted.ops[:1])
    return InputError(
        got_expected("sides", got, "some to compare", f"Run: lntune tune{ops}{options.text}")
    )


def _nothing(result: Result, compared: Sequence[Side], options: Options) -> InputError:
    """The error that says that two sides have no case in common."""
    has = {
        name: [m.case for m in result.missing if m.side == other]
        for name, other in ((result.a, result.b), (result.b, result.a))
    }
    parts = [f"{name} has {_few(cases)}" for name, cases in has.items() if cases]
    remedy = "; ".join(parts) + "." if parts and not result.commands else ""
    if result.commands:
        remedy = f"Run: {'; '.join(result.commands)}"
    elif not result.missing and all(isinstance(side, Contender) for side in compared):
        remedy = f"Run: lntune tune{options.text}"
    got = f"none that {result.a} and {result.b} have in common"
    got += " with a cold cache" if options.cold else ""
    return InputError(got_expected("cases", got, "some", remedy))


def _few(cases: Sequence[Case], most: int = 3) -> str:
    shown = ", ".join(map(str, cases[:most]))
    return shown + (f" and {len(cases) - most} more" if len(cases) > most else "")
