"""What describes an operator: its definition for the compiler, its reference in float64, how far
kernels may be off, which cases are tuned first, and where its PyTorch call is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from lntune.case import Case
from lntune.errors import unknown

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
Term = Callable[[Any, Any], Any]
"""A TE expression f(row, k)."""
Total = Callable[[Any], Any]
"""The sum of a term over k, as an expression of the row."""
RowSum = Callable[[Any, int, "Sequence[Term]", str], "list[Total]"]
"""How rows are summed: `row_sum(rows, hidden, terms, name)`; all terms are summed in one pass over
the row.

The definition says *what* is summed; the schedule says *how* (in one loop, in vector lanes, across
threads), because the order of a reduction is part of a schedule and s_tir's own rfactor loses the
tail predicate of sizes that do not divide."""


ArgRole = Literal["in", "scalar", "out", "sum"]
"""What an argument of a kernel is: a tensor that is read, a number, a tensor that is written, or a
"sum", a tensor that the kernel adds to: float32, with a row of its own for each of the blocks that
the rows are shared among.
"""


class Arg(msgspec.Struct, frozen=True):
    """One argument of a kernel. `shape` is made of "rows", "hidden", "gates" (four times hidden)
    and "blocks".
    """

    name: str
    role: ArgRole
    shape: tuple[str, ...]
    dtype: str

    def sizes(self, rows: int, hidden: int, blocks: int = 1) -> tuple[int, ...]:
        """The shape in numbers; `blocks` is Case.blocks of the case the kernel is for."""
        return tuple(
            {"rows": rows, "hidden": hidden, "gates": 4 * hidden, "blocks": blocks}[axis]
            for axis in self.shape
        )


class Tolerance(msgspec.Struct, frozen=True):
    """The tolerance of one output against float64: |error| <= times x (eager's own largest error) +
    floor x scale.

    Eager's error is measured on the same inputs, so a tolerance never asks for more than the dtype
    can give. The scale is the largest finite magnitude of the tensor or tensors `of` (inputs or
    reference outputs), at least `least`: a mean, for example, can be near 0 and still carry the
    rounding of the numbers it was summed from.
    """

    times: float
    floor: float
    of: str | tuple[str, ...]
    least: float = 0.0


STATISTICS = "stats"
"""What the variants of a forward list that keep what its backward needs."""
LAST = 3
"""The step of what nobody has given one: see Priority."""


class Priority(msgspec.Struct, frozen=True):
    """What tuned kernels of an operator are worth where time is short: steps, the smaller the
    earlier; a case's place is the sum of its steps. They are a judgement, not a measurement.

    `operator` is the operator's own step; `hidden` has those of its hidden sizes, and `rows`, by
    the kind of device, those of its numbers of rows. A size that is not there has LAST.
    """

    operator: int = LAST
    hidden: Mapping[int, int] = {}
    rows: Mapping[str, Mapping[int, int]] = {}

    def steps(self, case: Case, kind: str) -> int:
        """The sum of the steps of a case on a kind of device, but for that of its dtype."""
        return (
            self.operator
            + self.hidden.get(case.hidden, LAST)
            + self.rows.get(kind, {}).get(case.rows, LAST)
        )


@dataclass(frozen=True, eq=False)
class Op:
    """An operator: all that the rest of lntune knows of it. What it computes and what is said about
    it stand in its own file; see `ops/layer_norm.py` for the order.
    """

    name: str
    summary: str
    variants: tuple[str, ...]
    """Everything that can be compiled in beside the shape, the default first."""
    checked: tuple[str, ...]
    """The variants besides the default that PyTorch calls most; `lntune check` goes through them
    too.
    """
    arguments: Callable[[Case], tuple[Arg, ...]]
    """The kernel's arguments, in the order they are passed."""
    define: Callable[..., Any]
    """(case, row_sum, together=1) -> the TE definition: a TVM PrimFunc with symbolic rows, padded
    to a multiple of `together`.
    """
    inputs: Callable[[Case, int, str, int], dict[str, Any]]
    """(case, rows, style, seed) -> named inputs; the styles are `styles`."""
    reference: Callable[[Case, Tensors], dict[str, torch.Tensor]]
    """float64 mathematics on the given (dtype-rounded) inputs."""
    eager: Callable[[Case, Tensors], dict[str, torch.Tensor]]
    """What PyTorch gives, named like the kernel's outputs."""
    baseline: Callable[[Case, Tensors], Callable[[], Any]]
    """The eager call as a user writes it, bound to its inputs: what is timed against."""
    bytes: Callable[[Case], int]
    """Bytes that must cross the memory bus at least once."""
    flops: Callable[[Case], int]
    tolerance: Callable[[Case, str], Tolerance]
    grid: tuple[Case, ...]
    """Default cases to tune, the most valuable first."""
    binding: str
    """The module with its PyTorch call, such as "lntune.torch.layer_norm". Its function
    `bound_call(case, inputs)` is the public call bound to named inputs: what a benchmark times.
    """
    linear: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Inputs that outputs shrink with, as a gradient's do, and the inputs that have to be 0 for it:
    they are checked with denormal numbers.
    """
    saturated: Callable[[Case], Mapping[str, tuple[str, slice]]] | None = None
    """Of an operator with activations that large numbers saturate, which leaves next to nothing of
    a difference (how near eager mode comes to it is a matter of luck): of what is judged by itself
    on inputs of the style SATURATED, a name -> an output and its columns.
    """
    in_sequences: bool = False
    """Calls of it are the steps of sequences, which share what a single one costs beside its
    kernel.
    """
    version: int = 1
    """Raised when the code that kernels have from `define` changes."""
    gpu_baseline: Callable[[Case, Tensors], Callable[[], Any]] | None = None
    """`baseline` as a user of a GPU writes it, where PyTorch's CUDA kernels take other arguments
    than its CPU kernels do.
    """
    compiled: Callable[[Case, Tensors], Callable[[], Any]] | None = None
    """What torch.compile is given to compile where that is not the baseline, bound to its
    inputs.
    """
    more_cases: Mapping[str, tuple[Case, ...]] = field(default_factory=dict)
    """By the kind of device: what `lntune bringup` tunes there beyond the default grid, which is
    also a laptop's.
    """
    priority: Priority = field(default_factory=Priority)
    """Which of its cases `lntune bringup` tunes first, and how early among other operators'."""
    telling: tuple[tuple[Case, ...], ...] = ()
    """Cases that `lntune bringup` benchmarks, in rounds: the first round of every operator comes
    before the second of any.
    """
    backward: str = ""
    """The operator of its gradients, whose finals also time a step of training (see `training`);
    empty where there is none.
    """
    peers: Mapping[str, str] = field(default_factory=dict)
    """Others' kernels for GPUs that the default variant is benchmarked against: the contender's
    name -> a module with a function `bound_call`, as `binding` has it. Importing or calling it
    raises ImportError where their package is not installed.
    """

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles of inputs that its kernels are checked on."""
        return (*STYLES, *((SATURATED,) if self.saturated else ()))

    def check_variant(self, variant: str) -> str:
        """`variant`, or the default for the empty string; UnknownNameError for anything else."""
        if not variant:
            return self.variants[0]
        if variant not in self.variants:
            raise unknown(f"{self.name} variant", variant, self.variants)
        return variant

    @property
    def training(self) -> str:
        """The variant that a step of training calls whose inputs are those of the default one."""
        return f"{self.variants[0]}+{STATISTICS}"

    def called(self, variant: str) -> tuple[str, ...]:
        """The variants that PyTorch's calls take: `variant` alone, or for the empty string the
        default and those in `checked`.
        """
        return tuple(
            dict.fromkeys((self.check_variant(variant), *(() if variant else self.checked)))
        )


def same_sizes(op: str, cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases of another operator as cases of `op`: a backward has its forward's sizes."""
    return tuple(msgspec.structs.replace(case, op=op) for case in cases)


STYLES = ("normal", "shifted", "constant", "nonfinite", "tiny", "huge", "special")
"""Adversarial inputs: plain random; a mean far above sigma (1e4 and 1e-2 in float32); constant
rows; rows with Inf and NaN; values near the smallest normal number; values whose squares come near
the largest; infinities in the first and last columns, affine vectors that are large, zero and
denormal, and a sigma at which another eps shows.
"""
SATURATED = "saturated"
"""Of operators with activations: those as good as at their limits (see ops/saturation.py)."""
DEFAULT_EPS, SPECIAL_EPS = 1e-5, 1e-3
"""What is added to the variance: PyTorch's default, and in the style "special"."""


def eps_of(style: str) -> float:
    """What is added to the variance in a style of input."""
    return SPECIAL_EPS if style == "special" else DEFAULT_EPS


def drawn(*sizes: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers in float32 on the CPU, whatever PyTorch's defaults are."""
    import torch

    return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")


def styled(dtype: str, rows: int, size: int, style: str, generator: torch.Generator) -> Any:
    """A float32 matrix of rows of a style, for kernels that take it in a dtype.

    Raises:
        UnknownNameError: there is no such style.
    """
    x = drawn(rows, size, generator=generator)
    match style:
        case "normal":
            return x
        case "shifted":
            # A mean far above sigma, yet with sigma still a few units in the last place: 1e4 + 1e-2
            # would be a constant in float16.
            return x * 1e-2 + 1e4 if dtype == "float32" else x + 100
        case "constant":
            return (x[:, :1] * 100).expand(rows, size)
        case "nonfinite":
            specials = math.inf, -math.inf, math.nan
            for row in range(0, rows, 2):  # the rows between must stay untouched by neighbours
                x[row, (row * 7) % size] = specials[(row // 2) % 3]
            return x
        case "tiny":
            return x * (2.0**-20 if dtype == "float16" else 1e-37)
        case "huge":
            # Squared and summed these stay finite in float32; float16 ends at 65504.
            return x * (1e3 if dtype == "float16" else 1e15)
        case "special":
            x = x * 0.03
            x[1::4, -1], x[2::4, 0], x[3::4, -1] = math.inf, -math.inf, math.nan
            return x
    raise unknown("input style", style, STYLES)


def affine_vector(size: int, around: float, dtype: str, style: str, generator: Any) -> Any:
    """A vector around 1 or 0 to multiply or add, for a style of input, in its dtype."""
    import torch

    vector = (drawn(size, generator=generator) * 0.5 + around).to(getattr(torch, dtype))
    if style == "tiny" and not around:
        return vector * 0  # what is added to tiny numbers would be all that is seen
    if style == "special":
        special = (8.0, -6.0, 0.0, torch.finfo(vector.dtype).tiny / 4)[: size - 1]
        vector[: len(special)] = torch.tensor(special)
    return vector
