"""What `lntune tune` says when it is over: of cases without a result, and of results that do not
count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lntune.log import select
from lntune.log.records import Record
from lntune.report.columns import whole
from lntune.report.tables import NAMED
from lntune.words import counted


def untuned_lines(untuned: Mapping[str, str]) -> list[str]:
    """Cases that were not tuned and why, those that share a reason in one sentence."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in untuned.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        if len(names) == 1:
            lines.append(f"not tuned: {names[0]}: {reason}")
            continue
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = f"{'; '.join(names[:NAMED])}{more}"
        lines.append(f"not tuned: {counted(len(names), 'case')}, {reason}: {listed}")
    return lines


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
