"""What is said of a comparison: its summary, its sentences and tables, and the command."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_records import bench_file, record, samples
from rich.console import Console
from typer.testing import CliRunner

from lntune.case import Case
from lntune.certainty import Verdict
from lntune.cli import app
from lntune.compare import figures
from lntune.compare.comparison import Between, Comparison, Measurement, Missing, Result
from lntune.compare.differences import differences
from lntune.compare.sides import Contender
from lntune.compare.summary import Turn, summarize
from lntune.log.records import Rival
from lntune.report import comparisons as report


def comparison(hidden: int, ratio: float, rows: int = 512, **fields: Any) -> Comparison:
    """A case with its ratio A / B; decided, unless it lies within 2 % of 1."""
    verdict: Verdict = "SAME" if abs(ratio - 1) < 0.02 else "FASTER" if ratio > 1 else "SLOWER"
    values = {"ratio": ratio, "low": ratio / 1.01, "high": ratio * 1.01, "p": 0.01}
    values |= {"verdict": verdict, "method": "paired"}
    case = Case("layer_norm", hidden, fields.pop("dtype", "float32"), rows)
    sides = Measurement(100.0, "one"), Measurement(100 / ratio, "other")
    return Comparison("device", case, *sides, **{**values, **fields})


def result(*cases: Comparison, **fields: Any) -> Result:
    """A comparison of `other` with `one`."""
    return Result("one", "other", list(cases), **fields)


# --- summary


@pytest.mark.parametrize(
    ("ratios", "turn"),
    [
        ({64: 0.8, 128: 0.9, 256: 1.1, 512: 1.2}, (256, "other", "one")),
        ({64: 1.2, 128: 1.1, 256: 0.9, 512: 0.8}, (256, "one", "other")),
        ({64: 0.8, 128: 0.9, 256: 1.0, 512: 1.1, 1024: 1.2}, (512, "other", "one")),
        ({64: 0.8, 128: 1.1, 256: 0.9, 512: 1.2}, None),
        ({64: 0.8, 128: 1.1, 256: 1.2}, None),
        ({64: 1.1, 128: 1.1, 256: 1.2, 512: 1.2}, None),
        ({}, None),
    ],
)
def test_where_the_winner_changes(
    ratios: dict[int, float], turn: tuple[int, str, str] | None
) -> None:
    """One hidden size that separates every win from every loss, with two of either, is told; where
    they mix, or are too few, nothing is.
    """
    facts = summarize(result(*(comparison(hidden, r) for hidden, r in ratios.items())))
    assert [(t.at, t.above, t.below) for t in facts.turns] == ([] if turn is None else [turn])
    assert all(t.axis == "hidden" and t.of is None for t in facts.turns)


def grid(ratio: Sequence[Sequence[float]]) -> Result:
    """Ratios by rows (1, 8, 32, 512), then by hidden sizes (64, 128, 256, 512)."""
    return result(
        *(
            comparison(64 << j, r, (1, 8, 32, 512)[i])
            for i, line in enumerate(ratio)
            for j, r in enumerate(line)
        )
    )


def test_where_the_winner_changes_with_rows() -> None:
    """Rows count where hidden sizes do not separate, and one number of rows by itself where neither
    separates all.
    """
    by_rows = summarize(grid([[0.8] * 4, [0.9] * 4, [1.1] * 4, [1.2] * 4]))
    assert by_rows.turns == [Turn("layer_norm", "float32", "rows", 32, "other", "one")]
    low, high = [0.8, 0.8, 1.2, 1.2], [1.2, 1.2, 0.8, 0.8]
    alone = summarize(grid([low, high]))
    assert [(t.axis, t.of, t.at, t.above) for t in alone.turns] == [
        ("hidden", 1, 256, "other"),
        ("hidden", 8, 256, "one"),
    ]


def test_groups_and_the_largest_differences() -> None:
    """Means by operator and dtype; of what is decided, the three largest gains and losses."""
    cases = [comparison(64 + n, 1 + n / 10) for n in range(5)]
    cases += [comparison(64, 0.5, dtype="bfloat16")]
    facts = summarize(result(*cases))
    assert [(g.dtype, g.cases) for g in facts.groups] == [("float32", 5), ("bfloat16", 1)]
    assert facts.groups[1].geomean == pytest.approx(0.5)
    assert facts.groups[0].verdicts == {"FASTER": 4, "SLOWER": 0, "SAME": 1, "UNSURE": 0}
    assert [round(c.ratio, 1) for c in facts.gains] == [1.4, 1.3, 1.2]
    assert [c.ratio for c in facts.losses] == [0.5]


def test_what_settings_differ_in() -> None:
    """The schedule, and knobs that both have with other values; nothing of what has no schedule."""
    a = Measurement(1, "one", {"lanes": 4, "parallel": True, "own": 1})
    b = Measurement(1, "other", {"lanes": 8, "parallel": False, "store": 2})
    assert differences(a, b) == ["one -> other", "lanes 4 -> 8", "parallel on -> off"]
    assert differences(a, a) == differences(a, Measurement(1)) == []


# --- sentences and tables


def test_sentences() -> None:
    """Counts and mean, by operator and dtype where there are several, where the winner changes, the
    largest differences, what happened between runs, doubts, what is missing and the command.
    """
    cases = [comparison(64 << n, 0.8 + 0.1 * n) for n in range(5)]
    cases.append(comparison(64, 1.0, dtype="bfloat16", verdict="UNSURE", reason="B was disturbed"))
    missing = Missing(Case("layer_norm", 4096, "float32", 1), "other", "no record holds it")
    between = Between("device", "over eager", True, 6, 1.25, 0.9, 0.0, 0.03, 7)
    text = report.lines(
        result(*cases, missing=[missing], commands=["lntune tune"], between=[between])
    )
    assert text == [
        "6 cases: 2 FASTER, 2 SLOWER, 1 SAME, 1 UNSURE; geomean A / B 0.990 in the 5 that are not"
        " doubtful",
        "layer_norm float32: geomean 0.990 in 5 cases, 2 FASTER, 2 SLOWER, 1 SAME",
        "layer_norm bfloat16: 1 case, 1 UNSURE",
        "layer_norm: other from hidden 512 on in float32, one below",
        "other gains most: 1.20x in layer_norm 512x1024 float32, 1.10x in layer_norm 512x512"
        " float32",
        "other loses most: 0.80x in layer_norm 512x64 float32, 0.90x in layer_norm 512x128 float32",
        "different runs: eager mode took 1.25 times as long in A's and a copy took 0.90 times as"
        " long in A's; times are compared over eager mode's, case by case, which leaves 3.0 %"
        " uncertain",
        "FASTER and SLOWER: by more than 1 %, with an error of 5 % for all 5 cases together (Holm);"
        " intervals are of each case alone",
        "doubtful in 1: B was disturbed",
        "other is missing in 1 case (no record holds it): layer_norm 1x4096 float32",
        "to measure what is missing: lntune\u00a0tune",
    ]


def test_doubtful_ratios_are_in_no_mean() -> None:
    """What other work disturbed, which may be off by a factor of hundreds, is in no mean; of such
    cases alone there is none. The end of an interval that says nothing is short.
    """
    far = comparison(64, 0.006, verdict="UNSURE", reason="B was disturbed", high=1e28)
    assert summarize(result(far, comparison(128, 1.5))).geomean == pytest.approx(1.5)
    alone = result(far)
    assert summarize(alone).geomean is None
    output = report.output([alone])
    assert "geomean" not in report.lines(alone)[0] + str(output.headline)
    assert ".. >10000 " in shown([alone], 120)


def test_sides_without_a_case_in_common() -> None:
    """A side that has no case in common says so, without a mean; several commands are one
    sentence.
    """
    text = report.lines(result(commands=["lntune tune a", "lntune tune b"]), alone=False)
    assert text == [
        "other against one: no case that both have",
        "to measure what is missing: lntune\u00a0tune\u00a0a; lntune\u00a0tune\u00a0b",
    ]


def shown(results: Sequence[Result], width: int) -> str:
    """Tables as a terminal of that width shows them."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    for table in report.tables(results):
        console.print(table)
    return out.getvalue()


