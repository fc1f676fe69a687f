"""`lntune.report` from Python: what it returns, how it prints, and what pandas is given."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from made_log import CASES, DEVICE, finals
from made_up_records import bench_file, record, samples
from rich.console import Console

import lntune
from lntune import device, report
from lntune.errors import InputError, UnknownNameError
from lntune.log import records
from lntune.report.frames import Frame
from lntune.report.queries import Trial
from lntune.report.rows import Row
from lntune.versions import Code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made log, with three trials: two that were timed, one that failed with words that HTML
    would take for its own.
    """
    logs = tmp_path_factory.mktemp("made")
    made = list(finals(Code(1, 1, 1)))
    for final in made:
        records.append(logs, final)
    for final in made[:2]:
        records.append(logs, msgspec.structs.replace(final, role="trial"))
    failed: dict[str, Any] = {"status": "wrong", "timings": {}, "errors": {}}
    message = "<script>alert(1)</script> & more"
    records.append(logs, msgspec.structs.replace(made[0], role="trial", message=message, **failed))
    return logs


def test_cases_are_those_of_the_command(folder: Path) -> None:
    """Without arguments all cases of a device; with them those that are asked for, one value or
    several, dtypes by name or as torch has them.
    """
    every = report.cases(device="made", log_dir=folder)
    assert {row.case for row in every} == set(CASES) and len(every) == len(CASES)
    assert all(isinstance(row, Row) for row in every)
    some = report.cases("layer_norm", 256, "fp32", [1, 600], device="", log_dir=str(folder))
    assert [(r.hidden, r.dtype, r.rows) for r in some] == [
        (256, "float32", 1),
        (256, "float32", 512),
    ]
    import torch

    by_torch = report.cases(hidden=[256], dtype=[torch.float32], device="", log_dir=folder)
    assert list(by_torch) == list(some)


def test_this_machine_is_asked_by_default(folder: Path) -> None:
    """Where no device is named it is this machine's CPU; what is not there is refused."""
    assert DEVICE.slug != device.current().slug
    assert len(report.cases(log_dir=folder)) == 0
    with pytest.raises(InputError, match="log_dir: got"):
        report.cases(log_dir=folder / "none")
    with pytest.raises(InputError, match=DEVICE.slug):
        report.trials(device="intel", log_dir=folder)
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_norm'"):
        report.cases("layernorm")


def test_trials_are_told_as_they_were(folder: Path) -> None:
    """Candidates in their order with what came of them; times and errors are None where there are
    none.
    """
    tried = report.trials(device="made", log_dir=folder)
    assert [t.status for t in tried] == ["ok", "ok", "wrong"]
    first, _, failed = tried
    assert (first.op, first.knobs, first.of_allowed) == (
        "layer_norm",
        {"lanes": 4, "write": "plain"},
        0.25,
    )
    assert first.us and failed.us is failed.of_allowed is None
    assert isinstance(first, Trial)


def test_comparisons_are_those_of_the_command(tmp_path: Path) -> None:
    """Two files are compared case by case, and the cases print as the command's tables do."""
    a, b = (
        bench_file(tmp_path / name, [record(64, timings={"tuned": samples(us, seed=seed)})])
        for name, us, seed in (("a.json", 100, 0), ("b.json", 50, 1))
    )
    found = report.compare(a, b)
    (one,) = found
    assert (one.case.hidden, one.verdict) == (64, "FASTER")
    assert "FASTER" in repr(found) and "FASTER" in found._repr_html_()
    assert found.columns()["case.hidden"] == [64]


def test_a_frame_is_a_list_that_stays_one(folder: Path) -> None:
    """It is indexed, sliced, iterated and compared as a list is; a slice prints like the whole."""
    every = report.cases(device="made", log_dir=folder)
    assert every[0] is next(iter(every)) and every[-1] in every
    some = every[2:4]
    assert isinstance(some, Frame) and list(some) == list(every)[2:4]
    assert some == every[2:4] and some != every and hash(some) == hash(every[2:4])
    assert len(repr(some).splitlines()) == 3
    with pytest.raises(IndexError):
        every[len(every)]


def test_a_frame_prints_as_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe with all columns, on a terminal and by rich as wide as there is room."""
    every = report.cases(device="made", log_dir=folder)
    assert "schedule and knobs" in repr(every).splitlines()[0]
    monkeypatch.setenv("COLUMNS", "80")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        narrow = repr(every)
    assert max(map(len, narrow.splitlines())) <= 80 and "█" in narrow
    out = io.StringIO()
    Console(file=out, width=80).print(every)
    assert out.getvalue().splitlines() == narrow.splitlines()


class Cells(HTMLParser):
    """The text of each cell of a table, and the tags there are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def test_a_notebook_has_a_table_of_html(folder: Path) -> None:
    """Every cell of the table in a pipe, and nothing of a log's text is taken for HTML."""
    tried = report.trials(device="made", log_dir=folder)
    parser = Cells()
    parser.feed(tried._repr_html_())
    assert set(parser.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    (table,) = tried.tables()
    assert parser.rows[0] == [c.name for c in table.columns]
    assert parser.rows[1:] == [[cell.plain for cell in row] for row in table.rows]
    assert parser.rows[-1][-1] == "<script>alert(1)</script> & more"
    drawn = report.cases(device="made", log_dir=folder)
    assert "█" not in drawn._repr_html_()


def test_pandas_is_given_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DataFrame is made of one list a field, those of knobs by their names, None where a record
    has none; of nothing it has the fields' names.
    """
    given: list[dict[str, list[Any]]] = []
    fake = ModuleType("pandas")
    fake.DataFrame = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", fake)
    tried = report.trials(device="made", log_dir=folder)
    tried.to_pandas()
    (columns,) = given
    assert columns["us"] == [t.us for t in tried] and columns["us"][-1] is None
    assert columns["knobs.lanes"] == [4, 4, 4] and "knobs" not in columns
    assert {len(values) for values in columns.values()} == {3}
    tried[:0].to_pandas()
    assert given[-1] == {name: [] for name in Trial.__struct_fields__}


def test_without_pandas_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError says what to install."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.cases(device="made", log_dir=folder).to_pandas()


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_pandas_takes_it(folder: Path) -> None:
    """The real DataFrame has a row for each record and the figures as they are."""
    every = report.cases(device="made", log_dir=folder)
    table = every.to_pandas()
    assert len(table) == len(every)
    assert list(table["hidden"]) == [row.hidden for row in every]
    assert list(table["speedup"].dropna()) == [r.speedup for r in every if r.speedup is not None]


def test_names_are_found_on_first_use() -> None:
    """`import lntune` and `import lntune.report` load neither numpy nor rich nor torch; the public
    names are listed, and no other is there.
    """
    code = (
        "import sys, lntune, lntune.report\n"
        "print(*sorted({n.partition('.')[0] for n in sys.modules} & {'numpy', 'rich', 'torch'}))\n"
        "print(lntune.report.cases, lntune.report.trials, lntune.report.compare)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert done[0] == "" and done[-1] == "False False"
    assert lntune.report is report and set(report.__all__) <= set(dir(report))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        report.nothing  # noqa: B018
