"""One step of an LSTM with layer normalization, forward.

    z = LN(gates_x; weight_x) + LN(gates_h; weight_h) + bias      (a row is i, f, g, o; each hidden)
    c_new = sigmoid(f) c + sigmoid(i) tanh(g)
    h = sigmoid(o) tanh(LN(c_new; weight_c) + bias_c)

with gates_x = W_x x[t] and gates_h = W_h h[t-1]; LN without a bias of its own, since all that are
added to z (those of both layer norms and b) are one vector. Ba, Kiros, Hinton: *Layer
Normalization*, 2016, arXiv:1607.06450, supplement, eqs. 20-22. Two variations: gates_x already
normalized (LN(W_x x) does not depend on the step, and is cheaper for a whole sequence at once), and
the normalized cell state passed on to the next step, c_new = LN(...), as in PyTorch's
custom_lstms.py and TensorFlow Addons (the token "carried").

A row is one sequence of the batch. All arithmetic is float32; low-precision inputs are widened on
load and each output is rounded once. For training the means and 1/sigmas of all layer norms are
given as well; the rest of what the backward needs is cheaper to compute again than to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from lntune.case import DTYPES, Case
from lntune.ops import layer_norm, models, saturation
from lntune.ops.activations import sigmoid, tanh
from lntune.ops.dtypes import widen
from lntune.ops.moments import normalize
from lntune.ops.op import (
    SATURATED,
    Arg,
    Op,
    Priority,
    RowSum,
    Tensors,
    Tolerance,
    affine_vector,
    drawn,
    eps_of,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

NAME = "lnlstm_step"
TENSORS = ("gates_x", "gates_h", "c", "weight_x", "weight_h", "weight_c", "bias", "bias_c")
"""The tensors of a call, in order; weight_x and both biases may be missing."""

# A variant lists what is there beside the rest: "raw" (gates_x is normalized here, with weight_x),
# "bias", "bias_c", "carried" (c_new is the normalized cell state); and "stats", where what the
# backward needs is wanted.
_TOKENS = ("raw", "bias", "bias_c", "carried", "stats")
DEFAULT_VARIANT = "bias+bias_c"


def variant(raw: bool, bias: bool, bias_c: bool, carried: bool, stats: bool = False) -> str:
    """The variant's name from what a call brings."""
    return (
        "+".join(
            token
            for token, present in zip(_TOKENS, (raw, bias, bias_c, carried, stats), strict=True)
            if present
        )
        or "plain"
    )


VARIANTS = (
    DEFAULT_VARIANT,
    *sorted(
        {variant(*chosen) for chosen in itertools.product((False, True), repeat=5)}
        - {DEFAULT_VARIANT}
    ),
)


def tokens_of(case: Case) -> list[str]:
    """What the case's variant lists."""
    return (case.variant or DEFAULT_VARIANT).split("+")


def statistics(tokens: Sequence[str]) -> tuple[str, ...]:
    """The names of the rows' statistics, as the forward gives them to the backward."""
    return tuple(
        f"{moment}_{of}"
        for of in ("x", "h", "c")
        for moment in ("mean", "rstd")
        if of != "x" or "raw" in tokens
    )


def arguments(case: Case) -> tuple[Arg, ...]:
    """gates_x, gates_h, c, [weight_x], weight_h, weight_c, [bias], [bias_c], eps, h, c_new,
    [statistics]; all but the statistics, which are float32 (rows,), in the dtype of the case.
    """
    tokens, dtype = tokens_of(case), case.dtype
    gates, state = ("rows", "gates"), ("rows", "hidden")
    vectors = {
        "weight_x": "raw" in tokens,
        "weight_h": True,
        "weight_c": True,
        "bias": "bias" in tokens,
        "bias_c": "bias_c" in tokens,
    }
    return (
        Arg("gates_x", "in", gates, dtype),
        Arg("gates_h", "in", gates, dtype),
        Arg("c", "in", state, dtype),
        *(
            Arg(name, "in", ("hidden",) if name.endswith("_c") else ("gates",), dtype)
            for name, present in vectors.items()
            if present
        ),
        Arg("eps", "scalar", (), "float32"),
        Arg("h", "out", state, dtype),
        Arg("c_new", "out", state, dtype),
        *(
            Arg(name, "out", ("rows",), "float32")
            for name in statistics(tokens)
            if "stats" in tokens
        ),
    )


