"""How the text of options becomes numbers, words, durations and cases."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lntune import ops
from lntune.case import Case
from lntune.errors import InputError, got_expected, unknown
from lntune.ops import models


def integers(name: str, text: str) -> list[int]:
    """The numbers of a text such as "1,64,4096"; none of an empty one."""
    parts = names(text)
    try:
        if text and not parts:
            raise ValueError
        return [int(part.replace("_", "")) for part in parts]
    except ValueError:
        remedy = f"For example {name} 768,1024."
        raise InputError(
            got_expected(name, repr(text), "integers separated by commas", remedy)
        ) from None


def names(text: str) -> list[str]:
    """The words of a text such as "float32,bfloat16"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def some(name: str, text: str) -> str:
    """The text, which is to have one word at least."""
    if not names(text):
        expected = "one word or more, separated by commas"
        remedy = f"Leave {name} out for its default."
        raise InputError(got_expected(name, repr(text), expected, remedy))
    return text


LONGEST = 20 * 24 * 3600
"""Seconds; systems wait no longer than some 24 days."""
_UNITS = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_DURATION = re.compile(
    rf"(?:{_NUMBER} *h)? *(?:{_NUMBER} *m(?:in)?)? *(?:{_NUMBER} *s)? *(?:{_NUMBER} *ms)?"
)


def seconds(name: str, text: str) -> float:
    """The seconds of a text such as "90", "300ms", "90s", "1.5m", "1m30s" or "1h"."""
    plain = text.strip()
    match = _DURATION.fullmatch(f"{plain}s" if re.fullmatch(_NUMBER, plain) else plain)
    parts = zip(match.groups(), _UNITS.values(), strict=True) if match else ()
    total = sum(float(part) * unit for part, unit in parts if part)
    if not 0 < total <= LONGEST:
        expected = "a duration above 0 such as 90s, 1m30s, 10m or 1h"
        limit = f"{LONGEST // 3600} h at most"
        raise InputError(got_expected(name, repr(text), f"{expected}, of {limit}"))
    return total


def grids(op: str) -> dict[str, tuple[int, ...]]:
    """The hidden sizes that `--grid` stands for, by its words: those of the operator's default
    grid, of the paper, and of the families of models that have such norms or cells.
    """
    operator = ops.get(op)
    steps = operator.in_sequences or (operator.backward and ops.get(operator.backward).in_sequences)
    kind = "cells" if steps else "norms"
    families = {n: f.hidden for n, f in models.FAMILIES.items() if f.of == kind}
    default = tuple(dict.fromkeys(case.hidden for case in operator.grid))
    return {"default": default, "paper": models.PAPER, **families}


def cases_of(
    operators: Sequence[str], hidden: str, dtype: str, rows: str, grid: str = "default"
) -> list[Case]:
    """The cases of several operators (none: of all), one operator after another; those for which a
    family of models has no sizes are left out.
    """
    chosen = [ops.get(name).name for name in dict.fromkeys(operators)] or list(ops.OPS)
    if grid in models.FAMILIES and not hidden:
        fitting = [op for op in chosen if grid in grids(op)]
        chosen = fitting or chosen  # where none fits, the first says what would
    return [case for op in chosen for case in cases(op, hidden, dtype, rows, grid)]


def cases(op: str, hidden: str, dtype: str, rows: str, grid: str = "default") -> list[Case]:
    """The cases asked for: the operator's default grid, or its like for the sizes of the paper or
    of a family of models, narrowed or replaced along each axis that was given.
    """
    default_cases, known = ops.get(op).grid, grids(op)
    if grid in models.FAMILIES and grid not in known and not hidden:
        expected = f"one of {', '.join(known)}"
        got = f"{grid}, which are sizes of {models.FAMILIES[grid].of}, for {op}"
        raise InputError(got_expected("--grid", got, expected))
    if grid not in {**known, **models.FAMILIES}:
        raise unknown("grid", grid, known)
    if not (hidden or dtype or rows) and grid == "default":
        return list(default_cases)
    sizes = integers("--hidden", hidden) or list(known[grid])
    types = names(dtype) or list(dict.fromkeys(c.dtype for c in default_cases))
    counts = integers("--rows", rows) or list(dict.fromkeys(c.rows for c in default_cases))
    if any(count < 1 for count in counts):
        remedy = "An empty batch needs no kernel."
        raise InputError(got_expected("--rows", repr(rows), "numbers of rows from 1 on", remedy))
    return list(dict.fromkeys(Case(op, h, t, r) for h in sizes for t in types for r in counts))
