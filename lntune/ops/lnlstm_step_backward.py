"""One step of an LSTM with layer normalization, backward.

Given the gradients dh and dc_new of what the forward (ops/lnlstm_step.py, whose names these are)
made, with t = tanh(inner), the gates i, f, g, o after their activations, and xhat = (x - mean) *
rstd of whatever is normalized:

    dinner = dh o (1 - t^2)   [+ dc_new, where the normalized cell state is passed on]
    dcell  = LN'(dinner; weight_c, xhat_c)   [+ dc_new, where it is not]
    dc     = dcell f
    dz     = dcell g i (1 - i),  dcell c f (1 - f),  dcell i (1 - g^2),  dh t o (1 - o)
    dgates_h = LN'(dz; weight_h, xhat_h)
    dgates_x = dz, or LN'(dz; weight_x, xhat_x) where gates_x was raw

    LN'(d; weight, xhat)[k] = rstd (d[k] weight[k] - mean(d weight) - xhat[k] mean(d weight xhat))

and, summed over rows, dweight_* = d xhat and dbias_* = d of their layer norm. Ba, Kiros, Hinton:
*Layer Normalization*, 2016, arXiv:1607.06450, supplement, eqs. 20-22, differentiated.

The gates and the cell are computed again from the forward's inputs and statistics, in less time
than memory would take to keep them. The gradients of the gains and biases are *added* to float32
sums that the caller keeps over all time steps, a row of its own for each block of rows; adding
these rows up, once, is left to the caller. The same calls give the same bits.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import device
from lntune.case import DTYPES, Case
from lntune.ops import lnlstm_step, models, saturation
from lntune.ops.activations import sigmoid, tanh
from lntune.ops.dtypes import sum_of, widen
from lntune.ops.lnlstm_step import DEFAULT_VARIANT, statistics, tokens_of, variant
from lntune.ops.op import (
    DEFAULT_EPS,
    SATURATED,
    Arg,
    Op,
    RowSum,
    Tensors,
    Tolerance,
    drawn,
    same_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

NAME = "lnlstm_step_backward"
_I, _F, _G = range(3)
"""Parts of the gates, in their order; o is the rest."""
VARIANTS = (
    DEFAULT_VARIANT,
    *sorted(
        {variant(*chosen) for chosen in itertools.product((False, True), repeat=4)}
        - {DEFAULT_VARIANT}
    ),
)
"""Those of the forward, of which no statistics need to be asked."""


def sums(tokens: Sequence[str]) -> dict[str, str]:
    """The gradients that are summed over rows, and whether they have the size of "gates" or
    "hidden".
    """
    present = {
        "dweight_x": "raw" in tokens,
        "dweight_h": True,
        "dweight_c": True,
        "dbias": "bias" in tokens,
        "dbias_c": "bias_c" in tokens,
    }
    return {name: "hidden" if name.endswith("_c") else "gates" for name in present if present[name]}


def arguments(case: Case) -> tuple[Arg, ...]:
    """dh, dc_new, the forward's inputs without eps, its statistics, dgates_x, dgates_h, dc and the
    sums; all in the dtype of the case but statistics and sums, which are float32.
    """
    tokens = tokens_of(case)
    gates, state = ("rows", "gates"), ("rows", "hidden")
    return (
        Arg("dh", "in", state, case.dtype),
        Arg("dc_new", "in", state, case.dtype),
        *(a for a in lnlstm_step.arguments(_forward(case)) if a.role == "in"),
        *(Arg(name, "in", ("rows",), "float32") for name in statistics(tokens)),
        Arg("dgates_x", "out", gates, case.dtype),
        Arg("dgates_h", "out", gates, case.dtype),
        Arg("dc", "out", state, case.dtype),
        *(Arg(name, "sum", ("blocks", size), "float32") for name, size in sums(tokens).items()),
    )


def _forward(case: Case) -> Case:
    return Case(
        lnlstm_step.NAME, case.hidden, case.dtype, case.rows, case.variant or DEFAULT_VARIANT
    )


@dataclass(frozen=True)
class _Rows:
    """The kernel's inputs and stages over its rows, shared among `blocks` blocks that work on
    groups of `together` rows.

    A block's groups are `contiguous`, or it takes every `blocks`-th one (a strided loop over rows).
    Stages have their rows padded to as many groups for each block, the last row repeated.
    """

    case: Case
    together: int
    blocks: int
    contiguous: bool

    @functools.cached_property
    def count(self) -> Any:
        """The rows there are."""
        from tvm import te

        return te.var("rows", "int64")

    @property
    def stride(self) -> int:
        """Rows that all blocks together take in one step of their loops."""
        return self.blocks * self.together

    @property
    def steps(self) -> Any:
        """Steps of a block's loop over its groups of rows."""
        if self.stride == 1:
            return self.count
        return (self.count + _i64(self.stride - 1)) // _i64(self.stride)

    @property
    def padded(self) -> Any:
        """The rows of a stage."""
        return self.steps * _i64(self.stride) if self.stride > 1 else self.count

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        """The inputs."""
        from tvm import te

        sizes = {
            "rows": self.count,
            "hidden": _i64(self.case.hidden),
            "gates": _i64(4 * self.case.hidden),
        }
        return {
            a.name: te.placeholder(tuple(sizes[axis] for axis in a.shape), a.dtype, name=a.name)
            for a in arguments(self.case)
            if a.role == "in"
        }

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """An input in float32: a vector at k, a statistic at a row, a matrix at both."""
        from tvm import tirx

        arg = self.args[name]

        def at(*index: Any) -> Any:
            if self.stride > 1 and arg.shape[0].same_as(self.count):
                index = (tirx.min(index[0], self.count - 1), *index[1:])
            return widen(arg[index])

        return at

    def xhat(self, name: str) -> Callable[[Any, Any], Any]:
        """gates_x or gates_h, normalized."""
        return lambda i, k: (
            (self[f"gates_{name}"](i, k) - self[f"mean_{name}"](i)) * self[f"rstd_{name}"](i)
        )

    def stage(self, name: str, size: int, value: Callable[..., Any]) -> Any:
        """A float32 stage of size x hidden elements a row, or of one number a row for size 0."""
        from tvm import te

        return te.compute(
            (self.padded, _i64(size * self.case.hidden)) if size else (self.padded,),
            value,
            name=name,
        )

    def output(self, name: str, value: Callable[[Any, Any], Any]) -> Any:
        """An output, rounded once."""
        from tvm import te

        (size,) = (
            _i64(a.sizes(1, self.case.hidden)[1]) for a in arguments(self.case) if a.name == name
        )
        return te.compute(
            (self.count, size), lambda i, k: value(i, k).astype(self.case.dtype), name=name
        )

    def sums(
        self, stage: str, size: str, values: dict[str, Callable[[Any, Any], Any]]
    ) -> dict[str, Any]:
        """Sums over the rows of each block, all in one stage, so that none comes between the
        others' terms.
        """
        from tvm import te, tirx

        t, side = (
            te.reduce_axis((0, self.steps), name="step"),
            te.reduce_axis((0, _i64(self.together)), name="side"),
        )
        add = sum_of(len(values))

        def total(b: Any, k: Any) -> Any:
            group = b * self.steps + t if self.contiguous else t * _i64(self.blocks) + b
            i = group * _i64(self.together) + side
            terms = tuple(value(i, k) for value in values.values())
            if self.stride > 1:
                terms = tuple(
                    tirx.Select(i < self.count, term, tirx.const(0.0, "float32")) for term in terms
                )
            return add(terms if len(terms) > 1 else terms[0], axis=[t, side])

        totals = te.compute(
            (_i64(self.blocks), _i64((4 if size == "gates" else 1) * self.case.hidden)),
            total,
            name=stage,
        )
        return dict(zip(values, totals if len(values) > 1 else [totals], strict=True))


