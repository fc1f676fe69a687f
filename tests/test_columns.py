"""Every table of every command, on terminals of several widths and in a pipe."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import pkgutil
import re
from collections.abc import Callable

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lntune import report
from lntune.backends.cuda import Inspection
from lntune.backends.cuda.code import Code
from lntune.backends.cuda.occupancy import Occupancy
from lntune.backends.cuda.resources import Resources
from lntune.case import Case
from lntune.commands import merge as merging
from lntune.commands import prune as pruner
from lntune.commands.build import Built
from lntune.commands.check import Result as Checked
from lntune.commands.doctor import Finding
from lntune.commands.inspect import Inspected
from lntune.commands.search_study import Result as Studied
from lntune.compare.comparison import Comparison, Measurement, Result
from lntune.device import Device
from lntune.log import pruning
from lntune.report import (
    bringup,
    builds,
    called,
    columns,
    comparisons,
    costs,
    dry_runs,
    findings,
    histories,
    inspections,
    merged,
    overview,
    queries,
    studies,
    tables,
    training,
    verdicts,
)
from lntune.report.columns import KEY, WIDE, Column, Table, key
from lntune.report.history import Final, History, Run, Step
from lntune.report.output import Output, print_table
from lntune.report.rows import Row
from lntune.tune.dry import DryRun, Plan, Ranked

WIDTHS = (40, 60, 80, 100, 120, 200)
CASES = [
    Case("layer_norm", 64, "float32", 1),
    Case("lnlstm_step_backward", 16_384, "bfloat16", 131_072),
]
KNOBS: dict[str, int | bool | str] = {
    "lanes": 4,
    "store": 2,
    "unroll": 1,
    "together": 2,
    "prefetch": 1,
    "write": "streamed",
    "parallel": True,
}


def row(case: Case, **fields: object) -> Row:
    """A measured case with everything in it."""
    base = Row(
        op=case.op, device="some-cpu", dtype=case.dtype, hidden=case.hidden, rows=case.rows,
        bucket="1", eager_us=12_345.6, compile_us=10_000, tuned_us=7_654.3, default_us=8_000,
        copy_us=6_000, speedup=1.61, over_better=1.31, over_default=1.05, gbps=123.4, of_copy=1.27,
        error=4.17, of_allowed=0.3, spread=0.25, schedule="cached_rows",
        knobs="lanes=4 store=2 unroll=1 together=2 prefetch=1 write=streamed parallel",
        disturbed="others", stale=True, time="",
    )  # fmt: skip
    return msgspec.structs.replace(base, **fields)


def kernel(arch: str) -> Inspection:
    """A kernel for a GPU as it was compiled."""
    counts = {f.name: 0 for f in msgspec.structs.fields(Code)}
    code = {
        **counts,
        "kernel": "main",
        "origin": "nvdisasm",
        "machine": True,
        "hints": {},
        "operations": {},
        "shared_loads": {},
        "shared_stores": {},
    }
    moved = {"global_loads": {128: 6, 32: 1}, "global_stores": {128: 12, 16: 3}}
    resources = Resources("main", arch, 255, 1024, 4096, 4096, 49_152)
    return Inspection(
        "main",
        arch,
        256,
        65_536,
        "nvcc",
        resources,
        Code(**code | moved),
        Occupancy(1, 8, 64, ("registers",)),
    )  # type: ignore[arg-type]


def the_compared(sides: int = 1) -> Table:
    """A comparison of some sides with the first, with a verdict that an interval cannot give."""
    a, b = (
        Measurement(us, name, {"lanes": lanes}, 12.3, 0.98, 4.5, 7.25)
        for us, name, lanes in ((12_345.6, "cached_rows", 4), (7_654.3, "widened_rows", 8))
    )
    compared = [
        Comparison(
            "amd-epyc-f25m17s1-x86-64-v4-2c",
            msgspec.structs.replace(c, op=CASES[0].op),
            a,
            b,
            ratio=1.613,
            low=1.598,
            high=1.621,
            p=0.001,
            verdict="FASTER",
            method="over eager",
            drift=1.002,
            bytes=10,
            flops=20,
        )
        for c in CASES
    ]
    compared[1] = msgspec.structs.replace(
        compared[1], verdict="UNSURE", reason="B was measured on a busy machine"
    )
    results = [Result("cached_rows", f"widened_rows:lanes={n}", compared) for n in range(sides)]
    return comparisons.tables(results)[0]


def the_studies() -> Table:
    """Two searches on each of two cases, one of them without anything that works."""
    shares: dict[str, float | None] = {"5": 0.2345, "10": None, "20": 0.1, "50": 0.0}
    return studies.table(
        [
            Studied(
                case, "amd-epyc-f25m17s1-x86-64-v4-2c", name, name != "local", 12_000, 200,
                1.2345, shares, shares, 123.0, None, 0.1025, False,
            )
            for case in CASES
            for name in ("local", "evolutionary")
        ]
    )  # fmt: skip


def the_dry_runs() -> Table:
    """A dry run with candidates that failed."""
    first = (Ranked("shared_row", "threads_per_row=8 vector_width=16", "ok", 0.5, 128, 1024, 0.5),)
    plans = [
        Plan(c, 12_000, 8, 7, {"spills": 1}, {"wrong: y": ["a"]}, first, 10_000, 72_000, 100)
        for c in CASES
    ]
    return dry_runs.table(
        DryRun(Device("gpu", "NVIDIA H100", "sm_90", 132), "nvcc", plans, 1, "that", 10)
    )


def the_operators() -> Table:
    """What a bringup found of two operators."""
    operators = [
        bringup.Operator(c.op, 300, 299, 12.34, 1.06, 299, 10.11, 1.27, 0.71, []) for c in CASES
    ]
    return bringup.operators_table(operators)


def the_costs() -> Table:
    """What calls cost."""
    calls = {f"{who} {form}": 12.34 for who in ("eager", "tuned") for form in costs.FORMS}
    return costs.costs_table(
        [
            costs.Costs(
                c, calls, dict.fromkeys(costs.FORMS, 2.12), 206.8, 10.7, True, 63.5, 5, True
            )
            for c in CASES
        ]
    )


def the_steps() -> Table:
    """Training steps, one of them disturbed."""
    steps = [
        training.Step(
            "bfloat16", 16384, 131072, 12345.6, 9876.5, 5432.1, 2.27, 1.82, 1234.5, 678.9, 1.82, d
        )
        for d in ("", "busy")
    ]
    return training.steps_table(steps)


def the_builds() -> Table:
    """Kernels that were built for two devices."""
    built = [
        Built(
            msgspec.structs.replace(c, variant="weight32+dx+dgamma32"),
            "d",
            "x86-64-v4",
            "default",
            "cached_rows",
            KNOBS,
            True,
            "there",
        )
        for c in CASES
    ]
    return builds.table(
        [built[0], msgspec.structs.replace(built[1], arch="sm_100", status="failed", message="no")]
    )


def the_overview() -> Table:
    """What cases of two operators come to."""
    rows = [row(c, over_compile=1.2) for c in CASES]
    return overview.overview_table(overview.overviews(rows, CASES), "amd-epyc")


def the_histories() -> Table:
    """A case that was measured three times, and one that was disturbed."""
    finals = [
        Final("run", "2026-01-02T03:04:05", 12_345.6, ratio, "cached_rows", "lanes=4")
        for ratio in (1.5, None, 2.5)
    ]
    steps = [Step("2026-01-02", "2026-01-03", 1.7, 1.6, 1.8, ["tvm 1 -> 2"])]
    return histories.histories_table(
        [
            History("amd-epyc", CASES[0], "1", finals, steps),
            History("amd-epyc", CASES[1], "16384+", [finals[1], finals[1]], []),
        ],
        "amd-epyc",
    )


def the_verdicts() -> Table:
    """A right kernel and a wrong one."""
    results = [
        Checked(c, "bucket", "blocked_step", True, "", {"y": 0.31}, {"y": 4.17}) for c in CASES
    ]
    return verdicts.verdict_table(
        [
            results[0],
            msgspec.structs.replace(
                results[1], ok=False, message="y: error 3 is 4 times what is allowed"
            ),
        ]
    )


def the_merged() -> Table:
    """Logs of two devices put together."""
    files = [
        merging.File(f"/a/folder/{name}/{op}.jsonl", name, op, 1167, 93, 5)
        for name in ("amd-epyc-f25m17s1-x86-64-v4-2c", "intel-xeon-x86-64-v4-128c")
        for op in ("layer_norm", "lnlstm_step_backward")
    ]
    return merged.files(merging.Merged("c", (), tuple(files), 2, 1, 0, (), ()))


def the_pruned() -> Table:
    """Every reason to keep or to drop lines of a log."""
    whys = [value for name, value in vars(pruning).items() if name.isupper() and name[0] != "_"]
    counts = {why: 12_345 for why in whys if isinstance(why, str)}
    return merged.pruned(pruner.Pruned(True, (), counts, counts, ()))


TABLES: dict[str, Callable[[], Table]] = {
    "report": lambda: tables.cases_table(
        [row(c, compile_us=None, over_better=None) for c in CASES], "amd-epyc", details=True
    ),
    "bench": lambda: tables.cases_table(
        [row(c) for c in CASES], "outputs allocated by every call from a kept heap", details=True
    ),
    "bench of one operator": lambda: tables.cases_table(
        [row(CASES[1], rows=r) for r in (1, 131_072)], "outputs allocated", details=True
    ),
    "bench given outputs": lambda: tables.cases_table(
        [row(c, eager_us=None, compile_us=None) for c in CASES], "outputs given", details=True
    ),
    "bench on a GPU": lambda: tables.cases_table(
        [row(c) for c in CASES], "outputs allocated", details=True, bandwidth=3.35e12
    ),
    "report --knobs": lambda: tables.cases_table(
        [row(c) for c in CASES], "amd-epyc", details=True, knobs_below=True
    ),
    "report --cases": lambda: called.table(
        [
            called.Called(
                *("amd-epyc", c.op, c.hidden, c.dtype, "1024-16383", c.rows, 12_345_678, us, share),
                *(tier, tuned, "cached_rows", 12.3, ratio, ratio, gain),
            )
            for c, us, share, tier, tuned, ratio, gain in (
                (CASES[0], 12_345.6, 0.5, "exact", True, 1.5, 0.0),
                (CASES[1], None, None, "near", False, None, None),
                (CASES[0], 1.23, 0.001, "eager", True, 0.9, 0.3),
            )
        ],
        "recorded",
    ),
    "report's summary": the_overview,
    "report --history": the_histories,
    "report --history's runs": lambda: histories.runs_table(
        [Run("0123456789ab", "2026-01-02T03:04", "2026-01-02", n, ["tvm 1 -> 2"]) for n in (1, 60)],
        "runs",
    ),
    "trials in Python": lambda: queries.trials_table(
        [
            queries.Trial(
                c.op,
                "d",
                c.dtype,
                c.hidden,
                c.rows,
                "1",
                "cached_rows",
                KNOBS,
                "wrong",
                "y: error 3 is 4 times what is allowed",
                12_345.6,
                4.0,
                "run",
                "2026-01-02T03:04",
            )
            for c in CASES
        ]
    ),
    "demo": lambda: tables.cases_table([row(c) for c in CASES], "layer_norm"),
    "bench --call-cost": the_costs,
    "bench --training": the_steps,
    "build": the_builds,
    "check": the_verdicts,
    "search-study": the_studies,
    "compare": the_compared,
    "compare of several": lambda: the_compared(3),
    "inspect": lambda: inspections.table(
        [
            Inspected(
                c,
                "sm_100",
                "shared_row",
                KNOBS,
                (kernel("sm_100"),),
                {"x": 1.0, "dy": 2.0},
                {"y": 1.0},
                0.5,
                0.25,
            )
            for c in CASES
        ]
    ),
    "tune --dry-run": the_dry_runs,
    "merge": the_merged,
    "prune": the_pruned,
    "bringup": the_operators,
}


def shown(table: Table, width: int) -> list[str]:
    """What a terminal of that width shows."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None, highlight=False).print(
        table
    )
    return out.getvalue().splitlines()


