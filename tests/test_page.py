"""Pages of reports and comparisons: what they say, that nothing of a log becomes markup, and that
they stay small.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from page_logs import (
    CASE,
    CPU,
    GPU,
    TIMES,
    comparison,
    knob_trials,
    many,
    record,
    result,
    search,
)
from typer.testing import CliRunner

from lntune import ops, schedule
from lntune.case import Case
from lntune.certainty import VERDICTS
from lntune.cli import app
from lntune.compare.comparison import Missing
from lntune.errors import InputError
from lntune.log.records import Record, append, by_device
from lntune.log.wanted import Wanted
from lntune.report.page import (
    axes,
    cells,
    charts,
    compared,
    facts,
    heat,
    packed,
    trials,
    write,
)
from lntune.report.page.facts import DeviceFacts

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\u2028\x01"
COMMAND = "lntune report --html report.html"


def gathered(*records: Record) -> list[DeviceFacts]:
    """The facts of some records, with no schedule known but lntune's own."""
    schedules = schedule.all_schedules()
    groups = by_device(records)
    return [facts.gather(group[-1].device, group, schedules, Wanted()) for group in groups]


def page_of(*records: Record) -> str:
    """The page of some records."""
    return write.report(gathered(*records), COMMAND)


class Reader(HTMLParser):
    """Reads what a browser would: text outside of scripts, names of elements, and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def unpacked(value: Any, shapes: list[list[str]]) -> Any:
    """What packed.pack was given, lists for tuples."""
    if not isinstance(value, list):
        return value
    shape, *values = value
    items = [unpacked(one, shapes) for one in values]
    return items if shape < 0 else dict(zip(shapes[shape], items, strict=True))


def data_of(page: str) -> Any:
    """The data in a page; strict: JSON has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(Reader(page).scripts[0], parse_constant=refuse)
    return unpacked(found["packed"], found["shapes"])


# --- facts


def test_a_case_has_its_place_under_the_roofline() -> None:
    """Intensity is operations per byte; GFLOP/s and the copy's bandwidth follow from the times."""
    (case,) = gathered(record())[0].cases
    op = ops.get("layer_norm")
    assert case.intensity == op.flops(CASE) / op.bytes(CASE)
    assert case.gflops == pytest.approx(op.flops(CASE) / 50e-6 / 1e9)
    moved = 2 * 512 * 1024 * 4
    assert case.copy == (pytest.approx(moved), pytest.approx(moved / 40e-6 / 1e9))


def test_what_was_disturbed_has_no_figures_made_of_its_times() -> None:
    """Neither GFLOP/s nor a copy's bandwidth is told of a disturbed record."""
    (case,) = gathered(record(busy=True))[0].cases
    assert case.gflops is None and case.copy is None


def test_devices_are_told_apart() -> None:
    """Records of two devices make two parts, each with its own cases."""
    devices = gathered(record(), record(device=GPU))
    assert [d.device.name for d in devices] == ["Some CPU", "NVIDIA H200"]
    assert [len(d.cases) for d in devices] == [1, 1]


# --- trials


def test_a_curve_has_the_trials_that_were_best_so_far() -> None:
    """Only improvements are kept, with their numbers; failed trials count as trials."""
    curve = trials.curve("r1", search([9.0, None, 10.0, 7.0, 7.0, 6.5, 8.0]))
    assert curve.best == ((1, 9.0), (4, 7.0), (6, 6.5))
    assert curve.trials == 7


def test_trials_are_counted_by_their_distance_from_the_best_of_their_search() -> None:
    """Each class holds times up to its end as a multiple of the search's own best; failures are
    counted apart.
    """
    other = Case("layer_norm", 256, "float32", 1)
    found = trials.searches([*search([10.0, 10.1, 14.0, None]), *search([500.0, 1e6], other)])
    (one,) = trials.distributions(found)
    ends = dict(zip(trials.BEYOND, one.classes, strict=True))
    assert ends[1.02] == 3 and ends[1.5] == 1 and ends[math.inf] == 1
    assert one.trials == 6 and one.failed == {"wrong": 1}
    assert [(r.status, r.count) for r in one.reasons] == [("wrong", 1)]