def _i64(value: int) -> Any:
    from tvm import tirx

    return tirx.IntImm("int64", value)


def define(
    case: Case, row_sum: RowSum, together: int = 1, blocks: int = 1, contiguous: bool = False
) -> Any:
    """The TE definition for schedules that share the rows among `blocks` blocks, which work on
    groups of `together` rows.

    A block's groups are `contiguous`, or it takes every `blocks`-th one (a strided loop over rows).
    Stages, in order: z, act (the gates after their activations), xhat_c, inner, tanh_inner, dinner,
    the sums of the cell's row (cell...), dcell, dz, the sums of the gates' row (gates...), the
    outputs, and the sums over rows "sums_gates" and "sums_hidden", which take zeros for rows that
    are padding.
    """
    from tvm import te, tirx

    n, tokens, one = case.hidden, tokens_of(case), tirx.const(1.0, "float32")
    rows = _Rows(case, together, blocks, contiguous)
    act, xhat_c, t = _forward_stages(rows, tokens)

    def gate(number: int, i: Any, k: Any) -> Any:
        return act[i, k + _i64(number * n)]

    def normed(d: Any, name: str, xhat: Any, means: Any) -> Any:
        """LN' at (i, k)."""
        return lambda i, k: (
            rows[f"rstd_{name}"](i)
            * (d(i, k) * rows[f"weight_{name}"](k) - means[0][i] - xhat(i, k) * means[1][i])
        )

    def terms_of(d: Any, name: str, xhat: Any) -> tuple[Any, Any]:
        weight = rows[f"weight_{name}"]
        return lambda i, k: d(i, k) * weight(k), lambda i, k: d(i, k) * weight(k) * xhat(i, k)

    def means_of(terms: Any, size: int, name: str) -> list[Any]:
        scale = tirx.const(float(size), "float32")

        def mean(total: Any, j: int) -> Any:
            return rows.stage(f"{name}{j}_mean", 0, lambda i: total(i) / scale)

        return [mean(total, j) for j, total in enumerate(row_sum(rows.padded, size, terms, name))]

    # Through the output and the cell's layer norm.
    def output(i: Any, k: Any) -> Any:
        value = rows["dh"](i, k) * gate(3, i, k) * (one - t[i, k] * t[i, k])
        return value + rows["dc_new"](i, k) if "carried" in tokens else value

    dinner = rows.stage("dinner", 1, output)
    cell = (lambda i, k: dinner[i, k], "c", lambda i, k: xhat_c[i, k])
    into_cell = normed(*cell, means_of(terms_of(*cell), n, "cell"))
    dcell = rows.stage(
        "dcell",
        1,
        into_cell if "carried" in tokens else lambda i, k: into_cell(i, k) + rows["dc_new"](i, k),
    )

    # Through the cell and the gates.
    def of_gate(i: Any, k: Any) -> Any:
        """dz; which of the four expressions is known once k's loop is cut at the gates."""
        number, k = tirx.floordiv(k, _i64(n)), tirx.floormod(k, _i64(n))
        gi, gf, gg, go = (gate(j, i, k) for j in range(4))
        of_i, of_f = (
            dcell[i, k] * gg * (gi * (one - gi)),
            dcell[i, k] * rows["c"](i, k) * (gf * (one - gf)),
        )
        of_g, of_o = (
            dcell[i, k] * gi * (one - gg * gg),
            rows["dh"](i, k) * t[i, k] * (go * (one - go)),
        )
        return tirx.Select(
            number == _I,
            of_i,
            tirx.Select(number == _F, of_f, tirx.Select(number == _G, of_g, of_o)),
        )

    dz = rows.stage("dz", 4, of_gate)
    gates = {
        name: (lambda i, k: dz[i, k], name, rows.xhat(name))
        for name in (("x", "h") if "raw" in tokens else ("h",))
    }
    means = means_of([t for terms in gates.values() for t in terms_of(*terms)], 4 * n, "gates")
    gradients: dict[str, Any] = {
        f"dgates_{name}": normed(*terms, means[2 * j : 2 * j + 2])
        for j, (name, terms) in enumerate(gates.items())
    }
    gradients.setdefault("dgates_x", lambda i, k: dz[i, k])
    gradients["dc"] = lambda i, k: dcell[i, k] * gate(1, i, k)
    named = {**rows.args, **{name: rows.output(name, value) for name, value in gradients.items()}}

    # Over rows.
    values = {
        "dweight_x": lambda i, k: dz[i, k] * rows.xhat("x")(i, k),
        "dweight_h": lambda i, k: dz[i, k] * rows.xhat("h")(i, k),
        "dbias": lambda i, k: dz[i, k],
        "dweight_c": lambda i, k: dinner[i, k] * xhat_c[i, k],
        "dbias_c": lambda i, k: dinner[i, k],
    }
    for size in ("gates", "hidden"):
        named |= rows.sums(
            f"sums_{size}",
            size,
            {name: values[name] for name, axis in sums(tokens).items() if axis == size},
        )
    return te.create_prim_func([named[a.name] for a in arguments(case)])


