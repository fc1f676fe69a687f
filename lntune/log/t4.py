"""Trials in the T4 auto-tuning format that Kernel Tuner writes, and back.

A T4 file has the results of one search: a configuration, whether it is right, and the times of its
runs, in milliseconds. So there is a file for each case, device, schedule, code, threads and
versions, which T4 has no place for; they stand beside the results, under "lntune". What else a
trial has are measurements by name. Finals, comparisons and benchmarks measure several contenders
in the same rounds, which T4 has no form for: they are left out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from lntune import bounds
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log import records
from lntune.log.records import Knobs, Record, Status, Timing
from lntune.versions import Code

VERSION = "1.0.0"
Invalidity: TypeAlias = Literal[
    "timeout", "compile", "runtime", "correctness", "constraints", "correct"
]
_INVALIDITY: dict[Status, Invalidity] = {
    "ok": "correct",
    "invalid": "constraints",
    "compile": "compile",
    "run": "runtime",
    "wrong": "correctness",
    "timeout": "timeout",
}
_STATUS: dict[str, Status] = {value: status for status, value in _INVALIDITY.items()}
_MILLI = -3
_TOLERANCE = "share of the tolerance"
_EAGER = "times eager's"


class Measurement(msgspec.Struct, frozen=True):
    """Something that was measured, by name; a number, a text, or a list of these."""

    name: bounds.Name
    value: Any
    unit: bounds.Name = ""


class Times(msgspec.Struct, frozen=True):
    """What took how long, in milliseconds."""

    runtimes: Annotated[tuple[Decimal, ...], bounds.SAMPLES] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a configuration."""

    timestamp: bounds.Moment = ""
    configuration: Knobs
    times: Times
    invalidity: Invalidity
    correctness: float
    measurements: Annotated[tuple[Measurement, ...], bounds.SAMPLES] = ()
    objectives: Annotated[tuple[bounds.Name, ...], bounds.FEW] = ("time",)


class Search(msgspec.Struct, frozen=True):
    """What all results of a file are of."""

    case: Case
    device: Device
    schedule: bounds.Name
    code: Code = Code()
    threads: bounds.Count = 0
    versions: Annotated[dict[bounds.Name, bounds.Name], bounds.FEW] = {}


class File(msgspec.Struct, frozen=True):
    """A file in the T4 format; `lntune` is what a search of lntune's was of."""

    results: tuple[Result, ...]
    schema_version: bounds.Name = VERSION
    lntune: Search | None = None


def files(log: Iterable[Record]) -> dict[str, File]:
    """The trials of a log, by the path of the file that they go to below a folder."""
    groups: dict[bytes, list[Record]] = {}
    for record in log:
        if record.role == "trial":
            key = msgspec.json.encode(_search(record), order="sorted")
            groups.setdefault(key, []).append(record)
    named: dict[str, File] = {}
    for _, group in sorted(groups.items()):
        search = _search(group[0])
        path = f"{search.device.slug}/{_name(search)}"
        number = next(n for n in range(1, len(groups) + 1) if _numbered(path, n) not in named)
        named[_numbered(path, number)] = File(tuple(map(_result, group)), lntune=search)
    return named


def metadata(device: Device, versions: Mapping[str, str]) -> dict[str, Any]:
    """What T4 has of the machine and the software of results, in its metadata schema."""
    return {
        "schema_version": VERSION,
        "metadata": {
            "hardware": {"hardware_description": [msgspec.to_builtins(device)]},
            "environment": {
                "device_query": {},
                "requirements": [f"{name}=={version}" for name, version in versions.items()],
            },
        },
    }


_DECODER = msgspec.json.Decoder(File, float_hook=Decimal)


def encoded(value: Any) -> bytes:
    """JSON in which times have all of their digits."""
    plain = msgspec.json.Encoder(decimal_format="number").encode(value)
    return msgspec.json.format(plain, indent=1) + b"\n"


