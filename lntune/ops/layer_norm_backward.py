"""Layer normalization, backward.

With xhat[k] = (x[k] - mean) * rstd and g[k] = dy[k] * weight[k], all sums over the N elements of a
row unless they say rows:

    dx[k] = rstd * (g[k] - sum(g) / N - xhat[k] * sum(g * xhat) / N)
    dgamma[k] = sum over rows of dy[k] * xhat[k]        dbeta[k] = sum over rows of dy[k]

The derivative of eqs. 3-4 of Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450; mean
and rstd are those the forward saved. x and dy are read from memory once: a row's sums, its dx and
its share of dgamma and dbeta are made while it is in the cache. dgamma and dbeta are summed in
float32 per block of rows, and the blocks in a fixed order, so the same call gives the same bits
whatever the number of threads (the two stages are those of the kernels in Apex and in PyTorch's
CUDA backward).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from lntune.case import DTYPES, Case
from lntune.ops import layer_norm, models
from lntune.ops.dtypes import element, paired_placeholder, round_pair, sum_of
from lntune.ops.op import Arg, Op, RowSum, Tensors, Term, Tolerance, drawn, same_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

NAME = "layer_norm_backward"

# A variant lists the weight, where dx needs it, and the gradients that are wanted, joined by "+".
# "32" marks a float32 weight or bias (and so its gradient) beside a low-precision x.
_TOKENS = (
    ("", "weight", "weight32"),
    ("", "dx"),
    ("", "dgamma", "dgamma32"),
    ("", "dbeta", "dbeta32"),
)
DEFAULT_VARIANT = "weight+dx+dgamma+dbeta"


def variant(weight: str | None, bias: str | None, wanted: tuple[bool, bool, bool]) -> str:
    """The variant's name; `weight` and `bias` are None, "same" (in the dtype of x) or "float32",
    `wanted` is for dx, dgamma, dbeta.

    The gradient of a vector that is not there is not wanted, whatever `wanted` says.
    """
    suffix = {"same": "", "float32": "32"}
    dx, dgamma, dbeta = wanted
    parts = [f"weight{suffix[weight]}"] if weight and dx else []
    parts += ["dx"] if dx else []
    parts += [f"dgamma{suffix[weight]}"] if weight and dgamma else []
    parts += [f"dbeta{suffix[bias]}"] if bias and dbeta else []
    return "+".join(parts)


_KINDS = (None, "same", "float32")
_WANTED = [
    (dx, dgamma, dbeta)
    for dx in (True, False)
    for dgamma in (True, False)
    for dbeta in (True, False)
]
VARIANTS = (
    DEFAULT_VARIANT,
    *sorted(
        {variant(w, b, wanted) for w in _KINDS for b in _KINDS for wanted in _WANTED}
        - {"", DEFAULT_VARIANT}
    ),
)


def arguments(case: Case) -> tuple[Arg, ...]:
    """dy, x, mean, rstd, [weight], [dx], [dgamma], [dbeta]; what no wanted gradient depends on is
    left out.
    """
    tokens = (case.variant or DEFAULT_VARIANT).split("+")
    matrix = ("rows", "hidden")

    def kind(token: str) -> str:
        return "float32" if token.endswith("32") else case.dtype

    args = [Arg("dy", "in", matrix, case.dtype)]
    if any(not t.startswith("dbeta") for t in tokens):
        args += [
            Arg("x", "in", matrix, case.dtype),
            Arg("mean", "in", ("rows",), "float32"),
            Arg("rstd", "in", ("rows",), "float32"),
        ]
    args += [Arg("weight", "in", ("hidden",), kind(t)) for t in tokens if t.startswith("weight")]
    args += [Arg("dx", "out", matrix, case.dtype) for t in tokens if t == "dx"]
    return (
        *args,
        *(
            Arg(t.removesuffix("32"), "out", ("hidden",), kind(t))
            for t in tokens
            if t.startswith(("dgamma", "dbeta"))
        ),
    )


def define(
    case: Case,
    row_sum: RowSum,
    together: int = 1,
    blocks: int = 1,
    contiguous: bool = False,
    columns: int = 0,
    first_column: Callable[[Any], Any] | None = None,
    pairs: bool = False,
) -> Any:
    """The TE definition for schedules that sum dgamma and dbeta in `blocks` blocks, which work on
    groups of `together` rows.

    A block's groups are `contiguous`, or it takes every `blocks`-th one (a strided loop over rows).
    Stages, in order: dy32, x32 and weight32 (widened inputs), the row's sums, its two scalars c1
    and c2, dx, the partial sums of dgamma and dbeta ("blocks"), and what they come to. All stages
    over rows but dx have them padded to a multiple of blocks x together, the last row repeated; the
    partial sums take zeros for those.

    Rows and the weight have `columns` elements where these are more than the case's, for schedules
    that put the case's own in their place (others of dy and the weight are zeros); `first_column`
    is then the first of the case's in a block's partial sums.

    With `pairs` a column of rows and vectors in bfloat16 is two elements side by side, taken as one
    uint32 (see dtypes.widen_pair), for schedules that give the parameters their own dtype back;
    there is a stage more, its name ending in 1, for second elements (dy321, dgamma_sum1).
    """
    from tvm import te, tirx

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    width = 2 if pairs else 1
    hidden, stride = i64((columns or case.hidden) // width), blocks * together
    rows = te.var("rows", "int64")
    steps = (rows + i64(stride - 1)) // i64(stride) if stride > 1 else rows
    padded = steps * i64(stride) if stride > 1 else rows
    f32 = "float32"
    args = {
        a.name: paired_placeholder(a, {"rows": rows, "hidden": hidden}, pairs)
        for a in arguments(case)
        if a.role == "in"
    }
    wanted = {a.name: a.dtype for a in arguments(case) if a.role == "out"}
    numbers = range(width)

    def row(i: Any) -> Any:
        return tirx.min(i, rows - 1) if stride > 1 else i

    def widened(name: str, number: int) -> Any:
        return te.compute(
            (padded, hidden),
            lambda i, k: element(args[name], (row(i), k), number, pairs),
            name=f"{name}32{number or ''}",
        )

    def widened_weight(number: int) -> Any:
        return te.compute(
            (hidden,),
            lambda k: element(args["weight"], (k,), number, pairs),
            name=f"weight32{number or ''}",
        )

    dy = [widened("dy", number) for number in numbers]
    # dbeta alone needs no x
    x = [widened("x", number) for number in numbers] if "x" in args else dy
    weight = [widened_weight(number) for number in numbers] if "weight" in args else None

    def deviation(number: int) -> Term:
        return lambda i, k: x[number][i, k] - args["mean"][row(i)]

    def xhat(number: int) -> Term:
        return lambda i, k: deviation(number)(i, k) * args["rstd"][row(i)]

    def g(number: int) -> Term:
        return lambda i, k: (
            dy[number][i, k] if weight is None else dy[number][i, k] * weight[number][k]
        )

    def product(one: Term, other: Term) -> Term:
        return lambda i, k: one(i, k) * other(i, k)

    gradients: dict[str, Any] = {}
    if "dx" in wanted:
        n = tirx.const(float(case.hidden), f32)
        # With pairs rstd is a factor of the sum, not of its terms: one operation less for each.
        factor = deviation if pairs else xhat
        sum_g, sum_gx = row_sum(
            padded,
            case.hidden // width,
            (*map(g, numbers), *(product(g(number), factor(number)) for number in numbers)),
            "row",
        )
        c1 = te.compute((padded,), lambda i: sum_g(i) / n, name="c1")
        c2 = te.compute(
            (padded,),
            lambda i: sum_gx(i) * args["rstd"][row(i)] / n if pairs else sum_gx(i) / n,
            name="c2",
        )
        # of rows that share a block, the same element as in the row's sums: it is loaded once
        shared = together > 1 and not contiguous

        def dx(i: Any, k: Any, number: int) -> Any:
            return (g(number)(i, k) - c1[i] - xhat(number)(i, k) * c2[i]) * args["rstd"][
                row(i) if shared else i
            ]

        mixed = "weight" in args and str(args["weight"].dtype) == f32
        gradients["dx"] = te.compute(
            (rows, hidden),
            lambda i, k: (
                round_pair(dx(i, k, 0), dx(i, k, 1), any_nan=mixed)
                if pairs
                else dx(i, k, 0).astype(case.dtype)
            ),
            name="dx",
        )

    def dgamma(number: int) -> Term:
        return product(lambda i, k: dy[number][i, k], xhat(number))

    def dbeta(number: int) -> Term:
        return lambda i, k: dy[number][i, k]

    summed = {
        name: [term(number) for number in numbers]
        for name, term in (("dgamma", dgamma), ("dbeta", dbeta))
        if name in wanted
    }
    if summed:
        terms = [term for of_name in summed.values() for term in of_name]
        parts = _partial_sums(terms, rows, (steps, hidden), (blocks, together), contiguous)
        for place, name in enumerate(summed):
            own = parts[place * width : (place + 1) * width]
            sizes = (blocks, case.hidden // width)
            gradients[name] = _total(name, own, sizes, wanted[name], first_column)
    return te.create_prim_func([{**args, **gradients}[a.name] for a in arguments(case)])


def _partial_sums(
    terms: Sequence[Term],
    rows: Any,
    sizes: tuple[Any, Any],
    shared: tuple[int, int],
    contiguous: bool,
) -> list[Any]:
    """The sums over rows of each block, of `sizes` (groups of a block, columns), where rows are
    `shared` among (blocks, rows of a group). All in one stage: the totals of one must not come
    between the partial sums of others.
    """
    from tvm import te, tirx

    def i64(value: int) -> Any:
        return tirx.IntImm("int64", value)

    (steps, columns), (blocks, together) = sizes, shared
    t, side = (
        te.reduce_axis((0, steps), name="step"),
        te.reduce_axis((0, i64(together)), name="side"),
    )
    add = sum_of(len(terms))

    def partial(b: Any, k: Any) -> Any:
        group = b * steps + t if contiguous else t * i64(blocks) + b
        i = group * i64(together) + side
        values = tuple(term(i, k) for term in terms)
        if blocks * together > 1:
            values = tuple(
                tirx.Select(i < rows, value, tirx.const(0.0, "float32")) for value in values
            )
        return add(values if len(terms) > 1 else values[0], axis=[t, side])

    parts = te.compute((i64(blocks), columns), partial, name="blocks")
    return list(parts) if len(terms) > 1 else [parts]


def _total(
    name: str,
    parts: Sequence[Any],
    sizes: tuple[int, int],
    dtype: str,
    first_column: Callable[[Any], Any] | None,
) -> Any:
    """The sum of all blocks' partial sums, of `sizes` (blocks, columns), rounded once where it is
    not kept in float32; `parts` are those of the elements of a column.
    """
    from tvm import te, tirx

    blocks, columns = sizes

    def column(block: Any, k: Any) -> Any:
        return k if first_column is None else k + first_column(block)

    def whole(part: Any, called: str) -> Any:
        block = te.reduce_axis((0, tirx.IntImm("int64", blocks)), name="block")
        return te.compute(
            (tirx.IntImm("int64", columns),),
            lambda k: te.sum(part[block, column(block, k)], axis=block),
            name=called,
        )

    if len(parts) == 1:
        total = whole(parts[0], name if dtype == "float32" else f"{name}_sum")
        return (
            total
            if dtype == "float32"
            else te.compute(total.shape, lambda k: total[k].astype(dtype), name=name)
        )
    first, second = whole(parts[0], f"{name}_sum"), whole(parts[1], f"{name}_sum1")
    if dtype == "float32":
        return te.compute(
            (tirx.IntImm("int64", 2 * columns),),
            lambda k: tirx.Select(k % 2 < 1, first[k // 2], second[k // 2]),
            name=name,
        )
    return te.compute(first.shape, lambda k: round_pair(first[k], second[k]), name=name)


def _forward(case: Case) -> Case:
    """The forward whose statistics this backward takes."""
    tokens = (case.variant or DEFAULT_VARIANT).split("+")
    weight = next((t for t in tokens if t.startswith("weight")), None)
    return Case(
        layer_norm.NAME,
        case.hidden,
        case.dtype,
        case.rows,
        layer_norm.variant(weight and ("float32" if "32" in weight else "same"), None),
    )


def inputs(case: Case, rows: int, style: str, seed: int) -> dict[str, Any]:
    """x and weight as the forward's inputs of that style; dy plain random; mean and rstd as its
    reference gives them, in float32.
    """
    import torch

    forward = _forward(case)
    forward_inputs = layer_norm.inputs(forward, rows, style, seed)
    stats = layer_norm.reference(forward, forward_inputs)
    generator = torch.Generator().manual_seed(seed + 1)
    values = {
        **forward_inputs,
        "dy": drawn(rows, case.hidden, generator=generator).to(getattr(torch, case.dtype)),
    }
    values |= {name: stats[name].float() for name in ("mean", "rstd")}
    return {a.name: values[a.name] for a in arguments(case) if a.role == "in"}


def reference(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """dx, dgamma and dbeta in float64, as far as they are wanted."""
    dy = given["dy"].double()
    wanted = {a.name for a in arguments(case) if a.role == "out"}
    gradients = {"dbeta": dy.sum(0)}
    if "x" in given:
        rstd = given["rstd"].double()[:, None]
        xhat = (given["x"].double() - given["mean"].double()[:, None]) * rstd
        g = dy * given["weight"].double() if "weight" in given else dy
        gradients["dx"] = rstd * (
            g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
        )
        gradients["dgamma"] = (dy * xhat).sum(0)
    return {name: gradients[name] for name in gradients if name in wanted}


def _aten(case: Case, given: Tensors, mixed: bool) -> Callable[[], tuple[Any, ...]]:
    """PyTorch's own backward bound to its arguments; what it needs beside the kernel's inputs is
    made once, here.

    `mixed`: statistics and weight in float32 whatever the dtype of x, which CPU kernels take as
    well.
    """
    import torch

    tokens = (case.variant or DEFAULT_VARIANT).split("+")
    wanted = [any(t.startswith(name) for t in tokens) for name in ("dx", "dgamma", "dbeta")]
    dy = given["dy"]
    dtype = torch.float32 if mixed else dy.dtype
    x = given["x"] if "x" in given else torch.zeros_like(dy)
    mean, rstd = (
        given[name][:, None].to(dtype) if name in given else torch.ones(dy.shape[0], 1, dtype=dtype)
        for name in ("mean", "rstd")
    )
    ones = torch.ones(case.hidden, dtype=dtype)
    weight = (
        given["weight"].to(dtype) if "weight" in given else ones if wanted[1] or mixed else None
    )
    bias = torch.zeros_like(ones) if wanted[2] else None
    shape = [case.hidden]
    return lambda: torch.ops.aten.native_layer_norm_backward(
        dy, x, shape, mean, rstd, weight, bias, wanted
    )


def eager(case: Case, given: Tensors) -> dict[str, torch.Tensor]:
    """What torch.ops.aten.native_layer_norm_backward gives, each gradient in its own dtype.

    In its mixed form for low precision, which does not round the statistics first.
    """
    import torch

    grads = dict(zip(("dx", "dgamma", "dbeta"), _aten(case, given, mixed=True)(), strict=True))
    return {
        a.name: grads[a.name].to(getattr(torch, a.dtype))
        for a in arguments(case)
        if a.role == "out"
    }


def baseline(case: Case, given: Tensors) -> Callable[[], Any]:
    """torch.ops.aten.native_layer_norm_backward as autograd calls it: with statistics in the dtype
    of x unless an affine is float32.
    """
    return _aten(case, given, mixed="32" in case.variant)


def gpu_baseline(case: Case, given: Tensors) -> Callable[[], Any]:
    """torch.ops.aten.native_layer_norm_backward: statistics in float32 whatever the dtype of x, the
    weight in that of x.
    """
    import torch

    wanted_names = {a.name for a in arguments(case) if a.role == "out"}
    wanted = [name in wanted_names for name in ("dx", "dgamma", "dbeta")]
    dy = given["dy"]
    x = given["x"] if "x" in given else torch.zeros_like(dy)
    mean, rstd = (
        given[name][:, None] if name in given else dy.new_ones(dy.shape[0], 1, dtype=torch.float32)
        for name in ("mean", "rstd")
    )
    ones = dy.new_ones(case.hidden)
    weight = given["weight"].to(dy.dtype) if "weight" in given else ones if wanted[1] else None
    bias = torch.zeros_like(ones) if wanted[2] else None
    shape = [case.hidden]
    return lambda: torch.ops.aten.native_layer_norm_backward(
        dy, x, shape, mean, rstd, weight, bias, wanted
    )


def moved_bytes(case: Case) -> int:
    """dy and x read once, dx written once, plus the vectors and the statistics."""
    return sum(
        DTYPES[a.dtype]
        * (case.rows if "rows" in a.shape else 1)
        * (case.hidden if "hidden" in a.shape else 1)
        for a in arguments(case)
    )


def flops(case: Case) -> int:
    """3 for xhat and g, 3 for the row's sums, 4 for dx, 3 for dgamma and dbeta, per element."""
    return 13 * case.rows * case.hidden


