"""Records as they are of a cold cache."""

from __future__ import annotations

import msgspec

from lntune.log.records import Record, Timing


def cold(record: Record) -> Record | None:
    """The record with what it has of a cold cache in the place of `timings` and of its rivals';
    None where it has nothing of that. Where it has those of a warm one besides, as on GPUs,
    `timings` are that already.
    """
    if record.warm:
        return record
    if not record.cold:
        return None
    timings = {name: _or_same(t, record.timings.get(name)) for name, t in record.cold.items()}
    rivals = tuple(
        msgspec.structs.replace(r, timing=_or_same(r.cold, r.timing))
        for r in record.rivals
        if r.cold
    )
    # steps of training are of a warm one
    return msgspec.structs.replace(record, timings=timings, rivals=rivals, training={})


def _or_same(timing: Timing, other: Timing | None) -> Timing:
    """A timing, or where it has no samples the one that it stands for."""
    return timing if timing.samples_us or other is None else other