def test_a_knob_that_decides_explains_most_and_one_that_does_nothing_next_to_nothing() -> None:
    """The share of a knob with an effect ten times the noise is near 1; of one without effect near
    0, though with few trials to a search chance alone explains a fifth; one that never changes is
    not listed.
    """
    (one,) = trials.importances(trials.searches(knob_trials(40, 1.0)))
    assert [k.knob for k in one.knobs] == ["lanes", "unroll"]
    assert one.knobs[0].share > 0.9 and one.knobs[1].share < 0.05
    assert (one.trials, one.searches) == (320, 40)
    (nothing,) = trials.importances(trials.searches(knob_trials(40, 0.0)))
    assert max(k.share for k in nothing.knobs) < 0.1


def test_the_share_is_that_of_the_variance() -> None:
    """An effect that makes half of the variance has a share of about a half."""
    half = [trials.importances(trials.searches(knob_trials(60, 0.2, s)))[0] for s in range(5)]
    shares = [next(k.share for k in one.knobs if k.knob == "lanes") for one in half]
    assert statistics.fmean(shares) == pytest.approx(0.5, abs=0.08)


def test_nothing_is_said_of_knobs_after_few_trials() -> None:
    """Two searches of eight trials are too few."""
    assert trials.importances(trials.searches(knob_trials(2, 1.0))) == []


# --- charts


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1) of a colour such as "#9a3d00"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours (WCAG 2.1), from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("level", heat.LEVELS, ids=lambda one: f"to {one.end:g}")
def test_a_cells_text_can_be_read(level: heat.Level) -> None:
    """Text on each colour of the heat map has the contrast that WCAG asks of small text, 4.5, in
    both schemes.
    """
    assert contrast(level.light, level.light_text) >= 4.5
    assert contrast(level.dark, level.dark_text) >= 4.5


def test_classes_of_a_heat_map_follow_one_another() -> None:
    """Neighbouring classes differ in lightness, and it goes one way on either side of a draw."""
    for scheme in ("light", "dark"):
        shades = [luminance(getattr(level, scheme)) for level in heat.LEVELS]
        middle = heat.level(1.0)
        signs = [math.copysign(1, b - a) for a, b in itertools.pairwise(shades)]
        assert len(set(signs[middle:])) == 1
        assert len(set(signs[:middle])) == 1 and signs[0] != signs[-1]


def test_every_ratio_has_a_class() -> None:
    """A ratio at the end of a class is in it, one above in the next; None is in none."""
    assert [heat.level(r) for r in (1e-9, 0.5, 0.51, 1.0, math.inf)] == [
        0,
        0,
        1,
        3,
        len(heat.LEVELS) - 1,
    ]
    assert heat.level(None) == -1
    assert [i for i, _ in heat.legend()] == list(range(len(heat.LEVELS)))


def test_eager_is_named_where_it_serves() -> None:
    """A cell in which eager measured faster says eager, not the schedule that lost."""
    slow = record(times={**TIMES, "eager": 30.0})
    (map_,) = heat.heat_maps(gathered(slow)[0], 0)
    ((_, (cell,)),) = map_.rows
    assert cell is not None and cell.schedule == "eager" and cell.level < heat.level(1.0)


def inside(plot: axes.Plot) -> bool:
    """Whether all coordinates of a chart lie in it."""
    paths = [m.path for m in plot.marks]
    points = [re.findall(r"[MLHV]([-\d.]+)(?: ([-\d.]+))?", p) for p in paths]
    assert all(points)
    numbers = [float(n) for path in points for pair in path for n in pair if n]
    labels = [n for label in plot.labels for n in (label.x, label.y)]
    return all(0 <= n <= max(axes.WIDTH, plot.height) for n in numbers + labels)


