"""Plots: what is drawn is what was measured, the same measurements make the same file, and
matplotlib is left as it was.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from lntune.case import Case
from lntune.cli import app
from lntune.compare.comparison import Comparison, Measurement, Result
from lntune.device import Device
from lntune.errors import InputError
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.report import panels, plots
from lntune.report.panels import Point
from lntune.report.rows import row_of

CPU = Device("cpu", "Test CPU", "x86-64-v3", 2, l1=1 << 15, l2=1 << 20, l3=1 << 25)
TIMES = {"tuned": 1.0, "eager": 2.0, "copy": 0.8}


def measured(case: Case, **fields: Any) -> Record:
    """A final whose contenders take TIMES, some percent up and down from round to round."""
    us = 1 + case.rows * case.hidden / 1e4
    rounds = [us * (1 + 0.01 * (i % 7)) for i in range(40)]
    timings = {}
    for name, times in TIMES.items():
        samples = tuple(times * r * (1 + 0.001 * (i % 3)) for i, r in enumerate(rounds))
        timings[name] = Timing(samples, statistics.median(samples))
    plain: dict[str, Any] = {
        "role": "final",
        "case": case,
        "device": CPU,
        "threads": 2,
        "schedule": "cached_rows",
        "knobs": {},
        "status": "ok",
        "timings": timings,
        "versions": {"lntune": "0.1.0", "torch": "2.13.0"},
        "time": "2026-01-02T03:04:05Z",
    }
    return Record(**{**plain, **fields})


@pytest.fixture(scope="module")
def finals() -> list[Record]:
    """Two operators, two dtypes, three hidden sizes, two numbers of rows."""
    return [
        measured(Case(op, hidden, dtype, rows))
        for op in ("layer_norm", "lnlstm_step")
        for dtype in ("float32", "bfloat16")
        for hidden in (256, 1000, 1024)
        for rows in (1, 512)
    ]


def words(path: Path) -> str:
    """What is written in an SVG: matplotlib notes each text that it draws in a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.strip() for line in lines if line.strip().startswith("<!--"))


def compared(verdict: str = "FASTER", **fields: Any) -> Comparison:
    """One case of a comparison."""
    side = Measurement(10.0, time="2026-01-02T03:04:05Z")
    plain: dict[str, Any] = {
        "device": CPU.slug,
        "case": Case("layer_norm", 1024, "float32", 1),
        "a": side,
        "b": side,
        "ratio": 1.2,
        "low": 1.1,
        "high": 1.3,
        "p": 0.01,
        "verdict": verdict,
        "method": "paired",
    }
    return Comparison(**{**plain, **fields})


@pytest.mark.parametrize("ending", plots.ENDINGS)
def test_a_file_of_each_kind(finals: list[Record], tmp_path: Path, ending: str) -> None:
    """Written, of its kind, and to the byte the same again, whatever matplotlib's settings are."""
    begins = {".png": b"\x89PNG", ".svg": b"<?xml"}[ending]
    one, again = (tmp_path / f"{name}{ending}" for name in ("one", "again"))
    plots.of_records(finals, one)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "none"}):
        plots.of_records(finals, again)
    assert one.read_bytes().startswith(begins)
    assert one.read_bytes() == again.read_bytes()


