"""What a newcomer meets on a terminal of 80 columns: what matters is on it, and long work says how
far it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import pytest
from made_log import finals as made
from terminals import Terminal, on_a_terminal

from lntune import ops
from lntune.case import Case
from lntune.cli import parse
from lntune.cli.base import MANY
from lntune.commands import check as verification
from lntune.commands.check import Result
from lntune.device import Device
from lntune.report.tuned import disturbed_lines, untuned_lines
from lntune.tune import Settings, forecast
from lntune.tune.times import Times
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
    """On a terminal many cases are counted, and those that are wrong are shown; with --cases each
    has a line.
    """
    rows = ",".join(map(str, range(1, MANY + 2)))
    asked = ("check", "layer_norm", "--hidden", "64", "--dtype", "float32", "--rows", rows)
    printed = on_a_terminal(monkeypatch, *asked)
    assert f"{2 * (MANY + 1)} kernels checked, all right" in printed
    assert "verdict" not in printed and "with --cases" in printed
    case = verification.asked_of([Case("layer_norm", 64, "float32", 7)])[0]
    right = Result(case, "exact", "cached_rows", True, "", {"y": 3.0}, {"y": 3.0})
    checked[case] = msgspec.structs.replace(right, ok=False, message="y: far off")
    printed = on_a_terminal(monkeypatch, *asked)
    (line,) = [text for text in printed.splitlines() if text.endswith("WRONG")]
    assert line.split() == ["64", "7", "weight+bias", "exact:", "cached_rows", "3.00", "WRONG"]
    assert " right\n" not in printed and "1 wrong" in printed
    assert " right\n" in on_a_terminal(monkeypatch, *asked, "--cases")


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
