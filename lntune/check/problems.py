"""What kernels are checked on: inputs chosen to break them, with the outputs in float64, what eager
mode makes of them, and how far a kernel may be off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.check.rounding import Moving
from lntune.ops import saturation
from lntune.ops.op import SATURATED, STYLES, Arg, Op, Tensors, Tolerance

if TYPE_CHECKING:
    import torch

ROWS = (1, 21)
"""Row counts checked with every style: a single row; and an odd number to be shared unevenly among
threads.
"""
SEVERAL = 67
"""Rows of which every thread has several, and not as many."""
KEPT_BYTES = 1 << 30
"""Bytes of problems beyond these that are kept: those of 2,117 rows of 16,384 elements take 0.8 GB
and a second or two of a CPU, and many candidates of a case are checked with the same rows.
"""


FEW, ROUNDINGS, _TURNS = 8, 4, 3
"""Elements of a row below which tolerances also have what a few roundings can do (see _moved): in
longer rows no sigma comes near sqrt(eps) on plain random inputs. As many as two sums, a division
and an activation make. And how often that is tried.
"""


Parts = Mapping[str, tuple[str, slice]]
"""A name -> an output and columns of it."""


class Problem(msgspec.Struct, frozen=True):
    """Named inputs of a style and a number of rows, and of each output the float64 `truth`, what
    is finite in eager mode and what kind the rest is of (`kinds`, None where all is finite), the
    largest absolute error allowed (`tolerance`), and eager's own. `of_any_kind`: an infinity will
    do for a NaN. `parts`: a name -> an output and its columns, where these are judged by
    themselves, and all of the rest is of parts.
    """

    style: str
    rows: int
    given: dict[str, Any]
    truth: dict[str, Any]
    finite: dict[str, Any]
    kinds: dict[str, Any]
    tolerance: dict[str, float]
    eager_error: dict[str, float]
    of_any_kind: bool = False
    parts: Parts = {}

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        every = [*self.given.values(), *self.truth.values(), *self.finite.values()]
        return sum(v.nbytes for v in every if hasattr(v, "nbytes"))

    def allowing(self, least: Problem) -> Problem:
        """The problem, with tolerances that are no less than those of another: of few numbers
        eager's own error is a matter of luck.
        """
        allowed = {n: max(t, least.tolerance[n]) for n, t in self.tolerance.items()}
        return msgspec.structs.replace(self, tolerance=allowed)


def split(outputs: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Outputs by name, or their parts where there are such."""
    if not parts:
        return dict(outputs)
    return {label: outputs[name][..., columns] for label, (name, columns) in parts.items()}