def beside(table: Table) -> str:
    """What may stand above groups of rows and below rows."""
    shared = [i for i, column in enumerate(table.columns) if column.shared and table.grouped]
    below = [i for i, column in enumerate(table.columns) if column.below]
    parts = [[row[i].plain for i in which] for row in table.rows for which in (shared, below)]
    return "\n".join(map(" ".join, parts))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_keeps_its_point_on_a_terminal(name: str, width: int) -> None:
    """No line is wider than the terminal, no figure or name is cut, no row broken over two lines
    but as a block of pairs, the key columns of every row are there, and what is left out is named.
    """
    table = TABLES[name]()
    lines = shown(table, width)
    assert max(map(cell_len, lines)) <= width
    assert "…" not in "".join(lines)
    everything = " ".join(" ".join(lines).split())
    for i, column in enumerate(table.columns):
        said = (table.grouped and column.shared) or column.drawn or column.below
        assert said or column.name in everything, "a column is shown or named as left out"
        if column.rank == KEY:
            assert all(cells[i].plain in everything for cells in table.rows)
    names = {column.name for column in table.columns}
    header = next(
        (n for n, line in enumerate(lines) if set(re.split(r" {2,}", line.strip())) <= names), None
    )
    assert header is not None or width < 80, "one line a row from 80 columns on"
    if header is not None:
        lines = lines[: header + 1] + [
            line for line in lines[header + 1 :] if line.strip() not in beside(table)
        ]
        listed = re.split(r" {2,}", lines[header].strip())
        keys = [
            i
            for i, column in enumerate(table.columns)
            if column.rank == KEY and column.name in listed
        ]
        assert len(lines) >= header + 1 + len(table.rows)
        for line, cells in zip(lines[header + 1 :], table.rows, strict=False):
            assert all(cells[i].plain in line for i in keys)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_pipe_is_one_line_a_row(name: str) -> None:
    """Elsewhere than on a terminal: a title, the names, then every cell of every row on one line,
    split by two spaces or more; no boxes.
    """
    table = TABLES[name]()
    out = io.StringIO()
    Console(file=out, width=WIDE, highlight=False).print(table)
    lines = out.getvalue().splitlines()
    assert len(lines) == bool(table.title) + 1 + len(table.rows)
    assert all(line == line.rstrip() and line.isascii() for line in lines)
    for line, cells in zip(lines[-len(table.rows) :], table.rows, strict=True):
        plain = [
            c.plain for c, column in zip(cells, table.columns, strict=True) if not column.drawn
        ]
        assert re.split(r" {2,}", line.strip()) == plain