def test_matplotlib_is_left_as_it_was(finals: list[Record], tmp_path: Path) -> None:
    """Settings are the user's afterwards, and pyplot, which has a state, is not even loaded."""
    with mpl.rc_context({"font.size": 20}):
        before = dict(mpl.rcParams)
        plots.of_records(finals[:2], tmp_path / "a.png")
        assert dict(mpl.rcParams) == before
    (tmp_path / "finals.json").write_bytes(msgspec.json.encode(finals[:2]))
    program = (
        "import sys, msgspec, pathlib\n"
        "from lntune.log.records import Record\n"
        "from lntune.report import plots\n"
        "text = pathlib.Path('finals.json').read_bytes()\n"
        "plots.of_records(msgspec.json.decode(text, type=list[Record]), pathlib.Path('b.svg'))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_what_is_said(finals: list[Record], tmp_path: Path) -> None:
    """Operators, dtypes, sizes and rows, units, who the rival is, device, versions, day, and how
    many were left out.
    """
    disturbed = msgspec.structs.replace(finals[0], busy=True)
    plots.of_records([*finals, disturbed], tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    for word in (
        *("layer_norm, float32", "lnlstm_step, bfloat16", "1024", "512", "rows", "hidden size"),
        *("GB/s", "bytes that a call moves", "a copy", "L2", "2x", "eager mode"),
        *(CPU.name, CPU.slug, "2 threads", "lntune 0.1.0", "torch 2.13.0", "2026-01-02"),
        *("95 %", "left out: 1 disturbed"),
    ):
        assert word in text, word


def test_operators_are_in_their_order(finals: list[Record], tmp_path: Path) -> None:
    """That of `lntune ops`, and behind them what is not known any more."""
    gone = [msgspec.structs.replace(r, case=Case("gone", 256, "float32", 1)) for r in finals[:1]]
    plots.of_records([*gone, *reversed(finals)], tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    places = [text.index(f"{op}, float32") for op in ("layer_norm", "lnlstm_step", "gone")]
    assert places == sorted(places)


def test_the_rival_is_the_better_one(finals: list[Record]) -> None:
    """Of eager mode and torch.compile, in each case; a copy where neither was measured."""
    record = finals[0]
    times = record.timings
    slow, fast = (
        Timing(tuple(s * by for s in times["eager"].samples_us), times["eager"].median_us * by)
        for by in (2, 0.75)
    )
    for timings, ratio in (
        (times, 2.0),
        ({**times, "compile": slow}, 2.0),
        ({**times, "compile": fast}, 1.5),
        ({"tuned": times["tuned"], "copy": times["copy"]}, 0.8),
    ):
        point = plots.speedup(msgspec.structs.replace(record, timings=timings))
        assert point is not None
        assert point.ratio == pytest.approx(ratio)
        assert point.low <= point.ratio <= point.high
    assert plots.speedup(msgspec.structs.replace(record, timings={"tuned": times["tuned"]})) is None


def test_too_few_samples_for_an_interval(finals: list[Record]) -> None:
    """Their ratio is drawn without one, and hollow."""
    few = {n: Timing(t.samples_us[:3], t.median_us) for n, t in finals[0].timings.items()}
    point = plots.speedup(msgspec.structs.replace(finals[0], timings=few))
    assert point == Point(finals[0].case, pytest.approx(2.0), point.ratio, point.ratio, sure=False)


def drawn(points: Sequence[Point], smallest: float = 0.0) -> Any:
    """The axes of a panel with these points."""
    axes = Figure().subplots()
    panels.ratios(axes, points, sorted({p.case.rows for p in points}), smallest)
    return axes


def test_ratios_are_where_they_were_measured() -> None:
    """A line for each number of rows, through its ratios in the order of hidden sizes; bars from
    low to high.
    """
    sizes = (1024, 256, 4096)
    points = [
        Point(Case("layer_norm", hidden, "float32", rows), ratio, ratio - 0.2, ratio + 0.3)
        for (rows, hidden), ratio in zip(
            itertools.product((1, 64), sizes), (2.0, 3.0, 4.0, 5.0, 6.0, 7.0), strict=True
        )
    ]
    axes = drawn(points)
    of_one, of_many = axes.containers
    assert (of_one.get_label(), of_many.get_label()) == ("1", "64")
    assert list(of_one.lines[0].get_ydata()) == [3.0, 2.0, 4.0]
    assert list(of_many.lines[0].get_ydata()) == [6.0, 5.0, 7.0]
    assert list(of_one.lines[0].get_xdata()) == pytest.approx(sorted(sizes), rel=0.1)
    bars = of_one.lines[2][0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [
        pytest.approx((y - 0.2, y + 0.3)) for y in (3.0, 2.0, 4.0)
    ]
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
    assert len({color for color, _ in looks}) == len({mark for _, mark in looks}) == 2


def test_what_is_not_sure_is_hollow() -> None:
    """Marks of ratios that may be 1 are white inside, others are not."""
    case = Case("layer_norm", 256, "float32", 1)
    points = [
        Point(case, 1.5, 1.4, 1.6),
        Point(msgspec.structs.replace(case, hidden=512), 1.0, 0.9, 1.1, sure=False),
    ]
    hollow = [line for line in drawn(points).lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[1.0]]


def test_bandwidth_hangs_below_the_copy(finals: list[Record]) -> None:
    """Ours and the copy's stand at the bytes that a call moves, each where the rows have it."""
    rows = [row_of(r) for r in finals if r.case.op == "layer_norm"]
    axes = Figure().subplots()
    panels.roof(axes, rows, CPU)
    for mark, figure in ((panels.DTYPE_LOOKS["float32"][1], "gbps"), ("_", "copy_gbps")):
        line = next(line for line in axes.lines if line.get_marker() == mark)
        assert sorted(zip(line.get_xdata(), line.get_ydata(), strict=True)) == sorted(
            (row.bytes, getattr(row, figure)) for row in rows if row.dtype == "float32"
        )


@pytest.mark.parametrize("sizes", [(1024,), (1000, 1024), (256, 768, 1000, 1024, 4096, 16384)])
def test_sizes_below_an_axis(sizes: tuple[int, ...]) -> None:
    """Those that have room are written, powers of two before others, the first and last among
    them where they are powers of two.
    """
    case = Case("layer_norm", 1, "float32", 1)
    axes = drawn([Point(msgspec.structs.replace(case, hidden=s), 1.0, 0.9, 1.1) for s in sizes])
    written = [int(label.get_text()) for label in axes.get_xticklabels()]
    assert set(written) <= set(sizes)
    assert {s for s in sizes if s & (s - 1) == 0} <= set(written)
    assert {*axes.get_xticks(), *axes.get_xticks(minor=True)} == set(sizes)


def test_uncertainty_does_not_hide_the_rest() -> None:
    """All ratios are within a panel's range, whose ends are near them, however far an interval
    reaches.
    """
    case = Case("layer_norm", 256, "float32", 1)
    points = [Point(case, 2.0, 0.01, 900.0), Point(case, 3.0, 2.9, 3.1)]
    axes = drawn(points)
    panels.level([axes], points)
    low, high = axes.get_ylim()
    assert 0.5 < low <= 1
    assert 3.0 < high < 4.5
    assert {label.get_text() for label in axes.get_yticklabels()} >= {"1x", "2x"}


def test_the_plot_of_a_report(finals: list[Record], tmp_path: Path) -> None:
    """`lntune report --plot` draws what serves each case that is asked for, and says where it is;
    without a measurement it draws nothing.
    """
    for record in finals:
        records.append(tmp_path / "logs", record)
    path = tmp_path / "a.svg"
    command = ["report", "--log-dir", str(tmp_path / "logs"), "--plot", str(path)]
    done = CliRunner().invoke(app, [*command, "--device", "test-", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert f"The plot is in {path}." in done.stderr.replace("\n", " ")
    text = words(path)
    assert "lnlstm_step, bfloat16" in text and "float32" not in text
    path.unlink()
    assert CliRunner().invoke(app, [*command, "--hidden", "77"]).exit_code == 1
    assert not path.exists()
    done = CliRunner().invoke(app, [*command, "--history"])
    assert done.exit_code == 2 and "a plot beside it" in done.stderr


def test_a_comparison(tmp_path: Path) -> None:
    """Both sides are named, and the legend has every number of rows, also of what is uncertain
    without end.
    """
    cases = [
        compared(case=Case("layer_norm", 256, "bfloat16", 7), verdict="UNSURE"),
        compared(),
        compared(case=Case("layer_norm", 256, "float32", 999), low=0.0, high=float("inf")),
    ]
    plots.of_comparison(Result("cached_rows", "widened_rows", cases), tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    for word in ("widened_rows", "cached_rows", "Holm", CPU.slug, "2026-01-02", " 7 ", " 999 "):
        assert word in text, word


def test_the_plot_of_a_compare(finals: list[Record], tmp_path: Path) -> None:
    """`lntune compare --plot` draws B over A of the cases that both have; of more than two sides
    it draws none, and says so before it compares anything.
    """
    for side in ("before", "after"):
        for record in finals:
            records.append(tmp_path / side, record)
    before, after, path = (tmp_path / name for name in ("before", "after", "a.svg"))
    done = CliRunner().invoke(app, ["compare", str(before), str(after), "--plot", str(path)])
    assert done.exit_code == 0, done.output
    assert f"The plot is in {path}." in done.stderr.replace("\n", " ")
    assert "lnlstm_step, bfloat16" in words(path)
    three = ["compare", str(before), str(after), "eager", "--plot", str(path)]
    done = CliRunner().invoke(app, three)
    assert done.exit_code == 2 and "--plot: got 3 sides, expected two" in done.stderr


@pytest.mark.parametrize("most", [1.01, 1.3, 3.0, 40.0])
def test_ratios_beside_an_axis(most: float) -> None:
    """1 is among them, and they are neither one alone nor many."""
    case = Case("layer_norm", 256, "float32", 1)
    points = [Point(case, 1.0, 0.99, 1.01), Point(case, most, most * 0.99, most * 1.01)]
    axes = drawn(points)
    panels.level([axes], points)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 1.0 in ticks
    assert 3 <= len(ticks) <= panels.TICKS


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a.jpg", r"--plot: got .*a\.jpg, expected a file whose name ends in \.png or \.svg"),
        ("svg", r"--plot: got .*svg, expected a file whose name ends"),
        ("no/where.svg", r"--plot: got .*, expected a folder .*no that is there"),
    ],
)
def test_a_file_that_cannot_be(tmp_path: Path, name: str, match: str) -> None:
    """Its name and what is wrong with it are said before anything is drawn."""
    with pytest.raises(InputError, match=match):
        plots.check(tmp_path / name)


def test_a_file_in_the_way(finals: list[Record], tmp_path: Path) -> None:
    """A folder of that name is an error with the reason."""
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(InputError, match=r"--plot: got .*a\.svg, expected a file that can be"):
        plots.of_records(finals[:1], tmp_path / "a.svg")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"not installed.*pip install 'lntune\[plot\]'"):
        plots.check(tmp_path / "a.svg")


def test_nothing_to_draw(finals: list[Record], tmp_path: Path) -> None:
    """No measurement, only disturbed ones, those of two devices, or no case in common are errors,
    and leave no file.
    """
    other = msgspec.structs.replace(CPU, name="Other CPU")
    path = tmp_path / "a.svg"
    for measurements, match in (
        ([], "no measurements"),
        ([msgspec.structs.replace(finals[0], busy=True)], "disturbed"),
        ([finals[0], msgspec.structs.replace(finals[1], device=other)], "those of one device"),
    ):
        with pytest.raises(InputError, match=match):
            plots.of_records(measurements, path)
    for cases, match in (
        ([], "no measurements"),
        ([compared(), compared(device=other.slug)], "those of one device"),
    ):
        with pytest.raises(InputError, match=match):
            plots.of_comparison(Result("a", "b", cases), path)
    assert not path.exists()
