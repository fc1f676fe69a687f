"""A short check of a kernel that is about to serve calls: a handful of the problems of `verify`,
those that find most, in some tens of milliseconds.

Its problems are made, used and let go: it runs in a user's process. What PyTorch has as defaults
there (dtype, device) does not reach them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lntune import check, ops
from lntune.case import Case
from lntune.check import problems, team, traces
from lntune.check.problems import ROWS, Problem
from lntune.device import Device
from lntune.ops import saturation
from lntune.ops.op import SATURATED, Arg
from lntune.transforms import strides

VERSION = 3
"""Of this check: raised when it finds more than before, or less, so that it is made once more."""
STYLES = ("special", "shifted")
"""Beside plain random inputs: infinities, NaNs, another eps, affine vectors large, zero and
denormal; means far above sigma.
"""
MOST_ELEMENTS = 1 << 16
"""Of a matrix of a problem on a CPU, where that leaves it LEAST_ROWS."""
LEAST_ROWS = 3
"""Of which one is ordinary, one has an infinity first and one last."""
_APART = 16
"""Elements between rows that lie apart, at most: as many as an access may have."""
_NO_MEMORY = ("out of memory", "cannot allocate", "can't allocate")


class MissingMemoryError(MemoryError):
    """There is not enough memory to tell whether a kernel is right."""


class Shortly(msgspec.Struct, frozen=True):
    """Outcome of a short check: what is wrong, the empty string where nothing is, and the seconds
    it took.
    """

    message: str
    seconds: float


class _RaisedError(Exception):
    """The kernel itself raised something; `message` says what."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def rows_within(counts: Sequence[int], width: int, most: int = MOST_ELEMENTS) -> tuple[int, ...]:
    """Of the numbers of rows that a kernel is to be checked with, those of a short check: the
    largest whose elements are no more than `most`, and the largest even one below ROWS.
    """
    few = max((n for n in counts if n < ROWS[-1] and n % 2 == 0), default=0)
    many = max((n for n in counts if n * width <= most), default=0)
    return tuple(sorted({few, many} - {0, *ROWS}))


def width_of(case: Case) -> int:
    """Elements of a row of the widest matrix that a kernel of the case has."""
    return max(a.sizes(1, case.hidden)[-1] for a in ops.get(case.op).arguments(case) if a.shape)


def shortly(
    case: Case,
    kernel: Callable[..., Any],
    fence: int,
    place: str,
    device: Device,
    more_rows: Sequence[int] = (),
    strided: bool = False,
) -> Shortly:
    """Check a kernel of a case on plain random inputs of ROWS and `more_rows`, numbers of rows, and
    on the inputs of STYLES, of fewer rows where these are long; arguments else as those of
    `check.verify`. `strided`: a kernel for matrices whose rows lie apart, which is given such.

    What a kernel raises is wrong, too. It runs on as many threads as this one has; all else is done
    in this thread.

    Raises:
        MissingMemoryError: there is too little memory for the problems, or for the kernel's own.
    """
    begun = time.perf_counter()
    try:
        with team.alone() as whole:

            def shared(*values: Any) -> None:
                with whole():
                    kernel(*values)

            message = _wrong(case, shared, fence, place, device, more_rows, strided)
    except _RaisedError as e:
        message = e.message
    except MemoryError as e:
        raise MissingMemoryError(f"{case} cannot be checked: {str(e) or 'out of memory'}") from e
    except RuntimeError as e:
        if not _lacks_memory(e):
            raise
        raise MissingMemoryError(f"{case} cannot be checked: {e}") from e
    return Shortly(message, time.perf_counter() - begun)


def _wrong(
    case: Case,
    kernel: Callable[..., Any],
    fence: int,
    place: str,
    device: Device,
    more_rows: Sequence[int],
    strided: bool,
) -> str:
    op = ops.get(case.op)
    case = msgspec.structs.replace(case, variant=op.check_variant(case.variant))
    called = _Apart(case, kernel) if strided else _Called(case, kernel)
    checked = check._Checked(op, case, called, fence, place, device)
    several = max(LEAST_ROWS, min(ROWS[-1], MOST_ELEMENTS // width_of(case)))
    normal = problems.of_style(case, "normal", several, place)

    def plain(rows: int) -> Problem:
        return problems.of_style(case, "normal", rows, place).allowing(normal)

    def saturated() -> Problem:
        return problems.of_style(case, SATURATED, min(several, saturation.ROWS), place)

    every: list[Callable[[], Problem]] = [
        lambda: plain(ROWS[0]),
        lambda: normal,
        *(functools.partial(problems.of_style, case, s, several, place) for s in STYLES),
        *(functools.partial(plain, rows) for rows in more_rows),
        *([saturated] if op.saturated else []),
    ]
    for number, make in enumerate(every):
        message, _, _ = check._judge(checked, make(), number)
        if message:
            return message
    if not checked.flushed and traces.restored_denormals():
        return "left the processor flushing denormal numbers to zero"
    return ""


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(t in str(error).lower() for t in _NO_MEMORY)


class _Called:
    """A kernel whose exceptions are told from those of a problem."""

    def __init__(self, case: Case, kernel: Callable[..., Any]) -> None:
        self._arguments, self._kernel = ops.get(case.op).arguments(case), kernel

    def __call__(self, *values: Any) -> None:
        try:
            self._kernel(*values)
        except Exception as e:
            if _lacks_memory(e):
                raise
            raise _RaisedError(f"it raises {type(e).__name__}: {e}") from e


class _Apart(_Called):
    """A kernel that takes rows that lie apart: what it reads is copied to where they do."""

    def __init__(self, case: Case, kernel: Callable[..., Any]) -> None:
        super().__init__(case, kernel)
        self._moved = set(strides.names(self._arguments))

    def __call__(self, *values: Any) -> None:
        moved = zip(self._arguments, values, strict=True)
        super().__call__(*(self._moved_apart(a, v) for a, v in moved))

    def _moved_apart(self, argument: Arg, value: Any) -> Any:
        """A matrix whose rows lie apart, NaNs between them, and as well aligned as they are one
        behind the other; any other value as it is.
        """
        if argument.name not in self._moved:
            return value
        rows, width = value.shape
        distance = width + min(_APART, width & -width)
        wide = value.new_full((rows, distance), float("nan"))
        wide[:, :width] = value
        return wide[:, :width]