def test_a_table_for_each_operator_keeps_its_point() -> None:
    """At 80 columns each case has both times, the ratio with its interval and the verdict, on one
    line; a table is of one operator.
    """
    step = comparison(16_384, 1.25, 4096, dtype="bfloat16")
    other = Case("lnlstm_step_backward", 16_384, "bfloat16", 4096)
    cases = [comparison(64, 0.5), step, msgspec.structs.replace(step, case=other)]
    text = shown([result(*cases)], 80)
    lines = text.splitlines()
    assert sum("A one, B other" in line for line in lines) == 2
    for line in (line for line in lines if "FASTER" in line or "SLOWER" in line):
        assert len(line) <= 80 and ".." in line
        assert sum(part.replace(".", "").isdigit() for part in line.split()) >= 6


def test_several_sides_have_a_verdict_each() -> None:
    """With three sides a case is on one line, with the ratio to each; what one of them has not is a
    dash.
    """
    first = result(comparison(64, 0.5), comparison(128, 1.5))
    second = Result("one", "third", [comparison(64, 1.2)])
    (table,) = report.tables([first, second])
    names = [column.name for column in table.columns]
    assert table.title == "layer_norm: A one, B other, C third"
    assert [n for n in names if n.startswith("A /")] == ["A / B", "A / C"]
    assert [[row[names.index(n)].plain for n in ("A / B", "A / C")] for row in table.rows] == [
        ["0.500", "1.200"],
        ["1.500", "-"],
    ]
    assert "other against one: " in " ".join(report.output([first, second]).lines)


