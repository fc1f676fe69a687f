"""From records to tables: ratios, geomeans, the text of a table, and the verdicts of a
comparison.
"""

from __future__ import annotations

import io
import json
import random
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console, RenderableType

from lntune.case import Case
from lntune.commands.check import Result
from lntune.device import Device
from lntune.log.records import Record, Timing
from lntune.report.columns import WIDE
from lntune.report.output import Output, print_table
from lntune.report.rows import geomean, row_of, rows_of, spread, summary
from lntune.report.tables import (
    cases_table,
    console,
    micros,
    number,
    percent,
    ratio_text,
    summary_lines,
)
from lntune.report.verdicts import verdict_lines, verdict_table
from lntune.timing import pairwise

GOLDEN = Path(__file__).parent / "golden"
HERE = Device("cpu", "Some CPU", "x86-64-v3", 4)
THERE = Device("cpu", "Other CPU", "x86-64-v4", 8)


def timing(*samples: float) -> Timing:
    """A contender's samples in microseconds."""
    return Timing(samples, statistics.median(samples))


def record(
    hidden: int = 1024,
    rows: int = 512,
    dtype: str = "float32",
    device: Device = HERE,
    **fields: Any,
) -> Record:
    """A final record, measured by default as eager 100, tuned 50, copy 40, default 60 us."""
    timings = fields.pop(
        "timings",
        {"eager": timing(100), "tuned": timing(50), "copy": timing(40), "default": timing(60)},
    )
    values: dict[str, Any] = {
        "role": "final",
        "threads": 2,
        "schedule": "cached_rows",
        "knobs": {"lanes": 4, "parallel": True},
    }
    values |= {"status": "ok", "time": "2026-01-02T03:04:05+00:00", **fields}
    return Record(
        case=Case("layer_norm", hidden, dtype, rows), device=device, timings=timings, **values
    )


