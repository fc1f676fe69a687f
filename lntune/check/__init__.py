"""Whether a kernel computes the right thing: its outputs are compared with float64 mathematics, on
inputs chosen to break it.

Tensors lie between guards, inputs between NaNs or large numbers, aligned in some problems and one
element off any alignment in others, so a read or a write outside a buffer shows. The tolerance of
each output is the operator's own (see ops.op.Tolerance). A kernel may be right on few rows and
wrong on others, or from the second step of a loop on: its backend names the numbers of rows that
reach it (Backend.more_rows). What serves calls is also checked `thoroughly`: on one thread, call
after call, and for what it leaves behind in the process (`lntune/check/traces.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.check import beside_eager, judging, places, problems, rows, surroundings, traces, values
from lntune.check.beside_eager import compare_with_eager
from lntune.check.memory import ALIGNED, FENCE, guarded
from lntune.check.problems import KEPT_BYTES, ROWS, SEVERAL, Problem
from lntune.check.stage import Subject
from lntune.device import Device, current
from lntune.ops.op import Arg, Op

if TYPE_CHECKING:
    from lntune.check.memory import Guarded

__all__ = [
    "ALIGNED",
    "FENCE",
    "KEPT_BYTES",
    "ROWS",
    "SEVERAL",
    "Verdict",
    "compare_with_eager",
    "forget",
    "guarded",
    "verify",
]

LARGE = 1e4
"""Around inputs in every other problem: what is read there and is a NaN may be lost in a maximum,
what is large shows in every sum.
"""
HALF_ALIGNED = 16
"""Bytes behind a boundary at which a tensor is aligned for some accesses and not for wider ones, as
one is that begins with a later row of another.
"""
HARD = ("shifted", "special")
"""Styles that a thorough check has of many rows, too, for which a schedule may have other code than
for few: means far above sigma; infinities, NaNs, another eps, weights large, zero and denormal.
"""
CALLS, MOST_CALLS, CALLED = 12, 200, 1 << 26
"""Calls of a thorough check, whose outputs have to be the same: the fewest, the most, and of how
many bytes in all there are more than the fewest.
"""


def forget() -> None:
    """Give back the memory of problems that are kept."""
    problems.forget()
    beside_eager.forget()


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


@dataclass(frozen=True)
class _Checked:
    """A kernel to be checked, and where its tensors are to be: the arguments of `verify`."""

    op: Op
    case: Case
    kernel: Callable[..., Any]
    fence: int
    place: str
    device: Device
    growth: traces.Growth = field(default_factory=traces.Growth)
    flushed: bool = field(default_factory=traces.flushes)
    rounds_otherwise: bool = field(default_factory=traces.rounds_otherwise)
    before: traces.State = field(default_factory=traces.state)


def _fence(checked: _Checked, number: int, arg: Arg, first: bool) -> int:
    """How many elements behind a boundary an argument of a problem lies: all ways of being aligned
    come in turn, where a kernel has to take them. In every other four problems what is aligned is
    so to 16 bytes alone, and the `first` input otherwise than the others.
    """
    off = number % 4 in ((0, 1) if arg.role == "in" else (0, 2))
    other = checked.fence == FENCE and number // 4 % 2 == 1
    if other and arg.role == "in" and not first:
        off = not off
    if off:
        return checked.fence
    return ALIGNED + (HALF_ALIGNED // (4 if arg.dtype == "float32" else 2) if other else 0)


def _arguments(
    checked: _Checked, problem: Problem, number: int
) -> tuple[list[Any], dict[str, Guarded]]:
    """A kernel's arguments in order, and its tensors by name. Sums begin with small whole
    numbers, or with 0 where what is added to them is judged to its last digits.
    """
    import torch

    fill = float("nan") if number % 2 == 0 else LARGE
    values: list[Any] = []
    tensors: dict[str, Guarded] = {}
    for arg in checked.op.arguments(checked.case):
        if arg.role == "scalar":
            values.append(problem.given[arg.name])
            continue
        dtype, sizes = (
            getattr(torch, arg.dtype),
            arg.sizes(problem.rows, checked.case.hidden, checked.case.blocks(checked.device)),
        )
        fence = _fence(checked, number, arg, first=not values)
        if arg.role == "in":
            tensor = guarded(sizes, dtype, fill, fence, checked.place)
            tensor.view.copy_(problem.given[arg.name])
        else:
            tensor = guarded(sizes, dtype, None, fence, checked.place)
        if arg.role == "sum":
            begun = torch.arange(tensor.view.numel()).view(sizes) % 7 - 3
            tensor.view.copy_(begun * (not problem.parts))
        tensors[arg.name] = tensor
        values.append(tensor.view)
    return values, tensors


def _run(checked: _Checked, problem: Problem, number: int) -> tuple[dict[str, Any], str]:
    """The kernel's outputs where the problem's truth is, and what it did to memory that is not its
    own (empty: nothing). Of a sum the kernel's part is what is given.
    """
    import torch

    values, tensors = _arguments(checked, problem, number)
    roles = {a.name: a.role for a in checked.op.arguments(checked.case)}
    before = {n: t.view.clone() for n, t in tensors.items() if roles[n] in ("in", "sum")}
    kept = ""
    if all(tensor.view.is_cpu for tensor in tensors.values()):
        kept = checked.growth.call(checked.kernel, *values)
    else:  # the first launch makes all of the GPU's context
        checked.kernel(*values)
    outputs: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if roles[name] == "sum":
            outputs[name] = (tensor.view.double() - before[name]).sum(0)
        elif roles[name] == "out":
            outputs[name] = tensor.view
    # waits for a GPU, whose errors show here
    where = next(iter(problem.truth.values())).device
    outputs = {name: out.to(where) for name, out in outputs.items()}
    if kept:
        return outputs, kept
    if broken := [name for name, tensor in tensors.items() if tensor.broken]:
        return outputs, f"wrote outside {', '.join(broken)}"
    changed = [
        name
        for name, held in before.items()
        if roles[name] == "in"
        and not torch.equal(tensors[name].view.view(torch.uint8), held.view(torch.uint8))
    ]
    return outputs, f"changed its input {', '.join(changed)}" if changed else ""


def _judge(
    checked: _Checked, problem: Problem, number: int
) -> tuple[str, dict[str, float], dict[str, float]]:
    """Run a kernel on a problem: (what is wrong first, errors as shares of the tolerances, errors
    divided by eager's where the input is plain random). `number`: which of the ways its tensors
    lie.
    """
    outputs, memory = _run(checked, problem, number)
    message, errors, versus = judging.judge(outputs, problem)
    return f"{memory} ({judging.at(problem)})" if memory else message, errors, versus


def verify(
    case: Case,
    kernel: Callable[..., Any],
    fence: int = FENCE,
    place: str = "cpu",
    device: Device | None = None,
    more_rows: Sequence[int] = (),
    thoroughly: bool = False,
    every_row: int = 0,
    in_process: bool = False,
    plainly: bool = False,
) -> Verdict:
    """Check a kernel of `case` (any rows) on every style of input, and where that is right with
    `more_rows`, numbers of rows, on plain random input. `thoroughly`: also on many rows of the
    styles in HARD, on special values in each input alone, with each tensor aligned otherwise than
    the others, and with every number of rows up to `every_row`; `in_process`, for kernels that this
    process runs itself: also on one thread, call after call, and for what they leave changed.
    `plainly`: of all styles on plain random input alone.

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
    around = surroundings.seen() if in_process else None
    errors: dict[str, float] = {}
    versus: dict[str, float] = {}
    message = ""
    styles = problems.of_styles(case.op, case.hidden, case.dtype, case.variant)
    for number, problem in enumerate(styles):
        if plainly and problem.style != "normal":
            continue
        said, shares, ratios = _judge(checked, problem, number)
        message = message or said
        if said.startswith(traces.KEEPS):
            break
        errors |= {name: max(errors.get(name, 0.0), share) for name, share in shares.items()}
        for name, ratio in ratios.items():
            versus[name] = max(versus.get(name, 0.0), ratio)
    for number, count in enumerate(more_rows):
        if message:
            break  # wrong already, and these take the longest
        problem = problems.of_rows(case, count, place)
        message, shares, _ = _judge(checked, problem, number)
        errors = {name: max(errors.get(name, 0.0), share) for name, share in shares.items()}
    if thoroughly and more_rows:
        many = min((n for n in more_rows if n > SEVERAL), default=max(more_rows))
        for number, style in enumerate(HARD):
            if not message:
                problem = problems.of_rows(case, many, place, style)
                message, _, _ = _judge(checked, problem, number)
    if around is not None:  # and once more at the end
        message = message or _left(checked, around)
    if thoroughly and not message:
        message = _more(checked, every_row)
    if in_process and not message:
        message = _again(checked)
    if around is not None:
        message = message or _left(checked, around)
        if surroundings.changed(around, surroundings.seen()):
            surroundings.restore(around)
    if not checked.flushed and traces.restored_denormals():
        message = "left the processor flushing denormal numbers to zero"
    if not checked.rounds_otherwise and traces.rounds_otherwise():
        message = "left the processor rounding otherwise than to the nearest number"
        surroundings.round_to_nearest()
    return Verdict(message, errors, versus)


def _left(checked: _Checked, around: dict[str, Any]) -> str:
    """What a process is left with that was otherwise before; empty where nothing is."""
    if said := surroundings.changed(around, surroundings.seen()):
        return said
    now = traces.state()
    if said := traces.left(checked.before, now):
        return said
    return "left a thread running" if now.threads > checked.before.threads else ""


def _more(checked: _Checked, every_row: int) -> str:
    """What else is looked at in a thorough check, and is wrong: special values in each input,
    every number of rows, every alignment of each tensor.
    """
    c = checked
    subject = Subject(c.case, c.kernel, c.fence, c.place, c.device)
    message = places.wrong(subject) or values.wrong(subject)
    if not message and every_row:
        message = rows.wrong(subject, every_row)
    return message


def _again(checked: _Checked) -> str:
    """What is wrong with a kernel on one thread, or when it is called again and again."""
    import torch

    case = checked.case
    problem = problems.of_rows(case, SEVERAL, checked.place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        message, _, _ = _judge(checked, problem, 0)
    finally:
        torch.set_num_threads(threads)
    if message:
        return f"{message} on one thread"
    roles = {a.name: a.role for a in checked.op.arguments(case)}
    first: dict[str, Any] = {}
    numbers = itertools.count(1)

    def call() -> str:
        """One call, whose outputs hold other numbers before: what is added to them shows."""
        values, tensors = _arguments(checked, problem, 1)
        outputs = {n: t.view for n, t in tensors.items() if roles[n] in ("out", "sum")}
        number = next(numbers)
        for name, out in outputs.items():
            if roles[name] == "out":
                out.fill_(float(number))
        checked.kernel(*values)
        for name, out in outputs.items():
            same = first.setdefault(name, out)
            if not torch.equal(same.view(torch.uint8), out.view(torch.uint8)):
                return f"{name}: another result when it is called again with the same inputs"
        return ""

    calls = min(MOST_CALLS, max(CALLS, CALLED // problem.bytes))
    return traces.watch(call, calls, checked.before)
