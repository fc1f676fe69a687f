"""What a newcomer meets on a terminal of 80 columns: what matters is on it, and long work says how
far it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_log import CASES as made_cases
from made_log import finals as made
from terminals import Terminal, on_a_terminal
from typer.testing import CliRunner

from lntune import device, knobs, ops, schedule
from lntune.case import Case
from lntune.cli import app, parse
from lntune.cli.base import MANY
from lntune.commands import build as prebuild
from lntune.commands import check as verification
from lntune.commands import inspect as inspection
from lntune.commands.build import Built
from lntune.commands.check import Result
from lntune.compare import sides
from lntune.device import Device
from lntune.knobs import Value, knob
from lntune.log import records
from lntune.log.records import Record
from lntune.report.columns import Column, Table, key
from lntune.report.tuned import disturbed_lines, untuned_lines
from lntune.system import native, toolchain
from lntune.tune import Settings, forecast
from lntune.tune.times import SEARCHED, WORTH, Times
from lntune.versions import Code


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[Case, Result]:
    """What checks find, to be changed; else every kernel is right."""
    found: dict[Case, Result] = {}

    def fake(
        cases: Sequence[Case], _: Device, on_kernel: Callable[[Case], None] = lambda _: None
    ) -> list[Result]:
        results = []
        for case in verification.asked_of(cases):
            on_kernel(case)
            right = Result(case, "default", "cached_rows", True, "", {"y": 0.25}, {"y": 1.5})
            results.append(found.get(case, right))
        return results

    monkeypatch.setattr(verification, "check_cases", fake)
    return found


def test_check_keeps_what_matters(
    checked: dict[Case, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns each case of every operator has a line with what serves it, its error and its
    verdict, and the last lines count what serves; progress is on standard error alone.
    """
    for op in ops.OPS:
        stderr = Terminal()
        sizes = ("--hidden", "16384", "--dtype", "bfloat16", "--rows", "16384")
        printed = on_a_terminal(monkeypatch, "check", op, *sizes, stderr=stderr)
        (line,) = [text for text in printed.splitlines() if "16384" in text and "right" in text]
        assert line.split()[-4:] == ["default:", "cached_rows", "0.25", "right"]
        count = len(ops.get(op).called(""))
        assert f"{count} with default knobs, untuned (default)" in printed
        assert "check [" not in printed