def test_all_tables_are_tried_here() -> None:
    """Whatever in the reports makes a table makes one of the above, and makes it of these
    columns.
    """
    makers = set()
    for module in pkgutil.iter_modules(report.__path__, "lntune.report."):
        loaded = importlib.import_module(module.name)
        makers |= {
            f
            for _, f in inspect.getmembers(loaded, inspect.isfunction)
            if str(f.__annotations__.get("return")) in ("Table", "Table | None")
        }
        assert module.name == "lntune.report.findings" or "rich.table" not in inspect.getsource(
            loaded
        )
    tried = (
        tables.cases_table,
        costs.costs_table,
        builds.table,
        verdicts.verdict_table,
        comparisons.table,
        inspections.table,
        dry_runs.table,
        studies.table,
        merged.files,
        merged.pruned,
    )
    others = (overview.overview_table, histories.runs_table, histories.histories_table)
    others += (queries.trials_table, called.table)
    assert makers == {*tried, *others, bringup.operators_table, training.steps_table}


# --- the mechanism


def small() -> Table:
    """Two rows of a word that both share and three figures."""
    table = Table(
        "title", [*key("op", "case"), Column("time"), Column("first", 1), Column("second", 2)]
    )
    table.add("norm", "a", "1.25", "2.5", "3.75")
    table.add("norm", "bb", Text("10.25", style="red"), "20.5", "")
    return table