def largest(values: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """The largest magnitude among finite values, or where a mask says so; 0 of none."""
    import torch

    if values.numel() and (where is None or bool(where.all())):
        # without copies, where all are finite
        largest = float(torch.linalg.vector_norm(values, math.inf))
        if math.isfinite(largest):
            return largest
    values = values[where] if where is not None else values[values.isfinite()]
    return float(values.abs().max()) if values.numel() else 0.0


NAN = 1


def kinds(values: torch.Tensor) -> torch.Tensor:
    """What each element is: 0 a number, NAN, 2 infinity, 3 minus infinity."""
    import torch

    kind = values.isnan().to(torch.uint8)
    return kind.add_(values.isposinf(), alpha=2).add_(values.isneginf(), alpha=3)


def _problem(op: Op, case: Case, style: str, rows: int, seed: int, place: str = "cpu") -> Problem:
    """Inputs of a style and what is right for them, on PyTorch's device `place`."""
    return solved(case, style, rows, op.inputs(case, rows, style, seed), place)


def solved(case: Case, style: str, rows: int, given: dict[str, Any], place: str = "cpu") -> Problem:
    """Inputs with their float64 truth, eager's errors and the tolerances, on PyTorch's device
    `place`.

    Eager is that of the CPU everywhere, so that a kernel is held to the same on every device.
    """
    import torch

    op = ops.get(case.op)
    parts = op.saturated(case) if style == SATURATED and op.saturated else {}
    eager = {name: value.to(place) for name, value in op.eager(case, given).items()}
    given = {n: v.to(place) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    truth = op.reference(case, given)
    by_luck = case.hidden < FEW or (style in ("special", SATURATED) and op.saturated)
    moved = _moved(op, case, given, parts) if by_luck else {}
    whole = truth
    eager, truth = split(eager, parts), split(truth, parts)
    finite, kind, allowed, eager_error = {}, {}, {}, {}
    for arg, name in judged(op, case, parts):
        finite[name] = eager[name].isfinite()
        all_finite = bool(finite[name].all())
        kind[name] = None if all_finite else (kinds(eager[name]), kinds(truth[name]))
        both = finite[name] & truth[name].isfinite()
        eager_error[name] = largest(eager[name].double() - truth[name], both)
        tolerance = op.tolerance(case, arg.name)
        if parts:  # nothing else is of their size
            scale = largest(truth[name])
        else:
            scale = _scale(tolerance, style, given, whole)
        if arg.role == "sum" and rows > ROWS[-1]:  # to which each row adds a rounding
            scale *= 2 * math.sqrt(rows / ROWS[-1])
        allowed[name] = (
            tolerance.times * eager_error[name] + tolerance.floor * scale + moved.get(name, 0.0)
        )
        if parts:
            allowed[name] += _denormal(arg.dtype)
    return Problem(style, rows, given, truth, finite, kind, allowed, eager_error, parts=parts)


def judged(op: Op, case: Case, parts: Parts) -> Iterator[tuple[Arg, str]]:
    """What a problem has a truth of: an argument, and its own name or that of a part of it."""
    for arg in op.arguments(case):
        if arg.role not in ("out", "sum"):
            continue
        names = [label for label, (name, _) in parts.items() if name == arg.name]
        yield from ((arg, name) for name in (names if parts else (arg.name,)))


def _scale(tolerance: Tolerance, style: str, given: Tensors, truth: Tensors) -> float:
    """What a tolerance's floor is multiplied by on inputs of a style."""
    of = (tolerance.of,) if isinstance(tolerance.of, str) else tolerance.of
    # of tiny inputs an output may be tiny: what is 0 instead would be within any other scale
    least = 0.0 if style.startswith("tiny") else tolerance.least
    if style.startswith("tiny "):  # in an input that outputs shrink with, whatever else is given
        of = tuple(tensor for tensor in of if tensor in truth) or of
    return max(least, *(largest({**given, **truth}[tensor].double()) for tensor in of))


def _denormal(dtype: str) -> float:
    """The least number above 0: as far as a rounding reaches, however small a number is."""
    import torch

    info = torch.finfo(getattr(torch, dtype))
    return float(info.smallest_normal * info.eps)


def _moved(op: Op, case: Case, given: dict[str, Any], parts: Parts) -> dict[str, float]:
    """By how much each output, or part of one, moves at most where every input, and what every
    operation gives, moves by ROUNDINGS of float32, up or down: no arithmetic in float32 can be
    asked to be nearer to the truth than that. Rows with infinities or NaNs are left out.

    It counts where eager mode's own error is a matter of luck. Rows of a few elements that happen
    to be next to alike have a sigma of the size of sqrt(eps) or below, and their layer norm
    multiplies what rounding took from the mean by up to 1 / sqrt(eps), 316. In the style "special"
    two large weights decide on errors, in the few rows that are finite: where they turn gates all
    but fully on or off, 1 - gate is a rounding or a few, which they multiply once more on the way
    back.
    """
    import torch

    by_row = [a.name for a in op.arguments(case) if a.role == "in" and a.shape[:1] == ("rows",)]
    finite = [given[name].isfinite().reshape(len(given[name]), -1).all(1) for name in by_row]
    rows = torch.stack(finite).all(0)
    exact = {
        name: (value[rows] if name in by_row else value).double()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in given.items()
    }
    truth = op.reference(case, exact)
    moving = Moving(ROUNDINGS, case.hidden)
    most: dict[str, float] = {}
    # of a part, which may be a single number, roundings must not happen to undo each other
    turns = [moving, Moving(ROUNDINGS, 0, outwards=True)] if parts else [moving] * _TURNS
    for moving in turns:
        turned = {name: moving.moved(value) for name, value in exact.items()}
        with moving.all_results():
            other = op.reference(case, turned)
        apart = {
            name: (other[name] - value).abs_().nan_to_num_(0.0, 0.0)
            for name, value in truth.items()
        }
        for name, gap in split(apart, parts).items():
            most[name] = max(most.get(name, 0.0), float(gap.max()) if gap.numel() else 0.0)
    return most


_EVERY = (
    *((s, r) for s in STYLES for r in ROWS if s == "normal" or r > 1),
    (SATURATED, saturation.ROWS),
)


def of_style(case: Case, style: str, rows: int, place: str = "cpu") -> Problem:
    """One problem that is not kept; where it is of ROWS, that which every kernel is checked on."""
    seed = _EVERY.index((style, rows)) if (style, rows) in _EVERY else rows
    held = msgspec.structs.replace(case, rows=rows)
    return _problem(ops.get(case.op), held, style, rows, seed, place)


# cases come one after another, and a long row's problems take 200 MB
@functools.lru_cache(maxsize=2)
def of_styles(op_name: str, hidden: int, dtype: str, variant: str) -> tuple[Problem, ...]:
    """The problems that every kernel is checked on; the same for every candidate of a case."""
    op = ops.get(op_name)
    every = [
        _problem(op, Case(op_name, hidden, dtype, rows, variant), style, rows, seed)
        for seed, (style, rows) in enumerate(_EVERY)
        if style in op.styles
    ]
    usual = next(p for p in every if p.style == "normal" and p.rows == ROWS[-1])
    return tuple(p.allowing(usual) if p.rows == ROWS[0] else p for p in every)


def usual(case: Case, style: str = "normal") -> Problem:
    """The problem of a style with the most rows that every kernel is checked on."""
    styles = of_styles(case.op, case.hidden, case.dtype, case.variant)
    return next(p for p in styles if p.style == style and p.rows == ROWS[-1])


_kept: dict[tuple[str, int, str, str, int, str, str], Problem] = {}


def of_rows(case: Case, rows: int, place: str, style: str = "normal") -> Problem:
    """A problem of so many rows, on the device."""

    def make() -> Problem:
        held = msgspec.structs.replace(case, rows=rows)
        problem = _problem(ops.get(case.op), held, style, rows, rows, place)
        return problem.allowing(usual(case, style))

    return kept(case, style, rows, place, make)


def kept(case: Case, style: str, rows: int, place: str, make: Callable[[], Problem]) -> Problem:
    """The problem of this name, made where it is not kept; the latest ones are kept as far as
    KEPT_BYTES go.
    """
    key = (case.op, case.hidden, case.dtype, case.variant, rows, place, style)
    problem = _kept.pop(key, None) or make()
    _kept[key] = problem
    while len(_kept) > 1 and sum(p.bytes for p in _kept.values()) > KEPT_BYTES:
        del _kept[next(iter(_kept))]
    return problem


def forget() -> None:
    """Give back the memory of problems that are kept."""
    _kept.clear()
    of_styles.cache_clear()
