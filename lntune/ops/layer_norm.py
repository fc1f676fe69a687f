"""Layer normalization, forward.

    mean = sum_k x[k] / N        var = sum_k (x[k] - mean)^2 / N        rstd = 1 / sqrt(var + eps)
    y[k] = (x[k] - mean) * rstd * weight[k] + bias[k]

Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450, eqs. 3-4, with eps as PyTorch
places it; ops/moments.py says how mean and variance are found. All arithmetic is float32;
low-precision inputs are widened on load and y is rounded once, after the affine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lntune.case import DTYPES, Case
from lntune.ops import models
from lntune.ops.dtypes import element, paired_placeholder, round_pair
from lntune.ops.moments import normalize
from lntune.ops.op import (
    Arg,
    Op,
    Priority,
    RowSum,
    Tensors,
    Term,
    Tolerance,
    affine_vector,
    eps_of,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NAME = "layer_norm"

# A variant lists what is there beside x and y, joined by "+": an affine vector in the input's dtype
# ("weight", "bias") or in float32 ("weight32", "bias32"), and the statistics kept for a backward
# pass ("stats").
_TOKENS = (("", "weight", "weight32"), ("", "bias", "bias32"), ("", "stats"))
DEFAULT_VARIANT = "weight+bias"
VARIANTS = (
    DEFAULT_VARIANT,
    *sorted(
        {
            "+".join(t for t in (w, b, s) if t) or "plain"
            for w in _TOKENS[0]
            for b in _TOKENS[1]
            for s in _TOKENS[2]
        }
        - {DEFAULT_VARIANT}
    ),
)


def variant(weight: str | None, bias: str | None, stats: bool = False) -> str:
    """The variant's name from what a call brings; `weight` and `bias` are None, "same" (in the
    dtype of x) or "float32".
    """
    suffix = {"same": "", "float32": "32"}
    parts = [f"{name}{suffix[kind]}" for name, kind in (("weight", weight), ("bias", bias)) if kind]
    return "+".join([*parts, "stats"] if stats else parts) or "plain"


def arguments(case: Case) -> tuple[Arg, ...]:
    """x, [weight], [bias], eps, y, [mean, rstd]."""
    tokens = (case.variant or DEFAULT_VARIANT).split("+")
    affine = [
        Arg(t.removesuffix("32"), "in", ("hidden",), "float32" if t.endswith("32") else case.dtype)
        for t in tokens
        if t[0] in "wb"
    ]
    stats = [
        Arg(name, "out", ("rows",), "float32") for name in ("mean", "rstd") if "stats" in tokens
    ]
    matrix = ("rows", "hidden")
    return (
        Arg("x", "in", matrix, case.dtype),
        *affine,
        Arg("eps", "scalar", (), "float32"),
        Arg("y", "out", matrix, case.dtype),
        *stats,
    )


def define(
    case: Case,
    row_sum: RowSum,
    together: int = 1,
    columns: int = 0,
    inside: Term | None = None,
    pairs: bool = False,
    sample: int = 0,
) -> Any:
    """The TE definition, ready for schedules that work on `together` rows side by side; rows and
    vectors have `columns` elements where these are more than the case's, for schedules that put
    the case's own in their place. `inside` says which those are; others of x are zeros.

    With `pairs` a column of rows and vectors in bfloat16 is two elements side by side, taken as one
    uint32 (see dtypes.widen_pair), for schedules that give the parameters their own dtype back.
    `sample` is as in `normalize`.

    Stages, in order: x32, weight32 and bias32 (widened inputs; with pairs also x321, weight321 and
    bias321, of second elements), the sums, the scalars of a row, the outputs. All stages but the
    outputs have rows padded to a multiple of `together`, the last row repeated, so that none of
    them needs a condition. A schedule inlines the widening stages or keeps them (a row widened
    once, an affine widened once per call).
    """
    from tvm import te, tirx

    width = 2 if pairs else 1
    hidden = tirx.IntImm("int64", (columns or case.hidden) // width)
    side = tirx.IntImm("int64", together)
    rows = te.var("rows", "int64")
    padded = (rows + (side - 1)) // side * side if together > 1 else rows
    sizes = {"rows": rows, "hidden": hidden}
    f32 = "float32"
    args = {
        arg.name: paired_placeholder(arg, sizes, pairs)
        for arg in arguments(case)
        if arg.role == "in"
    }
    eps = te.var("eps", f32)

    def x_of(number: int) -> Any:
        def load(i: Any, k: Any) -> Any:
            row = tirx.min(i, rows - 1) if together > 1 else i
            return element(args["x"], (row, k), number, pairs)

        return te.compute((padded, hidden), load, name=f"x32{number or ''}")

    def affine_of(name: str, number: int) -> Any:
        called = f"{name}32{number or ''}"
        return te.compute(
            (hidden,), lambda k: element(args[name], (k,), number, pairs), name=called
        )

    def at(stage: Any) -> Term:
        return lambda i, k: stage[i, k]

    numbers = range(width)
    xs = tuple(at(x_of(number)) for number in numbers)
    affine = {
        name: [affine_of(name, number) for number in numbers]
        for name in ("weight", "bias")
        if name in args
    }

    row = normalize(row_sum, padded, case.hidden, xs, eps, inside=inside, sample=sample)

    def scaled(i: Any, k: Any, number: int) -> Any:
        value = row.values[number](i, k)
        if "weight" in affine:
            value = value * affine["weight"][number][k]
        if "bias" in affine:
            value = value + affine["bias"][number][k]
        return value

    def normalized(i: Any, k: Any) -> Any:
        values = [scaled(i, k, number) for number in numbers]
        if not pairs:
            return values[0].astype(case.dtype)
        mixed = any(arg.dtype == f32 for arg in arguments(case) if arg.role == "in")
        return round_pair(values[0], values[1], any_nan=mixed)

    named = {**args, "eps": eps, "y": te.compute((rows, hidden), normalized, name="y")}
    if any(arg.name == "mean" for arg in arguments(case)):
        named["mean"] = te.compute((rows,), row.mean, name="mean")
        named["rstd"] = te.compute((rows,), row.rstd, name="rstd")
    return te.create_prim_func([named[arg.name] for arg in arguments(case)])


def inputs(case: Case, rows: int, style: str, seed: int) -> dict[str, Any]:
    """x of the given style (see ops.op.STYLES), affine vectors around 1 and 0, and eps."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = styled(case.dtype, rows, case.hidden, style, generator)
    values: dict[str, Any] = {
        "x": x.contiguous().to(getattr(torch, case.dtype)),
        "eps": eps_of(style),
    }
    for arg in arguments(case):
        if arg.name in ("weight", "bias"):
            around = 1.0 if arg.name == "weight" else 0.0
            values[arg.name] = affine_vector(case.hidden, around, arg.dtype, style, generator)
    return values


