"""One step of an LSTM with layer normalization, backward.

Given the gradients dh and dc_new of what the forward (ops/lnlstm_step.py, whose names these are) made, with t = tanh(inner), the
gates i, f, g, o after their activations, and xhat = (x - mean) * rstd of whatever is normalized:

    dinner = dh o (1 - t^2)   [+ dc_new, where the cell is carried normalized]
    dcell  = LN'(dinner; weight_c, xhat_c)   [+ dc_new, where it is not]
    dc     = dcell f
    dz     = dcell g i (1 - i),  dcell c f (1 - f),  dcell i (1 - g^2),  dh t o (1 - o)
    dgates_h = LN'(dz; weight_h, xhat_h)     dgates_x = dz, or LN'(dz; weight_x, xhat_x) where gates_x was raw

    LN'(d; weight, xhat)[k] = rstd (d[k] weight[k] - mean(d weight) - xhat[k] mean(d weight xhat))

and, summed over rows, dweight_* = d xhat and dbias_* = d of their layer norm. Ba, Kiros, Hinton: *Layer Normalization*, 2016,
arXiv:1607.06450, supplement, eqs. 20-22, differentiated.

The gates and the cell are made again from the forward's inputs and statistics, in less time than memory would take to keep them.
The gradients of the gains and biases are *added* to float32 sums that the caller keeps over all time steps, a row of its own for
each block of rows; adding these rows up, once, is left to the caller. The same calls give the same bits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lntune import device
from lntune.case import DTYPES, Case
from lntune.ops import lnlstm_step
from lntune.ops.activations import sigmoid, tanh
from lntune.ops.dtypes import sum_of, widen
from lntune.ops.lnlstm_step import DEFAULT_VARIANT, statistics, tokens_of, variant
from lntune.ops.op import Arg, Op, RowSum, Tensors, Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NAME = "lnlstm_step_backward"
VARIANTS = (DEFAULT_VARIANT, *sorted({variant(*there) for there in itertools.product((False, True), repeat=4)} - {DEFAULT_VARIANT}))
"""Those of the forward, of which no statistics need to be asked."""


def sums(tokens: tuple[str, ...] | list[str]) -> dict[str, str]:
    """The gradients that are summed over rows, and whether they have the size of "gates" or "hidden"."""
    there = {"dweight_x": "raw" in tokens, "dweight_h": True, "dweight_c": True, "dbias": "bias" in tokens, "dbias_c": "bias_c" in tokens}
    return {name: "hidden" if name.endswith("_c") else "gates" for name in there if there[name]}


def arguments(case: Case) -> tuple[Arg, ...]:
    """dh, dc_new, the forward's inputs without eps, its statistics, dgates_x, dgates_h, dc and the sums; all in the dtype of the case
    but statistics and sums, which are float32.
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
    return Case(lnlstm_step.NAME, case.hidden, case.dtype, case.rows, case.variant or DEFAULT_VARIANT)


