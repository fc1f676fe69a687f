"""`lntune show --diff A B`: the code of two schedules or settings, and what differs in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_records import record, samples
from typer.testing import CliRunner

from lntune import device as device_module
from lntune import schedule
from lntune.cli import app
from lntune.log import records
from lntune.report import diffs

A = "for i in range(4):\n  load(i)\n  store(i)\n"
B = "for i in range(8):\n  load(i)\n  fetch(i + 1)\n  store(i)\n"
NAMES = "one", "other"


def test_a_unified_diff() -> None:
    """Lines that one has alone, with the names of both; nothing where nothing differs."""
    lines = diffs.unified(A, B, NAMES)
    assert lines[:2] == ["--- one", "+++ other"]
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert changed == ["-for i in range(4):", "+for i in range(8):", "+  fetch(i + 1)"]
    assert diffs.unified(A, A, NAMES) == []


def test_side_by_side() -> None:
    """Both texts whole, with signs between lines that differ; not where they do not fit."""
    assert diffs.side_by_side(A, B, NAMES, 80) == [
        "one                  other",
        "for i in range(4): | for i in range(8):",
        "  load(i)              load(i)",
        "                   >   fetch(i + 1)",
        "  store(i)             store(i)",
    ]
    (*_, last) = diffs.side_by_side(B, A, NAMES, 80) or []
    assert last == "  store(i)             store(i)"
    assert diffs.side_by_side(A, B, NAMES, 39) == diffs.side_by_side(A, B, NAMES, 80)
    assert diffs.side_by_side(A, B, NAMES, 38) is None


def show(*arguments: object) -> Any:
    """What a command says."""
    asked = ("show", "layer_norm", "--hidden", 256, "--dtype", "bfloat16", "--rows", 8, *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in asked])


@pytest.mark.slow
def test_two_schedules_and_two_settings(tmp_path: Path) -> None:
    """The loops of two schedules, or of one with two values of a knob, as a diff with their knobs;
    a form in which they do not differ says so; --json has both texts.
    """
    done = show("--diff", "cached_rows", "widened_rows", "--log-dir", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("--- cached_rows (lanes=")
    assert "\n+++ widened_rows (" in done.stdout and "@@" in done.stdout
    same = show("--diff", "default", "cached_rows", "--log-dir", tmp_path)
    assert "are the same" in same.stdout
    asked = ("--diff", "cached_rows:lanes=1", "cached_rows:lanes=2", "--log-dir", tmp_path)
    facts = json.loads(show(*asked, "--json").stdout)
    assert [facts[side]["knobs"]["lanes"] for side in "ab"] == [1, 2]
    assert facts["a"]["text"] != facts["b"]["text"] and facts["diff"]


@pytest.mark.slow
def test_the_best_that_was_measured_is_shown(tmp_path: Path) -> None:
    """Knobs that are not given are those of the final."""
    here, chosen = device_module.current(), schedule.get("cached_rows")
    knobs = {"lanes": 2}
    own = {"device": here, "code": chosen.code, "timings": {"tuned": samples(5)}, "knobs": knobs}
    records.append(tmp_path, record(256, 8, "bfloat16", **own))
    facts = show("--diff", "cached_rows", "tuned", "--log-dir", tmp_path, "--json").stdout
    assert [json.loads(facts)[side]["knobs"]["lanes"] for side in "ab"] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--diff", "eager", "cached_rows"), "--diff: got 'eager', expected a schedule"),
        (("--diff", "cached", "cached_rows"), "--diff: got 'cached', expected a schedule"),
        (("--diff", "tuned", "cached_rows"), "nothing is tuned for layer_norm 8x256 bfloat16"),
        (("--diff", "blocked_rows", "default"), "blocked_rows is of layer_norm_backward"),
        (
            ("--diff", "default", "default", "--schedule", "cached_rows"),
            "--schedule: got cached_rows beside --diff",
        ),
    ],
)
def test_what_has_no_code(arguments: tuple[str, ...], message: str) -> None:
    """Sides that stand for no kernel of the case are refused."""
    done = show(*arguments)
    assert done.exit_code == 2 and message in done.stderr
