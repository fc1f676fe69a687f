"""Environment variables: what is read is known and documented, what is mistyped is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import lntune
from lntune.commands import doctor
from lntune.system import variables

ROOT = Path(__file__).resolve().parent.parent


def test_every_variable_is_known() -> None:
    """Whatever name the code, the tools and the documents have is in the table, and nothing in the
    table is read nowhere.
    """
    sources = [
        path
        for folder in ("lntune", "schedules", "bench", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".c", ".cpp", ".md") and "_bundled" not in path.parts
    ]
    sources += [ROOT / name for name in ("README.md", "TRUST.md", "CONTRIBUTING.md", "Makefile")]
    names = {
        path: set(re.findall(r"\bLNTUNE_[A-Z_]*[A-Z]\b", path.read_text())) for path in sources
    }
    known = {*variables.KNOWN, *variables.OTHERS}
    for path, used in names.items():
        assert {n for n in used if not n.startswith("LNTUNE_TEST_")} <= known, path
    here = ROOT / "lntune" / "system" / "variables.py"
    read = set[str]().union(*(n for path, n in names.items() if path.suffix == ".py" != here))
    assert set(variables.KNOWN) <= read
    assert {f"LNTUNE_{name}" for name in variables.SWITCHES} <= set(variables.KNOWN)


def test_the_readme_has_them_all() -> None:
    """README's table says of every variable what the code's does, and has no other."""
    rows = re.findall(r"^\| `(LNTUNE_\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == variables.KNOWN


def test_what_is_mistyped() -> None:
    """A name that is none is said with the nearest that is one; a switch that is neither 0 nor 1,
    with what it is taken for. Names that are known, and those of tests, are not.
    """
    said = variables.mistaken(
        {
            "LNTUNE_CASHE_DIR": "/x",
            "lntune_strict": "1",
            "LNTUNE_CHECK": "off",
            "LNTUNE_STRICT": "1",
            "LNTUNE_TRUST": "/x",
            "LNTUNE_QQQQ": "",
            "LNTUNE_TEST_MOST": "3",
            "PATH": "/bin",
            variables.scratch.SYSTEM: "/tmp",
        }
    )
    assert said == [
        "LNTUNE_CASHE_DIR is set, which is no variable of lntune's and changes nothing."
        " Did you mean LNTUNE_CACHE_DIR?",
        "LNTUNE_CHECK: got off, expected 0 or 1; it is taken for 1.",
        "LNTUNE_QQQQ is set, which is no variable of lntune's and changes nothing."
        " README.md has a table of those it has.",
        "lntune_strict is set, which is no variable of lntune's and changes nothing."
        " Did you mean LNTUNE_STRICT?",
    ]


def test_a_program_is_told_once(monkeypatch: pytest.MonkeyPatch, log_dir: Path) -> None:
    """The first call warns, at the line that made it; the second does not."""
    monkeypatch.setattr(variables, "_warned", threading.Lock())
    monkeypatch.setenv("LNTUNE_STRIKT", "1")
    monkeypatch.delenv(variables.scratch.SYSTEM, raising=False)
    lntune.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for hidden in (33, 34):
            lntune.layer_norm(torch.randn(2, hidden), (hidden,))
    (said,) = (w for w in caught if w.category is variables.VariableWarning)
    assert "Did you mean LNTUNE_STRICT?" in str(said.message)
    assert said.filename == __file__


def test_a_command_tells_it() -> None:
    """Commands say it before they begin, and doctor has it among its findings."""
    environment = {**os.environ, "LNTUNE_LOGDIR": "/x"}
    command = [sys.executable, "-m", "lntune", "ops"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "LNTUNE_LOGDIR is set" in run.stderr and "LNTUNE_LOG_DIR" in run.stderr


def test_the_doctor_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding for what is set, and one with a remedy for each that is mistaken."""
    monkeypatch.setenv("LNTUNE_SHIPPED_LOGS", "no")
    monkeypatch.setenv("LNTUNE_LOGDIR", "/x")
    found = [f for f in doctor.looked("environment", doctor._environment) if f.status == "warn"]
    assert [(f.detail.split()[0], f.remedy) for f in found] == [
        ("LNTUNE_LOGDIR", "Did you mean LNTUNE_LOG_DIR?"),
        ("LNTUNE_SHIPPED_LOGS:", "Set it to 0 or 1."),
    ]
