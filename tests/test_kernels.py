"""The kernels themselves: every schedule there is, on this machine's instruction set, against
float64 mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_kernels import DEVICE, LAYER_NORMS, PLANS, Kernel, assert_right, built, schedule_cases
from grids import covered, thinned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_arguments import arguments, inputs, written

from lntune import ops
from lntune.case import DTYPES, MAX_HIDDEN, TYPICAL_ROWS, Case
from lntune.device import Device


def call(
    kernel: Kernel,
    case: Case,
    x: torch.Tensor,
    outputs: dict[str, torch.Tensor] | None = None,
    **given: Any,
) -> torch.Tensor:
    """y of a kernel; weight, bias and eps where `given` does not say are those of the operator's
    plain inputs.
    """
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    known = {**inputs(case, 1), "y": y, **given, "x": x, **(outputs or {})}
    values = arguments(case, x.numel() // case.hidden, known)
    kernel(*values.values())
    return values["y"]


@pytest.mark.parametrize("name", PLANS)
def test_every_schedule_serves_low_precision(name: str) -> None:
    """No schedule drops out of the tests below unseen: each has valid default knobs for an ordinary
    case.
    """
    assert any(case.values[0] == name for case in schedule_cases(short=(1024,), long=()))


def facts(parameter: Any) -> set[Any]:
    """What is to occur in every run: each dtype of each schedule, and each size."""
    name, case = parameter.values
    return {(name, case.dtype), case.hidden}


@pytest.mark.parametrize(("name", "case"), covered(schedule_cases(), facts))
def test_default_knobs_are_right(name: str, case: Case) -> None:
    """At its default knobs every schedule is right for every dtype, from rows of one element to the
    longest.
    """
    assert_right(case, built(name, case))


@pytest.mark.parametrize(("name", "case"), thinned(schedule_cases(short=(1000,), long=()), 4))
def test_one_row(name: str, case: Case) -> None:
    """The kernel planned for a single row (default knobs differ) is right for one and for many."""
    plan, single = PLANS[name], Case(case.op, case.hidden, case.dtype, 1)
    assert plan.reason_invalid(plan.default(single, DEVICE), single, DEVICE) is None
    assert_right(single, built(name, single))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    hidden=st.integers(1, 3000),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(LAYER_NORMS),
    rows=st.sampled_from(TYPICAL_ROWS),
)
def test_any_hidden_size(hidden: int, dtype: str, name: str, rows: int) -> None:
    """Sizes nobody thought of are right, too."""
    case = Case("layer_norm", hidden, dtype, rows)
    if PLANS[name].reason_invalid(PLANS[name].default(case, DEVICE), case, DEVICE):
        name = LAYER_NORMS[0]  # the one that takes every dtype
    assert_right(case, built(name, case))


@pytest.mark.parametrize("isa", ["x86-64-v4", "x86-64-v3", "x86-64-v2"])
def test_lower_levels_run_here(isa: str) -> None:
    """Code for an older CPU of the same family, with its narrower vectors, is right as well."""
    levels = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
    if DEVICE.isa not in levels or levels.index(isa) > levels.index(DEVICE.isa):
        pytest.skip(f"this CPU ({DEVICE.isa}) does not run {isa}")
    other = Device("cpu", "older", isa, 2)
    for name in LAYER_NORMS:
        for hidden in (100, 1000):
            case = Case("layer_norm", hidden, "bfloat16", 512)
            assert_right(case, built(name, case, other))


@pytest.mark.parametrize("name", LAYER_NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_depends_on_itself_alone(name: str, dtype: str) -> None:
    """y of a row is bitwise the same alone, among others, at any place and among any number of
    rows.
    """
    case = Case("layer_norm", 1000, dtype, 512)
    if PLANS[name].reason_invalid(PLANS[name].default(case, DEVICE), case, DEVICE):
        pytest.skip("the schedule does not take this dtype")
    kernel = built(name, case)
    x = inputs(case, 37, seed=1)["x"]
    together = call(kernel, case, x)
    for row in (0, 1, 17, 35, 36):
        assert torch.equal(call(kernel, case, x[row : row + 1].contiguous())[0], together[row])
    assert torch.equal(call(kernel, case, x[3:12].contiguous()), together[3:12])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(kernel, case, x[order].contiguous()), together[order])


@pytest.mark.parametrize("hidden", [3, 1000, 1024])
def test_invariants_of_the_mathematics(hidden: int) -> None:
    """Without an affine: rows sum to 0 and have variance 1; adding a constant to x or scaling it by
    a power of two (eps aside) changes nothing beyond rounding. And x itself is not written to.
    """
    case = Case("layer_norm", hidden, "float32", 512, "plain")
    kernel = built(LAYER_NORMS[0], case)
    x = inputs(case, 9, seed=2)["x"]
    before = x.clone()
    y = call(kernel, case, x, eps=0.0)
    assert torch.equal(x, before)
    assert y.double().mean(-1).abs().max() < 1e-6
    assert (y.double().square().mean(-1) - 1).abs().max() < 1e-5
    # x + 8 is rounded to 2^-21 (values below 16 have 20 bits after the point), which the smallest
    # row sigma here amplifies.
    sigma = x.double().std(-1, unbiased=False).min().item()
    assert (call(kernel, case, x + 8, eps=0.0) - y).abs().max() < 2**-19 / sigma + 1e-6
    assert torch.equal(call(kernel, case, x * 4, eps=0.0), y)  # exact: only exponents change


def test_no_rows() -> None:
    """An empty batch is taken, and nothing is written."""
    for name in LAYER_NORMS:
        case = Case("layer_norm", 100, "bfloat16", 512)
        assert call(built(name, case), case, torch.empty(0, 100, dtype=torch.bfloat16)).shape == (
            0,
            100,
        )


@pytest.mark.parametrize(("name", "case"), thinned(schedule_cases(short=(1000, 1024), long=()), 5))
def test_misaligned_arguments(name: str, case: Case) -> None:
    """Tensors that start at any element, 16 of them in a row, give bitwise what aligned ones
    give.
    """
    kernel, values = built(name, case), arguments(case, 3, inputs(case, 3, seed=4), output=0.0)
    outputs = written(case, values)
    kernel(*values.values())

    def moved(tensor: torch.Tensor, by: int) -> torch.Tensor:
        whole = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
        view = whole[by : by + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        return view

    for by in range(17):  # every argument by another number of elements
        off = {
            name: moved(t, by * (2 * i + 1) % 17)
            for i, (name, t) in enumerate(values.items())
            if isinstance(t, torch.Tensor)
        }
        for output in outputs:
            off[output].zero_()
        kernel(*{**values, **off}.values())
        for output, aligned in outputs.items():
            assert torch.equal(off[output], aligned), f"{output}, by {by}"


def _wrong_calls() -> dict[str, Callable[[dict[str, Any]], None]]:
    """What a caller may do wrong -> a change to the arguments that does it."""
    f32 = torch.float32
    return {
        "x of another dtype": lambda a: a.update(x=a["x"].to(torch.float16)),
        "x of double": lambda a: a.update(x=a["x"].double()),
        "x too wide": lambda a: a.update(x=torch.zeros(4, 101)),
        "x too narrow": lambda a: a.update(x=torch.zeros(4, 99)),
        "x flat": lambda a: a.update(x=torch.zeros(400)),
        "x of three dimensions": lambda a: a.update(x=torch.zeros(2, 2, 100)),
        "x transposed": lambda a: a.update(x=torch.zeros(100, 4).T),
        "x with gaps": lambda a: a.update(x=torch.zeros(4, 200)[:, ::2]),
        "x row-strided": lambda a: a.update(x=torch.zeros(4, 128)[:, :100]),
        "x on no device": lambda a: a.update(x=torch.zeros(4, 100, device="meta")),
        "x not a tensor": lambda a: a.update(x=[[0.0] * 100] * 4),
        "x missing": lambda a: a.update(x=None),
        "weight of another dtype": lambda a: a.update(weight=a["weight"].to(torch.bfloat16)),
        "weight too short": lambda a: a.update(weight=torch.zeros(99)),
        "weight with gaps": lambda a: a.update(weight=torch.zeros(200)[::2]),
        "bias missing": lambda a: a.update(bias=None),
        "eps a word": lambda a: a.update(eps="small"),
        "y with fewer rows": lambda a: a.update(y=torch.zeros(3, 100)),
        "y with more rows": lambda a: a.update(y=torch.zeros(5, 100)),
        "y of another dtype": lambda a: a.update(y=torch.zeros(4, 100, dtype=torch.int32)),
        "y row-strided": lambda a: a.update(y=torch.zeros(4, 128, dtype=f32)[:, :100]),
        "too few arguments": lambda a: a.pop("y"),
        "too many arguments": lambda a: a.update(more=torch.zeros(4)),
    }


def _refusal(wrong: str) -> tuple[type[Exception], str]:
    """What a wrong call is refused with: a TypeError for what is of the wrong kind, a ValueError
    for what has the wrong sizes, both naming the argument; and PyTorch's own error for what has no
    memory.
    """
    argument, _, what = wrong.partition(" ")
    if what == "on no device":
        return RuntimeError, "meta"
    if what == "arguments":
        return TypeError, "Expected 5 arguments"
    if what == "not a tensor":
        return ValueError, "Mismatched x.ndim on argument #0"
    if what in ("missing", "a word"):
        return (
            TypeError,
            f"Mismatched type on argument #{('x', 'weight', 'bias', 'eps', 'y').index(argument)}",
        )
    kind = TypeError if "dtype" in what or what == "of double" else ValueError
    return (
        kind,
        r"(Mismatched|Invalid)"
        rf" {argument}\.{'dtype' if kind is TypeError else '(shape|strides|ndim)'}",
    )


@pytest.mark.parametrize("wrong", _wrong_calls())
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_wrong_arguments_are_refused(name: str, wrong: str) -> None:
    """A call that does not fit the kernel raises what says which argument, and the kernel works as
    before.
    """
    dtype = "float32" if name == LAYER_NORMS[0] else "bfloat16"
    case = Case("layer_norm", 100, dtype, 512)
    kernel = built(name, case)
    right = arguments(case, 4, inputs(case, 4, seed=5))
    changed = dict(right)
    _wrong_calls()[wrong](changed)
    if dtype == "bfloat16":  # the dtype is wrong where it is meant to be
        for argument, value in changed.items():
            if wrong == "weight of another dtype" and argument == "weight":
                changed[argument] = right["weight"].float()
            elif (
                isinstance(value, torch.Tensor)
                and value.dtype == torch.float32
                and value.device.type == "cpu"
            ):
                changed[argument] = torch.empty_strided(
                    value.shape, value.stride(), dtype=torch.bfloat16
                )
    error, says = _refusal("few arguments" if wrong.startswith("too ") else wrong)
    with pytest.raises(error, match=says):
        kernel(*changed.values())
    kernel(*right.values())
    assert torch.isfinite(right["y"]).all()


@pytest.mark.parametrize(("isa", "cores"), [("x86-64-v4", 8), ("x86-64-v3", 1), ("aarch64", 2)])
def test_default_knobs_are_valid_everywhere(isa: str, cores: int) -> None:
    """For every hidden size, dtype and row bucket some schedule's default knobs are valid, its
    first schedule's always; and whatever is refused is refused with a reason in words, and only
    where no knobs at all would fit.
    """
    device = Device("cpu", "other", isa, cores)
    for op in {s.op for s in PLANS.values()}:
        plans = [s for s in PLANS.values() if s.op == op]
        for hidden in (
            *range(1, 200),
            *range(201, 2101, 19),
            768,
            1024,
            2048,
            4096,
            4097,
            16384,
            50257,
            65536,
        ):
            if any(
                a.sizes(1, hidden)[-1] > MAX_HIDDEN
                for a in ops.get(op).arguments(Case(op, hidden, "float32", 1))
                if a.shape
            ):
                continue  # gates longer than any row
            for dtype in DTYPES:
                for rows in TYPICAL_ROWS:
                    case = Case(op, hidden, dtype, rows)
                    reasons = [
                        p.reason_invalid(p.default(case, device), case, device) for p in plans
                    ]
                    assert reasons[0] is None, f"{plans[0].name}, {case}: {reasons[0]}"
                    assert all(
                        r is None or (isinstance(r, str) and len(r) > 10) for r in reasons
                    ), str(case)
                    if hidden in (1, 7, 1000):
                        assert not any(
                            r and p.space(case, device) for r, p in zip(reasons, plans, strict=True)
                        ), str(case)


@pytest.mark.parametrize("name", PLANS)
def test_reasons_are_sentences(name: str) -> None:
    """Over the whole knob space each setting is valid, or is refused with a reason in words, which
    fits behind "does not fit CASE: " and before a full stop; settings that differ are not all
    refused in the same words.
    """
    from lntune import knobs

    refused: set[str] = set()
    for hidden, rows, dtype in (
        (1, 1, "float32"),
        (100, 8, "bfloat16"),
        (1024, 512, "float32"),
        (16384, 4096, "float16"),
    ):
        case = Case(PLANS[name].op, hidden, dtype, rows)
        for setting in knobs.enumerate_space(PLANS[name].knobs):
            reason = PLANS[name].reason_invalid(setting, case, DEVICE)
            if reason is not None:
                assert (
                    len(reason.split()) >= 5
                    and "\n" not in reason
                    and reason[-1].isalnum()
                    and reason[0] == reason[0].lower()
                ), reason
                refused.add(reason)
    assert len(refused) > 1