def define(case: Case, row_sum: RowSum, together: int = 1, blocks: int = 1) -> Any:
    """The TE definition for schedules that share the rows among `blocks` blocks, which take turns of `together` rows.

    Stages, in order: z, act (the gates after their activations), xhat_c, inner, tanh_inner, dinner, the sums of the cell's row
    (cell_...), dcell, dz, the sums of the gates' row (gates_...), the outputs, and the sums over rows "sums_gates" and "sums_hidden". All
    but the three outputs have their rows padded to a multiple of blocks x together, the last row repeated; the sums over rows take
    zeros for those.
    """
    from tvm import te, tirx

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    f32, n, turn, tokens = "float32", case.hidden, blocks * together, tokens_of(case)
    one = tirx.const(1.0, f32)
    rows = te.var("rows", "int64")
    turns = (rows + i64(turn - 1)) // i64(turn) if turn > 1 else rows
    padded = turns * i64(turn) if turn > 1 else rows
    sizes = {"rows": rows, "hidden": i64(n), "gates": i64(4 * n)}
    args: dict[str, Any] = {
        a.name: te.placeholder(tuple(sizes[axis] for axis in a.shape), a.dtype, name=a.name) for a in arguments(case) if a.role == "in"
    }

    def of(name: str) -> Any:
        """A vector at k, a row's statistic at i, or a matrix at (i, k)."""

        def at(*index: Any) -> Any:
            if args[name].shape[0].same_as(rows):
                index = (tirx.min(index[0], rows - 1) if turn > 1 else index[0], *index[1:])
            return widen(args[name][index])

        return at

    def over_state(name: str, value: Any) -> Any:
        return te.compute((padded, sizes["hidden"]), value, name=name)

    def over_gates(name: str, value: Any) -> Any:
        return te.compute((padded, sizes["gates"]), value, name=name)

    def xhat(name: str) -> Any:
        return lambda i, k: (of(f"gates_{name}")(i, k) - of(f"mean_{name}")(i)) * of(f"rstd_{name}")(i)

    # What the forward made of the gates, again.
    normalized = ("x", "h") if "raw" in tokens else ("h",)

    def sum_of_gates(i: Any, k: Any) -> Any:
        from_x = xhat("x")(i, k) * of("weight_x")(k) if "raw" in tokens else of("gates_x")(i, k)
        value = xhat("h")(i, k) * of("weight_h")(k) + from_x
        return value + of("bias")(k) if "bias" in tokens else value

    z = over_gates("z", sum_of_gates)
    act = over_gates("act", lambda i, k: tirx.Select(tirx.floordiv(k, i64(n)) == 2, tanh(z[i, k]), sigmoid(z[i, k])))  # noqa: PLR2004 (i, f, g, o)

    def gate(number: int, i: Any, k: Any) -> Any:
        return act[i, k + i64(number * n)]

    def deviation(i: Any, k: Any) -> Any:
        return gate(1, i, k) * of("c")(i, k) + gate(0, i, k) * gate(2, i, k) - of("mean_c")(i)

    xhat_c = over_state("xhat_c", lambda i, k: deviation(i, k) * of("rstd_c")(i))

    def affine(i: Any, k: Any) -> Any:
        value = xhat_c[i, k] * of("weight_c")(k)
        return value + of("bias_c")(k) if "bias_c" in tokens else value

    inner = over_state("inner", affine)
    t = over_state("tanh_inner", lambda i, k: tanh(inner[i, k]))

    # Backwards: through the output, the cell's layer norm and the cell.
    def output(i: Any, k: Any) -> Any:
        value = of("dh")(i, k) * gate(3, i, k) * (one - t[i, k] * t[i, k])
        return value + of("dc_new")(i, k) if "carried" in tokens else value

    dinner = over_state("dinner", output)

    def normed(d: Any, weight: Any, xhat: Any, means: Any, rstd: Any) -> Any:
        """LN' at (i, k)."""
        return lambda i, k: rstd(i) * (d(i, k) * weight(k) - means[0][i] - xhat(i, k) * means[1][i])

    def terms_of(d: Any, weight: Any, xhat: Any) -> tuple[Any, Any]:
        return lambda i, k: d(i, k) * weight(k), lambda i, k: d(i, k) * weight(k) * xhat(i, k)

    def means_of(terms: Any, size: int, name: str) -> list[Any]:
        scale = tirx.const(float(size), f32)

        def mean(total: Any, j: int) -> Any:
            return te.compute((padded,), lambda i: total(i) / scale, name=f"{name}{j}_mean")

        return [mean(total, j) for j, total in enumerate(row_sum(padded, size, terms, name))]

    cell = (lambda i, k: dinner[i, k], of("weight_c"), lambda i, k: xhat_c[i, k])
    into_cell = normed(*cell, means_of(terms_of(*cell), n, "cell"), of("rstd_c"))
    dcell = over_state("dcell", into_cell if "carried" in tokens else lambda i, k: into_cell(i, k) + of("dc_new")(i, k))

    def of_gate(i: Any, k: Any) -> Any:
        """dz; which of the four expressions is known once k's loop is cut at the gates."""
        number, k = tirx.floordiv(k, i64(n)), tirx.floormod(k, i64(n))
        gi, gf, gg, go = (gate(j, i, k) for j in range(4))
        of_i, of_f = dcell[i, k] * gg * (gi * (one - gi)), dcell[i, k] * of("c")(i, k) * (gf * (one - gf))
        of_g, of_o = dcell[i, k] * gi * (one - gg * gg), of("dh")(i, k) * t[i, k] * (go * (one - go))
        return tirx.Select(number == 0, of_i, tirx.Select(number == 1, of_f, tirx.Select(number == 2, of_g, of_o)))  # noqa: PLR2004

    dz = over_gates("dz", of_gate)
    gates = {name: (lambda i, k: dz[i, k], of(f"weight_{name}"), xhat(name)) for name in normalized}
    means = means_of([term for name in normalized for term in terms_of(*gates[name])], 4 * n, "gates")
    outputs = {f"dgates_{name}": normed(*gates[name], means[2 * j : 2 * j + 2], of(f"rstd_{name}")) for j, name in enumerate(normalized)}
    outputs.setdefault("dgates_x", lambda i, k: dz[i, k])
    outputs["dc"] = lambda i, k: dcell[i, k] * gate(1, i, k)

    def rounded(name: str, value: Any) -> Any:
        return te.compute((rows, sizes["hidden" if name == "dc" else "gates"]), lambda i, k: value(i, k).astype(case.dtype), name=name)

    made = {a.name: rounded(a.name, outputs[a.name]) for a in arguments(case) if a.role == "out"}
    values = {
        "dweight_x": lambda i, k: dz[i, k] * xhat("x")(i, k),
        "dweight_h": lambda i, k: dz[i, k] * xhat("h")(i, k),
        "dbias": lambda i, k: dz[i, k],
        "dweight_c": lambda i, k: dinner[i, k] * xhat_c[i, k],
        "dbias_c": lambda i, k: dinner[i, k],
    }
    for size in ("gates", "hidden"):
        names = [name for name, its in sums(tokens).items() if its == size]
        made |= _over_rows(f"sums_{size}", {name: values[name] for name in names}, sizes[size], rows, blocks, together)
    return te.create_prim_func([{**args, **made}[a.name] for a in arguments(case)])


