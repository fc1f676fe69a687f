"""The schedule that schedules/README.md shows: what people copy keeps the contract that stands
above it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cpu_kernels import DEVICE, assert_right
from grids import thinned
from typer.testing import CliRunner

from lntune import schedule
from lntune.case import MAX_HIDDEN, Case
from lntune.cli import app
from lntune.kernels import compiler
from lntune.schedule import Schedule

README = Path(__file__).resolve().parent.parent / "schedules" / "README.md"
SIZES = (
    (1, "float32"),
    (7, "float16"),
    (1000, "bfloat16"),
    (4096, "float32"),
    (4097, "bfloat16"),
    (16_411, "float32"),
)
SIZES += ((65_521, "float16"), (MAX_HIDDEN, "float32"), (MAX_HIDDEN, "bfloat16"))
"""The least and the most, odd ones, primes, and one at which a sum in a single chain is wrong."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a user saves it: the folder that LNTUNE_SCHEDULES names."""
    blocks = re.findall(
        r"```python\n# ~/my_schedules/(\S+)\n(.*?)```",
        README.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    root = tmp_path_factory.mktemp("my_schedules")
    for path, code in blocks:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(code, encoding="utf-8")
    assert [path for path, _ in blocks] == ["cpu/plain.py"]
    return root


@pytest.fixture(scope="module")
def plain(folder: Path) -> Schedule:
    """The example, loaded."""
    (example,) = schedule.load_file(folder / "cpu" / "plain.py", "cpu")
    return example


@pytest.mark.parametrize(("hidden", "dtype"), thinned(SIZES))
def test_the_example_is_right(plain: Schedule, hidden: int, dtype: str) -> None:
    """The example passes the check of every candidate at every kind of size up to the largest, with
    all its knobs.
    """
    case = Case("layer_norm", hidden, dtype, 64)
    for knobs in plain.space(case, DEVICE) if hidden < 2000 else [plain.default(case, DEVICE)]:
        assert_right(case, compiler.in_memory(case, plain, knobs, DEVICE))


def test_the_example_of_one_row(plain: Schedule) -> None:
    """Its default knobs are valid for one row, too, and other knobs say why not."""
    case = Case("layer_norm", 1000, "float32", 1)
    assert plain.reason_invalid(plain.default(case, DEVICE), case, DEVICE) is None
    assert_right(case, compiler.in_memory(case, plain, plain.default(case, DEVICE), DEVICE))
    assert (
        plain.reason_invalid(plain.knobs(parallel=True), case, DEVICE)
        == "one row cannot be shared among threads"
    )


def test_the_first_command_of_the_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is found by its folder, as the README says, and shown."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(folder))
    schedule._load.cache_clear()
    try:
        done = CliRunner().invoke(
            app, ["show", "layer_norm", "--hidden", "1024", "--schedule", "plain", "--as", "tir"]
        )
    finally:
        schedule._load.cache_clear()
    assert done.exit_code == 0 and "T.parallel" in done.output
