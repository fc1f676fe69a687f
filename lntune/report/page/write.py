"""Pages written: facts and charts through the templates beside this file. All that comes from logs
is escaped on its way, and a content security policy keeps whatever would slip through from running
or reaching out.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lntune import __version__
from lntune.case import bucket_label
from lntune.compare.comparison import Result
from lntune.compare.summary import summarize
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log.records import Record, Timing
from lntune.log.wanted import Wanted
from lntune.report.comparisons import lines
from lntune.report.page import axes, cells, charts, compared, heat, packed, trials
from lntune.report.page.facts import CaseFacts, DeviceFacts, gather
from lntune.report.survey import asked_records
from lntune.report.tables import micros, number, percent
from lntune.schedule import Schedule
from lntune.system import scratch
from lntune.words import counted

TEMPLATES = Path(__file__).parent / "templates"
_DIGITS = 6
"""Significant digits of figures in a page's data."""


def report(devices: Sequence[DeviceFacts], command: str) -> str:
    """The page of a report; `command` is what prints it again."""
    first, sections, cases = 0, [], []
    versions: list[dict[str, str]] = []
    for place, facts in enumerate(devices):
        sections.append(_section(facts, first))
        cases += [_data(c, place, versions) for c in facts.cases]
        first += len(facts.cases)
    data = {"devices": [d.device for d in devices], "versions": versions, "cases": cases}
    return _render(
        "report.html.j2",
        title="lntune report",
        kind="report",
        command=command,
        data=data,
        sections=sections,
        levels=heat.LEVELS,
        legend=heat.legend(),
        beyond=trials.BEYOND,
        enough=trials.ENOUGH,
    )


def of_logs(
    folders: Sequence[Path],
    schedules: Mapping[str, Schedule],
    command: str,
    wanted: Wanted,
    device: Device | None = None,
) -> str:
    """The page of what is asked for of folders of logs, of one device where given."""
    groups = asked_records(folders, wanted, device, ())
    return report([gather(of, group, schedules, wanted) for of, group in groups], command)


def compare(results: Sequence[Result], command: str) -> str:
    """The page of a comparison: each of `results` against the same side A; `command` is what prints
    it again.
    """
    cases = [c for result in results for c in result.cases]
    axis, first, sections = compared.scale(cases), 0, []
    for result in results:
        sections.append(
            {
                "result": result,
                "summary": summarize(result),
                "counts": result.counts(),
                "groups": compared.groups(result.cases, axis, first),
                "table": cells.compare(result.cases, first),
                # what is missing has a section of its own
                "lines": lines(msgspec.structs.replace(result, missing=[], commands=[])),
            }
        )
        first += len(result.cases)
    return _render(
        "compare.html.j2",
        title=f"lntune compare: {', '.join([results[0].a, *(r.b for r in results)])}",
        kind="compare",
        command=command,
        data={"cases": [_trimmed(c) for c in cases]},
        sections=sections,
        ticks=axis.ticks(),
    )


def _section(facts: DeviceFacts, first: int) -> dict[str, Any]:
    """What a device's part of the page is made of."""
    return {
        "facts": facts,
        "first": first,
        "operators": charts.operators(facts),
        "heat_maps": heat.heat_maps(facts, first),
        "plots": [p for p in (charts.roofline(facts, first), charts.bandwidth(facts, first)) if p],
        "curves": charts.curves(facts, first),
        "table": cells.report(facts.cases, first),
    }


def _data(c: CaseFacts, device: int, versions: list[dict[str, str]]) -> dict[str, Any]:
    """A case as the page's script has it: the record without its samples, and the figures that are
    reckoned from it.
    """
    record = _brief(c.record)
    if c.record.versions:
        if c.record.versions not in versions:
            versions.append(c.record.versions)
        record["versions"] = versions.index(c.record.versions)
    row = c.row
    figures = {
        "speedup": row.speedup,
        "over_compile": row.over_compile,
        "over_default": row.over_default,
        "gbps": row.gbps,
        "of_copy": row.of_copy,
        "gflops": c.gflops,
        "spread": row.spread,
        "disturbed": row.disturbed,
        "stale": row.stale or None,
        "trials": c.curve.trials if c.curve else None,
        "found": c.curve.best[-1][0] if c.curve and c.curve.best else None,
    }
    return {"device": device, "figures": _trimmed(figures), "record": record}


def _brief(record: Record) -> dict[str, Any]:
    """A record as JSON has it, without what is empty, its device and its samples, whose median and
    number stay.
    """
    facts: dict[str, Any] = msgspec.to_builtins(record)
    del facts["device"]
    facts["timings"] = {name: _median(timing) for name, timing in record.timings.items()}
    for fact, rival in zip(facts["rivals"], record.rivals, strict=True):
        fact["timing"] = _median(rival.timing)
    trimmed: dict[str, Any] = _trimmed(facts)
    return trimmed


def _median(timing: Timing) -> dict[str, float]:
    return {"median_us": timing.median_us, "samples": len(timing.samples_us)}


def _trimmed(value: Any) -> Any:
    """A value as JSON has it, without fields that are empty, and with as many digits as figures are
    worth.
    """
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _trimmed(v) for name, v in value.items() if v not in _EMPTY}
    if isinstance(value, (list, tuple)):
        return [_trimmed(one) for one in value]
    if isinstance(value, msgspec.Struct):
        return _trimmed(msgspec.to_builtins(value))
    return value


_EMPTY: tuple[Any, ...] = (None, "", {}, (), [])


def _render(template: str, *, data: dict[str, Any], **values: Any) -> str:
    """A template with its values and what all pages have."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shapes: packed.Shapes = []
    return (
        _environment()
        .get_template(template)
        .render(
            data={"packed": packed.pack(msgspec.to_builtins(data), shapes), "shapes": shapes},
            script=script,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
            " img-src data:; base-uri 'none'; form-action 'none'",
            version=__version__,
            **values,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(TEMPLATES),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"micros": micros, "number": number, "percent": percent}
    environment.globals |= {"axes": axes, "bucket_label": bucket_label, "counted": counted}
    # numbers that JSON does not have become null, and `<` a harmless \u003c
    environment.policies["json.dumps_function"] = lambda value, **_: msgspec.json.encode(
        value
    ).decode()
    return environment


def save(path: Path, page: str) -> None:
    """Put a page into a file, whole or not at all; what is there and is no file, such as
    /dev/stdout or a pipe, is written to and stays what it is.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(page, encoding="utf-8")
            return
        with scratch.whole(Path(os.path.realpath(path))) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as e:
        expected, reason = "a file that can be written", f"{e.strerror or e}."
        raise InputError(got_expected("--html", path, expected, reason)) from e
