"""Whether a kernel computes the right thing: its outputs are compared with float64 mathematics, on
inputs chosen to break it.

Inputs sit between NaNs and outputs between fences, both one element off any alignment, so a read or
a write outside its buffer shows. The tolerance of each output is the operator's own
(see ops.op.Tolerance). A kernel whose blocks of threads loop over the rows is right on few of them
and may be wrong from the second step on: its backend names the numbers of rows that reach it
(Backend.more_rows).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.device import Device, current
from lntune.ops.op import STYLES, Op
from lntune.words import counted

if TYPE_CHECKING:
    import torch

FENCE = 67  # elements on each side; odd, so that what follows is aligned to one element only
ALIGNED = 64  # the same where kernels ask for whole accesses of 16 bytes, as a GPU's do
# a NaN in every dtype: an element that is never written shows, whatever belongs there
_POISON = 0xFF
ROWS = (1, 21)
"""Row counts checked: a single row; and an odd number to be shared unevenly among threads."""
KEPT_BYTES = 1 << 30
"""Bytes of problems beyond these that are kept: those of 2,117 rows of 16,384 elements take 0.8 GB
and a second or two of a CPU, and many candidates of a case are checked with the same rows.
"""


class Verdict(msgspec.Struct, frozen=True):
    """Outcome of a check. `errors`: largest error per output as a share of its tolerance (1 is the
    limit); `versus_eager`: largest error per output divided by eager's own on plain random inputs.
    `message` is empty when everything is right.
    """

    message: str
    errors: dict[str, float]
    versus_eager: dict[str, float]

    @property
    def ok(self) -> bool:
        """True when every output is within its tolerance."""
        return not self.message


class _Problem(msgspec.Struct, frozen=True):
    style: str
    rows: int
    given: dict[str, Any]
    truth: dict[str, Any]
    finite: dict[str, Any]
    tolerance: dict[str, float]  # the largest error allowed, absolute
    eager_error: dict[str, float]

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        every = [*self.given.values(), *self.truth.values(), *self.finite.values()]
        return sum(v.nbytes for v in every if hasattr(v, "nbytes"))


def _largest(values: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """The largest magnitude among finite values, or where a mask says so; 0 of none."""
    import torch

    if values.numel() and (where is None or bool(where.all())):
        # without copies, where all are finite
        largest = float(torch.linalg.vector_norm(values, math.inf))
        if math.isfinite(largest):
            return largest
    values = values[where] if where is not None else values[values.isfinite()]
    return float(values.abs().max()) if values.numel() else 0.0


def _problem(op: Op, case: Case, style: str, rows: int, seed: int, place: str = "cpu") -> _Problem:
    """Inputs, float64 truth, eager's errors and the tolerances, on PyTorch's device `place`.

    Eager is that of the CPU everywhere, so that a kernel is held to the same on every device.
    """
    import torch

    given = op.inputs(case, rows, style, seed)
    eager = {name: value.to(place) for name, value in op.eager(case, given).items()}
    given = {n: v.to(place) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    truth = op.reference(case, given)
    finite, allowed, eager_error = {}, {}, {}
    for arg in op.arguments(case):
        if arg.role not in ("out", "sum"):
            continue
        name = arg.name
        finite[name] = eager[name].isfinite()
        both = finite[name] & truth[name].isfinite()
        eager_error[name] = _largest(eager[name].double() - truth[name], both)
        tolerance = op.tolerance(case, name)
        of = (tolerance.of,) if isinstance(tolerance.of, str) else tolerance.of
        scale = max(
            tolerance.least, *(_largest({**truth, **given}[tensor].double()) for tensor in of)
        )
        allowed[name] = tolerance.times * eager_error[name] + tolerance.floor * scale
    return _Problem(style, rows, given, truth, finite, allowed, eager_error)


# cases come one after another, and a long row's problems take 200 MB
@functools.lru_cache(maxsize=2)
def _problems(op_name: str, hidden: int, dtype: str, variant: str) -> tuple[_Problem, ...]:
    """The problems that every kernel is checked on; the same for every candidate of a case."""
    op = ops.get(op_name)
    return tuple(
        _problem(op, Case(op_name, hidden, dtype, rows, variant), style, rows, seed)
        for seed, (style, rows) in enumerate(
            (s, r) for s in STYLES for r in ROWS if s == "normal" or r > 1
        )
    )


_kept: dict[tuple[str, int, str, str, int, str], _Problem] = {}


def _of_rows(case: Case, rows: int, place: str) -> _Problem:
    """A problem of so many rows, plain random, on the device; the latest ones are kept as far as
    KEPT_BYTES go.
    """
    key = (case.op, case.hidden, case.dtype, case.variant, rows, place)
    problem = _kept.pop(key, None)
    if problem is None:
        held = msgspec.structs.replace(case, rows=rows)
        problem = _problem(ops.get(case.op), held, "normal", rows, rows, place)
    _kept[key] = problem
    while len(_kept) > 1 and sum(p.bytes for p in _kept.values()) > KEPT_BYTES:
        del _kept[next(iter(_kept))]
    return problem


def forget() -> None:
    """Give back the memory of problems that are kept."""
    _kept.clear()
    _problems.cache_clear()


def fenced(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fill: float | None = None,
    fence: int = FENCE,
    place: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(view, whole): a contiguous view inside a larger buffer, `fence` elements from either end, on
    PyTorch's device `place`.

    The rest holds `fill`, or a byte pattern when it is None.
    """
    import torch

    count = math.prod(shape)
    whole = torch.empty(count + 2 * fence, dtype=dtype, device=place)
    if fill is None:
        whole.view(torch.uint8).fill_(_POISON)
    else:
        whole.fill_(fill)
    return whole[fence : fence + count].view(shape), whole


