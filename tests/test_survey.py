"""`lntune report`: which cases, what they come to, what is missing or to be measured again, and
what of it is printed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from made_log import BETTER, CASES, DEVICE, DISTURBED, STALE, finals
from rich.console import Console
from terminals import on_a_terminal
from typer.testing import CliRunner

from lntune import ops
from lntune.case import Case
from lntune.cli import app
from lntune.cli.base import MANY
from lntune.errors import InputError, UnknownNameError
from lntune.log import records
from lntune.log.records import Record
from lntune.log.wanted import Wanted
from lntune.report import histories, surveyed
from lntune.report.history import histories as follow
from lntune.report.history import runs
from lntune.report.output import Output, print_table
from lntune.report.overview import overviews
from lntune.report.rows import BEST_COPY, SAME_ROUNDS, geomean, row_of
from lntune.report.survey import Survey, survey, surveys
from lntune.report.tables import BAR, micros
from lntune.versions import Code

GOLDEN = Path(__file__).parent / "golden"
CODE = Code(1, 1, 1)
TODAY: Any = {
    name: SimpleNamespace(code=CODE, op=op, kind="cpu")
    for name, op in (
        ("cached_rows", "layer_norm"),
        ("blocked_rows", "layer_norm_backward"),
        ("fused_step", "lnlstm_step"),
        ("blocked_step", "lnlstm_step_backward"),
    )
}
"""Schedules as they are, for what asks whether a record is of another version."""
WANTED = Wanted(hidden=(256, 512, 1024), rows=(1, 512))


def made() -> list[Record]:
    """The records of the made log."""
    return list(finals(CODE))


def of(wanted: Wanted = WANTED, log: list[Record] | None = None) -> Survey:
    """What a log says of its device, the made one by default."""
    kept = [r for r in log or made() if wanted.takes(r.case)]
    return survey(kept, wanted, DEVICE, TODAY)


# --- which cases


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), CASES),
        (Wanted(("layer_norm",)), CASES[:8]),
        (Wanted(hidden=(256, 512)), CASES[:4] + CASES[8:]),
        (Wanted.of(dtypes="bf16"), [c for c in CASES if c.dtype == "bfloat16"]),
        (Wanted(rows=(200,)), [c for c in CASES if c.rows == 512]),
        (Wanted.of("layer_norm", 256, "fp32", [1]), [CASES[2]]),
    ],
)
def test_cases_are_asked_for(wanted: Wanted, expected: list[Case]) -> None:
    """Operator, hidden sizes, dtypes by any of their names, and rows, which stand for their
    buckets.
    """
    assert [case for case in CASES if wanted.takes(case)] == expected


def test_what_is_not_there_cannot_be_asked_for(tmp_path: Path) -> None:
    """Unknown operators, dtypes and parts of devices' names are refused with what there is."""
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_norm'"):
        Wanted.of("layr_norm")
    with pytest.raises(UnknownNameError, match="unknown dtype 'int8'"):
        Wanted.of(dtypes=["int8"])
    for sizes in ({"rows": 0}, {"rows": [1, -3]}, {"hidden": 0}, {"hidden": 1 << 20}):
        with pytest.raises(InputError, match=f"{next(iter(sizes))}: got"):
            Wanted.of(**sizes)  # type: ignore[arg-type]
    records.append(tmp_path, made()[0])
    with pytest.raises(InputError, match=f"device: got 'nothing', .*{DEVICE.slug}"):
        surveys([tmp_path], Wanted(device="nothing"), None, {})
    (found,) = surveys([tmp_path], Wanted(device="made"), None, {})
    assert found.device == DEVICE.slug


# --- what they come to