def tolerance(case: Case, output: str) -> Tolerance:
    """Twice eager's own largest error on the same inputs, plus a floor.

    The floor: one rounding of a low-precision gradient, or 16 of float32 for sums taken in another
    order, at the scale of the gradient itself. dgamma is at least of the scale of sqrt(rows)
    products of two numbers around 1.
    """
    rounding = {"float32": 16 * 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    dtype = next(a.dtype for a in arguments(case) if a.name == output)
    return Tolerance(2.0, rounding[dtype], of=output, least=0.0 if output == "dx" else 1.0)


GRID = tuple(
    Case(NAME, hidden, dtype, rows)
    for hidden in models.NORMS
    for dtype in ("float32", "bfloat16")
    for rows in (4096, 512, 32)
)

TELLING = (
    (Case(NAME, 4096, "bfloat16", 32768), Case(NAME, 1024, "float32", 4096)),
    (Case(NAME, 1024, "float32", 32768), Case(NAME, 4096, "bfloat16", 512)),
)

OP = Op(
    name=NAME,
    summary="layer normalization over the last axis, backward",
    variants=VARIANTS,
    checked=("dx", "weight+dx"),
    arguments=arguments,
    define=define,
    inputs=inputs,
    reference=reference,
    eager=eager,
    baseline=baseline,
    bytes=moved_bytes,
    flops=flops,
    tolerance=tolerance,
    linear={"dy": (), "weight": ()},
    grid=GRID,
    binding="lntune.torch.layer_norm_backward",
    gpu_baseline=gpu_baseline,
    more_cases={"gpu": same_sizes(NAME, layer_norm.GPU_CASES)},
    # only training calls it; half as much again is moved, so it takes longer than the forward
    priority=msgspec.structs.replace(layer_norm.PRIORITY, operator=1),
    telling=TELLING,
)
