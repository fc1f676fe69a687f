"""What Markdown shows to be run: its fenced blocks, and the commands in them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

BUDGET = "6s"
"""Of a tuning run: its process is there after some 4 s, and however late that is the first case
gets a trial and a final.
"""
LANGUAGES = ("bash", "console", "sh", "shell", "python")


class Block(NamedTuple):
    """A fenced block: the line it starts on, its language, its text, and why it is not run (empty:
    it is).
    """

    line: int
    language: str
    text: str
    skipped: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    parsed: list[Block] = []
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        above = next((above for above in reversed(lines[:start]) if above.strip()), "")
        reason = re.fullmatch(r"<!-- not run: (.+) -->", above.strip())
        parsed.append(
            Block(
                start + 1,
                lines[start].strip()[3:].strip(),
                "\n".join(lines[start + 1 : number]),
                reason[1] if reason else "",
            )
        )
        start = None
    assert start is None, f"the block of line {start} is never closed"
    return parsed


def commands(text: str, budget: Sequence[str] = (BUDGET,)) -> list[list[str]]:
    """The arguments of each lntune command in a bash block, with short budgets (`budget`: what
    stands in the place of one); continued lines are joined, comments and prompts dropped.
    """
    calls = []
    short = {"--budget": budget, "--time": ("50ms",)}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        if words[:1] == ["lntune"]:
            pairs = itertools.pairwise(words)
            calls.append([w for before, word in pairs for w in short.get(before, (word,))])
    return calls
