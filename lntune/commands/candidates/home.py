"""`lntune import FOLDER`: the records of candidates that were measured elsewhere come home."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from lntune import schedule
from lntune.commands import import_log
from lntune.commands.candidates import manifest
from lntune.commands.candidates.manifest import Built, Manifest, Sums
from lntune.commands.import_log import Imported
from lntune.errors import InputError, got_expected
from lntune.log import lines, records
from lntune.log.records import Record
from lntune.log.union import Fault, Union
from lntune.measure.jobs import Candidate, Outcome, record_fields
from lntune.tune import decide


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of candidates."""
    return (path / manifest.MANIFEST).is_file()


def take(folder: Path, log_dir: Path) -> Imported:
    """Add what was measured in a folder of candidates to a log, as it was written, finals with how
    certain they are. Left out is what is of no candidate of the folder, of other code, or of a
    device that it was not built for.

    Raises:
        InputError: it is no such folder, or is not what `measure.py` left.
        LogError: the log cannot be read or written.
    """
    of = manifest.read(folder)
    sums = _sums(folder)
    there = records.files(folder / manifest.RECORDS)
    names = {path.relative_to(folder).as_posix() for path in there}
    wrong = manifest.altered(folder, {**sums.files, manifest.MANIFEST: sums.manifest})
    wrong += sorted(names - set(sums.files))
    if wrong:
        remedy = "python measure.py there writes the digests anew, and goes on."
        got = f"{folder}, in which these were altered since: {', '.join(wrong[:5])}"
        raise InputError(got_expected("folder", got, "what measure.py left", remedy))
    union = Union()
    for path in there:
        union.add(path)
    known: dict[tuple[object, ...], Built] = {
        (b.case, b.candidate.schedule, _knobs(b.candidate.knobs)): b for b in of.candidates
    }
    found, faults = list[Record](), list(union.faults)
    for number, line in enumerate(union.lines(), 1):
        record = records.of_line(line.raw)
        built = known.get((record.case, record.schedule, _knobs(record.knobs)))
        why = _refused(record, built, of)
        if why:
            faults.append(Fault(str(folder / manifest.RECORDS), number, why))
        else:
            found.append(_settled(record))
    added = import_log.add(log_dir, found)
    return Imported(str(log_dir), added, len(found) - added, tuple(faults))


def _refused(record: Record, built: Built | None, of: Manifest) -> str:
    """Why a record is not of the folder, empty where it is."""
    if built is None:
        return "it is of no candidate of this folder"
    if record.code != built.code:
        return "it is of other code than the candidate that was built"
    device = record.device
    same = ("kind", "isa", "backend")
    if any(getattr(device, name) != getattr(of.device, name) for name in same):
        return f"it is of {device.name} ({device.isa}), which nothing was built for"
    rivals = [Candidate.of_rival(rival) for rival in record.rivals]
    if not {c.schedule for c in rivals} <= {b.candidate.schedule for b in of.candidates}:
        return "it names rivals of schedules that are not in this folder"
    return ""


def _settled(record: Record) -> Record:
    """A final with the winner and the certainty that tuning here would find on its samples; one of
    other code than today's as it is.
    """
    if record.role != "final" or record.status != "ok" or record.decision is not None:
        return record
    finalists = [Candidate.of_record(record), *map(Candidate.of_rival, record.rivals)]
    if any(schedule.code_of(c.schedule) != record.code for c in finalists[:1]):
        return record
    default = None
    if (given := record.default) is not None:
        default = Candidate(given.schedule, tuple(given.knobs.items()))
    outcome, decision = decide.settle(
        record.case,
        record.device,
        finalists,
        Outcome(winner=0, **record_fields(record)),
        default,
    )
    assert outcome.winner is not None
    winner = finalists[outcome.winner]
    return msgspec.structs.replace(
        record,
        schedule=winner.schedule,
        knobs=winner.knobs,
        code=schedule.code_of(winner.schedule),
        decision=decision,
        **record_fields(outcome),
    )


def _knobs(given: Mapping[str, object]) -> bytes:
    return msgspec.json.encode(given, order="sorted")


def _sums(folder: Path) -> Sums:
    try:
        with lines.opened(folder / manifest.SUMS) as file:
            return msgspec.json.decode(file.read(lines.LONGEST), type=Sums)
    except (OSError, msgspec.DecodeError) as e:
        expected = "one in which python measure.py has measured"
        raise InputError(got_expected("folder", f"{folder} ({e})", expected)) from e
