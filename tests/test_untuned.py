"""One warning, not one a case: untuned cases are counted and said in a line with a command, at the
line of the user's program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import lntune
from lntune import device
from lntune.case import Case
from lntune.system import callers, paths
from lntune.torch import untuned

HERE = device.current()


@pytest.fixture(autouse=True)
def no_logs(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is tuned, and nothing was met."""
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    lntune.reload()
    yield
    lntune.reload()


def line() -> int:
    """The line that calls this."""
    return sys._getframe(1).f_lineno


def cell() -> torch.Tensor:
    """One step of an LSTM's cell."""
    return lntune.LayerNormLSTMCell(3, 16)(torch.randn(2, 3))[0]  # type: ignore[no-any-return]


class Model(torch.nn.Module):
    """A model of the user's, whose norm is called by PyTorch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Identity(), lntune.LayerNorm(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A line of the user's, which calls a module."""
        return self.inner(x)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[], object]] = {
    "function": lambda: lntune.layer_norm(torch.randn(2, 16), (16,)),
    "training": lambda: lntune.layer_norm(torch.randn(2, 16, requires_grad=True), (16,)),
    "module": lambda: lntune.LayerNorm(16)(torch.randn(2, 16)),
    "model": lambda: Model()(torch.randn(2, 16)),
    "lstm": lambda: lntune.LayerNormLSTM(3, 16)(torch.randn(5, 2, 3)),
    "cell": cell,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_warning_points_at_the_users_line(way: str) -> None:
    """Whatever of lntune and PyTorch lies between, and however deep: it is a line of this file."""
    with pytest.warns(lntune.UntunedWarning) as caught:
        WAYS[way]()
    assert {w.filename for w in caught if issubclass(w.category, lntune.UntunedWarning)} == {
        __file__
    }
    text = Path(__file__).read_text().splitlines()[caught[0].lineno - 1]
    assert "lntune." in text or "Model()" in text or "self.inner" in text


def test_a_backward_points_at_the_line_that_asked_for_it() -> None:
    """An untuned backward is met inside backward()."""
    loss = lntune.layer_norm(torch.randn(2, 16, requires_grad=True), (16,)).sum()
    lntune.reload()
    with pytest.warns(lntune.UntunedWarning, match="layer_norm_backward") as caught:
        at = line() + 1
        loss.backward()
    assert (caught[0].filename, caught[0].lineno) == (__file__, at)


def test_many_cases_are_one_warning() -> None:
    """The first is said, with a command; all are counted, whatever their variants, in the order in
    which they were met.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for hidden in (16, 24):
            for rows in (1, 3, 5):
                for weight in (None, torch.ones(hidden)):
                    lntune.layer_norm(torch.randn(rows, hidden), (hidden,), weight)
    messages = [str(w.message) for w in caught if issubclass(w.category, lntune.UntunedWarning)]
    assert len(messages) == 1
    assert messages[0].startswith(
        "layer_norm hidden 16 float32 rows 1 is not tuned on this device; served by default knobs."
        " Run: lntune tune layer_norm"
    )
    assert "lntune.untuned()" in messages[0]
    assert [(one.case.hidden, one.case.rows) for one in lntune.untuned()] == [
        (16, 1),
        (16, 8),
        (24, 1),
        (24, 8),
    ]
    assert {(one.device, one.served) for one in lntune.untuned()} == {(HERE, "default knobs")}
    assert (
        untuned.command(lntune.untuned())
        == "lntune tune layer_norm --hidden 16,24 --dtype float32 --rows 1,8"
    )
    lntune.reload()
    assert lntune.untuned() == []


def test_the_list_is_for_people_and_programs() -> None:
    """It prints as a line for each case, aligned, and the command that tunes them all; it is a list
    of records all the same.
    """
    gpu = device.Device("gpu", "some", "sm_90", 132)
    cases = [Case("layer_norm", 64, "float32", 8), Case("layer_norm_backward", 1024, "bfloat16", 1)]
    found = untuned.UntunedCases(
        [
            untuned.Untuned(cases[0], HERE, "default knobs"),
            untuned.Untuned(cases[1], gpu, "eager mode", outlived=True),
        ]
    )
    first, *lines, last = str(found).splitlines()
    assert repr(found) == str(found) and first == "2 cases not tuned on their device:"
    assert lines[0].split("served")[0].rstrip() == "  layer_norm hidden 64 float32 rows 2-15"
    assert "--target cuda" in lines[1] and lines[1].endswith("before its schedule changed")
    assert len({line.index("served by") for line in lines}) == 1
    assert last == f"Run: {found.command}" and "&&" in last
    assert isinstance(found, list) and [one.case for one in found] == cases
    assert str(untuned.UntunedCases()).startswith("no call has met")


def test_one_command_for_several_operators() -> None:
    """A line for a shell, with a command for each operator and kind of device."""
    gpu = device.Device("gpu", "some", "sm_90", 132)
    cases = [
        (Case("layer_norm", 64, "float32", 8), HERE),
        (Case("layer_norm", 32, "float16", 1), HERE),
    ]
    cases += [
        (Case("layer_norm_backward", 64, "float32", 8), HERE),
        (Case("layer_norm", 64, "float32", 8), gpu),
    ]
    assert (
        untuned.command([untuned.Untuned(case, where, "default knobs") for case, where in cases])
        == "lntune tune layer_norm --hidden 32,64 --dtype float32,float16 --rows 1,8"
        " && lntune tune layer_norm_backward --hidden 64 --dtype float32 --rows 8"
        " && lntune tune layer_norm --hidden 64 --dtype float32 --rows 8 --target cuda"
    )


def test_where_a_warning_is_an_error_each_case_is_one() -> None:
    """Who asks for errors finds every untuned case, each once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for hidden in (16, 24):
            x = torch.randn(2, hidden)
            with pytest.raises(lntune.UntunedWarning, match=f"hidden {hidden}"):
                lntune.layer_norm(x, (hidden,))
            lntune.layer_norm(x, (hidden,))


END = """
import warnings, torch, lntune
from lntune.system import paths
paths.log_dirs = lambda: []
{filters}
def use(*sizes):
    for hidden in sizes:
        lntune.layer_norm(torch.randn(2, hidden), (hidden,))
use({sizes})
"""
IGNORED = "warnings.simplefilter('ignore', lntune.UntunedWarning)"
IN_PART = (
    "with warnings.catch_warnings(): warnings.simplefilter('ignore');"
    " lntune.layer_norm(torch.randn(2, 8), (8,))"
)
ENDS = (("", "16, 24, 32", 2), ("", "16", 1), (IGNORED, "16, 24", 0), (IN_PART, "16, 24", 2))
"""(what is done to warnings, sizes, lines that are printed) of processes."""
FORKED = """
import json, os, sys
import torch, lntune
for number, code in enumerate(json.loads(sys.argv[1])):
    if (child := os.fork()) == 0:
        os.dup2(os.open(str(number), os.O_WRONLY | os.O_CREAT), 2)
        exec(compile(code, "<string>", "exec"))
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, number
"""
"""Runs each of some programs in a process of its own, whose standard error goes to a file."""


def test_the_line_at_the_end(tmp_path: Path) -> None:
    """A process that met several untuned cases ends with one line that counts them and names one
    command for all; not those whose warnings were ignored when they were met.
    """
    path = os.pathsep.join(
        [str(paths.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    codes = [END.format(filters=filters, sizes=sizes) for filters, sizes, _ in ENDS]
    done = subprocess.run(
        [sys.executable, "-c", FORKED, json.dumps(codes)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for number, (_, sizes, lines) in enumerate(ENDS):
        said = (tmp_path / str(number)).read_text()
        printed = [text for text in said.splitlines() if "UntunedWarning" in text]
        assert len(printed) == lines, said
        if lines > 1:
            count, listed = len(sizes.split(",")), sizes.replace(" ", "")
            assert (
                f"<string>:8: UntunedWarning: {count} cases were not tuned on this device. Run:"
                f" lntune tune layer_norm --hidden {listed} " in printed[1]
            )


def test_filters_are_asked_as_python_asks_them() -> None:
    """What callers.action says of a warning is what becomes of it."""
    at = callers.place()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        assert callers.action("text", UserWarning, at) == "default"
        warnings.filterwarnings("ignore", "some.*", lntune.UntunedWarning)
        warnings.filterwarnings("error", module="another")
        assert callers.action("some text", lntune.UntunedWarning, at) == "ignore"
        assert callers.action("a text", lntune.UntunedWarning, at) == "default"
        assert callers.action("some text", UserWarning, at) == "default"
        warnings.filterwarnings("always", lineno=at.line)
        assert callers.action("text", UserWarning, at) == "always"


def test_all_warnings_find_the_callers_line() -> None:
    """Nothing of ours counts frames: what lies between a user's line and a warning changes."""
    texts = {
        path.name: path.read_text(encoding="utf-8")
        for path in paths.PACKAGE.rglob("*.py")
        if path.name != "callers.py"
    }
    assert not [
        name for name, text in texts.items() if "warnings.warn(" in text or "stacklevel" in text
    ]
