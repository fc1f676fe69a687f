"""A plain `pip install lntune`, which brings what serves kernels and nothing that builds them."""

from __future__ import annotations

from pathlib import Path

import bare_install
import pytest

pytestmark = pytest.mark.slow

SERVES = """
import warnings
import torch, lntune
x, w = torch.randn(5, 40), torch.ones(40)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = lntune.layer_norm(x, (40,), w, w)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (40,), w, w))
print(*(w.message for w in caught), sep="\\n")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with what a plain install brings."""
    return bare_install.make(tmp_path_factory.mktemp("bare") / "venv")


def test_a_plain_install_asks_for_nothing_that_builds() -> None:
    """Neither TVM nor SciPy nor NumPy comes with lntune; `lntune[tune]` brings them, and the tests
    have it.
    """
    asked = bare_install.requirements()
    names = {extra: {r.name for r in ones} for extra, ones in asked.items()}
    building = {"apache-tvm", "numpy", "scipy"}
    assert not building & names[""] and {"torch", "apache-tvm-ffi", "typer"} <= names[""]
    assert building <= names["tune"]
    assert any(r.name == "lntune" and r.extras == {"tune"} for r in asked["test"])


def test_calls_are_served_by_eager_mode_which_is_said(python: Path, tmp_path: Path) -> None:
    """Where no kernel was built and none can be, eager mode serves, and the warning names the
    extra that builds them.
    """
    done = bare_install.run(python, "-c", SERVES, LNTUNE_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert "eager mode serves it" in done.stdout
    assert "pip install 'lntune[tune]'" in done.stdout


def test_a_command_that_builds_names_the_extra(python: Path, tmp_path: Path) -> None:
    """A command that needs TVM ends without a trace of Python, with what to install."""
    cache, sizes = str(tmp_path / "cache"), ["--hidden", "40", "--dtype", "float32"]
    command = ["-m", "lntune", "tune", "layer_norm", *sizes, "--rows", "8"]
    done = bare_install.run(python, *command, LNTUNE_CACHE_DIR=cache)
    shown = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in shown, shown
    assert "lntune[tune]" in shown


def test_the_state_of_the_machine_is_said(python: Path, tmp_path: Path) -> None:
    """`lntune doctor` runs where nothing can be built, and names the extra that builds."""
    cache = str(tmp_path / "cache")
    done = bare_install.run(python, "-m", "lntune", "doctor", LNTUNE_CACHE_DIR=cache)
    assert "Traceback" not in done.stderr, done.stderr
    assert "pip install 'lntune[tune]'" in " ".join(done.stdout.split())