def define(case: Case, row_sum: RowSum) -> Any:
    """The TE definition. Stages, in order: the moments of gates_h (named h_...) and, where it is
    raw, of gates_x (x_...), z, the cell, the cell's moments (c_...), inner (the argument of tanh),
    h and c_new.
    """
    from tvm import te, tirx

    size, tokens, dtype = case.hidden, tokens_of(case), case.dtype
    rows = te.var("rows", "int64")
    sizes = {
        "rows": rows,
        "hidden": tirx.IntImm("int64", size),
        "gates": tirx.IntImm("int64", 4 * size),
    }
    args: dict[str, Any] = {
        a.name: te.placeholder(tuple(sizes[axis] for axis in a.shape), a.dtype, name=a.name)
        for a in arguments(case)
        if a.role == "in"
    }
    eps = te.var("eps", "float32")

    def of(name: str) -> Any:
        return lambda *at: widen(args[name][at])

    hs = normalize(row_sum, rows, 4 * size, of("gates_h"), eps, "h_")
    xs = normalize(row_sum, rows, 4 * size, of("gates_x"), eps, "x_") if "raw" in tokens else None

    def sum_of_gates(i: Any, k: Any) -> Any:
        from_x = of("gates_x")(i, k) if xs is None else xs.value(i, k) * of("weight_x")(k)
        value = hs.value(i, k) * of("weight_h")(k) + from_x
        return value + of("bias")(k) if "bias" in tokens else value

    z = te.compute((rows, sizes["gates"]), sum_of_gates, name="z")

    def gate(number: int, i: Any, k: Any) -> Any:
        return z[i, k + tirx.IntImm("int64", number * size)]

    state = (rows, sizes["hidden"])
    cell = te.compute(
        state,
        lambda i, k: (
            sigmoid(gate(1, i, k)) * of("c")(i, k) + sigmoid(gate(0, i, k)) * tanh(gate(2, i, k))
        ),
        name="cell",
    )
    cs = normalize(row_sum, rows, size, lambda i, k: cell[i, k], eps, "c_")

    def normalized(i: Any, k: Any) -> Any:
        value = cs.value(i, k) * of("weight_c")(k)
        return value + of("bias_c")(k) if "bias_c" in tokens else value

    inner = te.compute(state, normalized, name="inner")
    state_out = inner if "carried" in tokens else cell
    outputs = {
        "h": te.compute(
            state, lambda i, k: (sigmoid(gate(3, i, k)) * tanh(inner[i, k])).astype(dtype), name="h"
        ),
        "c_new": te.compute(state, lambda i, k: state_out[i, k].astype(dtype), name="c_new"),
    }
    if "stats" in tokens:
        for part, moments in (("x", xs), ("h", hs), ("c", cs)):
            if moments is not None:
                outputs[f"mean_{part}"] = te.compute((rows,), moments.mean, name=f"mean_{part}")
                outputs[f"rstd_{part}"] = te.compute((rows,), moments.rstd, name=f"rstd_{part}")
    return te.create_prim_func([{**args, **outputs, "eps": eps}[a.name] for a in arguments(case)])


def inputs(case: Case, rows: int, style: str, seed: int) -> dict[str, Any]:
    """Gates of the given style (see Op.styles), a plain random cell, vectors around 1 and 0,
    and eps.
    """
    import torch

    if style == SATURATED:
        return saturation.inputs(case, arguments(case), rows, seed)
    generator = torch.Generator().manual_seed(seed)
    dtype, gates = getattr(torch, case.dtype), 4 * case.hidden
    x_style = style if "raw" in tokens_of(case) else "normal"
    values: dict[str, Any] = {
        "gates_x": styled(case.dtype, rows, gates, x_style, generator),
        "gates_h": styled(case.dtype, rows, gates, style, generator),
        "c": drawn(rows, case.hidden, generator=generator),
    }
    values = {name: matrix.contiguous().to(dtype) for name, matrix in values.items()}
    for arg in arguments(case):
        if arg.role == "in" and len(arg.shape) == 1:
            around = 1.0 if arg.name.startswith("weight") else 0.0
            (size,) = arg.sizes(rows, case.hidden)
            values[arg.name] = affine_vector(size, around, case.dtype, style, generator)
    return {**values, "eps": eps_of(style)}