def test_columns_go_in_their_declared_order() -> None:
    """What all rows share is said once, then the highest rank goes first and a line says so; at
    last rows become blocks.
    """
    table = small()
    assert [line.plain for line in table.lines(WIDE)] == [
        "title",
        "op    case   time  first  second",
        "norm  a      1.25    2.5    3.75",
        "norm  bb    10.25   20.5       -",
    ]
    assert table.lines(32)[1].plain.startswith("op"), "it just fits"
    assert [line.plain for line in table.lines(31)][:2] == [
        "title, op norm",
        "case   time  first  second",
    ]
    narrower = [line.plain for line in table.lines(25)]
    assert narrower[1:] == [
        "case   time  first",
        "a      1.25    2.5",
        "bb    10.25   20.5",
        narrower[-1],
    ]
    assert narrower[-1] == "not shown for want of width: second; --wide or a pipe shows all"
    assert [line.plain for line in table.lines(10)] == [
        "title, op norm",
        "case a",
        "  time 1.25",
        "case bb",
        "  time 10.25",
        table.lines(10)[-1].plain,
    ]
    assert "first, second" in table.lines(10)[-1].plain


def test_a_table_of_one_row_says_nothing_twice() -> None:
    """Of a single row all is shared: its words stay in their columns as long as they fit, figures
    go first.
    """
    table = small()
    table.rows = table.rows[:1]
    assert table.lines(25)[1].plain == "op    case  time  first"