# --- the command


def run(*arguments: object) -> Any:
    """What a command says."""
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs, of which the second is faster in one case and slower in another."""
    steady = {"eager": samples(100, seed=3), "copy": samples(40, seed=4)}

    def of(name: str, *times: float) -> Path:
        measured = [
            record(hidden, run=name, timings={"tuned": samples(us, seed=hidden), **steady})
            for hidden, us in zip((64, 128), times, strict=True)
        ]
        return bench_file(tmp_path / f"{name}.json", measured)

    return of("a", 100, 100), of("b", 50, 200)


def test_the_command(files: tuple[Path, Path]) -> None:
    """`lntune compare A B`: the table, and exit code 1 with --fail-on slower where something is."""
    a, b = files
    done = run(a, b)
    assert done.exit_code == 0, done.output
    assert "FASTER" in done.output and "2 cases: 1 FASTER, 1 SLOWER" in done.output
    lost = run(a, b, "--fail-on", "slower")
    assert lost.exit_code == 1
    assert lost.stderr == "fails: layer_norm 512x128 float32: SLOWER\n"
    for on in ("slower", "unsure"):
        assert run(a, a, "--fail-on", on).exit_code == 0
    assert run(a, b, "--fail-on", "slower", "--smallest", "120%").exit_code == 2
    assert run(a, b, "--fail-on", "slower", "--smallest", "0.5").exit_code == 1
    assert run(a, b, "--fail-on", "faster").exit_code == 2
    narrowed = run(a, b, "--hidden", 64, "--dtype", "fp32", "--op", "layer_norm", "--rows", 200)
    assert "1 case: 1 FASTER" in narrowed.output
    assert "unknown operator" in run(a, b, "--op", "norm").stderr


def test_formats_of_the_command(files: tuple[Path, Path]) -> None:
    """JSON has the facts, verdicts and summary; CSV a line a case, with its sides' names; Markdown
    a headline, the sentences, and the table folded away.
    """
    facts = json.loads(run(*files, "--json").stdout)
    assert facts["verdicts"] == {"FASTER": 1, "SLOWER": 1, "SAME": 0, "UNSURE": 0}
    assert [(c["case"]["hidden"], c["verdict"]) for c in facts["cases"]] == [
        (64, "FASTER"),
        (128, "SLOWER"),
    ]
    assert facts["summary"]["groups"][0]["cases"] == 2 and facts["smallest"] == 0.01
    rows = list(csv.DictReader(io.StringIO(run(*files, "--format", "csv").stdout)))
    assert [row["verdict"] for row in rows] == ["FASTER", "SLOWER"]
    assert {row["side_b"] for row in rows} == {str(files[1])}
    text = run(*files, "--format", "markdown").stdout
    assert (
        text.startswith("**") and "FASTER in 1 and SLOWER in 1 of 2 cases" in text.splitlines()[0]
    )
    assert "\n- 2 cases: 1 FASTER, 1 SLOWER" in text
    assert text.index("\n<details>\n\n<summary>") < text.index("| 64 |") < text.index("</details>")


@pytest.mark.parametrize("text", ["", "x", "-1%", "100%", "nan"])
def test_the_smallest_difference_is_a_share(text: str, files: tuple[Path, Path]) -> None:
    """What is no share from 0 up to 1 is refused."""
    done = run(*files, "--smallest", text)
    assert done.exit_code == 2 and "expected a share such as 3% or 0.03" in done.stderr


def test_instructions_where_they_are_known() -> None:
    """A column for each side that has them, and none where no side has: of CPUs."""
    other = Rival("widened_rows", {"lanes": 8}, samples(40), instructions=5.25)
    known = record(rivals=(other,), instructions=9.5)
    sides = [Contender(name, schedule=name) for name in ("cached_rows", "widened_rows")]
    held = [side.held(known) for side in sides]
    measured = [figures.measurement(known.case, one) for one in held if one is not None]
    assert [m.instructions for m in measured] == [9.5, 5.25]
    a, b = measured
    compared = msgspec.structs.replace(comparison(64, 2.0), a=a, b=b)
    names = [column.name for column in report.tables([result(compared)])[0].columns]
    assert {"A instr./element", "B instr./element"} <= set(names)
    names = [column.name for column in report.tables([result(comparison(64, 2.0))])[0].columns]
    assert not any("instr" in name for name in names)
