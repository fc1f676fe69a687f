"""Special values in one input at a time: an infinity, a NaN, a number so large or so small that
what is cut off shows, in the first, a middle and the last column, of the first, middle and last
rows. Whatever else a kernel is given is plain random, so nothing hides what it makes of them.

All is done in the same tensors, which differ in one input from call to call: what a kernel
remembers of an earlier call shows, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.check import problems
from lntune.check.judging import judge
from lntune.check.problems import Problem
from lntune.check.stage import Stage, Subject
from lntune.ops.op import Arg

if TYPE_CHECKING:
    import torch

ROWS = 11
"""Nine ways of being special (three values in three columns), and two plain rows between them."""
KINDS = {"a NaN": math.nan, "an infinity": math.inf, "minus infinity": -math.inf}
LARGE = {"float16": 3e4, "bfloat16": 1e10, "float32": 1e10}
"""Numbers whose cubes stay finite in float32; float16 ends at 65504."""
TINY = {"float16": 2.0**-20, "bfloat16": 1e-38, "float32": 1e-38}
"""What plain random numbers are multiplied by, so that most are denormal."""
OTHER_EPS = 0.25
"""An eps that nobody has as a default."""
CUT = 8.0
"""Times the usual tolerance, where large numbers are given: they are there to be cut off, which is
an error of thousands. How exactly a row is summed up that has one is a matter of luck: eager mode's
own error is ten times as large in the next row.
"""
_SEED = 77


def places(size: int) -> tuple[int, int, int]:
    """The last, the first and a middle one of so many: an odd one, within a vector."""
    return size - 1, 0, size // 2 | 1 if size > 2 else 0  # noqa: PLR2004


def _every(plain: torch.Tensor) -> torch.Tensor:
    """Rows with a special value each, from the first to the last, of every kind and in every
    place.
    """
    changed = plain.clone().view(ROWS, -1)
    ways = [(kind, k) for kind in KINDS.values() for k in dict.fromkeys(places(changed.shape[1]))]
    for n, (kind, k) in enumerate(ways):
        changed[n * (ROWS - 1) // (len(ways) - 1), k] = kind
    return changed.view(plain.shape)


def _one(plain: torch.Tensor, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(its kind, an input) with a single special value: where one NaN makes the whole row of
    outputs NaN, or the sum over all rows, another would hide what becomes of it. `number`: of the
    input, by which places differ.
    """
    columns = places(plain.shape[-1])
    ways = [("a NaN", k) for k in columns]
    ways += [(kind, columns[(number + n) % 3]) for n, kind in enumerate(KINDS) if n]
    for n, (kind, k) in enumerate(dict.fromkeys(ways)):
        changed = plain.clone()
        at = changed.view(-1, changed.shape[-1])
        at[n % 2 * (len(at) - 1), k] = KINDS[kind]
        yield f"{kind} in column {k}", changed


def _large(arg: Arg, plain: torch.Tensor) -> torch.Tensor:
    """Plain numbers, and large ones in a few places."""
    changed, large = plain.clone(), LARGE[arg.dtype]
    if arg.shape[:1] != ("rows",):
        for place, sign in zip(places(len(plain)), (1, -1, 1), strict=True):
            changed[place] = sign * large
        return changed
    for row, place in zip((0, 4, ROWS - 1), places(plain.shape[-1]), strict=True):
        changed[(row, place) if plain.dim() > 1 else row] = large if row else -large
    return changed


def special(case: Case, place: str) -> Iterator[Problem]:
    """The problems, a plain one first; made when they are asked for, and kept as far as
    problems.KEPT_BYTES go.
    """
    op = ops.get(case.op)
    plain = op.inputs(case, ROWS, "normal", _SEED)
    arguments = op.arguments(case)
    summed = any(a.role in ("out", "sum") and a.shape[:1] != ("rows",) for a in arguments)

    # Statistics that are given are those of plain inputs. Beside them an infinity meets a factor
    # that is 0 or all but 0, according to how an activation was made: NaN, or infinite.
    given_statistics = any(a.role == "in" and a.shape == ("rows",) for a in arguments)

    def made(style: str, given: dict[str, Any]) -> Problem:
        def make() -> Problem:
            problem = problems.solved(case, style, ROWS, given, place)
            problem = msgspec.structs.replace(problem, of_any_kind=given_statistics)
            if style.startswith("tiny"):
                return problem
            problem = problem.allowing(problems.usual(case))
            if not style.startswith("large"):
                return problem
            allowed = {name: CUT * t for name, t in problem.tolerance.items()}
            return msgspec.structs.replace(problem, tolerance=allowed)

        return problems.kept(case, style, ROWS, place, make)

    yield made("plain random", plain)
    for number, arg in enumerate(arguments):
        name = arg.name
        if arg.role == "scalar":
            yield made(f"another {name}", {**plain, name: OTHER_EPS})
        if arg.role != "in":
            continue
        by_row = arg.shape[:1] == ("rows",)
        if by_row:
            yield made(f"infinities and NaNs in {name}", {**plain, name: _every(plain[name])})
        if summed or not by_row:
            for kind, changed in _one(plain[name], number):
                yield made(f"{kind} of {name}", {**plain, name: changed})
        yield made(f"large {name}", {**plain, name: _large(arg, plain[name])})
        if name in op.linear:
            tiny = {**plain, name: plain[name] * TINY[arg.dtype]}
            tiny |= {other: plain[other] * 0 for other in op.linear[name] if other in plain}
            yield made(f"tiny {name}", tiny)


def wrong(subject: Subject) -> str:
    """What is wrong with a kernel on special values, empty where nothing is.

    Raises:
        Exception: whatever the kernel itself raised.
    """
    stage = Stage(subject, ROWS)
    for problem in special(subject.case, subject.place):
        stage.fill(problem.given)
        outputs = stage.call()
        message, _, _ = judge(outputs, problem)
        if message or (message := stage.broken):
            return message
    return ""
