"""What `lntune tune` says when it is over: of its trials, of cases without a result, and of results
that do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lntune.log import select
from lntune.log.records import Record
from lntune.report.columns import whole
from lntune.report.failures import by_kind, lines
from lntune.report.tables import NAMED
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.tune import Summary


def summary_lines(summary: Summary, pace: float | None) -> list[str]:
    """What a run did: trials by what came of them, where they are logged, why some failed, which
    cases have no result, and what else is to be said. `pace`: verified trials a second.
    """
    statuses = by_kind(summary.statuses) or "none"
    speed = "" if pace is None else f", {pace:.1f} verified trials a second"
    counts = f"{counted(summary.trials, 'trial')} ({statuses}) in {summary.seconds:.0f} s{speed}"
    if summary.earlier:
        counts += f", beside {summary.earlier.total()} of earlier runs ({by_kind(summary.earlier)})"
    interrupted = " (interrupted)" if summary.interrupted else ""
    return [
        f"{counts}; log in {whole(summary.log_dir)}{interrupted}",
        *(f"failed: {line}" for line in lines(summary.failures.reasons())),
        *untuned_lines(summary.untuned),
        *(f"note: {note}" for note in summary.notes),
    ]


def untuned_lines(untuned: Mapping[str, str]) -> list[str]:
    """Cases that were not tuned and why, those that share a reason in one sentence."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in untuned.items():
        by_reason.setdefault(reason, []).append(name)
    said = []
    for reason, names in by_reason.items():
        if len(names) == 1:
            said.append(f"not tuned: {names[0]}: {reason}")
            continue
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = f"{'; '.join(names[:NAMED])}{more}"
        said.append(f"not tuned: {counted(len(names), 'case')}, {reason}: {listed}")
    return said


def disturbed_lines(finals: Sequence[Record], option: str) -> list[str]:
    """The commands that measure again what other work disturbed; `option` is what a command for the
    device has beside.
    """
    disturbed = [record.case for record in finals if record.disturbance]
    if not disturbed:
        return []
    commands = "; ".join(map(whole, select.tune_commands(disturbed, option)))
    which = f"{counted(len(disturbed), 'case')} disturbed by other work on the machine"
    return [f"note: {which}; measured again, when it is quiet, by: {commands}"]