def test_charts_keep_their_marks_inside() -> None:
    """No mark of a roofline, a chart of bandwidth or a tuning curve lies outside, and each case has
    its own.
    """
    (device,) = gathered(*many(50))
    plots = [charts.roofline(device, 7), charts.bandwidth(device, 7), *charts.curves(device, 7)]
    for plot in plots:
        assert plot is not None and inside(plot)
        assert plot.x_ticks and plot.y_ticks
    for plot in plots[:2]:
        assert plot is not None
        assert {m.case for m in plot.marks} == {-1, *range(7, 57)}
    drawn = [m.case for plot in plots[2:] if plot for m in plot.marks]
    assert sorted(drawn) == list(range(7, 57))


def test_one_case_has_its_charts() -> None:
    """A single point still has axes with a beginning and an end."""
    (device,) = gathered(record(), *search([60.0, 50.0]))
    for plot in (
        charts.roofline(device, 0),
        charts.bandwidth(device, 0),
        *charts.curves(device, 0),
    ):
        assert plot is not None and inside(plot)


@pytest.mark.parametrize("rows", [0, 1, 10**9])
@pytest.mark.parametrize("us", [0.0, -1.0, 5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("name", ["tuned", "copy"])
def test_times_that_make_no_sense_spoil_nothing(name: str, us: float, rows: int) -> None:
    """An edited log has its page, and the other cases their points, whatever times it holds."""
    odd = record(Case("layer_norm", 64, "float32", rows), times={**TIMES, name: us})
    (device,) = gathered(record(), odd, *search([us, 1.0, us]))
    plot = charts.roofline(device, 0)
    assert plot is not None and inside(plot)
    assert len(data_of(write.report([device], COMMAND))["cases"]) == 2


def test_without_a_copy_there_is_no_roof() -> None:
    """The roofline is drawn of points alone where no copy was measured."""
    (device,) = gathered(record(times={"tuned": 50.0, "eager": 100.0}))
    plot = charts.roofline(device, 0)
    assert plot is not None and {m.style for m in plot.marks} == {"dot o0 round"}


@pytest.mark.parametrize(
    ("size", "text"), [(16, "16 B"), (4096, "4 KiB"), (3 << 20, "3 MiB"), (1 << 32, "4 GiB")]
)
def test_bytes_have_the_unit_that_suits_them(size: int, text: str) -> None:
    """Sizes are told in the largest unit of which they are at least one."""
    assert axes.bytes_text(size) == text


# --- pages


def test_the_page_says_what_the_log_says() -> None:
    """Cards, table, knobs, versions, days and the command stand in the page; its data has the
    record.
    """
    page = page_of(record(), *search([60.0, 50.0]))
    text = Reader(page).text
    for said in (
        f"2.00{cells.TIMES}",
        "Some CPU",
        "cached_rows",
        "torch 2.13.0",
        "2026-01-02",
        COMMAND,
    ):
        assert said in text, said
    ((case,), (device,)) = (data_of(page)[name] for name in ("cases", "devices"))
    assert device == msgspec.to_builtins(CPU) | {"features": []}
    assert case["record"]["knobs"] == {"lanes": 4, "write": "plain"}
    assert case["record"]["timings"]["tuned"] == {"median_us": 50.0, "samples": 5}
    assert case["figures"]["speedup"] == 2.0


def test_every_mark_leads_to_a_case_of_the_table() -> None:
    """Each link of a chart or a heat map has the row of its case, and each case has a mark."""
    reader = Reader(page_of(*many(60)))
    links = {v for name, v in reader.attributes if name == "href" and v and v.startswith("#case-")}
    rows = {f"#{v}" for name, v in reader.attributes if name == "id" and v and "case-" in v}
    assert links == rows and len(rows) == 60


@pytest.mark.parametrize("place", ["schedule", "message", "knob", "device", "version", "run"])
def test_nothing_of_a_log_becomes_markup(place: str) -> None:
    """Text of a log stays text wherever it is shown: no element, no attribute, no script comes of
    it, and the data can be read.
    """
    fields: dict[str, Any] = {
        "schedule": {"schedule": HOSTILE},
        "knob": {"knobs": {HOSTILE: HOSTILE}},
        "device": {"device": msgspec.structs.replace(CPU, name=HOSTILE, isa=HOSTILE)},
        "version": {"versions": {HOSTILE: HOSTILE}},
        "run": {"run": HOSTILE},
        "message": {},
    }[place]
    failed = record(role="trial", status="run", message=HOSTILE, times={}, **fields)
    timed = [record(role="trial", **fields)] * 40
    page = page_of(record(**fields), failed, *timed)
    reader, plain = Reader(page), Reader(page_of(record(), *search([50.0])))
    assert len(reader.scripts) == 2 and set(reader.names) <= {*plain.names, "ul", "li", "svg"}
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "alert(1)</script>" not in page and "<img" not in page
    assert "49" not in reader.text or "7*7" in reader.text  # no template is run
    assert len(data_of(page)["cases"]) == 1


def test_names_given_to_a_comparison_do_not_become_markup() -> None:
    """The names of both sides, reasons and commands stay text."""
    hostile = msgspec.structs.replace(
        result(comparison(reason=HOSTILE), missing=(Missing(CASE, HOSTILE, HOSTILE, HOSTILE),)),
        commands=[HOSTILE],
        a=HOSTILE,
        b=HOSTILE,
    )
    page = write.compare([hostile], f"lntune compare {HOSTILE}")
    reader = Reader(page)
    assert len(reader.scripts) == 2 and "img" not in reader.names
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_a_page_reaches_for_nothing() -> None:
    """No address, no import and no link to elsewhere is in a page, and its policy forbids them."""
    for page in (page_of(*many(5)), write.compare([result(comparison())], "lntune compare a b")):
        assert not re.search(r"https?:|@import|url\(", page)
        values = [v for name, v in Reader(page).attributes if name in ("src", "href") and v]
        assert all(v.startswith("#") or v == "data:," for v in values)
        assert "default-src &#39;none&#39;" in page


def test_figures_that_are_no_numbers_are_null() -> None:
    """Infinite and undefined numbers do not get into the data: JSON has none."""
    endless = comparison(low=0.0, high=math.inf, p=math.nan, verdict="UNSURE")
    (case,) = data_of(write.compare([result(endless)], "lntune compare a b"))["cases"]
    assert case.get("high") is None and case.get("p") is None


def test_an_empty_log_has_a_page() -> None:
    """It says that there are no measurements, and what makes them."""
    text = Reader(page_of()).text
    assert "No measurements" in text and "lntune tune" in text


def test_trials_alone_have_a_page() -> None:
    """A log without finals shows its trials and has neither heat map nor table."""
    reader = Reader(page_of(*search([10.0, 9.0, None])))
    assert "3 trials, 1 wrong" in reader.text and "thead" not in reader.names


def test_a_gpu_has_its_page() -> None:
    """A GPU's multiprocessors, schedule and case are shown."""
    text = Reader(page_of(record(device=GPU))).text
    for said in ("NVIDIA H200", "132 multiprocessors", "shared_row", "sm_90"):
        assert said in text


def test_disturbed_and_stale_cases_are_marked() -> None:
    """Their rows say so, and no speedup stands in their cells."""
    page = page_of(record(busy=True, code=msgspec.convert({"schedule": 0}, type=type(CODE))))
    assert "<em>stale</em>" in page and "<em>disturbed</em>" in page
    assert f"2.00{cells.TIMES}" not in Reader(page).text


CODE = record().code


def test_an_operator_that_is_not_known_is_shown_without_a_roofline() -> None:
    """A record of somebody's own operator has its times and ratios."""
    text = Reader(page_of(record(Case("someones_op", 64, "float32", 1)))).text
    assert "someones_op" in text and "Roofline" not in text


@pytest.mark.parametrize("count", [160, 1440])
def test_pages_stay_small(count: int) -> None:
    """As many cases as a shipped log has fit into 300 KB; those of three dtypes, six row buckets
    and twenty hidden sizes into 2 MB.
    """
    limit = 300_000 if count <= 160 else 2_000_000
    assert len(page_of(*many(count)).encode()) <= limit


def test_trials_add_next_to_nothing() -> None:
    """A page of hundreds of times as many trials is hardly longer."""
    few = page_of(record(), *search([60.0, 50.0]))
    lots = page_of(record(), *search([60.0, 50.0, *([70.0] * 1000)]))
    assert len(lots) < len(few) + 500


def test_more_cases_than_a_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards count all cases, the page shows the first and says so."""
    monkeypatch.setattr(facts, "MOST", 10)
    page = page_of(*many(15))
    assert "shows 10 cases of 15" in Reader(page).text
    assert len(data_of(page)["cases"]) == 10


def test_two_devices_share_no_number() -> None:
    """Cases are numbered on, from device to device."""
    page = page_of(record(), record(device=GPU))
    assert [c["device"] for c in data_of(page)["cases"]] == [0, 1]
    ids = [v for name, v in Reader(page).attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"case-0", "case-1", "device-1"} <= set(ids)


@pytest.mark.parametrize("columns", [["op", 3], {"a": {"b": [1, {"c": None}]}, "d": []}, 1.5, "x"])
def test_what_is_packed_can_be_unpacked(columns: Any) -> None:
    """Objects, lists and plain values come back as they were."""
    shapes: packed.Shapes = []
    assert unpacked(packed.pack(columns, shapes), shapes) == columns


def test_the_script_stays_short() -> None:
    """Ten kilobytes are enough for sorting, filtering, hovering and colours."""
    assert (write.TEMPLATES / "page.js").stat().st_size <= 10 * 1024


# --- comparisons


def test_a_comparison_says_who_wins() -> None:
    """Counts, ratios, what is missing and the command are on the page."""
    missing = Missing(Case("layer_norm", 64, "float16", 1), "B", "no record")
    cases = [comparison(verdict=v) for v in VERDICTS]
    said_so = msgspec.structs.replace(
        result(*cases, missing=(missing,)), commands=["lntune tune it"]
    )
    text = Reader(write.compare([said_so], "lntune compare a b")).text
    for said in (
        "cached_rows",
        f"2.000{cells.TIMES}",
        *VERDICTS,
        "no record",
        "lntune tune it",
        "Holm",
    ):
        assert said in text, said


def test_a_comparison_of_nothing_has_a_page() -> None:
    """Without a case in common the page says how many are missing."""
    missing = tuple(Missing(CASE, "B", "no record") for _ in range(3))
    assert "missing" in Reader(write.compare([result(missing=missing)], "lntune compare a b")).text


def test_the_scale_of_ratios_holds_all_and_ends_somewhere() -> None:
    """The axis is as wide as the intervals, at least 1.1 and at most 8 either way; what lies beyond
    is drawn at its end.
    """
    narrow = compared.scale([comparison(ratio=1.0, low=0.99, high=1.01)])
    wide = compared.scale([comparison(ratio=1.0, low=0.0, high=math.inf), comparison(high=99.0)])
    assert (narrow.limit, wide.limit) == (compared.NARROWEST, compared.WIDEST)
    assert [wide.at(r) for r in (0.0, 1 / 8, 1.0, 8.0, 1000.0)] == [0, 0, 50, 100, 100]
    assert [text for _, text in narrow.ticks()][-1] == "1.1"


def test_groups_have_the_numbers_of_their_cases() -> None:
    """Cases are grouped by operator and dtype, in the order given, and numbered from the first."""
    cases = [comparison(), comparison(Case("layer_norm", 64, "bfloat16", 1)), comparison()]
    one, other = compared.groups(cases, compared.scale(cases), 7)
    assert (one.dtype, [i.number for i in one.intervals]) == ("float32", [7, 9])
    assert (other.dtype, [i.number for i in other.intervals]) == ("bfloat16", [8])


def test_ratios_beyond_the_axis_are_arrows_with_their_figure() -> None:
    """A ratio past either end of the axis is no point at it: an arrow with the ratio stands there,
    and a sentence says so where there is one.
    """
    far, near = comparison(ratio=32.2, low=30.0, high=34.0), comparison(ratio=8.0, high=8.1)
    slow = comparison(ratio=0.05, low=0.04, high=0.06)
    (group,) = compared.groups([far, near, slow], compared.Scale(compared.WIDEST))
    assert [i.beyond for i in group.intervals] == ["right", "", "left"]
    text = Reader(write.compare([result(far)], "lntune compare a b")).text
    assert "Arrows lie beyond the axis" in text and f"32.2{cells.TIMES}" in text
    assert "Arrows" not in Reader(write.compare([result(near)], "lntune compare a b")).text


def test_three_sides_share_a_page() -> None:
    """Each side has its part against the first, and cases are numbered on."""
    third = msgspec.structs.replace(result(comparison(), comparison()), b="default")
    page = write.compare([result(comparison()), third], "lntune compare a b c")
    reader = Reader(page)
    ids = [v for name, v in reader.attributes if name == "id"]
    assert {"case-0", "case-1", "case-2", "cases-0", "cases-1"} <= set(ids)
    assert len(ids) == len(set(ids)) and len(data_of(page)["cases"]) == 3
    for said in ("widened_rows against cached_rows", "default against cached_rows"):
        assert said in reader.text


def test_a_column_that_has_nothing_is_left_out() -> None:
    """Doubts and the device are columns only where there is something to say."""
    names = [c.name for c in cells.compare([comparison()]).columns]
    assert not {"doubts", "device"} & set(names) and "differs in" in names
    doubted = msgspec.structs.replace(comparison(reason="drift"), device="other")
    names = [c.name for c in cells.compare([comparison(), doubted]).columns]
    assert "doubts" in names and "device" in names


# --- files


def test_a_page_is_saved_whole(tmp_path: Path) -> None:
    """The file has the page, in folders that are made for it, and nothing else is left behind."""
    path = tmp_path / "new" / "report.html"
    write.save(path, "<p>old")
    write.save(path, f"<p>{cells.TIMES}")
    assert path.read_text(encoding="utf-8") == f"<p>{cells.TIMES}"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    """A pipe, as a device such as /dev/stdout, gets the page and stays what it is; so does a link,
    whose file gets it. A folder is refused.
    """
    pipe, link, file = tmp_path / "pipe", tmp_path / "link.html", tmp_path / "file.html"
    os.mkfifo(pipe)
    link.symlink_to(file)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write.save(pipe, "a page")
        assert os.read(reader, 100) == b"a page"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    write.save(link, "a page")
    assert link.is_symlink()
    assert file.read_text() == "a page"
    with pytest.raises(InputError, match=r"--html: got .*expected a file that can be written"):
        write.save(tmp_path, "a page")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error has the option, the file and the reason."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "report.html"
    with pytest.raises(InputError, match=r"--html: got .*report\.html, expected a file"):
        write.save(path, "<p>")


# --- commands


def test_report_writes_a_page(tmp_path: Path, log_dir: Path) -> None:
    """`lntune report --html FILE` writes the page beside its table; `--format html` prints it; both
    name the command.
    """
    for one in (record(), *search([60.0, 50.0])):
        append(log_dir, one)
    path = tmp_path / "report.html"
    asked = ["report", "layer_norm", "--all-devices", "--log-dir", str(log_dir)]
    done = CliRunner().invoke(app, [*asked, "--html", str(path)])
    assert done.exit_code == 0, done.output
    page = path.read_text(encoding="utf-8")
    assert "tuned us" in done.stdout and f"The page is in {path}." in done.stderr
    command = f"lntune {' '.join(asked[:3])} --log-dir {log_dir} --html {path}"
    assert command in Reader(page).text
    printed = CliRunner().invoke(app, [*asked, "--format", "html"]).stdout
    assert printed.replace("report.html", str(path)).strip() == page.strip()


def test_compare_prints_a_page(log_dir: Path) -> None:
    """`lntune compare A B --format html` prints a page that names the command."""
    for _ in range(2):
        append(log_dir, record())
    asked = ["compare", "tuned", "eager", "--all-devices", "--log-dir", str(log_dir)]
    done = CliRunner().invoke(app, [*asked, "--format", "html"])
    assert done.exit_code == 0, done.output
    text = Reader(done.stdout).text
    assert "eager against tuned" in text and f"lntune {' '.join(asked)} --format html" in text