def text(renderable: RenderableType, width: int = WIDE) -> str:
    """What a console without colours prints."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


# --- figures


def test_a_row_holds_medians_ratios_and_bandwidth() -> None:
    """speedup = eager / tuned, over default likewise, GB/s from the bytes that must move, its share
    of a copy = copy / tuned.
    """
    row = row_of(record(versus_eager={"y": 1.5, "mean": 0.5}))
    assert (row.eager_us, row.tuned_us, row.copy_us, row.default_us, row.compile_us) == (
        100,
        50,
        40,
        60,
        None,
    )
    assert (row.speedup, row.over_default, row.of_copy, row.error) == (
        2,
        pytest.approx(1.2),
        pytest.approx(0.8),
        1.5,
    )
    assert row.gbps == pytest.approx((2 * 512 * 1024 * 4 + 2 * 1024 * 4) / 50e-6 / 1e9)
    assert (row.bucket, row.knobs) == ("128-1023", "lanes=4 parallel")


def test_over_better_is_against_the_faster_rival() -> None:
    """Against the better of eager and torch.compile, whichever that is; unknown where torch.compile
    was not measured.
    """
    eager, slow, fast = timing(100), timing(150), timing(75)
    assert (
        row_of(record(timings={"eager": eager, "compile": slow, "tuned": timing(50)})).over_better
        == 2
    )
    assert (
        row_of(record(timings={"eager": eager, "compile": fast, "tuned": timing(50)})).over_better
        == 1.5
    )
    assert row_of(record()).over_better is None


def test_what_was_not_measured_is_none() -> None:
    """A record of the kernel and a copy alone has no eager figures and no ratios to them; one of
    eager alone no tuned ones.
    """
    row = row_of(record(timings={"tuned": timing(50), "copy": timing(40)}))
    assert (row.eager_us, row.speedup, row.over_default, row.spread, row.error) == (None,) * 5
    row = row_of(record(timings={"eager": timing(50)}, knobs={}))
    assert (row.tuned_us, row.speedup, row.gbps, row.of_copy) == (None,) * 4


def test_a_record_of_an_operator_that_is_gone_still_shows() -> None:
    """A log may hold an operator this version does not know: times are shown, bandwidth is not."""
    base = record()
    row = row_of(
        msgspec.structs.replace(base, case=msgspec.structs.replace(base.case, op="once_there"))
    )
    assert (row.speedup, row.gbps) == (2, None)


def test_ratios_are_taken_within_rounds() -> None:
    """The ratio is the median of the rounds' own ratios, which a clock that slows down for everyone
    does not move.
    """
    slow, fast = timing(10, 20, 40, 80), timing(5, 10, 20, 40)
    assert pairwise(slow, fast) == 2
    assert pairwise(timing(10, 20, 90), timing(5, 20, 30)) == 2
    assert pairwise(timing(30, 30), timing(10, 10, 20)) == 3, (
        "rounds that do not match: the ratio of medians"
    )
    assert pairwise(None, fast) is pairwise(slow, None) is pairwise(slow, timing(0)) is None


def test_spread_is_the_distance_of_quartiles() -> None:
    """Quartiles over the median; fewer than four samples, or a clock that stood still, say
    nothing.
    """
    assert spread(timing(8, 9, 10, 11, 12)) == pytest.approx(0.2)
    assert spread(timing(8, 9, 10)) is spread(None) is spread(timing(0, 0, 0, 0)) is None


def test_geomean() -> None:
    """The n-th root of the product of what is there."""
    assert geomean([2, None, 8]) == pytest.approx(4)
    assert geomean([None]) is geomean([]) is None


def test_rows_are_in_the_order_a_person_looks_for_them() -> None:
    """By dtype, hidden size, rows; whatever order they were measured in."""
    shuffled = [
        record(hidden, rows, dtype)
        for hidden in (1024, 64)
        for rows in (512, 1)
        for dtype in ("float32", "bfloat16")
    ]
    random.Random(0).shuffle(shuffled)
    keys = [(r.dtype, r.hidden, r.rows) for r in rows_of(shuffled)]
    assert keys == sorted(keys)


def test_summary_names_what_is_slower() -> None:
    """Geomeans over what was measured, the smallest share of a copy, every case slower than
    eager.
    """
    slower = record(64, 1, timings={"eager": timing(10), "tuned": timing(20), "copy": timing(10)})
    facts = summary(rows_of([record(), slower]))
    assert facts["cases"] == 2 and facts["disturbed"] == 0
    assert facts["geomean_over_eager"] == pytest.approx(1)
    assert facts["geomean_over_default"] == pytest.approx(1.2)
    assert facts["geomean_over_better_of_eager_and_compile"] is None
    assert facts["geomean_of_copy"] == pytest.approx((0.8 * 0.5) ** 0.5)
    assert facts["smallest_of_copy"] == 0.5
    assert facts["slower_than_eager"] == ["layer_norm 1x64 float32: 0.50x"]
    assert json.loads(msgspec.json.encode(facts)) == facts
    assert "slower than eager in 1: layer_norm 1x64 float32: 0.50x" in summary_lines(
        rows_of([record(), slower])
    )
    assert "slower than eager nowhere" in summary_lines(rows_of([record()]))


def test_errors_are_shown_beside_what_is_allowed() -> None:
    """The share of what is allowed and the bare ratio to eager's error stand beside each other; a
    ratio above 2 is explained.
    """
    measured = record(errors={"y": 0.3, "mean": 0.2}, versus_eager={"y": 1.0, "mean": 4.17})
    row = row_of(measured)
    assert (row.of_allowed, row.error) == (0.3, 4.17)
    shown = text(cases_table([row], ""))
    assert "error/allowed" in shown and "0.30" in shown and "4.17" in shown
    (sentence,) = [line for line in summary_lines([row]) if "error" in line]
    assert (
        sentence
        == "error/eager's above 2 in 1: there eager is all but exact; error/allowed counts, whose"
        " limit is 1"
    )
    assert not [
        line
        for line in summary_lines(rows_of([record(versus_eager={"y": 1.9})]))
        if "error" in line
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"busy": True},
        # 2488.89x, as once was printed
        {"timings": {"eager": timing(9_000), "tuned": timing(3.6), "copy": timing(10)}},
        {
            "timings": {
                name: timing(us, us + 2, us + 5)
                for name, us in (("eager", 7_996), ("tuned", 7_998), ("copy", 7_990))
            }
        },
    ],
    ids=["others", "a factor of 2500", "turns of the scheduler"],
)
def test_nothing_is_reckoned_from_disturbed_times(fields: dict[str, Any]) -> None:
    """A disturbed case keeps its times, marked, and has no ratio, bandwidth or share; no geomean
    counts it, and a line says so.
    """
    disturbed = record(64, 1, **fields)
    (row,) = rows_of([disturbed])
    assert row.disturbed and row.tuned_us == disturbed.median()
    assert {row.speedup, row.over_better, row.over_default, row.gbps, row.of_copy, row.spread} == {
        None
    }
    facts = summary(rows_of([record(), disturbed]))
    assert (facts["cases"], facts["disturbed"], facts["slower_than_eager"]) == (2, 1, [])
    assert facts["geomean_over_eager"] == pytest.approx(2) and facts[
        "smallest_of_copy"
    ] == pytest.approx(0.8)
    assert (
        summary_lines([row])[-1]
        == "* 1 disturbed by other work on the machine: neither times nor ratios hold"
    )
    assert "*" in text(cases_table([row], ""))


def test_summary_of_kernel_against_copy() -> None:
    """Where nobody allocates there is no eager to be faster than: the lines give the share of a
    copy's bandwidth instead.
    """
    measured = [
        record(h, timings={"tuned": timing(50), "copy": timing(c)})
        for h, c in ((64, 50), (128, 32))
    ]
    assert summary_lines(rows_of(measured)) == [
        "2 cases",
        "bandwidth of a copy: geomean 80%, smallest 64%",
    ]


# --- text


def test_figures_as_text() -> None:
    """Three digits or so, a dash for what is not there, colour by the side of 1 with 2 % either way
    a draw.
    """
    assert [micros(v) for v in (None, 1.234, 99.99, 123.4)] == ["-", "1.23", "99.99", "123"]
    assert (number(None), number(1.236, 1, "x"), percent(None), percent(0.856)) == (
        "-",
        "1.2x",
        "-",
        "86%",
    )
    assert [str(ratio_text(v).style) for v in (None, 1.01, 1.5, 0.5)] == ["", "", "green", "red"]


def test_the_table_as_text() -> None:
    """The table of a known set of records, to the letter (tests/golden/report.txt)."""
    measured = [
        record(versus_eager={"y": 1.02}),
        record(
            64,
            1,
            busy=True,
            timings={"eager": timing(4), "tuned": timing(5), "copy": timing(1)},
            schedule="eager",
            knobs={},
        ),
        record(
            4096,
            4096,
            "bfloat16",
            timings={
                "eager": timing(*range(100, 120)),
                "compile": timing(*range(90, 110)),
                "tuned": timing(*range(50, 70)),
                "copy": timing(*range(45, 65)),
            },
        ),
    ]
    rows = rows_of(measured)
    lines = "".join(f"{line}\n" for line in summary_lines(rows))
    shown = (
        text(cases_table(rows, "tuned", details=True))
        + lines
        + text(cases_table(rows[2:], "short"))
    )
    assert shown == (GOLDEN / "report.txt").read_text(encoding="utf-8")


def test_columns_are_there_only_for_what_was_measured() -> None:
    """Without torch.compile no columns of it, without eager none of eager."""
    both = text(
        cases_table(
            rows_of(
                [record(timings={n: timing(9) for n in ("eager", "compile", "tuned", "copy")})]
            ),
            "",
        )
    )
    plain, given = (
        text(cases_table(rows_of([record()]), "")),
        text(cases_table(rows_of([record(timings={"tuned": timing(1)})]), "")),
    )
    assert "compile us" in both and "over better" in both and "over eager" in both
    assert "compile us" not in plain and "over better" not in plain and "over eager" in plain
    assert "eager us" not in given and "over eager" not in given and "tuned us" in given


@pytest.mark.parametrize("colours", [False, True])
def test_a_table_in_a_file_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], colours: bool
) -> None:
    """When output is not a terminal nothing is cut or left out, whatever COLUMNS says and whether
    colours are forced.
    """
    monkeypatch.setenv("COLUMNS", "40")
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
    rows = rows_of([record(versus_eager={"y": 1.02})])
    sentence = "a sentence longer than the forty columns of COLUMNS"
    table = cases_table(rows, "tuned", details=True)
    print_table(Output(rows, [table], [sentence]), console())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "cached_rows lanes=4 parallel" in lines[2]
    assert ("\x1b" in lines[2]) == colours
    assert not console().is_interactive, "nothing is drawn over and over in a file"


def test_the_verdict_table_shows_messages_as_they_are() -> None:
    """Wrong kernels say why below it, brackets and all; those left to eager mode are told apart
    from those checked.
    """
    case = Case("layer_norm", 64, "float32", 8)
    results = [
        Result(
            case,
            "exact",
            "cached_rows",
            False,
            "ValueError: [y] [/red] is odd",
            {"y": 2.5, "mean": 0.5},
            {"y": 3},
        ),
        Result(case, "default", "cached_rows", True, "", {"y": 0.5}, {}),
        Result(case, "eager", "", True, "eager mode serves it", {}, {}),
    ]
    shown = text(verdict_table(results))
    assert "WRONG" in shown and "2.50" in shown and "exact: cached_rows" in shown
    lines = verdict_lines(results)
    assert lines == [
        "2 kernels checked, 1 wrong, eager mode serves 1 more",
        "what serves: 1 tuned for the case itself (exact), 1 with default knobs, untuned (default)",
        "WRONG: layer_norm 8x64 float32: ValueError: [y] [/red] is odd",
    ]
    out = io.StringIO()
    print_table(Output(results, (), lines), Console(file=out))
    assert lines[1] in out.getvalue()
    assert verdict_lines(results[1:2])[0] == "1 kernel checked, all right"


def test_what_is_wrong_comes_first_in_few_rows() -> None:
    """Variants of a case that the same kernels serve as well share a row, whose errors are the
    worst; one that is wrong has its own row, above all that are right.
    """
    case = Case("layer_norm", 64, "float32", 8)
    right, wrong = (
        Result(case, "exact", "cached_rows", ok, "", {"y": error}, {"y": error})
        for ok, error in ((True, 0.5), (False, 2.5))
    )
    weight, stats, bias = (
        msgspec.structs.replace(case, variant=v) for v in ("weight", "stats", "bias")
    )
    results = [
        msgspec.structs.replace(right, case=weight),
        msgspec.structs.replace(right, case=stats, errors={"y": 0.75}),
        msgspec.structs.replace(wrong, case=bias),
    ]
    table = verdict_table(results)
    cells = [[cell.plain for cell in row] for row in table.rows]
    named = [column.name for column in table.columns]
    assert [row[named.index("variants")] for row in cells] == ["bias", "weight stats"]
    assert [row[named.index("error/allowed")] for row in cells] == ["2.50", "0.75"]
    assert [row[-1] for row in cells] == ["WRONG", "right"]


def test_a_kernel_that_cannot_be_had_is_not_right() -> None:
    """Where eager mode serves because a kernel cannot be built or loaded, the table and its lines
    say so, and a reason that many cases share stands once.
    """
    case = Case("layer_norm", 64, "float32", 8)
    missing = Result(case, "eager", "", False, "no kernel: disk full", {}, {}, True)
    right = Result(case, "default", "cached_rows", True, "", {"y": 0.5}, {})
    assert "NONE" in text(verdict_table([missing, right]))
    assert verdict_lines([missing, missing, right]) == [
        "1 kernel checked, all right, 2 cannot be had",
        "what serves: 1 with default knobs, untuned (default)",
        "no kernel: disk full",
    ]
    assert verdict_lines([missing])[0] == "0 kernels checked, none right, 1 cannot be had"