def test_a_table_without_rows_has_its_names() -> None:
    """Nothing found is a header and no error, at any width."""
    table = Table("", [*key("case"), Column("time", 1)])
    assert [line.plain for line in table.lines(80)] == ["case  time"]
    assert shown(table, 5)


def test_a_column_is_plain_data() -> None:
    """Columns are declared, not computed: name, rank, side, and where else their cells may
    stand.
    """
    names = [f.name for f in dataclasses.fields(columns.Column)]
    assert names == ["name", "rank", "right", "shared", "drawn", "below"]


# --- doctor


FOUND = [
    Finding("python", "ok", "3.11", "not shown"),
    Finding(
        "C++ compiler",
        "fail",
        "does not run: [Errno 13] Permission denied: '/usr/bin/c++'",
        "Install g++ or clang, or set CXX.",
    ),
]


@pytest.mark.parametrize("width", WIDTHS)
def test_findings_on_a_terminal(width: int) -> None:
    """Topics stand below each other, details are broken between words and stand below their first,
    and nothing is cut.
    """
    out = io.StringIO()
    print_table(
        Output(FOUND, (), findings.lines(FOUND)),
        Console(file=out, width=width, force_terminal=True, color_system=None, highlight=False),
    )
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    assert lines[0] == "ok   python       3.11"
    assert lines[1].startswith("FAIL C++ compiler does not run:")
    assert all(line.startswith(" " * 18) for line in lines[2:])
    words = " ".join(out.getvalue().split())
    assert words.endswith(
        "does not run: [Errno 13] Permission denied: '/usr/bin/c++' -> Install g++ or clang, or set"
        " CXX."
    )


def test_findings_in_a_pipe() -> None:
    """One line a finding."""
    out = io.StringIO()
    print_table(
        Output(FOUND, (), findings.lines(FOUND)), Console(file=out, width=WIDE, highlight=False)
    )
    assert len(out.getvalue().splitlines()) == 2