def decoded(text: bytes) -> File:
    """A file in the T4 format.

    Raises:
        InputError: it is none.
    """
    try:
        return _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError) as e:
        expected = f"a file in the T4 auto-tuning format {VERSION}"
        raise InputError(got_expected("file", f"another one ({e})", expected)) from e


def trial(result: Result, search: Search) -> Record:
    """The trial that a result tells of.

    Raises:
        ValueError: it holds what no record may.
    """
    plain = [m for m in result.measurements if m.unit not in (_TOLERANCE, _EAGER)]
    by_name = {m.name: m.value for m in plain}
    samples = tuple(map(_micro, result.times.runtimes))
    median, instructions = _number(by_name.get("time")), _number(by_name.get("instructions"))
    status, timings = _STATUS[result.invalidity], dict[str, Timing]()
    if median is not None:
        timings["tuned"] = Timing(samples, _micro(median))
    elif samples:
        timings["tuned"] = Timing(samples, statistics.median(samples))
    record = Record(
        case=search.case,
        device=search.device,
        threads=search.threads,
        schedule=search.schedule,
        code=search.code,
        versions=search.versions,
        knobs=result.configuration,
        status=status,
        message=_text(by_name.get("message")),
        timings=timings,
        errors=_errors(result, _TOLERANCE),
        versus_eager=_errors(result, _EAGER),
        busy={"True": True, "False": False}.get(_text(by_name.get("busy"))),
        clocks=tuple(int(n) for n in map(_number, _list(by_name.get("clocks"))) if n is not None),
        instructions=None if instructions is None else float(instructions),
        noticed=tuple(map(_text, _list(by_name.get("noticed")))),
        run=_text(by_name.get("run")),
        time=result.timestamp,
    )
    return records.of_line(msgspec.json.encode(record))  # as anybody's is read


def _search(record: Record) -> Search:
    return Search(
        record.case,
        record.device,
        record.schedule,
        record.code,
        record.threads,
        record.versions,
    )


def _name(search: Search) -> str:
    case = search.case
    words = (case.op, f"{case.rows}x{case.hidden}", case.dtype, case.variant, search.schedule)
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(filter(None, words)))[:150]


def _numbered(path: str, number: int) -> str:
    return f"{path}.json" if number == 1 else f"{path}-{number}.json"


def _result(record: Record) -> Result:
    tuned, measured = record.timings.get("tuned"), list[Measurement]()
    if tuned is not None:
        measured.append(Measurement("time", _milli(tuned.median_us), "ms"))
    for unit, errors in ((_TOLERANCE, record.errors), (_EAGER, record.versus_eager)):
        measured += [Measurement(n, Decimal(repr(e)), unit) for n, e in errors.items()]
    words = {"run": record.run, "message": record.message}
    words["busy"] = "" if record.busy is None else str(record.busy)
    measured += [Measurement(name, value) for name, value in words.items() if value]
    if record.noticed:
        measured.append(Measurement("noticed", list(record.noticed)))
    if record.clocks:
        measured.append(Measurement("clocks", [Decimal(c) for c in record.clocks], "MHz"))
    if record.instructions is not None:
        measured.append(Measurement("instructions", Decimal(repr(record.instructions))))
    return Result(
        timestamp=record.time,
        configuration=record.knobs,
        times=Times(tuple(map(_milli, tuned.samples_us)) if tuned else ()),
        invalidity=_INVALIDITY[record.status],
        correctness=float(record.status == "ok"),
        measurements=tuple(measured),
    )


def _milli(us: float) -> Decimal:
    return Decimal(repr(us)).scaleb(_MILLI)


def _micro(ms: Decimal) -> float:
    return float(ms.scaleb(-_MILLI))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return Decimal(value)


def _errors(result: Result, unit: str) -> dict[str, float]:
    numbers = {m.name: _number(m.value) for m in result.measurements if m.unit == unit}
    return {name: float(number) for name, number in numbers.items() if number is not None}