def test_an_overview_is_made_of_its_cases() -> None:
    """Per operator and dtype: counts, geometric means of what nothing disturbed, the slowest."""
    found = of()
    by_dtype = {(o.op, o.dtype): o for o in found.operators}
    rows = [r for r in found.cases if (r.op, r.dtype) == ("layer_norm", "float32")]
    one = by_dtype["layer_norm", "float32"]
    assert one.tuned == len(rows) == 4
    assert one.over_eager == geomean(r.speedup for r in rows)
    assert one.slowest == min(r.speedup for r in rows if r.speedup)
    assert (one.disturbed, one.stale) == (1, 1)
    assert [o.op for o in found.operators] == sorted(
        (o.op for o in found.operators), key=list(ops.OPS).index
    )


def test_what_is_missing_is_of_the_default_grid() -> None:
    """A case is missing where the grid has it, it is asked for, and no record is of its bucket."""
    found = of()
    keys = {records.Key.of(case) for case in CASES}
    grid = [c for op in ops.OPS.values() for c in op.grid if WANTED.takes(c)]
    assert found.missing == [c for c in grid if records.Key.of(c) not in keys]
    assert found.missing and sum(o.missing for o in found.operators) == len(found.missing)


def test_what_wants_a_measurement_has_its_command() -> None:
    """Missing, stale and disturbed cases are counted, with commands that measure these cases and no
    others; an operator without any record has one without sizes.
    """
    found = of(Wanted())
    mends = {mend.why: mend for mend in found.mend}
    assert mends["missing"].cases == len(found.missing)
    for why, case in (("stale", STALE), ("disturbed", DISTURBED)):
        assert mends[why].cases == 1
        (command,) = mends[why].commands
        asked = f"--hidden {case.hidden} --dtype {case.dtype} --rows {case.typical.rows}"
        assert command == f"lntune tune {case.op} {asked}"
    assert "lntune tune lnlstm_step" in mends["missing"].commands
    named = {
        Case(op, int(h), d, int(r))
        for command in mends["missing"].commands
        if (
            m := re.fullmatch(
                r"lntune tune (\S+) --hidden (\S+) --dtype (\S+) --rows (\S+)", command
            )
        )
        for op in [m[1]]
        for h in m[2].split(",")
        for d in m[3].split(",")
        for r in m[4].split(",")
    }
    whole = {c.split()[-1] for c in mends["missing"].commands if "--hidden" not in c}
    assert named == {case.typical for case in found.missing if case.op not in whole}


def test_nothing_to_mend_is_not_told() -> None:
    """Where all of what is asked for is tuned, in quiet and of today, there is no command."""
    case = BETTER
    found = of(Wanted((case.op,), (case.hidden,), (case.dtype,), (case.rows,)))
    assert (found.mend, found.missing) == ([], [])


def test_torch_compile_is_of_a_benchmark_of_the_same_kernel() -> None:
    """How many times as fast as torch.compile is from the latest quiet benchmark in the log that
    has the knobs which serve, and from no other.
    """
    final = made()[0]
    twice = {**final.timings, "compile": msgspec.structs.replace(
        final.timings["tuned"],
        samples_us=tuple(2 * us for us in final.timings["tuned"].samples_us),
        median_us=2 * final.timings["tuned"].median_us,
    )}  # fmt: skip
    bench = msgspec.structs.replace(final, role="bench", timings=twice)
    assert of(log=[final, bench]).cases[0].over_compile == pytest.approx(2)
    for other in (
        msgspec.structs.replace(bench, knobs={"lanes": 1}),
        msgspec.structs.replace(bench, busy=True),
        msgspec.structs.replace(bench, case=CASES[1]),
    ):
        assert of(log=[final, other]).cases[0].over_compile is None


def test_the_roof_is_the_copy_of_the_same_rounds() -> None:
    """The share of the roof is that of a copy in the same rounds; where a record has none, of the
    best copy of the log, and the row says which.
    """
    one, other = made()[:2]
    alone = msgspec.structs.replace(other, timings={"tuned": other.timings["tuned"]})
    first, second = of(log=[one, alone]).cases
    assert (first.roof, first.of_roof) == (SAME_ROUNDS, first.of_copy)
    assert second.roof == BEST_COPY and second.of_copy is None
    assert second.gbps and first.copy_gbps
    assert second.of_roof == pytest.approx(second.gbps / first.copy_gbps)
    itemsize, copied = one.case.itemsize, one.median("copy")
    assert first.copy_gbps == pytest.approx(
        2 * one.case.rows * one.case.hidden * itemsize / (copied or 0) / 1e3
    )