def reference(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """y, mean and rstd in float64."""
    x = given["x"].double()
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(-1, keepdim=True) + float(given["eps"])).rsqrt()
    y = centred * rstd
    if "weight" in given:
        y = y * given["weight"].double()
    if "bias" in given:
        y = y + given["bias"].double()
    return {"y": y, "mean": mean.squeeze(-1), "rstd": rstd.squeeze(-1)}


def eager(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """What torch.native_layer_norm gives.

    A float32 affine beside a low-precision x is what PyTorch's CPU kernels take too, but only both
    vectors together, so a mixed pair is widened.
    """
    import torch

    weight, bias = given.get("weight"), given.get("bias")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    y, mean, rstd = torch.native_layer_norm(
        given["x"], (case.hidden,), weight, bias, float(given["eps"])
    )
    return {"y": y, "mean": mean.flatten(), "rstd": rstd.flatten()}


def baseline(case: Case, given: Tensors) -> Callable[[], Any]:
    """torch.nn.functional.layer_norm as a user calls it; it allocates its output."""
    import torch

    x, weight, bias, eps = given["x"], given.get("weight"), given.get("bias"), float(given["eps"])
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        # as in `eager`; once, where a user who can would do it, too
        weight, bias = weight.float(), bias.float()
    shape = (case.hidden,)
    return lambda: torch.nn.functional.layer_norm(x, shape, weight, bias, eps)


def moved_bytes(case: Case) -> int:
    """x read once, y written once, plus the vectors."""
    vectors = [a for a in arguments(case) if len(a.shape) == 1]
    return 2 * case.rows * case.hidden * case.itemsize + sum(
        a.sizes(case.rows, case.hidden)[0] * DTYPES[a.dtype] for a in vectors
    )


def flops(case: Case) -> int:
    """1 for the sum, 4 for the deviations and their squares, 5 for the normalization with its
    affine, per element.
    """
    return 10 * case.rows * case.hidden


def tolerance(case: Case, output: str) -> Tolerance:
    """Twice eager's own largest error on the same inputs (the form flash-attention's tests use),
    plus a floor.

    The floor is for inputs on which eager happens to be exact: one rounding of a low-precision y,
    or 8 of float32 for sums taken in another order.
    """
    rounding = {"float32": 8 * 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    if output == "y":
        # a normalized row has scale 1
        return Tolerance(2.0, rounding[case.dtype], of="y", least=1.0)
    return Tolerance(2.0, rounding["float32"], of="x" if output == "mean" else "rstd")


_ROWS = (4096, 512, 1, 32, 8)
GRID = tuple(
    Case(NAME, hidden, dtype, rows)
    for hidden in models.NORMS
    for dtype in ("float32", "bfloat16")
    for rows in _ROWS
)

# What a GPU is for beyond the default grid: data far beyond its cache, the widths of large models,
# the precision of older GPUs.
GPU_CASES = (
    *(
        Case(NAME, hidden, dtype, 32768)
        for hidden in (1024, 4096, 768)
        for dtype in ("bfloat16", "float32")
    ),
    *(Case(NAME, 8192, dtype, 4096) for dtype in ("bfloat16", "float32")),
    *(Case(NAME, hidden, "float16", 4096) for hidden in (1024, 4096)),
)

PRIORITY = Priority(
    # every user calls it, in inference and in training, and its bandwidth tells whether the rest
    # can be any good
    operator=0,
    # transformers' usual widths; the widest; an odd one; a narrow one
    hidden={
        **{1024: 0, 4096: 0, 768: 1, 8192: 1, 16384: 2, 1000: 2},
        **{512: 2, 2048: 2, 1280: 2, 384: 2, 256: 3},
    },
    rows={
        # inference of a few rows is what CPUs do, too
        "cpu": {4096: 0, 512: 0, 1: 1, 32: 1, 8: 2},
        # Tokens of a training step. Below some hundred rows all kernels take as long as a launch,
        # whatever their knobs.
        "gpu": {4096: 0, 32768: 0, 512: 1, 32: 2, 8: 3, 1: 3},
    },
)

# What moves the most data and the usual size; then the other ends, and few rows.
TELLING = (
    (Case(NAME, 4096, "bfloat16", 32768), Case(NAME, 1024, "float32", 4096)),
    (
        Case(NAME, 1024, "bfloat16", 32768),
        Case(NAME, 1024, "float32", 32768),
        Case(NAME, 8192, "float32", 4096),
        Case(NAME, 1000, "float32", 4096),
        Case(NAME, 4096, "bfloat16", 512),
        Case(NAME, 1024, "float32", 1),
    ),
)

OP = Op(
    name=NAME,
    summary="layer normalization over the last axis, forward",
    variants=VARIANTS,
    checked=("weight+bias+stats",),
    arguments=arguments,
    define=define,
    inputs=inputs,
    reference=reference,
    eager=eager,
    baseline=baseline,
    bytes=moved_bytes,
    flops=flops,
    tolerance=tolerance,
    linear={"weight": ("bias",), "bias": ("weight",)},
    grid=GRID,
    binding="lntune.torch.layer_norm",
    backward="layer_norm_backward",
    more_cases={"gpu": GPU_CASES},
    priority=PRIORITY,
    telling=TELLING,
    peers={
        "liger": "lntune.commands.bench.liger_layer_norm",
        "triton": "lntune.commands.bench.triton_layer_norm",
    },
)
