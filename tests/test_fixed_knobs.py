"""`lntune tune --knob`: candidates with these values of knobs alone."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from lntune.backends import device_of
from lntune.case import Case
from lntune.cli import app
from lntune.errors import InputError, UnknownNameError
from lntune.tune import Settings, check_settings
from lntune.tune.candidates import Candidates

CASE = Case("layer_norm", 1024, "bfloat16", 512)
HERE = device_of("cpu")


@pytest.mark.parametrize("words", [("pairs=false",), ("pairs",), ("lanes=2", "sample=false")])
def test_only_candidates_with_these_values(words: tuple[str, ...]) -> None:
    """Those of the whole space that have them, in the same order; neighbours and what a search
    sees, too.
    """
    every, held = Candidates(CASE, HERE), Candidates(CASE, HERE, fixing=words)
    values = {w.partition("=")[0]: w.partition("=")[2] for w in words}

    def fits(knobs: dict[str, object]) -> bool:
        return all(str(knobs[n]).lower() == (v or "true") for n, v in values.items())

    expected = [c for c in every if fits(c.knobs)]
    assert 0 < len(expected) < len(every)
    assert set(held) == set(expected) and held.as_space().candidates == tuple(held)
    assert all(fits(n.knobs) for c in list(held)[:20] for n in held.neighbours(c))
    left_out = next(c for c in every if c not in expected)
    assert left_out not in held


def test_schedules_without_the_knob_are_tuned_as_ever() -> None:
    """Of several schedules, one knows the knob."""
    names = ["blocked_rows", "metaschedule_backward"]
    case = Case("layer_norm_backward", 1024, "bfloat16", 512)
    held = Candidates(case, HERE, names, ["pairs=false"])
    assert {c.schedule for c in held} == set(names)


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (("pears=true",), UnknownNameError, "knob 'pears'"),
        (("lanes=3",), InputError, "lanes=VALUE with one of"),
        (("lanes=2", "lanes=4"), InputError, "lanes twice"),
        (("=2",), InputError, "NAME=VALUE"),
    ],
)
def test_knobs_that_cannot_be(words: tuple[str, ...], error: type[Exception], said: str) -> None:
    """Before anything is run."""
    with pytest.raises(error, match=said):
        check_settings(Settings(knobs=words), [CASE], dry=True)
    given = [option for word in words for option in ("--knob", word)]
    done = CliRunner().invoke(app, ["tune", "layer_norm", "--hidden", "64", *given])
    assert done.exit_code != 0 and said in done.output.replace("\n", " ")