def test_a_row_has_its_case_and_work() -> None:
    """Bytes and flops are the operator's; an operator that is gone has neither."""
    row = row_of(made()[0])
    op = ops.get(row.op)
    assert row.case == CASES[0]
    assert (row.bytes, row.flops) == (op.bytes(row.case), op.flops(row.case))
    gone = msgspec.structs.replace(CASES[0], op="once_there")
    row = row_of(msgspec.structs.replace(made()[0], case=gone))
    assert (row.bytes, row.flops, row.copy_gbps, row.roof) == (None, None, None, "")
    assert overviews([row])[0].op == "once_there"


# --- how it is printed


def shown(output: Output, width: int) -> str:
    """What a terminal of that width shows, without colours."""
    out = io.StringIO()
    print_table(
        output,
        Console(file=out, width=width, force_terminal=True, color_system=None, highlight=False),
    )
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["report", "history"])
def test_golden(name: str, width: int) -> None:
    """The report of a made log and its history on terminals of 80 and 120 columns, to the letter
    (tests/golden/report-80.txt and the like).
    """
    if name == "report":
        output = surveyed.output([of()], "lntune report")
    else:
        followed = {DEVICE.slug: (follow(made()), runs(made()))}
        output = histories.output(followed, "lntune report --history")
    assert shown(output, width) == (GOLDEN / f"{name}-{width}.txt").read_text(encoding="utf-8")


def test_nothing_of_the_point_is_lost_at_80_columns() -> None:
    """Each case has its sizes, time, ratio and bar on one line of 80 columns."""
    text = shown(surveyed.output([of()], "lntune report"), 80)
    for row in of().cases:
        begin = rf"^ *{row.hidden} +{row.rows} +.*"
        ratio = f"{row.speedup:.2f}x  █" if row.speedup else "-"
        assert re.search(begin + ratio, text, re.MULTILINE), row


def test_without_cases_the_summary_says_how_to_see_them() -> None:
    """The summary alone has no line for a case, and names the command that has them."""
    without = shown(surveyed.output([of()], "lntune report", cases=False), 80)
    assert "lntune report --every-case" in without and "eager us" not in without
    both = shown(surveyed.output([of()], "lntune report"), 80)
    assert (
        "--every-case" not in both
        and both.count("\nof copy: ") == without.count("\nof copy: ") == 1
    )


def test_bars_of_nothing_are_left_out() -> None:
    """Where no case has a speedup there is no column of bars for it."""
    disturbed = [msgspec.structs.replace(r, busy=True) for r in made()[:1]]
    text = shown(surveyed.output([of(log=disturbed)], "lntune report"), 80)
    assert "over eager" in text and "up to" not in text


def test_a_bar_is_beside_others_of_its_operator() -> None:
    """The longest bar is that of each operator's fastest case, whatever another's gains are."""
    text = shown(surveyed.output([of()], "lntune report"), 80)
    assert len(re.findall(f"█{{{BAR}}} ", text)) == 2


def test_knobs_stand_below_their_case() -> None:
    """With knobs every case's schedule and knobs have a line of their own on a terminal."""
    text = shown(surveyed.output([of()], "lntune report", knobs_below=True), 80)
    assert text.count("\n    cached_rows lanes=") == 8
    assert "\n    cached_rows lanes=" not in shown(surveyed.output([of()], "lntune report"), 80)


# --- the command


def run(*arguments: object) -> Any:
    """A command of lntune in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made log in a folder."""
    logs = tmp_path_factory.mktemp("made")
    for record in made():
        records.append(logs, record)
    return logs