def _forward_stages(rows: _Rows, tokens: Sequence[str]) -> tuple[Any, Any, Any]:
    """What the forward computed: the gates after their activations, the normalized cell, tanh of
    inner.
    """
    from tvm import tirx

    n = rows.case.hidden

    def sum_of_gates(i: Any, k: Any) -> Any:
        from_x = (
            rows.xhat("x")(i, k) * rows["weight_x"](k) if "raw" in tokens else rows["gates_x"](i, k)
        )
        value = rows.xhat("h")(i, k) * rows["weight_h"](k) + from_x
        return value + rows["bias"](k) if "bias" in tokens else value

    z = rows.stage("z", 4, sum_of_gates)
    act = rows.stage(
        "act",
        4,
        lambda i, k: tirx.Select(tirx.floordiv(k, _i64(n)) == _G, tanh(z[i, k]), sigmoid(z[i, k])),
    )

    def normalized(i: Any, k: Any) -> Any:
        gi, gf, gg = (act[i, k + _i64(j * n)] for j in range(3))
        return (gf * rows["c"](i, k) + gi * gg - rows["mean_c"](i)) * rows["rstd_c"](i)

    xhat_c = rows.stage("xhat_c", 1, normalized)

    def affine(i: Any, k: Any) -> Any:
        value = xhat_c[i, k] * rows["weight_c"](k)
        return value + rows["bias_c"](k) if "bias_c" in tokens else value

    inner = rows.stage("inner", 1, affine)
    return act, xhat_c, rows.stage("tanh_inner", 1, lambda i, k: tanh(inner[i, k]))


