"""Lines of at most 100 columns in what ruff does not read: C, C++, shell scripts, the Makefile."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("*.c", "*.cc", "*.cpp", "*.h", "*.sh", "Makefile")
FOLDERS = ("lntune", "schedules", "tests", "tools", "bench")
COLUMNS = 100


def long_lines(path: Path) -> list[str]:
    """Where a file's lines are longer than that."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [f"{path}:{n}" for n, line in enumerate(lines, 1) if len(line) > COLUMNS]


def test_sources_that_ruff_does_not_read() -> None:
    """No line of a C, C++ or shell source, or of the Makefile, is longer than 100 columns."""
    files = [path for pattern in SOURCES for path in ROOT.glob(pattern)]
    for folder in FOLDERS:
        files += [path for pattern in SOURCES for path in (ROOT / folder).rglob(pattern)]
    kinds = {path.suffix for path in files}
    assert kinds >= {"", ".c", ".cc", ".cpp", ".h", ".sh"}
    assert [place for path in files for place in long_lines(path)] == []


def test_a_long_line_is_reported(tmp_path: Path) -> None:
    """A line of 100 columns passes; one of 101 is named with its number."""
    file = tmp_path / "kernel.c"
    file.write_text(f"int a;\n{'/' * 100}\n{'/' * 101}\n")
    assert long_lines(file) == [f"{file}:3"]
