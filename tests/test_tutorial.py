"""schedules/TUTORIAL.md: its schedule, as it is at first and mended, keeps the contract of
schedules/README.md, and what the page does with it works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_kernels import DEVICE, assert_right
from grids import thinned
from shown import Block, blocks, commands
from typer.testing import CliRunner

from lntune import schedule
from lntune.case import MAX_HIDDEN, Case
from lntune.cli import app
from lntune.kernels import compiler
from lntune.log import records, select
from lntune.schedule import Schedule
from lntune.tune import times

PAGE = Path(__file__).resolve().parent.parent / "schedules" / "TUTORIAL.md"
BLOCKS = [b for b in blocks(PAGE.read_text(encoding="utf-8")) if not b.skipped]
FILE = "cpu/plain.py"
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
BRIEFLY = ("60s", "--trials", "3")
"""In the place of a budget: however late the process that measures is there, both schedules are
tried, and no longer than that.
"""


def mended(code: str, apply: str) -> str:
    """The file with another `apply`, and what that imports."""
    before, rest = code.split("def apply(")
    return (before + apply + "\n\nSCHEDULES" + rest.split("SCHEDULES")[1]).replace(
        "import alignment, row_sums\n", "import alignment, row_sums, vectors\n"
    )


def versions() -> dict[str, str]:
    """The file as the page has it at first, and as it has it mended."""
    first, second = [b.text for b in BLOCKS if b.language == "python"]
    assert first.startswith(f"# ~/my_schedules/{FILE}\n")
    assert second.startswith(f"# ~/my_schedules/{FILE}, in the place of apply\n")
    return {"at first": first, "mended": mended(first, second.split("\n", 1)[1])}


def save(folder: Path, version: str) -> Path:
    """The file as a user saves it in the folder that LNTUNE_SCHEDULES names."""
    path = folder / FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(versions()[version] + "\n", encoding="utf-8")
    schedule._load.cache_clear()
    return path


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Schedule:
    """The schedule, loaded: mended, or as a test asks for it."""
    (example,) = schedule.load_file(save(tmp_path, getattr(request, "param", "mended")), "cpu")
    return example


@pytest.fixture
def my_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the page, known to lntune."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path / "my_schedules"))
    (tmp_path / "my_schedules").mkdir()
    yield tmp_path / "my_schedules"
    schedule._load.cache_clear()


@pytest.mark.parametrize(
    ("plain", "hidden", "dtype"),
    [
        *thinned([("at first", *size) for size in SIZES], 4),
        *thinned([("mended", *size) for size in SIZES[2:] + SIZES[:2]], 4),
    ],
    indirect=["plain"],
)
def test_the_schedule_is_right(plain: Schedule, hidden: int, dtype: str) -> None:
    """It passes the check of every candidate at every kind of size up to the largest, with all its
    knobs.
    """
    case = Case("layer_norm", hidden, dtype, 64)
    for knobs in plain.space(case, DEVICE) if hidden < 2000 else [plain.default(case, DEVICE)]:
        assert_right(case, compiler.in_memory(case, plain, knobs, DEVICE))


def test_a_single_row(plain: Schedule) -> None:
    """Its default knobs are valid for one row, too, and other knobs say why not."""
    case = Case("layer_norm", 1000, "float32", 1)
    assert plain.reason_invalid(plain.default(case, DEVICE), case, DEVICE) is None
    assert_right(case, compiler.in_memory(case, plain, plain.default(case, DEVICE), DEVICE))
    assert (
        plain.reason_invalid(plain.knobs(parallel=True), case, DEVICE)
        == "one row cannot be shared among threads"
    )


def test_the_page_from_beginning_to_end(
    my_schedules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command does what the page says, in its order, with the file as it is there: both
    schedules are tried and measured in the same rounds, compared, shown, mended, measured again,
    and one of them serves.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(times, "FINAL_SHARE", 1e-4)  # finals as short as they may be
    done = [run(block, my_schedules) for block in BLOCKS]
    shown = "\n".join(done)
    assert "T.parallel" in shown
    assert {"--- plain", "+++ cached_rows"} <= {line.split(" (")[0] for line in shown.splitlines()}
    log = records.read([tmp_path / "my_logs"])
    first, second = [r for r in log if r.role == "final"]
    for final in (first, second):
        measured = {final.schedule, *(rival.schedule for rival in final.rivals)}
        assert measured == {"plain", "cached_rows"}
    assert {r.status for r in log} == {"ok"}
    assert shown.count("A plain, B cached_rows") == 3
    assert [r.role for r in log if r.time > second.time] == ["comparison"]
    (serving,) = select.served(log, schedule.all_schedules()).values()
    assert serving.schedule in done[-1] or "eager" in done[-1]


def run(block: Block, folder: Path) -> str:
    """What the commands of a block print; a block of code is saved, and one that shows what a
    command printed is left alone.
    """
    if block.language == "python":
        save(folder, "mended" if "in the place of" in block.text.split("\n", 1)[0] else "at first")
    output = ""
    for words in commands(block.text, BRIEFLY) if block.language == "bash" else ():
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"lntune {' '.join(words)}\n{done.output}\n{done.exception!r}"
        output += done.stdout
    return output


def test_other_pages_lead_here() -> None:
    """From the schedules' page and the project's."""
    for page in (PAGE.parent / "README.md", PAGE.parent.parent / "README.md"):
        links = re.findall(r"\]\(([^)#]*TUTORIAL\.md)", page.read_text(encoding="utf-8"))
        assert [(page.parent / link).resolve() for link in links] == [PAGE]
