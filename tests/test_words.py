"""Figures in sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lntune.words import counted

PACKAGE = Path(__file__).resolve().parent.parent / "lntune"
NOUNS = (
    "argument candidate case core element finding kernel line module multiprocessor norm operator"
    " parameter record schedule trial worker"
)
CODE = ("ops", "gpu")
"""What kernels are made of: its sentences are about sizes above one."""


def test_one_and_many() -> None:
    """One has its singular, everything else the plural, made with an s or given."""
    assert [counted(n, "kernel") for n in (0, 1, 2)] == ["0 kernels", "1 kernel", "2 kernels"]
    assert [counted(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]


@pytest.mark.parametrize(
    "path",
    sorted(p for p in PACKAGE.rglob("*.py") if p.parent.name not in CODE),
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_sentence_counts_by_itself(path: Path) -> None:
    """No text puts a figure before a plural of its own: "1 kernels" is nowhere."""
    pattern = rf"\{{(?!counted)[^{{}}]*\}} (?:{'|'.join(NOUNS.split())})s\b"
    text = path.read_text(encoding="utf-8")
    assert [match.group() for match in re.finditer(pattern, text)] == []