def _over_rows(stage: str, values: dict[str, Any], size: Any, rows: Any, blocks: int, together: int) -> dict[str, Any]:
    """Sums over the rows of each block, all in one stage, so that none comes between the others' terms."""
    from tvm import te, tirx

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    turn = blocks * together
    turns = (rows + i64(turn - 1)) // i64(turn) if turn > 1 else rows
    t, side, add = te.reduce_axis((0, turns), name="turn"), te.reduce_axis((0, i64(together)), name="side"), sum_of(len(values))

    def total(b: Any, k: Any) -> Any:
        i = (t * i64(blocks) + b) * i64(together) + side
        terms = tuple(value(i, k) for value in values.values())
        if turn > 1:
            terms = tuple(tirx.Select(i < rows, term, tirx.const(0.0, "float32")) for term in terms)
        return add(terms if len(terms) > 1 else terms[0], axis=[t, side])

    made = te.compute((i64(blocks), size), total, name=stage)
    return dict(zip(values, made if len(values) > 1 else [made], strict=True))


def inputs(case: Case, rows: int, style: str, seed: int) -> dict[str, Any]:
    """The forward's inputs of that style, dh and dc_new plain random, the statistics its reference gives, in float32; sums of 0."""
    import torch

    forward = _with_statistics(case)
    given = lnlstm_step.inputs(forward, rows, style, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    made = {**given, **{name: t.float() for name, t in lnlstm_step.reference(forward, given).items()}}
    for arg in arguments(case):
        if arg.name in ("dh", "dc_new"):
            made[arg.name] = torch.randn(rows, case.hidden, generator=generator).to(getattr(torch, case.dtype))
        elif arg.role == "sum":
            made[arg.name] = torch.zeros(arg.sizes(rows, case.hidden, case.blocks(device.current().cores)))
    return {a.name: made[a.name] for a in arguments(case) if a.role != "out"}


def _with_statistics(case: Case) -> Case:
    return Case(lnlstm_step.NAME, case.hidden, case.dtype, case.rows, "+".join([*(t for t in tokens_of(case) if t != "plain"), "stats"]))


def formula(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """The equations above in PyTorch's operators, in the dtype of `given`; the sums as one row each, (gates,) or (hidden,)."""
    import torch

    tokens = tokens_of(case)
    normalized = ("x", "h") if "raw" in tokens else ("h",)
    xhat = {name: (given[f"gates_{name}"] - given[f"mean_{name}"][:, None]) * given[f"rstd_{name}"][:, None] for name in normalized}
    z = xhat["h"] * given["weight_h"] + (xhat["x"] * given["weight_x"] if "raw" in tokens else given["gates_x"])
    z = z + given["bias"] if "bias" in tokens else z
    i, f, g, o = (act(part) for act, part in zip((torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid), z.chunk(4, -1), strict=True))
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
    parts = dcell * g * (i * (1 - i)), dcell * given["c"] * (f * (1 - f)), dcell * i * (1 - g * g), given["dh"] * t * (o * (1 - o))
    dz = torch.cat(parts, -1)
    made = {"dgates_x": norm(dz, "x") if "raw" in tokens else dz, "dgates_h": norm(dz, "h"), "dc": dcell * f}
    made |= {f"dweight_{name}": ((dinner if name == "c" else dz) * xhat[name]).sum(0) for name in xhat}
    made |= {"dbias": dz.sum(0), "dbias_c": dinner.sum(0)}
    return {a.name: made[a.name] for a in arguments(case) if a.role in ("out", "sum")}


def reference(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """All gradients in float64, given the statistics; the sums as one row each."""
    return formula(case, {name: t.double() for name, t in given.items() if hasattr(t, "double")})


def eager(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """The equations in float32, rounded to their dtypes at the end: nearer to float64 than eager mode in low precision comes."""
    import torch

    made = formula(case, {name: t.float() for name, t in given.items() if hasattr(t, "float")})
    return {a.name: made[a.name].to(getattr(torch, a.dtype)) for a in arguments(case) if a.role in ("out", "sum")}


def baseline(case: Case, given: Tensors) -> Callable[[], Any]:
    """PyTorch's autograd through the forward's formula, recorded once: what eager mode does at every time step."""
    import torch

    names = [a.name for a in arguments(case) if a.role == "in" and a.name in lnlstm_step.TENSORS]
    with torch.inference_mode(False), torch.enable_grad():
        leaves: dict[str, Any] = {name: given[name].detach().clone().requires_grad_() for name in names}
        every = {name: leaves.get(name) for name in lnlstm_step.TENSORS}
        made = lnlstm_step.formula(**every, eps=1e-5, carried="carried" in tokens_of(case))
        grads = tuple(given[name].clone() for name in ("dh", "dc_new"))

    def backward() -> Any:
        with torch.inference_mode(False):
            return torch.autograd.grad(made, tuple(leaves.values()), grads, retain_graph=True)

    return backward


def compiled(case: Case, given: Tensors) -> Callable[[], Any]:
    """The equations, for torch.compile: a graph of its own, without the autograd engine around it."""
    return lambda: formula(case, given)


def moved_bytes(case: Case) -> int:
    """All matrices of rows once, and the sums, which are read and written."""
    made = 0
    for a in arguments(case):
        sizes = a.sizes(case.rows, case.hidden)
        made += (2 if a.role == "sum" else 1) * DTYPES[a.dtype] * sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
    return made


def flops(case: Case) -> int:
    """For each element of the gates 4 for z, 8 for dz, 11 for its layer norm and 3 for the sums; for each of the cell 22 and five exp at 20."""
    return (4 * 26 + 22 + 5 * 20) * case.rows * case.hidden


def tolerance(case: Case, output: str) -> Tolerance:
    """Twice the error of the same equations in float32, plus a floor.

    The floor: one rounding of a low-precision gradient, or 16 of float32 for sums taken in another order and for the activations'
    polynomials, at the scale of the gradient itself and of rstd_c, by which the cell's layer norm multiplies what is left when a row's
    mean is taken off. The sums over rows are at least of the scale of what they begin with. In rows of a few elements next to nothing is
    left, both layer norms multiply it by up to 1 / sqrt(eps), and two computations are as far apart as either is from the truth.
    """
    rounding = {"float32": 16 * 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    summed = output in sums(tokens_of(case))
    times = 2.0 if case.hidden >= 8 else 8.0  # noqa: PLR2004
    return Tolerance(times, rounding["float32" if summed else case.dtype], of=(output, "rstd_c"), least=4.0 if summed else 0.0)


GRID = tuple(Case(NAME, hidden, dtype, rows) for hidden in (512, 1024, 256, 128, 400) for dtype in ("float32", "bfloat16") for rows in (32, 1, 128))

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
    grid=GRID,
)