def test_filters_of_the_command(folder: Path) -> None:
    """Every filter leaves what it says in JSON and CSV, the cases alike."""
    asked = ("layer_norm", "--hidden", "256,1024", "--dtype", "fp32", "--rows", 300)
    common = ("--device", "made-x86", "--log-dir", folder)
    (facts,) = json.loads(run("report", *asked, *common, "--json").stdout)
    cases = [(c["op"], c["hidden"], c["dtype"], c["rows"]) for c in facts["cases"]]
    assert cases == [("layer_norm", 256, "float32", 512), ("layer_norm", 1024, "float32", 512)]
    printed = run("report", *asked, *common, "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [(r["op"], int(r["hidden"]), r["dtype"], int(r["rows"])) for r in rows] == cases


def test_the_command_it_names_prints_the_same(folder: Path) -> None:
    """The closing line's command, with its options, prints the very same again."""
    asked = ("--rows", "1", "--device", "made", "--log-dir", folder, "--knobs", "--every-case")
    done = run("report", "layer_norm", *asked)
    assert "--every-case --knobs" in done.stdout
    (command,) = re.findall(r"printed again by (lntune report .*), every", done.stdout)
    assert run(*command.split()[1:]).stdout == done.stdout


def test_nothing_of_what_is_asked_for(folder: Path) -> None:
    """Where no record is of what is asked for, the command that would measure it is named with
    these sizes; exit code 1.
    """
    done = run("report", "layer_norm", "--hidden", 77, "--device", "made", "--log-dir", folder)
    assert done.exit_code == 1
    assert "no measurements of what is asked for" in done.stderr
    assert "of devices with 'made' in their names" in done.stderr
    assert done.stderr.rstrip().endswith("Run where it is: lntune tune layer_norm --hidden 77")
    done = run("report", "--hidden", 77, "--log-dir", folder)
    assert "of this device" in done.stderr
    assert done.stderr.rstrip().endswith(" Run: lntune tune layer_norm --hidden 77")


def test_a_device_and_a_target_are_one_too_many(folder: Path) -> None:
    """--device and --target both say whose records; a part of a name that no device has is
    refused.
    """
    done = run("report", "--device", "made", "--target", "cuda", "--log-dir", folder)
    assert done.exit_code == 2 and "--device: got made beside --target cuda" in done.stderr
    done = run("report", "--device", "intel", "--log-dir", folder)
    assert done.exit_code == 2 and DEVICE.slug in done.stderr


@pytest.mark.parametrize(
    "beside", [["--html", "page.html"], ["--plot", "a.svg"], ["--format", "html"]]
)
def test_a_history_has_no_page(beside: list[str], folder: Path, tmp_path: Path) -> None:
    """What draws one state of a log is refused beside --history, and no file is written."""
    asked = [str(tmp_path / word) if "." in word else word for word in beside]
    done = run("report", "--history", "--device", "made", "--log-dir", folder, *asked)
    assert done.exit_code == 2 and "--history: got a p" in done.stderr
    assert not list(tmp_path.iterdir())


def test_many_cases_are_summed_up_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many cases and nothing asked for a terminal has the summary; with --every-case, a
    filter, or in a pipe it has a line for each.
    """
    record = made()[0]
    for hidden in range(64, 64 + MANY + 1):
        case = Case("layer_norm", hidden, "float32", 1)
        records.append(tmp_path, msgspec.structs.replace(record, case=case))
    asked = ("report", "--device", "made", "--log-dir", tmp_path)
    summed = on_a_terminal(monkeypatch, *asked)
    assert "--every-case" in summed and "eager us" not in summed
    for more in (["--every-case"], ["--dtype", "float32"], ["--knobs"]):
        assert "eager us" in on_a_terminal(monkeypatch, *asked, *more)
    assert re.search(rf"^layer_norm +float32 +{64 + MANY} ", run(*asked).stdout, re.MULTILINE)


# --- history


def test_a_step_is_found_where_it_is() -> None:
    """Of the made log the one case with better knobs has one step, between the runs that differ, by
    as much as it was made, with the knobs that changed; no other case has any.
    """
    found = follow(made())
    steps = {h.case: h.steps for h in found if h.steps}
    assert list(steps) == [BETTER]
    (step,) = steps[BETTER]
    assert (step.before[:10], step.after[:10]) == ("2026-01-02", "2026-02-03")
    assert step.low < 1.3 < step.high and step.low <= step.ratio <= step.high
    assert step.changed == ["lanes 4 -> 8", "torch 2.12.0 -> 2.13.0"]


def test_a_disturbed_measurement_makes_no_step() -> None:
    """A measurement that other work disturbed has no ratio and is passed over."""
    log = [r for r in made() if r.case == BETTER]
    log[1] = msgspec.structs.replace(log[1], busy=True)
    (history,) = follow(log)
    assert history.finals[1].over_eager is None
    (step,) = history.steps
    assert step.after == log[2].time


def test_the_last_time_of_a_history_is_of_its_last_ratio() -> None:
    """A time that other work disturbed does not stand beside the ratio of the measurement before
    it.
    """
    log = [r for r in made() if r.case == BETTER]
    tuned = msgspec.structs.replace(log[-1].timings["tuned"], median_us=28_010.0)
    busy = {**log[-1].timings, "tuned": tuned}
    log[-1] = msgspec.structs.replace(log[-1], busy=True, timings=busy)
    table = histories.histories_table(follow(log), "")
    (row,) = table.rows
    cells = {c.name: cell.plain for c, cell in zip(table.columns, row, strict=True)}
    assert cells["last us"] == micros(log[-2].median()) and "28010" not in cells.values()


def test_a_slower_machine_is_no_step() -> None:
    """Where eager mode took as much longer as the kernel, nothing happened."""
    log = [r for r in made() if r.case == CASES[0]]
    slow = {
        name: msgspec.structs.replace(
            t, samples_us=tuple(3 * us for us in t.samples_us), median_us=3 * t.median_us
        )
        for name, t in log[1].timings.items()
    }
    log[1] = msgspec.structs.replace(log[1], timings=slow)
    (history,) = follow(log)
    assert history.steps == []
    assert history.finals[1].tuned_us > 2 * history.finals[0].tuned_us


def test_histories_of_samples_that_say_nothing() -> None:
    """A case measured once, without eager, or with too few samples has no step and no error."""
    one = made()[0]
    few = {
        n: msgspec.structs.replace(t, samples_us=t.samples_us[:2]) for n, t in one.timings.items()
    }
    plain = {"tuned": one.timings["tuned"]}
    for timings in (few, plain, {**one.timings, "eager": few["eager"]}):
        changed = msgspec.structs.replace(one, timings=timings, run="other")
        (history,) = follow([one, changed])
        assert history.steps == [] and len(history.finals) == 2
    assert follow([one])[0].steps == []


def test_runs_are_listed_with_what_changed() -> None:
    """A run has its finals and the versions that changed since the run before."""
    first, second, third = runs(made())
    assert (first.changed, second.changed, third.changed) == ([], ["torch 2.12.0 -> 2.13.0"], [])
    assert first.finals == second.finals == third.finals - 1


def test_the_history_command(folder: Path) -> None:
    """`lntune report --history` tells the step in a sentence; CSV has a record for each final."""
    asked = ("report", "--history", "--device", "made", "--log-dir", folder)
    done = run(*asked)
    assert done.exit_code == 0, done.output
    assert re.search(rf"{BETTER}: 1\.\d\dx faster .* lanes 4 -> 8", done.stdout)
    rows = list(csv.DictReader(io.StringIO(run(*asked, "--format", "csv").stdout)))
    assert len(rows) == len(made())
    (facts,) = json.loads(run(*asked, "--json").stdout)
    assert [len(h["steps"]) for h in facts["history"] if h["steps"]] == [1]