def test_sentences_behind_a_lead() -> None:
    """On a terminal further lines stand below the first word, words that do not fit are left whole;
    in a pipe it is one line.
    """
    out, pipe = io.StringIO(), io.StringIO()
    screen = Console(file=out, width=20, force_terminal=True, color_system=None)
    columns.hanging(screen, "  - ", "not used: [red] records, another-device")
    columns.hanging(Console(file=pipe, width=20), "  - ", "not used: [red] records, another-device")
    assert out.getvalue() == "  - not used: [red]\n    records,\n    another-device\n"
    assert pipe.getvalue() == "  - not used: [red] records, another-device\n"


@pytest.mark.parametrize("width", [60, 80])
def test_sentences_on_a_terminal(width: int) -> None:
    """They are broken between words, never within one: a path and a command stay whole on one line,
    however long they are and whatever spaces they have, so that they can be copied; each line of a
    text begins where it began.
    """
    path = "/home/some one/" + "long_name/" * 12
    command = (
        "lntune tune layer_norm --hidden 256,768,1000,1024,4096,16384 --dtype bfloat16,float32"
        " --rows 1,8,32,512,4096"
    )
    out = io.StringIO()
    screen = Console(file=out, width=width, force_terminal=True, color_system=None)
    text = (
        f"3 trials (3 ok) in 12 s; log in {columns.whole(path)} (interrupted)\n  stale: [red]"
        f" {'word ' * 30}Run: {command}; {command} (and more)"
    )
    columns.say(screen, text)
    lines = out.getvalue().splitlines()
    assert path in "\n".join(lines)
    assert sum(command in line for line in lines) == 2
    assert all(
        cell_len(line) <= width for line in lines if command not in line and "long_name" not in line
    )
    assert [line for line in lines if not line.startswith(" ")] == [lines[0]]
    assert out.getvalue().split() == text.replace("\u00a0", " ").split(), (
        "no word is broken or lost"
    )
    pipe = io.StringIO()
    columns.say(Console(file=pipe, width=width), text)
    assert pipe.getvalue() == text.replace("\u00a0", " ") + "\n"


def test_a_lead_that_leaves_no_room() -> None:
    """A sentence behind a lead of more than half a line is broken as any other."""
    out = io.StringIO()
    columns.hanging(
        Console(file=out, width=20, force_terminal=True, color_system=None),
        "a lead of many words: ",
        "what it says of it",
    )
    assert out.getvalue() == "a lead of many\n  words: what it\n  says of it\n"


def test_a_long_path_in_a_block() -> None:
    """A cell that holds a path longer than the terminal is not broken, cut or folded."""
    table = Table("files", [*key("name"), Column("path", right=False)])
    path = "/tmp/" + "folder/" * 20
    table.add("one", path)
    out = io.StringIO()
    terminal = Console(file=out, width=40, force_terminal=True, color_system=None)
    print_table(Output(None, [table]), terminal)
    assert path in out.getvalue()


@pytest.mark.parametrize("sign", ["\x1b[31m", "\x9b31m", "\r", "\x00", "\u202e", "\n"])
@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_a_log_do_nothing_to_a_terminal(sign: str, terminal: bool) -> None:
    """What moves a cursor, colours or turns text around is spelled out, in cells, titles and
    sentences, and breaks no line.
    """
    name = f"evil{sign}name"
    table = Table(name, [Column("case"), Column("us")])
    table.add(name, "1.00")
    file = io.StringIO()
    out = Console(file=file, force_terminal=terminal, width=WIDE, color_system=None)
    print_table(Output(None, [table], [("lead: ", name)]), out)
    printed = file.getvalue()
    assert printed.count("\n") == 4  # the title, the head, a row and a sentence
    assert sign == "\n" or sign not in printed
    assert printed.count(repr(name)[1:-1]) == 3


def test_a_name_of_several_columns_that_are_left_out_is_said_once() -> None:
    """What is left out is named once, however many columns have that name."""
    named = Table("", [Column("a"), *(Column("interval", 1) for _ in range(3))])
    named.add("1", "2", "3", "4")
    assert named.lines(10)[-1].plain.startswith("not shown for want of width: interval; ")
