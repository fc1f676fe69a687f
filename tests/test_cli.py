"""The command line: help, JSON, errors of one line, and a whole tuning run looked at by every other
command.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from grids import exhaustive
from rich.console import Console
from typer.testing import CliRunner, Result

from lntune import device, ops
from lntune.case import Case
from lntune.cli import app
from lntune.cli.base import (
    ORDER,
)
from lntune.cli.parse import cases, integers, seconds
from lntune.commands import check as verification
from lntune.device import Device
from lntune.errors import InputError
from lntune.kernels.compiler import FORMS
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.report.columns import WIDE
from lntune.report.failures import Failures
from lntune.report.progress import Pace, TuningProgress
from lntune.report.tables import console
from lntune.torch import dispatch
from lntune.tune import Progress

COMMANDS = (
    "ops",
    "tune",
    "report",
    "why",
    "show",
    "check",
    "build",
    "export",
    "bench",
    "compare",
    "doctor",
    "inspect",
    "demo",
    "bringup",
    "search-study",
    "merge",
    "prune",
    "export-log",
    "export-candidates",
    "import",
)
TINY = ["--hidden", "64", "--dtype", "float32", "--rows", "8"]
CASE = Case("layer_norm", 64, "float32", 8)


def run(*arguments: object) -> Result:
    """A command of lntune in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def start(*arguments: object, program: tuple[str, ...] = ("-m", "lntune")) -> subprocess.Popen[str]:
    """A command of lntune in a process of its own."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a tuning run of one tiny case with two candidates, its final measured briefly."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lntune.tune.times.FINAL_SHARE", 1e-4)
        done = run(
            "tune",
            "layer_norm",
            *TINY,
            "--trials",
            2,
            "--budget",
            "60s",
            "--log-dir",
            folder,
            "--json",
        )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["trials"] == 2
    assert facts["statuses"] == {"ok": 2}
    assert facts["verified_trials_per_second"] > 0
    assert not facts["interrupted"]
    assert [(c["hidden"], c["dtype"], c["rows"]) for c in facts["cases"]] == [(64, "float32", 8)]
    assert "1/1" in done.stderr, "progress goes to stderr, so that stdout is JSON alone"
    return folder


def only_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other log is read: on a machine whose measurements are shipped `check` would go through
    all of those, for minutes.
    """
    monkeypatch.setattr("lntune.system.paths.log_dirs", lambda: [folder])


# --- help, version, JSON


def test_every_command_is_listed() -> None:
    """`lntune --help` names each command and says what it does; no other exists."""
    text = run("--help").output
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} == set(
        COMMANDS
    )
    assert run().exit_code == 2 and "Usage" in run().output


@pytest.mark.parametrize("option", ["--hidden", "--dtype", "--rows"])
@pytest.mark.parametrize("command", ["tune", "bench", "check", "build", "export"])
def test_an_option_without_a_word_is_refused(command: str, option: str) -> None:
    """What an unset variable of a shell leaves is not taken for an option that was left out, which
    means the default grid.
    """
    done = run(command, option, "")
    assert done.exit_code == 2
    assert f"lntune: {option}: got '', expected one word or more" in done.output


