"""`lntune show --diff A B`: the code of two schedules or settings of their knobs."""

from __future__ import annotations

import msgspec

from lntune import schedule
from lntune.case import Case
from lntune.commands import compare
from lntune.compare import sides
from lntune.compare.run import Options
from lntune.errors import InputError, got_expected
from lntune.kernels import compiler
from lntune.knobs import Value
from lntune.log import records, select
from lntune.measure.jobs import Candidate


class Code(msgspec.Struct, frozen=True):
    """A kernel as text, by the name it was asked for."""

    name: str
    schedule: str
    knobs: dict[str, Value]
    text: str


def code(name: str, case: Case, options: Options, form: str) -> Code:
    """The code of a case in one of compiler.FORMS: of a schedule with the best knobs that were
    measured, of those given (`cached_rows:lanes=4`) where some are, else with its default knobs; of
    "default", what serves where nothing is tuned; or of "tuned", what a final has found best.

    Raises:
        InputError, UnknownNameError: the name stands for no kernel of the case.
        ScheduleError, BuildError: the kernel cannot be made.
    """
    device = options.device
    side = sides.parse_contender(name, device.kind)
    if side is None or not (side.schedule or side.word in ("default", "tuned")):
        expected = "a schedule, with knobs or without, default or tuned"
        raise InputError(got_expected("--diff", repr(name), expected))
    chosen = _candidate(side, case, options)
    resolved, setting = chosen.resolved(case.op)
    text = compiler.show(case, resolved, setting, device, form)
    return Code(name, chosen.schedule, chosen.knobs, text)


def _candidate(side: sides.Contender, case: Case, options: Options) -> Candidate:
    device = options.device
    if side.word == "default":
        found = select.untuned(case.typical, device, schedule.for_op(case.op, device.kind))
        if not found.schedule:
            raise compare.UnfitSideError(f"no schedule's default knobs fit {case}")
        return Candidate.of(found.schedule, found.setting)
    known = compare.by_case(options, {case.op}).get(records.Key.of(case), [])
    if side.schedule:
        return compare.candidate(side, case, device, known)
    finals = records.finals(known)
    if not finals:
        raise compare.UnfitSideError(f"nothing is tuned for {case}")
    return Candidate.of_record(finals[records.Key.of(case)])
