"""What a newcomer meets on a terminal of 80 columns: what matters is on it, and long work says how
far it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
from terminals import Terminal, on_a_terminal

from lntune import ops
from lntune.case import Case
from lntune.cli.base import MANY
from lntune.commands import check as verification
from lntune.commands.check import Result
from lntune.device import Device


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
