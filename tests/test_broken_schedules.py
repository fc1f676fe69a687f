"""One schedule of the user's that is broken, in whatever way: it is said once and left out, and
everything else goes on.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

import lntune
from lntune import device, schedule, tune
from lntune.case import Case
from lntune.cli import app
from lntune.commands.doctor import Finding, content
from lntune.errors import LntuneError, ScheduleError
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.schedule import ScheduleWarning
from lntune.torch import dispatch
from lntune.torch.untuned import UntunedWarning
from lntune.tune import settings
from lntune.tune.candidates import Candidates
from lntune.versions import Code

X = torch.randn(8, 48)
CASE = Case("layer_norm", 48, "float32", 8, "plain")

MINE = """
from dataclasses import dataclass
from lntune.knobs import knob
from lntune.schedule import Schedule

@dataclass(frozen=True)
class Knobs:
    lanes: int = knob(2, (1, 2, 4), "how many")

def default(case, device):
    return Knobs()

def valid(knobs, case, device):
    return None

def apply(case, knobs, device):
    raise ValueError("applied")

SCHEDULES = (Schedule("mine", "layer_norm", "cpu", Knobs, default, valid, apply),)
"""
DIVIDED = r"failed on layer_norm .*: ZeroDivisionError"
BROKEN = {
    "import": (
        MINE + "1 / 0\n",
        "the schedule file does not load: ZeroDivisionError: division by zero",
    ),
    "exit": (MINE + "raise SystemExit(1)\n", "the schedule file does not load: SystemExit: 1"),
    "default": (
        MINE.replace("return Knobs()", "return 1 / 0"),
        rf"default\(\) of 'mine' {DIVIDED}",
    ),
    "valid": (MINE.replace("return None", "return 1 / 0"), rf"valid\(\) of 'mine' {DIVIDED}"),
    "space": (
        MINE.replace("return None", "return 1 / 0 if knobs.lanes == 4 else None"),
        rf"valid\(\) of 'mine' {DIVIDED}",
    ),
    "apply": (MINE, r"mine \(lanes=2\) failed on layer_norm .*: ValueError: applied"),
}
"""What is broken: the file, and what is said of it."""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """`broken("valid")` puts a schedule into the user's folder whose `valid` fails and gives the
    expression that what is said of it matches.
    """
    file = tmp_path / "schedules" / "cpu" / "mine.py"
    file.parent.mkdir(parents=True)

    def put(what: str) -> str:
        text, reason = BROKEN[what]
        file.write_text(text)
        monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path / "schedules"))
        forget()
        return reason if what == "apply" else f"{re.escape(str(file))}: {reason}"

    yield put
    lntune.strict(False)
    forget()


def forget() -> None:
    """Decide anew, on schedules that are read anew."""
    schedule._load.cache_clear()
    lntune.reload()


def won(log_dir: Path, name: str, knobs: dict[str, Any], code: Code | None = None) -> None:
    """A final in the log that a schedule has won."""
    known = schedule.all_schedules()
    timings = {"tuned": Timing((1.0,), 1.0), "eager": Timing((2.0,), 2.0)}
    code = code or (known[name].code if name in known else Code())
    record = Record(
        role="final", case=CASE, device=device.current(), threads=1, schedule=name, code=code,
        knobs=knobs, status="ok", timings=timings, busy=False,
        time="2026-01-01T00:00:00.000+00:00",
    )  # fmt: skip
    records.append(log_dir, record)


def heard(call: Callable[[], object]) -> list[str]:
    """What is said of schedules while something is called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert not [w for w in caught if "eager mode serves it" in str(w.message)]
    return [str(w.message) for w in caught if issubclass(w.category, ScheduleWarning)]