def formula(
    gates_x: torch.Tensor,
    gates_h: torch.Tensor,
    c: torch.Tensor,
    weight_x: torch.Tensor | None,
    weight_h: torch.Tensor,
    weight_c: torch.Tensor,
    bias: torch.Tensor | None,
    bias_c: torch.Tensor | None,
    eps: float,
    carried: bool,
    per_gate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, c_new) by PyTorch's own operators, in any dtype, differentiable as often as those are.

    `per_gate`: each of the four gates is normalized by itself, which kernels do not do.
    """
    import torch
    from torch.nn import functional

    hidden = c.shape[-1]

    def norm(gates: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not per_gate:
            return functional.layer_norm(gates, (4 * hidden,), weight, None, eps)
        return (
            functional.layer_norm(
                gates.unflatten(-1, (4, hidden)), (hidden,), None, None, eps
            ).flatten(-2)
            * weight
        )

    z = norm(gates_h, weight_h) + (gates_x if weight_x is None else norm(gates_x, weight_x))
    if bias is not None:
        z = z + bias
    i, f, g, o = z.chunk(4, -1)
    cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    normalized = functional.layer_norm(cell, (hidden,), weight_c, bias_c, eps)
    return torch.sigmoid(o) * torch.tanh(normalized), normalized if carried else cell


def _bound(case: Case, given: Tensors) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    values: dict[str, Any] = {name: given.get(name) for name in TENSORS}
    eps, carried = float(given["eps"]), "carried" in tokens_of(case)
    return lambda: formula(**values, eps=eps, carried=carried)


def reference(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """h, c_new and the statistics in float64."""
    wide = {name: value.double() if name != "eps" else value for name, value in given.items()}
    return dict(zip(("h", "c_new"), _bound(case, wide)(), strict=True)) | _statistics(
        case, wide, layer_norm.reference
    )


def eager(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """What the formula gives in the inputs' own dtype, and statistics by PyTorch's float32."""
    import torch

    wide = {
        name: value.float() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    return dict(zip(("h", "c_new"), _bound(case, given)(), strict=True)) | _statistics(
        case, wide, layer_norm.eager
    )


def _statistics(
    case: Case, given: dict[str, Any], normalized: Callable[[Case, Tensors], Tensors]
) -> dict[str, torch.Tensor]:
    """Mean and rstd (rows,) of what is normalized, in the dtype of `given` and by layer norm's own
    `reference` or `eager`, where the variant wants them.
    """
    tokens = tokens_of(case)
    if "stats" not in tokens:
        return {}
    cell = _bound(msgspec.structs.replace(case, variant="plain"), given | {"bias_c": None})()[1]
    moments: dict[str, torch.Tensor] = {}
    for of, values in (("x", given["gates_x"]), ("h", given["gates_h"]), ("c", cell)):
        if of != "x" or "raw" in tokens:
            row = msgspec.structs.replace(case, hidden=values.shape[-1])
            made = normalized(row, {"x": values, "eps": given["eps"]})
            moments |= {f"mean_{of}": made["mean"], f"rstd_{of}": made["rstd"]}
    return moments


def baseline(case: Case, given: Tensors) -> Callable[[], Any]:
    """The formula in PyTorch's operators, as a user without a fused step writes it."""
    return _bound(case, given)


def moved_bytes(case: Case) -> int:
    """Two rows of gates and one of the cell read, h and the cell written, the vectors read once."""
    sizes = (a.sizes(case.rows, case.hidden) for a in arguments(case) if a.shape)
    return DTYPES[case.dtype] * sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes)


def flops(case: Case) -> int:
    """For each element of the gates 5 for the moments, 4 for z; for each of the cell 5 for its
    moments and 20 for each of five exp.
    """
    return (4 * 9 + 5 + 5 * 20) * case.rows * case.hidden


def tolerance(case: Case, output: str) -> Tolerance:
    """Twice eager's own largest error on the same inputs, plus a floor: one rounding of low
    precision, or 16 of float32 for sums in another order and for the activations' polynomials, at
    the scale of h (1) or of the cell, of what a mean is taken of, of rstd.
    """
    rounding = {"float32": 16 * 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    if output.startswith(("mean", "rstd")):
        of = {"mean_x": "gates_x", "mean_h": "gates_h"}.get(output, output)
        return Tolerance(2.0, rounding["float32"], of=of, least=0.0 if "rstd" in output else 1.0)
    return Tolerance(2.0, rounding[case.dtype], of=output, least=1.0)


def saturated(case: Case) -> dict[str, tuple[str, slice]]:
    """What is judged by itself where gates are saturated: h where the output gate is shut, the cell
    where nothing comes into it.
    """
    shut = {"o": "h"} if "carried" in tokens_of(case) else {"o": "h", "f": "c_new"}
    return saturation.parts(case, (), (), shut)


GRID = tuple(
    Case(NAME, hidden, dtype, rows)
    for hidden in models.CELLS
    for dtype in ("float32", "bfloat16")
    for rows in (32, 1, 128)
)

# What a GPU is for beyond the default grid: large models and batches.
GPU_CASES = tuple(
    Case(NAME, hidden, dtype, rows)
    for hidden, rows in ((2048, 128), (1024, 512), (512, 512))
    for dtype in ("float32", "bfloat16")
)

PRIORITY = Priority(
    operator=2,  # few models have one, though they gain the most
    hidden={512: 0, 1024: 0, 256: 1, 2048: 1, 128: 2, 640: 2, 400: 2},
    rows={"cpu": {32: 0, 1: 0, 128: 1}, "gpu": {128: 0, 32: 1, 512: 1, 1: 3}},
)

TELLING = ((Case(NAME, 1024, "float32", 128),), (Case(NAME, 512, "bfloat16", 32),))

OP = Op(
    name=NAME,
    summary="one step of an LSTM with layer normalization, forward",
    variants=VARIANTS,
    checked=("raw+bias+bias_c", "bias+bias_c+carried", "bias+bias_c+stats"),
    arguments=arguments,
    define=define,
    inputs=inputs,
    reference=reference,
    eager=eager,
    baseline=baseline,
    bytes=moved_bytes,
    flops=flops,
    tolerance=tolerance,
    saturated=saturated,
    linear={"weight_c": ("bias_c",), "bias_c": ("weight_c",)},
    grid=GRID,
    binding="lntune.torch.lnlstm",
    backward="lnlstm_step_backward",
    more_cases={"gpu": GPU_CASES},
    priority=PRIORITY,
    telling=TELLING,
)
