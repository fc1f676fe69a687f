"""The check, checked: kernels written in PyTorch that are right pass, and each way of being wrong
is caught.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from lntune import check, ops
from lntune.backends import device_of
from lntune.case import DTYPES, Case
from lntune.check import problems
from lntune.log.records import Record

OP = ops.get("layer_norm")
Kernel = Callable[..., None]
Body = Callable[[dict[str, Any]], dict[str, torch.Tensor]]


def case_of(dtype: str = "float32", hidden: int = 100, variant: str = "weight+bias+stats") -> Case:
    """A case; with the statistics unless asked otherwise, so that every output is covered."""
    return Case("layer_norm", hidden, dtype, 8, variant)


def kernel_of(
    case: Case, compute: Body, after: Callable[[dict[str, Any]], None] = lambda _: None
) -> Kernel:
    """A kernel in PyTorch: `compute` makes y, mean and rstd from the named arguments; `after` may
    do harm.
    """

    def kernel(*values: Any) -> None:
        named = dict(zip((a.name for a in OP.arguments(case)), values, strict=True))
        for name, value in compute(named).items():
            if name in named:
                named[name].copy_(value.reshape(named[name].shape))
        after(named)

    return kernel


def right(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Layer norm in float64, rounded once."""
    x = named["x"].double()
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + named["eps"]).rsqrt()
    return {"y": affine((x - mean) * rstd, named), "mean": mean, "rstd": rstd}