def inputs(case: Case, rows: int, style: str, seed: int) -> dict[str, Any]:
    """The forward's inputs of that style, dh and dc_new plain random (of saturated gates those that
    show them), the statistics its reference gives, in float32; sums of 0.
    """
    import torch

    forward = _with_statistics(case)
    forward_inputs = lnlstm_step.inputs(forward, rows, style, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    values = {
        **forward_inputs,
        **{name: t.float() for name, t in lnlstm_step.reference(forward, forward_inputs).items()},
    }
    if style == SATURATED:
        values |= saturation.cotangents(case, rows, values["weight_c"], seed)
    for arg in arguments(case):
        if arg.name in ("dh", "dc_new") and arg.name not in values:
            values[arg.name] = drawn(rows, case.hidden, generator=generator).to(
                getattr(torch, case.dtype)
            )
        elif arg.role == "sum":
            values[arg.name] = torch.zeros(
                arg.sizes(rows, case.hidden, case.blocks(device.current())), dtype=torch.float32
            )
    return {a.name: values[a.name] for a in arguments(case) if a.role != "out"}


def _with_statistics(case: Case) -> Case:
    return Case(
        lnlstm_step.NAME,
        case.hidden,
        case.dtype,
        case.rows,
        "+".join([*(t for t in tokens_of(case) if t != "plain"), "stats"]),
    )


def formula(tokens: Sequence[str], given: Tensors) -> dict[str, torch.Tensor]:
    """The equations above in PyTorch's operators, in the dtype of `given`; the sums as one row
    each, (gates,) or (hidden,).
    """
    import torch

    normalized = ("x", "h") if "raw" in tokens else ("h",)
    xhat = {
        name: (
            (given[f"gates_{name}"] - given[f"mean_{name}"][:, None])
            * given[f"rstd_{name}"][:, None]
        )
        for name in normalized
    }
    z = xhat["h"] * given["weight_h"] + (
        xhat["x"] * given["weight_x"] if "raw" in tokens else given["gates_x"]
    )
    z = z + given["bias"] if "bias" in tokens else z
    i, f, g, o = (
        act(part)
        for act, part in zip(
            (torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid), z.chunk(4, -1), strict=True
        )
    )
    xhat["c"] = (f * given["c"] + i * g - given["mean_c"][:, None]) * given["rstd_c"][:, None]
    inner = xhat["c"] * given["weight_c"]
    t = torch.tanh(inner + given["bias_c"] if "bias_c" in tokens else inner)

    def norm(d: torch.Tensor, name: str) -> torch.Tensor:
        weighted = d * given[f"weight_{name}"]
        means = weighted.mean(-1, keepdim=True), (weighted * xhat[name]).mean(-1, keepdim=True)
        return given[f"rstd_{name}"][:, None] * (weighted - means[0] - xhat[name] * means[1])

    dinner = given["dh"] * o * (1 - t * t)
    dinner = dinner + given["dc_new"] if "carried" in tokens else dinner
    dcell = norm(dinner, "c")
    dcell = dcell if "carried" in tokens else dcell + given["dc_new"]
    parts = (
        dcell * g * (i * (1 - i)),
        dcell * given["c"] * (f * (1 - f)),
        dcell * i * (1 - g * g),
        given["dh"] * t * (o * (1 - o)),
    )
    dz = torch.cat(parts, -1)
    gradients = {
        "dgates_x": norm(dz, "x") if "raw" in tokens else dz,
        "dgates_h": norm(dz, "h"),
        "dc": dcell * f,
    }
    gradients |= {
        f"dweight_{name}": ((dinner if name == "c" else dz) * xhat[name]).sum(0) for name in xhat
    }
    gradients |= {"dbias": dz.sum(0), "dbias_c": dinner.sum(0)}
    return {name: gradients[name] for name in ("dgates_x", "dgates_h", "dc", *sums(tokens))}


def reference(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """All gradients in float64, given the statistics; the sums as one row each."""
    return formula(
        tokens_of(case), {name: t.double() for name, t in given.items() if hasattr(t, "double")}
    )


def eager(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """The equations in float32, rounded to their dtypes at the end: nearer to float64 than eager
    mode in low precision comes.
    """
    import torch

    gradients = formula(
        tokens_of(case), {name: t.float() for name, t in given.items() if hasattr(t, "float")}
    )
    return {
        a.name: gradients[a.name].to(getattr(torch, a.dtype))
        for a in arguments(case)
        if a.role in ("out", "sum")
    }


def baseline(case: Case, given: Tensors) -> Callable[[], Any]:
    """PyTorch's autograd through the forward's formula, recorded once: what eager mode does at
    every time step.
    """
    import torch

    names = [a.name for a in arguments(case) if a.role == "in" and a.name in lnlstm_step.TENSORS]
    with torch.inference_mode(False), torch.enable_grad():
        leaves: dict[str, Any] = {
            name: given[name].detach().clone().requires_grad_() for name in names
        }
        every: dict[str, Any] = {name: leaves.get(name) for name in lnlstm_step.TENSORS}
        outputs = lnlstm_step.formula(
            **every, eps=DEFAULT_EPS, carried="carried" in tokens_of(case)
        )
        grads = tuple(given[name].clone() for name in ("dh", "dc_new"))

    def backward() -> Any:
        with torch.inference_mode(False):
            return torch.autograd.grad(outputs, tuple(leaves.values()), grads, retain_graph=True)

    return backward


def compiled(case: Case, given: Tensors) -> Callable[[], Any]:
    """The equations, for torch.compile: a graph of its own, without the autograd engine around
    it.
    """
    tokens = tuple(tokens_of(case))
    return lambda: formula(tokens, given)


def moved_bytes(case: Case) -> int:
    """All matrices of rows once, and the sums, which are read and written."""
    total = 0
    for a in arguments(case):
        sizes = a.sizes(case.rows, case.hidden)
        total += (
            (2 if a.role == "sum" else 1)
            * DTYPES[a.dtype]
            * sizes[0]
            * (sizes[1] if len(sizes) > 1 else 1)
        )
    return total


def flops(case: Case) -> int:
    """For each element of the gates 4 for z, 8 for dz, 11 for its layer norm and 3 for the sums;
    for each of the cell 22 and five exp at 20.
    """
    return (4 * 26 + 22 + 5 * 20) * case.rows * case.hidden


def tolerance(case: Case, output: str) -> Tolerance:
    """Twice the error of the same equations in float32, plus a floor.

    The floor: one rounding of a low-precision gradient, or 16 of float32 for sums taken in another
    order and for the activations' polynomials, at the scale of the gradient itself and of rstd_c,
    by which the cell's layer norm multiplies what is left when a row's mean is taken off. The sums
    over rows are at least of the scale of what they begin with. In rows of a few elements next to
    nothing is left, both layer norms multiply it by up to 1 / sqrt(eps), and two computations are
    as far apart as either is from the truth.
    """
    rounding = {"float32": 16 * 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    summed = output in sums(tokens_of(case))
    times = 2.0 if case.hidden >= 8 else 8.0  # noqa: PLR2004
    return Tolerance(
        times,
        rounding["float32" if summed else case.dtype],
        of=(output, "rstd_c"),
        least=4.0 if summed else 0.0,
    )


def saturated(case: Case) -> dict[str, tuple[str, slice]]:
    """What is judged by itself where gates are saturated: each column's own derivatives, which dz
    is where gates_x came normalized, and always a sum over rows that has them.
    """
    of_gates = ["dweight_h"] if "raw" in tokens_of(case) else ["dweight_h", "dgates_x"]
    return saturation.parts(case, of_gates, ["dweight_c"], {"f": "dc"})


GRID = tuple(
    Case(NAME, hidden, dtype, rows)
    for hidden in models.CELLS
    for dtype in ("float32", "bfloat16")
    for rows in (32, 1, 128)
)

OP = Op(
    name=NAME,
    summary="one step of an LSTM with layer normalization, backward",
    variants=VARIANTS,
    checked=("raw+bias+bias_c", "bias+bias_c+carried"),
    arguments=arguments,
    define=define,
    inputs=inputs,
    reference=reference,
    eager=eager,
    baseline=baseline,
    compiled=compiled,
    bytes=moved_bytes,
    flops=flops,
    tolerance=tolerance,
    saturated=saturated,
    in_sequences=True,
    linear={"dh": ("dc_new",), "dc_new": ("dh",)},
    grid=GRID,
    binding="lntune.torch.lnlstm_backward",
    more_cases={"gpu": same_sizes(NAME, lnlstm_step.GPU_CASES)},
    priority=msgspec.structs.replace(lnlstm_step.PRIORITY, operator=3),
    telling=tuple(same_sizes(NAME, cases) for cases in lnlstm_step.TELLING),
)