def test_check_of_many_shows_what_is_wrong(
    checked: dict[Case, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal many cases are counted, and those that are wrong are shown; with --every-case
    each has a line.
    """
    rows = ",".join(map(str, range(1, MANY + 2)))
    asked = ("check", "layer_norm", "--hidden", "64", "--dtype", "float32", "--rows", rows)
    printed = on_a_terminal(monkeypatch, *asked)
    assert f"{2 * (MANY + 1)} kernels checked, all right" in printed
    assert "verdict" not in printed and "with --every-case" in printed
    case = verification.asked_of([Case("layer_norm", 64, "float32", 7)])[0]
    right = Result(case, "exact", "cached_rows", True, "", {"y": 3.0}, {"y": 3.0})
    checked[case] = msgspec.structs.replace(right, ok=False, message="y: far off")
    printed = on_a_terminal(monkeypatch, *asked)
    (line,) = [text for text in printed.splitlines() if text.endswith("WRONG")]
    assert line.split() == ["64", "7", "weight+bias", "exact:", "cached_rows", "3.00", "WRONG"]
    assert " right\n" not in printed and "1 wrong" in printed
    assert " right\n" in on_a_terminal(monkeypatch, *asked, "--every-case")


def test_a_budget_is_said_to_be_short() -> None:
    """Before a run begins it is said how many cases there are, which come first, how many fit, and
    with which budget each is searched; a budget that is enough is not remarked on.
    """
    grid = ops.get("layer_norm").grid
    for seconds, lines in ((20.0, 2), (3600.0, 1)):
        said = forecast.sentences(grid, Settings(seconds=seconds))
        assert len(said) == lines and said[0].startswith(f"tuning {len(grid)} cases in ")
        assert str(grid[0]) in said[0] and f"then {len(grid) - forecast.NAMED} more" in said[0]
    short = forecast.sentences(grid, Settings(seconds=20.0))[1]
    fits = forecast.fitting(grid, 20.0)
    assert 1 < fits < len(grid) and f"about {fits} of them fit" in short
    assert fits <= 20.0 / SEARCHED, "those that are begun are searched"
    named = parse.seconds("--budget", short.partition("--budget ")[2].split()[0])
    assert len(forecast.sentences(grid, Settings(seconds=named))) == 1
    assert forecast.fitting(grid, 1.0) == 1, "one case is always begun"
    large = [Case("layer_norm", 65536, "float32", 16384)]
    assert forecast.least(large[0]) > 10 * forecast.least(grid[0])


def test_a_large_case_is_not_begun_at_the_end() -> None:
    """What a case takes at least is what the last one took, and for a larger one as much more as
    its tensors take to be made and checked.
    """
    times = Times()
    times.tried(0.25)
    times.listing, times.bytes = 0.25, 1e6
    small = times.least(1e6)
    assert small == times.least(1e3) == pytest.approx(0.5 + times.final(1, math.inf))
    assert times.least(1e9) > small + 10


def test_cases_that_are_begun_are_searched() -> None:
    """Time is shared evenly where that is enough for a search of each case; else a case has enough
    for it, the last what is left, and the next ones wait for another run.
    """
    learned = Times()
    assert learned.share(600.0, 10, 1e6) == 60.0
    assert learned.share(60.0, 100, 1e6) == SEARCHED, "no trial is known yet"
    learned.tried(0.5)
    worth = learned.share(60.0, 100, 1e6)
    assert WORTH * 0.5 < worth < 12
    assert learned.share(60.0, 100, 1e9) > worth, "of a larger case more"
    assert learned.share(60.0, 100, 1e6, trials=2) < worth - (WORTH - 2) * 0.5 + 0.1
    assert learned.share(3.0, 100, 1e6) == 3.0
    assert learned.share(-1.0, 100, 1e6) == 0.0
    assert learned.share(math.inf, 3, 1e6) == math.inf


def test_reasons_are_said_once() -> None:
    """Cases that were not tuned for one reason are counted in a sentence that names the first; what
    was disturbed is counted with the command that measures it again.
    """
    untuned = dict.fromkeys((f"layer_norm {n}x64 float32" for n in range(1, 60)), "no time")
    lines = untuned_lines({**untuned, "that": "broken"})
    assert len(lines) == 2 and lines[1] == "not tuned: that: broken"
    assert lines[0].startswith("not tuned: 59 cases, no time: layer_norm 1x64 float32; ")
    assert lines[0].endswith(" and 53 more")
    finals = list(made(Code(1)))
    disturbed = [r for r in finals if r.disturbance]
    (line,) = disturbed_lines(finals, " --target cuda")
    for record in disturbed:
        assert f"lntune tune {record.case.op} --hidden" in line.replace("\u00a0", " ")
    assert "--target" in line and not disturbed_lines([], "")


def final_of(device: Device, **change: object) -> Record:
    """A final of some device, of a schedule as it is today."""
    code = schedule.get("cached_rows").code
    (record, *_) = made(code)
    return msgspec.structs.replace(record, device=device, **change)


def test_why_is_short_and_ends_with_a_command(
    log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices' records are counted, and named by --all; what is not tuned ends with the
    command that tunes it, what was disturbed with the one that measures again, what is tuned with
    none. --json has all of it.
    """
    here = device.current()
    others = [msgspec.structs.replace(here, name=f"CPU {n}", cores=99) for n in range(14)]
    for other in others:
        records.append(log_dir, final_of(other))
    case = made_cases[0]
    asked = ("why", case.op, "--hidden", case.hidden, "--dtype", case.dtype, "--rows", case.rows)
    asked = (*asked, "--log-dir", log_dir)
    sizes = f"--hidden {case.hidden} --dtype {case.dtype} --rows {case.rows}"
    printed = on_a_terminal(monkeypatch, *asked)
    assert "records of 14 other devices" in printed and len(printed.splitlines()) < 14
    assert printed.splitlines()[-1].strip().endswith(f"lntune tune {case.op} {sizes}")
    every = on_a_terminal(monkeypatch, *asked, "--all")
    assert all(other.slug in every for other in others)
    facts = json.loads(on_a_terminal(monkeypatch, *asked, "--json"))
    assert set(facts["foreign"]) == {other.slug for other in others}
    assert facts["command"] == f"lntune tune {case.op} {sizes}"
    records.append(log_dir, final_of(here, knobs=default_knobs(case), busy=True))
    assert "measure it again: lntune tune" in on_a_terminal(monkeypatch, *asked)
    records.append(log_dir, final_of(here, knobs=default_knobs(case)))
    assert "lntune tune" not in on_a_terminal(monkeypatch, *asked)


def default_knobs(case: Case) -> dict[str, Value]:
    """Knobs that fit."""
    return knobs.to_dict(schedule.get("cached_rows").untuned(case, device.current()))


def test_operators_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators fit a terminal, a line each; the name of one has its schedules and variants."""
    lines = on_a_terminal(monkeypatch, "ops").splitlines()
    assert [line.split()[0] for line in lines[1 : len(ops.OPS) + 1]] == list(ops.OPS)
    assert len(lines) == len(ops.OPS) + 2 and max(map(len, lines)) <= 80
    one = on_a_terminal(monkeypatch, "ops", "layer_norm")
    assert "cached_rows" in one and "weight+bias+stats" in one and "lnlstm" not in one
    (facts,) = json.loads(on_a_terminal(monkeypatch, "ops", "layer_norm", "--json"))
    assert facts["variants"] == list(ops.get("layer_norm").variants)


def test_a_knob_that_is_none_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`inspect` and `tune` name the knobs there are and the values of each; knobs that do not fit a
    later case are refused before the first is compiled, and what would make them fit is named.
    """
    monkeypatch.setattr(inspection, "inspect_case", lambda *_: pytest.fail("it was compiled"))
    for command in ("inspect", "tune"):
        target = ("--target", "cuda:sm_90") if command == "inspect" else ()
        done = CliRunner().invoke(app, [command, "layer_norm", *target, "--knob", "threads=8"])
        assert done.exit_code == 2 and "unknown knob 'threads'" in done.output
        known = "threads_per_row=" if command == "inspect" else "lanes=1|2|4|8"
        assert known in done.output and "|" in done.output
    asked = ["inspect", "layer_norm", "--hidden", "4096,1024", "--knob", "threads_per_row=999"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "threads_per_row=VALUE with one of" in done.output
    asked = ["inspect", "layer_norm", "--hidden", "4096,1024", "--knob", "threads_per_row=512"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "x1024 float32" in done.output
    assert "It fits with --knob vector_width=2 beside it." in done.output


@dataclass(frozen=True)
class Three:
    """Knobs of which some do not go together."""

    a: int = knob(1, (1, 2, 3), "one")
    b: bool = knob(True, (False, True), "another")
    c: int = knob(8, (2, 4, 8), "a third")


def test_the_nearest_knobs_that_fit() -> None:
    """Of settings that fit the one with the fewest other knobs changed, by the fewest steps, is
    taken; what was fixed stays, and where nothing fits there is none.
    """
    start = Three(a=2)
    assert knobs.nearest(start, {"a"}, lambda _: True) is start
    assert knobs.nearest(start, {"a"}, lambda s: not s.b) == Three(2, False, 8)
    assert knobs.nearest(start, {"a"}, lambda s: s.c < 8) == Three(2, True, 4)
    assert knobs.nearest(start, {"a"}, lambda s: s.c < 8 and not s.b) == Three(2, False, 4)
    assert knobs.nearest(start, {"a"}, lambda s: s.a == 1) is None


def test_a_knob_of_a_side_brings_those_that_depend_on_it() -> None:
    """A side with one knob of a schedule is measured with the default values of the others, but for
    those that do not go with it.
    """
    case, cpu = Case("layer_norm", 1024, "bfloat16", 512), device.current()
    chosen = schedule.get("cached_rows")
    default = chosen.untuned(case, cpu)
    for name, value in (("pairs", not default.pairs), ("sample", not default.sample)):
        side = sides.parse_contender(f"cached_rows:{name}={str(value).lower()}", "cpu")
        assert side is not None and not side.unfit(case, cpu)
        assert getattr(side.default(case, cpu), name) == value


def test_an_empty_log_is_said(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` says as plainly as `report` that there are no measurements, where it looked, and
    what makes some.
    """
    log_dir.mkdir()
    for command in (("report", "layer_norm"), ("compare", "eager", "tuned", "--op", "layer_norm")):
        done = CliRunner().invoke(app, [*command, "--log-dir", str(log_dir)])
        assert done.exit_code and "no measurements of this device in" in " ".join(
            done.output.replace("of what is asked for ", "").split()
        )
        assert str(log_dir) in done.output and "Run: lntune tune layer_norm" in done.output


def test_a_column_of_dashes_goes_first() -> None:
    """Where not all columns fit, those that say nothing of any row go before others; key columns
    stay.
    """
    table = Table("", [*key("case"), Column("us", 1), Column("knobs", 2), Column("empty")])
    table.columns.insert(1, Column("of copy", 1))
    table.add("a", "", "1.5", "lanes=4", "")
    table.add("b", "", "2.5", "lanes=8", "")
    assert table.lines(25)[0].plain.split() == ["case", "us", "knobs", "empty"]
    assert "of copy" in table.lines(25)[-1].plain


def test_a_long_compile_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before something of ours is compiled that takes many seconds it is said, once."""
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        toolchain, "run_compiler", lambda _, path: Path(path).write_bytes(b"a library")
    )
    said: list[str] = []
    monkeypatch.setattr(native, "telling", [said.append])
    for name in ("slow.cpp", "quick.c", "slow.cpp"):
        source = tmp_path / name
        source.write_text("")
        native.compiled(source)
    assert len(said) == 1 and said[0].startswith("compiling slow.cpp, once for this machine")


def test_a_build_says_how_much_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first kernel it is said how many there are and what each takes; --json is alone on
    standard output.
    """
    case = Case("layer_norm", 64, "float32", 8)

    def fake(*arguments: Any) -> list[Built]:
        for number in range(3):
            arguments[-1](number, 3, case, device.current())
        return []

    monkeypatch.setattr(prebuild, "build", fake)
    done = CliRunner().invoke(app, ["build", "layer_norm", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == []
    assert done.stderr.startswith("3 kernels, about a second each")


def test_the_readme_has_its_contents() -> None:
    """Above the first section the README links to each, in their order, and names how to set up."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    above, _, sections = text.partition("\n## ")
    contents = " ".join(above[above.index("Contents: ") :].split())
    headings = re.findall(r"^## (.+)$", f"## {sections}", re.MULTILINE)
    linked = re.findall(r"\[([^]]+)\]\(#([^)]+)\)", contents)
    assert [name for name, _ in linked] == headings
    for name, anchor in linked:
        assert anchor == re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")
    assert "make setup" in above