def affine(y: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
    """y with weight and bias, where there are any."""
    if "weight" in named:
        y = y * named["weight"].to(y.dtype)
    return y + named["bias"].to(y.dtype) if "bias" in named else y


def neighbours(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A flat view of the tensor and of as many elements before and behind it."""
    start = tensor.storage_offset() - elements
    return tensor.as_strided((tensor.numel() + 2 * elements,), (1,), start)


@pytest.mark.parametrize("variant", OP.variants)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_kernel_passes(dtype: str, variant: str) -> None:
    """Layer norm in float64 passes for every dtype and variant, on every style of input, well
    within the tolerance.
    """
    case = case_of(dtype, 7, variant)
    verdict = check.verify(case, kernel_of(case, right))
    assert verdict.ok, verdict.message
    assert set(verdict.errors) == {a.name for a in OP.arguments(case) if a.role == "out"}
    assert all(0 <= error <= 1 for error in verdict.errors.values())
    # nothing rounds less than once
    assert all(ratio <= 1.01 for ratio in verdict.versus_eager.values())


@pytest.mark.parametrize("hidden", [1, 1000, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_itself_passes(dtype: str, hidden: int) -> None:
    """PyTorch's own layer norm passes: the tolerance asks for nothing that eager does not give. Its
    error is what others are compared with.
    """
    case = case_of(dtype, hidden)
    verdict = check.verify(case, kernel_of(case, lambda a: dict(OP.eager(case, a))))
    assert verdict.ok, verdict.message
    assert all(0.99 <= ratio <= 1.01 for ratio in verdict.versus_eager.values())


@pytest.mark.parametrize("hidden", [1000, 65536])
def test_a_long_row_in_float32_passes(hidden: int) -> None:
    """Statistics in float32, summed pairwise and in two passes, are good enough at every length."""

    def two_pass(named: dict[str, Any]) -> dict[str, torch.Tensor]:
        x = named["x"].float()
        mean0 = x.mean(-1, keepdim=True)
        delta = (x - mean0).mean(-1, keepdim=True)
        rstd = (
            ((x - mean0).square().mean(-1, keepdim=True) - delta.square()).clamp(min=0)
            + named["eps"]
        ).rsqrt()
        rstd = torch.where(x.isfinite().all(-1, keepdim=True), rstd, torch.nan)
        return {
            "y": affine((x - mean0) * rstd - delta * rstd, named),
            "mean": mean0 + delta,
            "rstd": rstd,
        }

    case = case_of("float32", hidden)
    verdict = check.verify(case, kernel_of(case, two_pass))
    assert verdict.ok, verdict.message


def off_by(error: float, output: str) -> Body:
    """Right, but for one element of one output."""

    def compute(named: dict[str, Any]) -> dict[str, torch.Tensor]:
        outputs = right(named)
        outputs[output] = outputs[output].clone()
        outputs[output].view(-1)[-1] += error
        return outputs

    return compute


def one_pass(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The variance as E[x^2] - mean^2 in float32."""
    x = named["x"].float()
    mean = x.mean(-1, keepdim=True)
    rstd = ((x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0) + named["eps"]).rsqrt()
    rstd = torch.where(x.isfinite().all(-1, keepdim=True), rstd, torch.nan)
    return {"y": affine((x - mean) * rstd, named), "mean": mean, "rstd": rstd}


def rounded_statistics(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Right, but mean and rstd are kept in the dtype of x."""
    x = named["x"].double()
    mean = x.mean(-1, keepdim=True).to(named["x"].dtype).double()
    rstd = (
        ((x - mean).square().mean(-1, keepdim=True) + named["eps"])
        .rsqrt()
        .to(named["x"].dtype)
        .double()
    )
    return {"y": affine((x - mean) * rstd, named), "mean": mean, "rstd": rstd}


def low_sums(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The sums of a row are accumulated in the dtype of x, element by element."""
    x = named["x"]
    mean = (_running(x) / x.shape[-1]).double()
    squares = (x.double() - mean).square().to(x.dtype)
    rstd = ((_running(squares) / x.shape[-1]).double() + named["eps"]).rsqrt()
    return {"y": affine((x.double() - mean) * rstd, named), "mean": mean, "rstd": rstd}


def _running(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x[..., :1])
    for k in range(x.shape[-1]):
        total = total + x[..., k : k + 1]
    return total


def rounded_twice(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """y is rounded to the dtype of x before the affine, after its multiplication and after its
    addition.
    """
    outputs, low = right(named), named["x"].dtype
    x = named["x"].double()
    y = ((x - outputs["mean"]) * outputs["rstd"]).to(low)
    y = (y * named["weight"].to(low)).to(low) * torch.tensor(1 + 2.0**-7, dtype=low)
    return {**outputs, "y": y + named["bias"].to(low)}


def without_eps(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """eps forgotten; constant rows then divide by zero."""
    return right({**named, "eps": 0.0})


def eps_outside(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """eps added to sigma, not to the variance (what the paper's text suggests and PyTorch does not
    do).
    """
    x = named["x"].double()
    mean = x.mean(-1, keepdim=True)
    rstd = 1 / ((x - mean).square().mean(-1, keepdim=True).sqrt() + named["eps"])
    return {"y": affine((x - mean) * rstd, named), "mean": mean, "rstd": rstd}


def unbiased(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The variance divided by N - 1."""
    x = named["x"].double()
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1) + named["eps"]).rsqrt()
    return {"y": affine((x - mean) * rstd, named), "mean": mean, "rstd": rstd}


def swallowed_nan(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whatever is not a number becomes 0."""
    return {name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in right(named).items()}


def clamped_variance(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """rstd by way of a maximum that forgets NaN, as fmaxf does: an Inf in the row then leaves a
    finite rstd.
    """
    outputs = right(named)
    return {**outputs, "rstd": torch.fmin(outputs["rstd"], torch.tensor(1e30, dtype=torch.float64))}


def poisoned_neighbours(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two rows share their statistics' registers: what is not finite in one reaches the next."""
    outputs = right(named)
    bad = ~outputs["rstd"].isfinite()
    return {name: value.masked_fill(bad.roll(1, 0), torch.nan) for name, value in outputs.items()}


def swapped_rows(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The last two rows of y change places."""
    outputs = right(named)
    rows = outputs["y"].shape[0]
    order = [*range(rows - 2), rows - 1, rows - 2] if rows > 1 else [0]
    return {**outputs, "y": outputs["y"][order]}


def rows_swapped_statistics(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """y is right but the statistics that are kept belong to other rows."""
    outputs = right(named)
    return {**outputs, "mean": outputs["mean"].roll(1, 0), "rstd": outputs["rstd"].roll(1, 0)}


def squares_overflow(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Deviations are squared in float16 or as if the largest float were 1e30."""
    x = named["x"].double()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square()
    variance = torch.where(
        variance > (65504 if named["x"].dtype == torch.float16 else 1e30), torch.inf, variance
    ).mean(-1, keepdim=True)
    rstd = (variance + named["eps"]).rsqrt()
    return {"y": affine((x - mean) * rstd, named), "mean": mean, "rstd": rstd}


WRONG: dict[str, tuple[Body, tuple[str, ...]]] = {
    "y off by 1e-3": (off_by(1e-3, "y"), ("float32",)),
    "y off by 0.1": (off_by(0.1, "y"), ("float16", "bfloat16")),
    "mean off by 1e-3": (off_by(1e-3, "mean"), ("float32",)),
    "rstd off by 1e-3": (off_by(1e-3, "rstd"), tuple(DTYPES)),
    "variance in one pass": (one_pass, ("float32",)),
    "statistics rounded": (rounded_statistics, ("float16", "bfloat16")),
    "sums in low precision": (low_sums, ("float16", "bfloat16")),
    "y scaled by a rounding": (rounded_twice, ("float16", "bfloat16")),
    "eps forgotten": (without_eps, tuple(DTYPES)),
    "eps outside the root": (eps_outside, tuple(DTYPES)),
    "variance over N - 1": (unbiased, tuple(DTYPES)),
    "NaN swallowed": (swallowed_nan, tuple(DTYPES)),
    "NaN lost in a maximum": (clamped_variance, tuple(DTYPES)),
    "neighbours poisoned": (poisoned_neighbours, tuple(DTYPES)),
    "rows swapped": (swapped_rows, tuple(DTYPES)),
    "statistics of other rows": (rows_swapped_statistics, tuple(DTYPES)),
    "squares overflow": (squares_overflow, ("float32", "float16")),
}


@pytest.mark.parametrize(
    ("how", "dtype"), [(how, dtype) for how, (_, dtypes) in WRONG.items() for dtype in dtypes]
)
def test_a_wrong_kernel_is_caught(how: str, dtype: str) -> None:
    """Each way of computing something else is caught, and the message says which output and on
    which inputs.
    """
    case = case_of(dtype)
    verdict = check.verify(case, kernel_of(case, WRONG[how][0]))
    assert not verdict.ok
    assert verdict.message.split(":")[0] in ("y", "mean", "rstd")
    assert "inputs" in verdict.message
    assert " row" in verdict.message


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("variance in one pass", "float32"),
        ("sums in low precision", "float16"),
        ("sums in low precision", "bfloat16"),
        ("statistics rounded", "float16"),
        ("statistics rounded", "bfloat16"),
        ("neighbours poisoned", "bfloat16"),
        ("eps forgotten", "bfloat16"),
    ],
)
def test_y_alone_gives_it_away(how: str, dtype: str) -> None:
    """A kernel that keeps no statistics is caught by its y: some style of input brings the fault
    out of the rounding.
    """
    case = case_of(dtype, 1000, "weight+bias")
    assert not check.verify(case, kernel_of(case, WRONG[how][0])).ok


def test_one_pass_is_caught_by_the_shifted_style() -> None:
    """E[x^2] - mean^2 is right on plain inputs, so it is the style with a large mean that must
    catch it.
    """
    case = case_of()
    assert "shifted" in check.verify(case, kernel_of(case, one_pass)).message


def unwritten(elements: slice) -> Callable[[dict[str, Any]], None]:
    """The case in which some elements of y keep what was there before; called in place of a
    computation.
    """

    def skip(named: dict[str, Any]) -> None:
        normalized = affine(
            (named["x"].double() - right(named)["mean"]) * right(named)["rstd"], named
        ).to(named["y"].dtype)
        keep = named["y"].view(-1)[elements].clone()
        named["y"].copy_(normalized.reshape(named["y"].shape))
        named["y"].view(-1)[elements] = keep

    return skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "elements",
    [slice(-1, None), slice(0, 1), slice(96, 100), slice(None)],
    ids=["last", "first", "tail of a row", "all"],
)
def test_an_element_that_is_not_written_is_caught(dtype: str, elements: slice) -> None:
    """Outputs start as NaN, so what a kernel leaves out shows even where the right value is 0."""
    case = case_of(dtype, 100, "plain")

    def kernel(*values: Any) -> None:
        unwritten(elements)(dict(zip((a.name for a in OP.arguments(case)), values, strict=True)))

    verdict = check.verify(case, kernel)
    assert not verdict.ok
    assert "y: " in verdict.message


def test_a_statistic_that_is_not_written_is_caught() -> None:
    """The same for the statistics: a kernel that forgets rstd is wrong."""
    case = case_of()
    verdict = check.verify(
        case, kernel_of(case, lambda a: {k: v for k, v in right(a).items() if k != "rstd"})
    )
    assert verdict.message.startswith("rstd: ")


@pytest.mark.parametrize("output", ["y", "mean", "rstd"])
@pytest.mark.parametrize("at", [0, -1, 1, -2])
def test_a_write_outside_is_caught(output: str, at: int) -> None:
    """One element written before or behind any output is seen, whatever is written there and though
    all results are right.
    """
    case = case_of("bfloat16")

    def spill(named: dict[str, Any]) -> None:
        neighbours(named[output], 2)[at] = 0.0

    verdict = check.verify(case, kernel_of(case, right, spill))
    assert verdict.message.startswith(f"wrote outside {output}")


@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_a_changed_input_is_caught(argument: str) -> None:
    """One element of an input written to is seen, be it only the sign of a zero."""
    case = case_of()

    def harm(named: dict[str, Any]) -> None:
        flat = named[argument].view(-1)
        flat[3] = -0.0 if flat[3] == 0 else flat[3] * (1 + 2.0**-20)

    assert check.verify(case, kernel_of(case, right, harm)).message.startswith(
        f"changed its input {argument}"
    )


@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
@pytest.mark.parametrize("side", [0, -1], ids=["before", "behind"])
def test_a_read_outside_is_caught(argument: str, side: int) -> None:
    """What lies beside an input is NaN: a kernel that adds 0 times its neighbour to the result is
    seen.
    """
    case = case_of()

    def compute(named: dict[str, Any]) -> dict[str, torch.Tensor]:
        outputs = right(named)
        outputs["y"] = outputs["y"].clone()
        outputs["y"].view(-1)[side] += 0.0 * neighbours(named[argument], 1)[side].double()
        return outputs

    assert "finite where" in check.verify(case, kernel_of(case, compute)).message


@pytest.mark.parametrize("fence", [check.FENCE, check.ALIGNED])
def test_arguments_are_contiguous_and_lie_as_kernels_have_to_take_them(fence: int) -> None:
    """Kernels are checked on contiguous tensors; inputs and outputs are both aligned to 64 bytes in
    some problems and, unless a kernel may ask for more, to 16 or to one element only in others, in
    all ways.
    """
    case, seen = case_of("bfloat16"), set()

    def kernel(*values: Any) -> None:
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        assert all(v.is_contiguous() for v in tensors)
        off = 67 * tensors[0].element_size() % 64
        places = [v.data_ptr() % 64 for v in (tensors[0], tensors[3])]
        assert {v.data_ptr() % 64 for v in tensors} <= {0, 16, *(67 * s % 64 for s in (2, 4))}
        seen.add(tuple({0: "64", 16: "16", off: "1"}[place] for place in places))

    check.verify(case, kernel, fence)
    ways = {(a, b) for aligned in ("64", "16") for a in (aligned, "1") for b in (aligned, "1")}
    assert seen == (ways if fence == check.FENCE else {("64", "64")})


def test_inputs_are_not_all_aligned_alike() -> None:
    """In some problems the first input is aligned and others are not, and the other way round."""
    seen = set()

    def kernel(*values: Any) -> None:
        x, weight = (v for v in values[:2])
        seen.add((x.data_ptr() % 16 == 0, weight.data_ptr() % 16 == 0))

    check.verify(case_of("float32"), kernel)
    assert seen >= {(True, False), (False, True)}


@pytest.mark.parametrize("name", ops.OPS)
def test_a_tolerance_is_at_the_scale_of_what_is_right(name: str) -> None:
    """What stands in an output's or a sum's place before does not decide how far a kernel may be
    off: in every style and variant a tolerance is at least its floor at the scale of the truth.
    """
    op = ops.get(name)
    for variant in op.variants:
        case = Case(name, 8, "float32", 21, variant)
        for problem in problems.of_styles(name, 8, "float32", variant):
            for output, allowed in problem.tolerance.items():
                rule = op.tolerance(case, output)
                if output in ((rule.of,) if isinstance(rule.of, str) else rule.of):
                    least = rule.floor * problems.largest(problem.truth[output])
                    assert allowed >= least


def test_what_a_kernel_raises_comes_through() -> None:
    """An exception of the kernel is the caller's to record."""

    def kernel(*_: Any) -> None:
        raise RuntimeError("cannot")

    with pytest.raises(RuntimeError, match="cannot"):
        check.verify(case_of(), kernel)


def test_a_kernel_that_does_nothing_is_wrong() -> None:
    """Nothing done is nothing right, and the verdict is still made of numbers that a log can
    hold.
    """
    verdict = check.verify(case_of(), lambda *_: None)
    assert not verdict.ok
    assert all(error <= sys.float_info.max for error in verdict.errors.values())
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=check.Verdict) == verdict


def test_errors_are_in_units_of_the_tolerance() -> None:
    """`errors` is 1 at the tolerance: an error of twice that reads 2, and the message has both
    numbers.
    """
    case = case_of()
    (problem,) = (
        p
        for p in problems.of_styles("layer_norm", 100, "float32", case.variant)
        if p.style == "normal" and p.rows > 1
    )
    largest = max(
        p.tolerance["y"] for p in problems.of_styles("layer_norm", 100, "float32", case.variant)
    )
    verdict = check.verify(case, kernel_of(case, off_by(-3 * largest, "y")))
    assert not verdict.ok
    assert verdict.errors["y"] >= 2.0
    assert "times what is allowed" in verdict.message
    assert problem.tolerance["y"] > 2 * problem.eager_error["y"]


def test_records_take_any_verdict() -> None:
    """The errors of a verdict fit a record's fields."""
    fields = {f.name: f.type for f in msgspec.structs.fields(Record)}
    for name in ("errors", "versus_eager"):
        shares = {"y": 0.0, "dx": 1.5, "dgamma": float(torch.finfo(torch.float64).max)}
        assert msgspec.convert(shares, fields[name]) == shares


SUMS = {
    "added": "",
    "set": "dweight_h: error",
    "left": "dweight_h: error",
    "outside": "wrote outside dweight_h",
}


@pytest.mark.parametrize("how", SUMS)
def test_sums_are_added_to(how: str) -> None:
    """A kernel has to add to the sums that it is given, in any of their rows; setting them, leaving
    them or writing beside them is seen.
    """
    plan = ops.get("lnlstm_step_backward")
    case = Case(plan.name, 5, "float32", 512)
    arguments = plan.arguments(case)

    def kernel(*values: Any) -> None:
        named = dict(zip([a.name for a in arguments], values, strict=True))
        outputs = plan.eager(case, {a.name: named[a.name] for a in arguments if a.role == "in"})
        for a in arguments:
            if a.role == "out":
                named[a.name].copy_(outputs[a.name])
            elif a.role == "sum" and (how == "added" or a.name != "dweight_h"):
                named[a.name][-1] += outputs[a.name]
        if how == "set":
            named["dweight_h"].zero_()[0] += outputs["dweight_h"]
        elif how == "outside":
            neighbours(named["dweight_h"], 1)[-1] = 0

    verdict = check.verify(case, kernel)
    assert verdict.ok is (how == "added")
    assert verdict.message.startswith(SUMS[how])


@pytest.mark.parametrize("target", [None, "cpu", "cuda:sm_90"])
def test_sums_are_those_of_the_device(target: str | None) -> None:
    """There are as many blocks of sums as the kernel's device asks for, this CPU unless told
    otherwise.
    """
    device = device_of(target) if target else None
    plan = ops.get("lnlstm_step_backward")
    case = Case(plan.name, 5, "float32", 512)
    seen: set[int] = set()

    def kernel(*values: Any) -> None:
        seen.update(
            v.shape[0] for a, v in zip(plan.arguments(case), values, strict=True) if a.role == "sum"
        )

    check.verify(case, kernel, device=device)
    assert seen == {case.blocks(device or device_of("cpu"))}


def test_tensors_are_where_they_are_asked_for() -> None:
    """All tensors of a call are on the place named, inputs, outputs and sums alike."""
    plan = ops.get("lnlstm_step_backward")
    case, seen = Case(plan.name, 5, "float32", 512), []

    def kernel(*values: Any) -> None:
        seen.extend(v.device.type for v in values if isinstance(v, torch.Tensor))
        raise RuntimeError("nothing runs there")

    with pytest.raises(RuntimeError, match="nothing runs there"):
        check.verify(case, kernel, place="meta")
    assert set(seen) == {"meta"}