def _fence_broken(whole: torch.Tensor, fence: int) -> bool:
    import torch

    edges = torch.cat([whole[:fence], whole[-fence:]]).view(torch.uint8)
    return bool((edges != _POISON).any())


@dataclass(frozen=True)
class _Checked:
    """A kernel to be checked, and where its tensors are to be: the arguments of `verify`."""

    op: Op
    case: Case
    kernel: Callable[..., Any]
    fence: int
    place: str
    device: Device


def _run(checked: _Checked, problem: _Problem) -> tuple[dict[str, Any], str]:
    """The kernel's outputs where the problem's truth is, and what it did to memory that is not its
    own (empty: nothing).

    Sums begin with small whole numbers, a kernel's part in them is what is given.
    """
    import torch

    values: list[Any] = []
    outputs: dict[str, Any] = {}
    fences: dict[str, Any] = {}
    before: dict[str, Any] = {}
    originals: list[tuple[str, Any, Any]] = []
    case, fence, place = checked.case, checked.fence, checked.place
    for arg in checked.op.arguments(case):
        if arg.role == "scalar":
            values.append(problem.given[arg.name])
            continue
        dtype, sizes = (
            getattr(torch, arg.dtype),
            arg.sizes(problem.rows, case.hidden, case.blocks(checked.device)),
        )
        if arg.role == "in":
            view, _ = fenced(sizes, dtype, float("nan"), fence, place)
            view.copy_(problem.given[arg.name])
            originals.append((arg.name, view, view.clone()))
        else:
            view, fences[arg.name] = fenced(sizes, dtype, fence=fence, place=place)
            outputs[arg.name] = view
        if arg.role == "sum":
            view.copy_(torch.arange(view.numel()).view(sizes) % 7 - 3)
            before[arg.name] = view.clone()
        values.append(view)
    checked.kernel(*values)
    for name, held in before.items():
        outputs[name] = (outputs[name].double() - held).sum(0)
    # waits for a GPU, whose errors show here
    outputs = {name: out.to(problem.truth[name].device) for name, out in outputs.items()}
    broken = [name for name, whole in fences.items() if _fence_broken(whole, fence)]
    changed = [
        name
        for name, view, original in originals
        if not torch.equal(view.view(torch.uint8), original.view(torch.uint8))
    ]
    message = ""
    if broken:
        message = f"wrote outside {', '.join(broken)}"
    elif changed:
        message = f"changed its input {', '.join(changed)}"
    return outputs, message


def _judge(checked: _Checked, problem: _Problem) -> tuple[str, dict[str, float], dict[str, float]]:
    """Run a kernel on a problem: (what is wrong first, errors as shares of the tolerances, errors
    divided by eager's where the input is plain random).
    """
    at = f"{problem.style} inputs, {counted(problem.rows, 'row')}"
    outputs, memory = _run(checked, problem)
    message = f"{memory} ({at})" if memory else ""
    errors: dict[str, float] = {}
    versus: dict[str, float] = {}
    for name, out in outputs.items():
        finite = problem.finite[name]
        wrong_kind = int((out.isfinite() != finite).sum())
        if wrong_kind and not message:
            message = (
                f"{name}: {counted(wrong_kind, 'element')} finite where eager has none, or the"
                f" other way round ({at})"
            )
        both = finite & out.isfinite() & problem.truth[name].isfinite()
        error = _largest(out.double() - problem.truth[name], both)
        tolerance = problem.tolerance[name]
        # JSON has no infinity
        share = error / tolerance if tolerance else (0.0 if error == 0 else sys.float_info.max)
        errors[name] = share
        if share > 1 and not message:
            allowed = f"{share:.3g} times what is allowed, {tolerance:.3g}"
            message = (
                f"{name}: error {error:.3g} is {allowed} ({at}; eager's own error is"
                f" {problem.eager_error[name]:.3g})"
            )
        if problem.style == "normal" and problem.eager_error[name]:
            versus[name] = error / problem.eager_error[name]
    return message, errors, versus


def verify(
    case: Case,
    kernel: Callable[..., Any],
    fence: int = FENCE,
    place: str = "cpu",
    device: Device | None = None,
    more_rows: Sequence[int] = (),
) -> Verdict:
    """Check a kernel of `case` (any rows) on every style of input, and where that is right with
    `more_rows`, numbers of rows, on plain random input.

    `fence`: FENCE, or ALIGNED for a kernel that may ask for it. `place`: the device of PyTorch's
    that the kernel's tensors are on, "cuda:1". `device`: the lntune device the kernel is for,
    which decides how many blocks of rows keep sums; None: this machine's CPU. `more_rows` are
    what the kernel's backend says (Backend.more_rows).

    Raises:
        Exception: whatever the kernel itself raised; the caller records it as a failed run.
    """
    op = ops.get(case.op)
    device = device or current()
    case = msgspec.structs.replace(case, variant=op.check_variant(case.variant))
    checked = _Checked(op, case, kernel, fence, place, device)
    errors: dict[str, float] = {}
    versus: dict[str, float] = {}
    message = ""
    for problem in _problems(case.op, case.hidden, case.dtype, case.variant):
        said, shares, ratios = _judge(checked, problem)
        message = message or said
        errors = {name: max(errors.get(name, 0.0), share) for name, share in shares.items()}
        for name, ratio in ratios.items():
            versus[name] = max(versus.get(name, 0.0), ratio)
    for rows in more_rows:
        if message:
            break  # wrong already, and these take the longest
        problem = _of_rows(case, rows, place)
        message, shares, _ = _judge(checked, problem)
        errors = {name: max(errors.get(name, 0.0), share) for name, share in shares.items()}
    return Verdict(message, errors, versus)