def test_no_summary_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command's summary is whole on a terminal of 80 columns, and they stand in the order in
    which a newcomer meets them.
    """
    monkeypatch.setenv("COLUMNS", "80")
    commands = run("--help").output.split("Commands:\n")[1]
    lines = commands.strip().splitlines()
    assert [line.split()[0] for line in lines] == ORDER
    assert not any(line.endswith("...") for line in lines) and "...\n" not in commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    """--help says what a command does, and what each of its options means."""
    done = run(command, "--help")
    assert done.exit_code == 0
    text = done.output.split("\n\n", 1)[1]
    assert len(text.split("Options:")[0].split()) > 5, "no description"
    entry = next(
        c
        for c in app.registered_commands
        if command in (c.name, c.callback and c.callback.__name__)
    )
    hints = entry.callback.__annotations__ if entry.callback else {}
    assert "--json" in text and hints
    for line in text.split("Options:")[1].splitlines():
        if line.startswith("  --"):
            assert len(line.split()) > 2 or len(line) > 25, f"{line!r} has no help"


@pytest.mark.parametrize(
    "command",
    [
        *("tune", "report", "check", "build", "bench", "compare", "inspect", "demo", "bringup"),
        *("search-study", "merge", "prune"),
    ],
)
def test_tables_can_be_had_whole(command: str) -> None:
    """Every command that prints a table can print all of its columns."""
    assert "--wide" in run(command, "--help").output


def test_wide_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the console is as wide as it, with `wide` nothing is left out there either."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert (console().width, console(wide=True).width) == (60, WIDE)


def test_version() -> None:
    """--version prints the version and nothing else."""
    from lntune import __version__

    assert run("--version").output == f"{__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("ops",),
        ("report", "--log-dir", "{log}"),
        ("why", "layer_norm", "--hidden", "64", "--rows", "8", "--log-dir", "{log}"),
        ("why", "layer_norm", "--hidden", "70000"),
        ("show", "layer_norm", "--hidden", "64", "--as", "te", "--log-dir", "{log}"),
        ("check", "--log-dir", "{log}"),
        ("bench", *TINY, "--no-compile", "--time", "20ms", "--log-dir", "{log}"),
        ("compare", "{log}", "{log}"),
        ("search-study", "--seeds", "1", "--search", "exhaustive"),
        ("doctor",),
    ],
    ids=lambda a: a[0],
)
def test_json_parses(
    arguments: tuple[str, ...], tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json stdout is JSON and nothing else, and exit code 0 says that all is well."""
    only_log(tuned, monkeypatch)
    done = run(*(a.replace("{log}", str(tuned)) for a in arguments), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "layr_norm"), "unknown operator 'layr_norm'. Did you mean 'layer_norm'?"),
        (("report", "layer_nrm"), "Did you mean 'layer_norm'?"),
        (("check", "layernorm"), "Did you mean 'layer_norm'?"),
        (("tune", "--schedule", "cached_row"), "Did you mean 'cached_rows'?"),
        (
            ("show", "layer_norm", "--hidden", 64, "--schedule", "cachd_rows"),
            "Did you mean 'cached_rows'?",
        ),
        (("show", "layer_norm", "--hidden", 64, "--variant", "weigth"), "Did you mean 'weight'?"),
        (("tune", "--search", "locl"), "unknown search 'locl'. Did you mean 'local'?"),
        (("search-study", "--strategy", "locl"), "unknown search 'locl'. Did you mean 'local'?"),
        (("search-study", "--seeds", "0"), "--seeds: got 0, expected 1 or more"),
        (("search-study", "nowhere"), "LOG: got nowhere, which is not there"),
        (("tune", "--dtype", "floa32"), "unknown dtype 'floa32'. Did you mean 'float32'?"),
        (
            ("tune", "layer_norm_backward", "--schedule", "cached_row"),
            "Did you mean 'blocked_rows'? Known: blocked_rows, metaschedule_backward.",
        ),
        (
            (
                "show",
                "layer_norm",
                "--hidden",
                64,
                "--target",
                "cuda:sm_90",
                "--schedule",
                "shared_rows",
            ),
            "'shared_row'? Known: shared_row.",
        ),
        (
            ("tune", "--dtype", "float64"),
            (
                "dtype: got float64, expected float32, float16, bfloat16. No kernel is built for"
                " it: eager mode serves it."
            ),
        ),
        (("build", "--dtype", "fp32,double"), "dtype: got float64"),
        (
            ("tune", "--hidden", 1024, "--dtype", "fp32", "--rows", "99999999999999"),
            "rows: got 99999999999999 of layer_norm",
        ),
        (
            ("bench", "--hidden", 1024, "--dtype", "fp32", "--rows", "99999999999999"),
            "rows: got 99999999999999 of layer_norm",
        ),
        (("why", "layer_norm", "--hidden", 64, "--dtype", "bfloat"), "Did you mean 'bfloat16'?"),
        (
            ("show", "layer_norm", "--hidden", 64, "--as", "asmm"),
            "unknown form 'asmm'. Did you mean 'asm'?",
        ),
        (("compare", ".", ".", "--fail-on", "slow"), "Did you mean 'slower'?"),
        (("tune", "--hidden", "many"), "--hidden: got 'many', expected integers"),
        (("bench", "--hidden", ","), "--hidden: got ','"),
        (("inspect", "--hidden", ""), "--hidden: got ''"),
        (("inspect", "--dtype", ","), "--dtype: got ','"),
        (("inspect", "--target", ""), "--target: got ''"),
        (
            ("show", "lnlstm_step", "--hidden", 16385, "--target", "cuda:sm_90"),
            "(eager: no schedule of lnlstm_step for a gpu fits)",
        ),
        (
            (
                "show",
                "lnlstm_step",
                "--hidden",
                16385,
                "--target",
                "cuda:sm_90",
                "--schedule",
                "gated_row",
            ),
            "65540, more than the 65536",
        ),
        (
            (
                "show",
                "lnlstm_step_backward",
                "--hidden",
                16385,
                "--target",
                "cuda:sm_90",
                "--schedule",
                "gated_row_backward",
            ),
            "65540, more than the 65536",
        ),
        (("check", "--hidden", "0"), "hidden: got 0, expected 1 to 65536"),
        (("tune", "--hidden", "65537"), "hidden: got 65537"),
        (("tune", "--rows", "-4"), "--rows: got '-4'"),
        (("bench", "--rows", "0"), "--rows: got '0'"),
        (("tune", "--budget", "-5s"), "--budget: got '-5s', expected a duration above 0"),
        (("tune", "--budget", "0"), "--budget: got '0'"),
        (("bench", "--time", "soon"), "--time: got 'soon'"),
        (("bench", "--call-cost", "--rows", "32"), "--call-cost: got --rows 32 beside it"),
        (("bench", "--call-cost", "--given-output"), "--call-cost: got --given-output beside it"),
        (("bench", "--strided", "--given-output"), "--strided: got --given-output beside it"),
        (("bench", "--training", "--strided"), "--training: got --strided beside it"),
        (("bench", "--training", "--target", "cuda"), "--training: got --target cuda beside it"),
        (("demo", "--budget", "nan"), "--budget: got 'nan'"),
        (("tune", "--trials", "-1"), "trials: got -1, expected more than 0"),
        (("bench", "--output", "/proc/none/such.json"), "--output: got /proc/none/such.json"),
        (
            ("bench", "--plot", "a.gif"),
            "--plot: got a.gif, expected a file whose name ends in .png",
        ),
        (("bench", "--call-cost", "--plot", "a.png"), "--call-cost: got --plot a.png beside it"),
        (("compare", "nowhere.json", "nowhere.json"), "cannot read nowhere.json"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[object, ...], message: str) -> None:
    """What a user can get wrong is answered in one line that names it, and the near miss; never
    with a traceback.
    """
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert message in done.stderr
    assert done.stderr.startswith("lntune: ") and done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_mistake_with_json_is_an_object_too() -> None:
    """With --json the error is on stdout as an object, for machines, and on stderr for people."""
    done = run("tune", "--search", "locl", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["kind"] == "UnknownNameError"
    assert "Did you mean" in done.stderr


NEEDED = {
    "why": ("layer_norm", "--hidden", "64"),
    "show": ("layer_norm", "--hidden", "64"),
    "compare": ("a.json", "b.json"),
    "merge": ("a.jsonl", "-o", "b.jsonl"),
    "export-log": ("-o", "b"),
    "import": ("a.json",),
    "export-candidates": ("out",),
}
"""What commands cannot do without."""
UNEXPECTED: list[tuple[Exception, int, str]] = [
    (
        RuntimeError("no home"),
        3,
        (
            "unexpected RuntimeError: no home; LNTUNE_TRACEBACK=1 shows where it comes from. Please"
            " report it."
        ),
    ),
    (KeyError("lanes"), 3, "unexpected KeyError: 'lanes'; "),
    (ValueError("first\n\n  a program\nlast"), 3, "unexpected ValueError: first ... last; "),
    (AssertionError(), 3, "unexpected AssertionError; "),
    (MemoryError(), 3, "unexpected MemoryError; "),
    (
        ImportError("libtvm.so: cannot open shared object file"),
        3,
        "unexpected ImportError: libtvm.so",
    ),
    (
        OSError(28, "No space left on device", "/there/file"),
        2,
        "/there/file: No space left on device\n",
    ),
    (OSError(116, "Stale file handle"), 2, "Stale file handle (LNTUNE_TRACEBACK=1 shows where)\n"),
    (OSError("odd"), 3, "unexpected OSError: odd; "),
    (InputError("hidden: got -1."), 2, "hidden: got -1.\n"),
]


def failing(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A command's arguments; in its place something is called that fails."""
    (info,) = [
        c
        for c in app.registered_commands
        if name in (c.name, c.callback.__name__ if c.callback else "")
    ]
    callback = info.callback
    assert callback is not None

    @functools.wraps(callback)
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(info, "callback", fail)
    return name, *NEEDED.get(name, ())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_ends_in_a_traceback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in a command is one line on standard error: exit code 2 where the machine
    is at fault, 3 for what should not happen, with the way to see its traceback; with --json it is
    an object too.
    """
    # all of them in the first command, some in each of the others
    some = UNEXPECTED[:: 1 if name == COMMANDS[0] else 6]
    for error, code, message in some:
        with monkeypatch.context() as patch:
            done = run(*failing(name, error, patch))
            assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (code, "", 1)
            assert done.stderr.startswith(f"lntune: {message}")
    error, code, message = UNEXPECTED[0]
    arguments = failing(name, error, monkeypatch)
    done = run(*arguments, "--json")
    assert json.loads(done.stdout) == {"error": message, "kind": "RuntimeError"}
    monkeypatch.setenv("LNTUNE_TRACEBACK", "1")
    done = run(*arguments)
    assert done.exit_code == code
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1] == f"lntune: {message}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_that_is_closed_ends_every_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads no further, as `head`, is told nothing."""
    done = run(*failing(name, BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch))
    assert (done.exit_code, done.output) == (1, "")


def test_the_commands_are_those_there_are() -> None:
    """What holds for all commands is tested with all of them."""
    assert sorted(COMMANDS) == sorted(
        c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands
    )


REFUSED = [
    ("tune", "--hiden", "64"),
    ("why", "layer_norm", "--hidden", "x"),
    ("why", "layer_norm"),
    ("tunes",),
    ("bench", "--seed", str(2**64)),
]


@pytest.mark.parametrize("arguments", REFUSED, ids=str)
def test_what_the_parser_refuses(arguments: tuple[str, ...]) -> None:
    """Unknown options and commands, missing ones and text for a number: usage, the reason, exit
    code 2.
    """
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Error" in done.stderr and "Traceback" not in done.output


def test_an_unwritable_log_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """A log folder that cannot be made (a file is in its place) is said at once, with the
    remedy.
    """
    (tmp_path / "file").write_text("")
    done = run("tune", *TINY, "--trials", 1, "--log-dir", tmp_path / "file")
    assert done.exit_code == 2
    assert "cannot write tuning logs" in done.stderr and "--log-dir" in done.stderr


def test_the_process_says_the_same() -> None:
    """A real `python -m lntune` exits with 2 and the one line, too."""
    process = start("show", "layer_norm", "--hidden", "64", "--as", "ams")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert (
        err.startswith("lntune: unknown form 'ams'. Did you mean 'asm'?") and err.count("\n") == 1
    )


# --- text to cases


DURATIONS = {
    "90": 90,
    "300ms": 0.3,
    "90s": 90,
    "1.5m": 90,
    " 1h ": 3600,
    "1m30s": 90,
    "1h 2m 3s": 3723,
    "2min": 120,
    "1s500ms": 1.5,
}


@pytest.mark.parametrize(("text", "expected"), DURATIONS.items())
def test_durations(text: str, expected: float) -> None:
    """A duration is numbers with h, m, s or ms, the largest first; a plain number is seconds."""
    assert seconds("--budget", text) == pytest.approx(expected)


NOT_DURATIONS = [
    "",
    "s",
    "-1s",
    "1d",
    "1 s s",
    "1e3",
    "0ms",
    "\u0661s",
    "inf",
    "30s1m",
    "1m1m",
    "1m30",
    "1.5.5s",
    "0m0s",
    "481h",
    "9" * 400 + "s",
]


@pytest.mark.parametrize("text", NOT_DURATIONS)
def test_not_durations(text: str) -> None:
    """Everything else is refused, nothing is guessed."""
    with pytest.raises(InputError, match="a duration above 0"):
        seconds("--budget", text)


def test_integers_and_cases() -> None:
    """Lists are split at commas; axes left out are the default grid's; a case asked for twice is
    one case.
    """
    assert integers("--rows", "1, 4_096,") == [1, 4096]
    grid = cases("layer_norm", "64,64", "float16", "")
    assert {c.hidden for c in grid} == {64} and {c.dtype for c in grid} == {"float16"}
    assert len(grid) == len({c.rows for c in grid}) > 1
    assert len(cases("layer_norm", "", "", "")) > len(grid)


def test_the_grid_of_the_paper() -> None:
    """`--grid paper` takes the hidden sizes of the paper's experiments for every operator; other
    axes narrow it; typos are told.
    """
    for op in ops.OPS:
        assert {c.hidden for c in cases(op, "", "", "", "paper")} == {
            240,
            256,
            400,
            1000,
            1024,
            2400,
        }
        assert {c.dtype for c in cases(op, "", "", "", "paper")} == {
            c.dtype for c in cases(op, "", "", "")
        }
    assert {(c.hidden, c.rows) for c in cases("layer_norm", "", "float32", "7", "paper")} == {
        (h, 7) for h in (240, 256, 400, 1000, 1024, 2400)
    }
    assert {c.hidden for c in cases("layer_norm", "64", "", "", "paper")} == {64}
    assert "paper" in run("tune", "layer_norm", "--grid", "papper").stderr


# --- one log, every command


def test_report_of_the_run(tuned: Path) -> None:
    """`report` shows the tuned case with its speedup."""
    done = run("report", "--log-dir", tuned)
    assert done.exit_code == 0
    assert (
        "64" in done.output
        and "float32" in done.output
        and ("geomean" in done.output or "disturbed" in done.output)
    )


def test_report_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured `report` says so, names the folder and the command to run, and
    exits with 1.
    """
    monkeypatch.setattr("lntune.system.paths.log_dirs", lambda: [tmp_path])
    done = run("report", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (1, [])
    assert str(tmp_path) in done.stderr and "Run: lntune tune layer_norm" in done.stderr


def test_why_of_the_run(tuned: Path) -> None:
    """`why` says that the case's own record serves it (or that eager won there), and names the time
    and the knobs.
    """
    facts = json.loads(
        run("why", "layer_norm", "--hidden", 64, "--rows", 8, "--log-dir", tuned, "--json").stdout
    )
    assert facts["tier"] in ("exact", "eager") and facts["tuned_us"] > 0 and facts["eager_us"] > 0
    text = run("why", "layer_norm", "--hidden", 64, "--rows", 8, "--log-dir", tuned).output
    assert ("served by its own record" in text) == (facts["tier"] == "exact")
    assert "record of layer_norm 8x64 float32" in text
    for dtype in ("float64", "double"):
        assert (
            "served by eager mode"
            in run("why", "layer_norm", "--hidden", 64, "--dtype", dtype).output
        )
    assert (
        "hidden 64 bfloat16 rows 1:"
        in run("why", "layer_norm", "--hidden", 64, "--dtype", "bf16").output
    )


def test_other_devices_are_asked_about(tuned: Path) -> None:
    """`why`, `report` and `show` tell of a GPU that is not here: its schedules' default knobs, no
    record of a CPU; `ops` lists its schedules.
    """
    facts = json.loads(
        run(
            "why",
            "layer_norm",
            "--hidden",
            64,
            "--rows",
            8,
            "--target",
            "cuda:sm_90",
            "--log-dir",
            tuned,
            "--json",
        ).stdout
    )
    assert (facts["tier"], facts["schedule"], facts["tuned_us"]) == ("default", "shared_row", None)
    assert (
        "on NVIDIA H100"
        in run("why", "layer_norm", "--hidden", 64, "--target", "nvidia/nvidia-h100").output
    )
    none = run("report", "--target", "nvidia/nvidia-h100", "--log-dir", tuned)
    assert none.exit_code == 1
    assert "Run where it is: lntune tune layer_norm --target cuda\n" in none.output
    assert (
        "threadIdx.x" in run("show", "layer_norm", "--hidden", 64, "--target", "cuda:sm_90").output
    )
    assert run("why", "layer_norm", "--hidden", 64, "--target", "cuda:sm_1").exit_code == 2
    listed = {o["op"]: o for o in json.loads(run("ops", "--json").stdout)}
    assert all(listed[op]["schedules"] and listed[op]["gpu_schedules"] for op in ops.OPS)


def test_source_of_a_gpu_begins_with_the_kernel() -> None:
    """What TVM puts before it is said to be left out, and shown on demand; --json has all."""
    asked = ("show", "layer_norm", "--hidden", 64, "--target", "cuda:sm_90", "--as", "source")
    short, full = run(*asked).stdout, run(*asked, "--full").stdout
    assert short.splitlines()[2].startswith('extern "C" __global__')
    assert full.endswith(short.split("\n", 2)[2]) and len(full) > len(short)
    assert json.loads(run(*asked, "--json").stdout)["text"] == full.removesuffix("\n")


@pytest.mark.parametrize(
    ("form", "has"),
    [("te", "T.sblock"), ("tir", "def main"), ("source", "define "), ("asm", ".text")],
    ids=lambda v: v if v in FORMS else "",
)
def test_show_in_each_form(form: str, has: str, tuned: Path) -> None:
    """`show` prints the kernel as definition, scheduled loops, LLVM IR and assembly."""
    done = run(
        "show",
        "layer_norm",
        "--hidden",
        64,
        "--rows",
        8,
        "--as",
        form,
        "--log-dir",
        tuned,
        "--schedule",
        "cached_rows",
    )
    assert done.exit_code == 0, done.output
    assert has in done.output


def test_check_of_the_run(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` goes through the tuned cases with all their checked variants, and exits with 0 when
    all are right.
    """
    only_log(tuned, monkeypatch)
    done = run("check", "--log-dir", tuned)
    assert done.exit_code == 0, done.output
    assert "all right" in done.output
    (line,) = [text for text in done.output.splitlines() if text.startswith("layer_norm ")]
    assert line.split()[:4] == ["layer_norm", "float32", "64", "8"] and "+stats" in line


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_check_finds_a_wrong_kernel(
    fault: str, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that answers wrongly or raises is WRONG in the table, with the reason, and the exit
    code is 1.
    """

    def kernel(*values: Any) -> None:
        if fault == "raises":
            raise ValueError("[y] is not what I expect")
        values[4].zero_()

    monkeypatch.setattr(
        verification.dispatch, "choose", lambda case, *_: dispatch.Choice("exact", "cached_rows")
    )
    monkeypatch.setattr(verification.dispatch, "kernel_for", lambda case, *_: kernel)
    done = run("check", *TINY, "--log-dir", tuned)
    assert done.exit_code == 1
    assert "WRONG" in done.output and (
        "ValueError: [y]" in done.output if fault == "raises" else "y: error" in done.output
    )
    facts = json.loads(run("check", *TINY, "--log-dir", tuned, "--json").stdout)
    assert facts and not any(r["ok"] for r in facts)


def test_bench_of_the_run(tuned: Path, tmp_path: Path) -> None:
    """`bench` measures all contenders, says where outputs come from, and writes the records beside
    the table.
    """
    file = tmp_path / "folder" / "bench.json"
    done = run(
        "bench", *TINY, "--no-compile", "--time", "20ms", "--log-dir", tuned, "--output", file
    )
    assert done.exit_code == 0, done.output
    assert "outputs allocated by every call" in done.stdout and "over eager" in done.stdout
    facts = json.loads(file.read_text())
    assert set(facts["records"][0]["timings"]) == {"eager", "tuned", "copy"}
    assert facts["outputs"].startswith("allocated by every call")
    same = run("compare", file, file, "--fail-on", "slower")
    verdict = "UNSURE" if facts["cases"][0]["disturbed"] else "SAME"
    assert same.exit_code == 0 and f"1 case: 1 {verdict}" in same.output


def test_tune_says_how_fast_it_was(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closing line of `tune` counts trials by status and gives verified trials a second;
    without a winner the exit code is 1.
    """
    from lntune import tune as module
    from lntune.tune import Summary

    final = next(r for r in records.read([tuned]) if r.role == "final")

    failures = Failures()
    failures.add("wrong", "y: far off")

    def fake(
        asked: list[Case], settings: Any, observer: Callable[[Progress], None], *_: Any
    ) -> Summary:
        state = Progress(asked[0], 0, 1)
        observer(state)
        for trials in (1, 2, 3):
            state.trials = trials
            time.sleep(0.001)
            observer(state)
        return Summary(
            [final] if asked[0].hidden == 64 else [],
            Counter(ok=2, wrong=1),
            2.0,
            log_dir=Path("there"),
            untuned={"that": "broken"},
            failures=failures,
            notes=["so it is"],
        )

    monkeypatch.setattr(module, "tune", fake)
    done = run("tune", *TINY)
    assert done.exit_code == 0
    assert (
        "3 trials (2 ok, 1 wrong) in 2 s, " in done.output
        and " verified trials a second; log in there" in done.output
    )
    assert "not tuned: that: broken" in done.output
    assert "failed: 1 wrong: y: far off" in done.output and "note: so it is" in done.output
    assert run("tune", "--hidden", 65).exit_code == 1


# --- Ctrl-C


@pytest.mark.parametrize(
    ("sent", "code"),
    [exhaustive((signal.SIGINT, 0)), (signal.SIGTERM, 143), exhaustive((signal.SIGHUP, 129))],
)
def test_an_interrupt_keeps_what_was_found(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    """SIGINT, SIGTERM or SIGHUP during a search ends it in order: the case is settled, its records
    are in the log, and the exit code is as the help says, though SIGTERM comes twice as `timeout`
    sends it.
    """
    brief = (
        "from lntune.tune import times; times.FINAL_SHARE = 1e-4;"
        " from lntune.cli import main; main()"
    )
    process = start(
        "tune", *TINY, "--budget", "60s", "--log-dir", tmp_path, "--json", program=("-c", brief)
    )
    threading.Thread(target=process.stderr.read, daemon=True).start()  # type: ignore[union-attr]
    end = time.monotonic() + 60
    try:
        while not any(f.read_bytes().count(b'"ok"') >= 2 for f in tmp_path.glob("*/*.jsonl")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(sent)
        if sent != signal.SIGINT:
            process.send_signal(sent)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    facts = json.loads(process.stdout.read())  # type: ignore[union-attr]
    assert facts["interrupted"] and len(facts["cases"]) == 1
    kept = records.read([tmp_path])
    assert sum(r.role == "trial" for r in kept) == facts["trials"] >= 2
    assert [r.role for r in kept].count("final") == 1


# --- progress


HERE = Device("cpu", "Some CPU", "x86-64-v3", 4)


def states() -> list[Progress]:
    """What a short run reports: the start, two trials (one failed), the finals, the end."""

    def at(**fields: Any) -> Progress:
        return Progress(CASE, 0, 2, **fields)

    timings = {
        name: Timing((t,), t) for name, t in (("tuned", 2.0), ("eager", 4.0), ("default", 3.0))
    }
    final = Record(
        role="final",
        case=CASE,
        device=HERE,
        threads=1,
        schedule="s",
        knobs={},
        status="ok",
        timings=timings,
    )
    failed = Counter(timeout=1)
    return [
        at(),
        at(trials=1, best_us=2.5, best="s lanes=4", deadline=time.monotonic() + 30),
        at(
            trials=2, best_us=2.5, best="s lanes=4", failures=failed, deadline=time.monotonic() + 30
        ),
        at(trials=2, best_us=2.5, best="s lanes=4", failures=failed, phase="final"),
        at(trials=2, best_us=2.5, best="s lanes=4", failures=failed, phase="done", final=final),
    ]


def test_progress_is_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: whole lines without control characters, with trials, failures by kind,
    best and time left.
    """
    monkeypatch.setattr("lntune.report.progress.PLAIN_SECONDS", 0)
    out = io.StringIO()
    with TuningProgress(Console(file=out, width=200, force_terminal=False)) as progress:
        for state in states():
            progress(state)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert lines[0] == "[1/2] layer_norm 8x64 float32: 0 trials"
    assert lines[2].startswith(
        "[1/2] layer_norm 8x64 float32: 2 trials, 1 timeout, best 2.50 us, "
    ) and lines[2].endswith(" s left (s lanes=4)")
    assert "measuring finalists" in lines[3]
    assert (
        lines[4]
        == "[1/2] layer_norm 8x64 float32: tuned 2.00 us, eager 4.00 us (2.00x), without tuning"
        " 3.00 us (1.50x); 2 trials, 1 timeout"
    )


def test_a_disturbed_final_makes_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of a case whose final other work disturbed has no ratio and says that none would
    hold.
    """
    out = io.StringIO()
    done = states()[-1]
    assert done.final is not None
    with TuningProgress(Console(file=out, width=200, force_terminal=False)) as progress:
        progress(dataclasses.replace(done, final=msgspec.structs.replace(done.final, busy=True)))
    assert (
        "tuned 2.00 us (best trial: 2.50 us), but other work disturbed this final: neither times"
        " nor ratios hold" in out.getvalue()
    )
    assert "x)" not in out.getvalue()


def test_plain_progress_is_not_a_flood() -> None:
    """Between two plain lines there is time; the line of a finished case always comes."""
    out = io.StringIO()
    with TuningProgress(Console(file=out, width=200, force_terminal=False)) as progress:
        for state in states():
            progress(state)
    assert len(out.getvalue().splitlines()) == 2


def test_progress_is_one_live_line_on_a_terminal() -> None:
    """On a terminal one line is drawn over and over and removed at the end; only finished cases
    stay.
    """
    out = io.StringIO()
    with TuningProgress(
        Console(file=out, width=200, force_terminal=True, highlight=False)
    ) as progress:
        for state in states():
            progress(state)
            progress._live.refresh()  # type: ignore[union-attr]
    text = out.getvalue()
    assert "\x1b[2K" in text, "the line is erased before it is drawn again"
    assert "2 trials, 1 timeout" in text
    assert text.count("eager 4.00 us (2.00x)") == 1


def test_the_live_line_is_one_line_on_a_narrow_terminal() -> None:
    """Where it does not fit its end is left out, never what stands first: the case, the trials, the
    best and the time left.
    """
    out = io.StringIO()
    with TuningProgress(
        Console(file=out, width=80, force_terminal=True, color_system=None, highlight=False)
    ) as progress:
        state = states()[2]
        state.best = "cached_rows lanes=4 store=2 unroll=1 together=1 prefetch=1 write=plain"
        progress(state)
        progress._live.refresh()  # type: ignore[union-attr]
        shown = [
            line
            for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n", out.getvalue())
            if line.strip()
        ]
    assert shown and all(
        len(line) <= 80
        and line.startswith("[1/2] layer_norm 8x64 float32: 2 trials, 1 timeout, best 2.50 us, ")
        for line in shown
    )


def test_the_pace_leaves_out_warming_up_and_finals() -> None:
    """Verified trials a second: after the first trial, failures are not counted as verified, their
    time is; finals are left out.
    """
    pace = Pace()

    def at(now: float, index: int, trials: int, failed: int = 0, phase: str = "search") -> None:
        pace(
            Progress(
                CASE,
                index,
                2,
                trials=trials,
                failures=Counter(run=failed),
                phase=phase,
                best_us=math.inf,
            ),
            now,
        )

    at(0, 0, 0)
    at(10, 0, 1)  # pays for the start
    assert pace.per_second is None
    at(11, 0, 2)
    at(12, 0, 3, failed=1)
    at(12, 0, 3, failed=1, phase="final")
    at(50, 0, 3, failed=1, phase="done")
    at(51, 1, 0)
    at(53, 1, 2)
    assert pace.per_second == pytest.approx(3 / 4)


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    """`lntune ops | head -0` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lntune", "ops"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_json_of_a_path_that_is_no_utf8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bytes of a path that are no UTF-8 are escaped, not an error."""
    monkeypatch.setenv("LNTUNE_CACHE_DIR", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    done = run("doctor", "--json")
    assert done.exit_code in (0, 1), done.output
    assert "\\udcff" in done.stdout and json.loads(done.stdout)["findings"]


def test_report_of_a_log_without_winners(tmp_path: Path) -> None:
    """Where every candidate failed the report says so, and why, and that there is no
    measurement.
    """
    message = "y: error 5.1 is 9 times what is allowed"
    trial = Record(
        case=CASE,
        device=device.current(),
        threads=1,
        schedule="mine",
        knobs={},
        status="wrong",
        message=message,
    )
    records.append(tmp_path, trial)
    records.append(tmp_path, trial)
    done = run("report", "--log-dir", tmp_path)
    assert done.exit_code == 1
    assert (
        "2 trials, none of which has won a case" in done.output
        and "2 wrong: y: error 5.1 is 9 times what is allowed" in done.output
    )
    assert "no measurements of this device" in done.output