@pytest.mark.parametrize("what", ["import", "exit", "valid", "apply"])
def test_calls_are_served_by_the_others(
    what: str, broken: Callable[[str], str], log_dir: Path
) -> None:
    """A record of a schedule that is broken now is passed over, and so is the schedule: a shipped
    one serves, on its kernel. Said once.
    """
    reason = broken(what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        won(log_dir, "mine", {"lanes": 2})
    forget()

    def calls() -> None:
        for x in (X, X, torch.randn(8, 56)):
            torch.testing.assert_close(
                lntune.layer_norm(x, x.shape[-1:]),
                functional.layer_norm(x, x.shape[-1:]),
                rtol=1e-5,
                atol=1e-5,
            )

    (message,) = heard(calls)
    assert re.match(f"left out: {reason}", message)
    assert dispatch.kernel_for(CASE) is not None
    choice = dispatch.choose(CASE)
    assert (choice.tier, choice.schedule) == ("default", "cached_rows")
    if what in ("valid", "apply"):
        assert any(re.search(reason, step) for step in choice.steps)


@pytest.mark.parametrize("what", ["import", "valid", "apply"])
def test_strict_mode_names_it(what: str, broken: Callable[[str], str], log_dir: Path) -> None:
    """In strict mode it is an error that names the schedule, and not a step down."""
    reason = broken(what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        won(log_dir, "mine", {"lanes": 2})
        lntune.strict()
        for _ in range(2):
            with pytest.raises(ScheduleError, match=reason):
                lntune.layer_norm(X, (48,))


def test_a_default_that_fails_where_no_other_schedule_fits(
    broken: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for its default knobs it is passed over as one that does not fit; eager mode is what is
    left.
    """
    reason = broken("default")
    mine = schedule.get("mine")
    monkeypatch.setattr(schedule, "for_op", lambda op, kind: {"mine": mine})
    (message,) = heard(lambda: dispatch.choose(CASE))
    assert re.match(f"left out: {reason}", message)
    assert dispatch.choose(CASE).tier == "eager"


@pytest.mark.parametrize("what", ["import", "exit", "default", "valid", "space"])
def test_tuning_goes_on_without_it(what: str, broken: Callable[[str], str]) -> None:
    """A run that does not name it tunes the others and says once that it is left out; one that
    names it is refused, with the reason.
    """
    reason = broken(what)
    wide = Case("layer_norm", 96, "float32", 8)
    (message,) = heard(lambda: settings.check_settings(tune.Settings(), [CASE, wide]))
    assert re.match(f"left out: {reason}", message)
    assert {c.schedule for c in Candidates(CASE, device.current())} == {"cached_rows"}
    with pytest.raises(ScheduleError, match=reason):
        settings.check_settings(tune.Settings(schedules=("mine",)), [CASE])


@pytest.mark.parametrize("what", ["import", "default", "valid", "space"])
def test_the_doctor_lists_it(what: str, broken: Callable[[str], str]) -> None:
    """`doctor` has it with its reason as a failure, the schedules that can be used beside it, and
    says it once.
    """
    reason = broken(what)
    findings: dict[str, Finding] = {}
    assert heard(lambda: findings.update({f.topic: f for f in content.examine()})) == []
    assert findings["left out"].status == "fail"
    assert re.match(reason, findings["left out"].detail)
    assert findings["left out"].remedy
    assert findings["schedules"].status == "ok"
    assert "cached_rows" in findings["schedules"].detail


def test_the_doctor_lists_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without schedules is no failure, and not what was meant either."""
    (tmp_path / "cpu").mkdir()
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path))
    forget()
    findings = {f.topic: f for f in content.examine()}
    assert (
        findings["schedule folders"].status == "warn"
        and str(tmp_path) in findings["schedule folders"].detail
    )
    assert "left out" not in findings
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    "command",
    [
        ["ops", "--json"],
        ["why", "layer_norm", "--hidden", "48", "--rows", "8", "--json"],
        ["show", "layer_norm", "--hidden", "48", "--rows", "8", "--as", "te", "--json"],
    ],
    ids=lambda c: c[0],
)
@pytest.mark.parametrize("what", ["import", "valid"])
def test_commands_go_on(
    what: str, command: list[str], broken: Callable[[str], str], log_dir: Path
) -> None:
    """Commands that do not name it say it on standard error and answer as without it."""
    reason = broken(what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        won(log_dir, "mine", {"lanes": 2})
    forget()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "cached_rows" in json.dumps(json.loads(done.stdout))
    assert re.search(reason, done.stderr) or command[0] == "ops"


@pytest.mark.parametrize("what", ["import", "default"])
def test_a_command_that_names_it(what: str, broken: Callable[[str], str]) -> None:
    """It is a line with the reason and exit code 2."""
    reason = broken(what)
    done = CliRunner().invoke(app, ["show", "layer_norm", "--hidden", "48", "--schedule", "mine"])
    assert done.exit_code == 2
    assert re.search(f"^lntune: {reason}", done.stderr, re.MULTILINE)


def test_an_error_of_the_users_filters_passes(broken: Callable[[str], str]) -> None:
    """Who makes such warnings errors gets them."""
    broken("import")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        warnings.simplefilter("ignore", UntunedWarning)
        with pytest.raises(ScheduleWarning):
            lntune.layer_norm(X, (48,))
    assert not issubclass(ScheduleWarning, LntuneError)
