"""README.md: what it shows runs.

Every ```bash block is run line by line as far as it calls lntune, with short budgets, in this
process (which spares starting torch and TVM for each; test_cli.py starts real ones); every
```python block in a process of its own. A block that a test cannot run has `<!-- not run: reason
-->` on the line above it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from shown import BUDGET, LANGUAGES, Block, blocks, commands
from typer.testing import CliRunner

from lntune.cli import app
from lntune.cli.parse import cases
from lntune.log import records
from lntune.system import paths

README = Path(__file__).resolve().parent.parent / "README.md"
SHOWN = blocks(README.read_text(encoding="utf-8")) if README.is_file() else []
BRIEFLY = ("10s", "--trials", "3")
"""In the place of a budget: so long at most, and no more candidates a case."""
RUN = [b for b in SHOWN if b.language in LANGUAGES and not b.skipped]


def run_python(code: str, folder: Path) -> None:
    """A program that must succeed, away from the checkout's own files."""
    root = str(README.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def run_lntune(arguments: list[str]) -> None:
    """A command that must succeed and print something."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (
        f"lntune {shlex.join(arguments)}\n{done.output[-3000:]}\n{done.exception!r}"
    )
    assert done.stdout
    if arguments[0] == "tune" and "--dry-run" not in arguments:
        assert_tuned(arguments, done.stdout)


def assert_tuned(arguments: list[str], shown: str) -> None:
    """What a tuning command promises: trials in the log, and a winner of a case that was asked for,
    with its time beside eager's, in the log and in the table.
    """
    if "--cases" in arguments:  # recorded before, by a block of Python
        assert [r for r in records.read(paths.log_dirs(), role="final") if r.status == "ok"]
        return
    if "--stale" in arguments:  # nothing is
        assert "nothing of that" in shown
        return
    given = dict(zip(arguments[2::2], arguments[3::2], strict=False))
    asked = cases(
        arguments[1], *(given.get(name, "") for name in ("--hidden", "--dtype", "--rows"))
    )
    log = records.read(paths.log_dirs(), arguments[1])
    run = [r for r in log if r.run == log[-1].run]
    trials, finals = (
        [r for r in run if r.role == role and r.status == "ok"] for role in ("trial", "final")
    )
    assert trials
    assert finals
    for final in finals:
        assert final.case in asked and final.median() and final.median("eager")
        assert final.schedule == given.get("--schedule", final.schedule)
        assert any(
            (r.case, r.schedule, r.knobs) == (final.case, final.schedule, final.knobs)
            for r in trials
        )
    table = shown[shown.index("\ntuned\n") :]
    assert len(re.findall(rf"^{arguments[1]}  ", table, re.MULTILINE)) == len(finals)
    lines = re.findall(r"^not tuned: (?:(\d+) cases, )?", shown, re.MULTILINE)
    assert len(finals) + sum(int(count or 1) for count in lines) == len(asked), (
        "every case has a winner, or the reason why not"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole README: what one block tunes the next may look at."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
def test_there_is_something_to_run() -> None:
    """The README shows commands and Python, in languages this test knows, and says why a block is
    not run.
    """
    assert {b.language for b in RUN} >= {"bash", "python"}
    assert not [
        b for b in SHOWN if "lntune" in b.text and b.language not in LANGUAGES and not b.skipped
    ]


@pytest.mark.parametrize("block", RUN, ids=lambda b: f"line{b.line}")
def test_a_block_runs(block: Block, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block's commands end with exit code 0, its Python without an exception."""
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(folders / "logs"))
    # Not the shipped ones: on a machine that they are of, `lntune check` would go through all its
    # cases, for minutes.
    monkeypatch.setattr("lntune.system.paths.log_dirs", lambda: [folders / "logs"])
    monkeypatch.setattr("lntune.tune.times.FINAL_SHARE", 1e-4)  # finals as short as they may be
    if block.language == "python":
        run_python(block.text, folders)
        return
    monkeypatch.chdir(folders)
    calls = commands(block.text, BRIEFLY)
    assert calls, "no line of it calls lntune; mark it as not run, with the reason"
    for command in calls:
        run_lntune(command)


def test_options_of_the_readme_exist() -> None:
    """Every option that the README names belongs to some command."""
    names = [c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands]
    known = set(
        re.findall(
            r"--[a-z][a-z-]+",
            " ".join(
                CliRunner().invoke(app, [*n, "--help"]).output for n in ([], *([n] for n in names))
            ),
        )
    )
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    assert (
        set(
            re.findall(
                r"--[a-z][a-z-]+",
                " ".join(re.findall(r"^lntune .*|`lntune .*?`|`--.*?`", text, re.MULTILINE)),
            )
        )
        <= known
    )


def test_how_blocks_are_read() -> None:
    """Languages, the mark above a block (with or without an empty line between), prompts, comments
    and continued lines.
    """
    text = (
        "a\n```bash\n$ lntune tune x --budget 60s \\\n  --time=1s --time 2s  # so\nmake\n```\n<!--"
        " not run: slow -->\n\n```python\n1/0\n```\n"
    )
    first, second = blocks(text)
    assert (first.line, first.language, first.skipped) == (2, "bash", "")
    assert (second.language, second.text, second.skipped) == ("python", "1/0", "slow")
    assert commands(first.text) == [
        ["tune", "x", "--budget", BUDGET, "--time=1s", "--time", "50ms"]
    ]


def test_the_figures_are_those_of_the_results() -> None:
    """The table on the first screen is what bench/summary.py makes of the files under
    bench/results.
    """
    script = README.parent / "bench" / "summary.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- figures of bench/summary.py -->")[1].split(
        "<!-- end of the figures -->"
    )[0]
    assert table.strip() == done.stdout.strip()
    assert len(done.stdout.splitlines()) >= 12
