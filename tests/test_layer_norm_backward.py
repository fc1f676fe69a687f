"""Layer norm backward as a function and as a kernel: the same bits, any number of rows, any set of
gradients, bad arguments.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from grids import product
from kernel_arguments import inputs
from torch import Tensor

import lntune
from lntune import check, device, schedule
from lntune.case import Case
from lntune.errors import InputError
from lntune.kernels import compiler
from lntune.ops.layer_norm_backward import VARIANTS, reference, variant
from lntune.torch import layer_norm_backward as module
from lntune.torch.layer_norm_backward import layer_norm_backward

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

DEVICE = device.current()
PLAN = schedule.get("blocked_rows", "layer_norm_backward")
NAMES = ("dx", "dgamma", "dbeta")


def given(rows: int, hidden: int, dtype: str = "float32", style: str = "normal") -> dict[str, Any]:
    """The operator's own inputs."""
    case = Case("layer_norm_backward", hidden, dtype, max(rows, 1))
    return inputs(case, rows, style, seed=7)


def run(
    g: dict[str, Any], wanted: tuple[bool, bool, bool] = (True, True, True)
) -> dict[str, Tensor]:
    """The gradients by name, those that are not wanted left out."""
    with torch.no_grad():
        grads = layer_norm_backward(
            g["dy"],
            g["x"],
            (g["dy"].shape[-1],),
            g["mean"],
            g["rstd"],
            g["weight"],
            g["weight"],
            wanted,
        )
    assert [m is not None for m in grads] == list(wanted)
    return {name: m for name, m in zip(NAMES, grads, strict=True) if m is not None}


def close(grads: dict[str, Tensor], g: dict[str, Any], dtype: str = "float32") -> None:
    """The gradients against float64; dgamma and dbeta carry the rounding of sums over the rows."""
    case = Case("layer_norm_backward", g["x"].shape[-1], dtype, max(len(g["x"]), 1))
    truth = reference(case, g)
    rounding = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for name, tensor in grads.items():
        scale = max(1.0, float(truth[name].abs().max()) if truth[name].numel() else 1.0)
        assert float((tensor.double() - truth[name]).abs().max()) <= rounding * scale, name


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 33, 127, 1025])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_rows(rows: int, dtype: str) -> None:
    """Rows that fill no block, some blocks and all of them; the second call, which is a direct one,
    gives the same bits.
    """
    g = given(rows, 100, dtype)
    first, second = run(g), run(g)
    close(first, g, dtype)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_the_same_bits_whatever_the_threads() -> None:
    """dgamma and dbeta are summed in a fixed order: one thread, two, and two again agree to the
    bit.
    """
    g, threads = given(1024, 512), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            results.append(run(g))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(results[0][name], other[name]) for other in results[1:] for name in NAMES
    )


@pytest.mark.parametrize(
    ("blocks", "together", "hidden"), product((1, 2, 8), (1, 2, 4), (5, 1000, 100))
)
def test_blocks_and_rows_side_by_side(blocks: int, together: int, hidden: int) -> None:
    """Every way to share rows among blocks is right, also where the last turn is not full."""
    case = Case("layer_norm_backward", hidden, "bfloat16", 64)
    machine = machine_with(cores=8)
    setting = dataclasses.replace(
        PLAN.default(case, machine), blocks=blocks, together=together, lanes=1, store=1
    )
    assert PLAN.reason_invalid(setting, case, machine) is None
    verdict = check.verify(case, compiler.in_memory(case, PLAN, setting, machine))
    assert verdict.ok, verdict.message


def machine_with(**fields: Any) -> device.Device:
    """This device with some of its facts changed."""
    import msgspec

    return msgspec.structs.replace(DEVICE, **fields)


@pytest.mark.parametrize(
    ("name", "dtype", "hidden"), product(tuple(VARIANTS), ("float32", "float16"), (7, 130))
)
def test_every_set_of_gradients(name: str, dtype: str, hidden: int) -> None:
    """Every variant is right in the dtypes that the general tests leave out, for a row shorter than
    a vector and a longer one.
    """
    case = Case("layer_norm_backward", hidden, dtype, 32, name)
    verdict = check.verify(case, compiler.in_memory(case, PLAN, PLAN.default(case, DEVICE), DEVICE))
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_only_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    """Any subset of the gradients, each as among all three (up to where a compiler fuses multiply
    and add), the same bits twice.
    """
    g = given(20, 64)
    everything = run(g)
    first, second = run(g, wanted), run(g, wanted)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        torch.testing.assert_close(tensor, everything[name], rtol=1e-6, atol=1e-6)


def test_invariants_of_the_mathematics() -> None:
    """Without a weight dx sums to 0 along a row and is orthogonal to xhat; scaling dy by a power of
    two scales everything.
    """
    g = given(12, 1000)
    g["weight"] = torch.ones(1000)
    grads = run(g)
    xhat = (g["x"].double() - g["mean"].double()[:, None]) * g["rstd"].double()[:, None]
    scale = float(grads["dx"].abs().max())
    assert float(grads["dx"].double().mean(-1).abs().max()) < 1e-6 * scale
    assert float((grads["dx"].double() * xhat).mean(-1).abs().max()) < 1e-6 * scale
    doubled = run({**g, "dy": g["dy"] * 2})
    assert all(torch.equal(doubled[name], grads[name] * 2) for name in NAMES)


def test_no_rows_and_no_elements() -> None:
    """Without rows dx is empty and the sums over rows are zeros."""
    grads = run(
        {
            "dy": torch.empty(0, 64),
            "x": torch.empty(0, 64),
            "mean": torch.empty(0),
            "rstd": torch.empty(0),
            "weight": torch.ones(64),
        }
    )
    assert grads["dx"].shape == (0, 64) and not grads["dgamma"].any() and not grads["dbeta"].any()


@pytest.mark.parametrize(
    "how",
    [
        "expanded",
        "transposed",
        "strided",
        "misaligned",
        "three dimensions",
        "one dimension",
        "two normalized",
    ],
)
def test_layouts(how: str) -> None:
    """dy of stride 0, as a sum sends it, and any view of dy and x; any number of leading and of
    normalized dimensions.
    """
    rows, hidden, shape = 6, 48, (48,)
    x, dy = torch.randn(rows, hidden), torch.randn(rows, hidden)
    if how == "expanded":
        dy = torch.randn(1, 1).expand(rows, hidden)
    elif how == "transposed":
        x, dy = torch.randn(hidden, rows).t(), torch.randn(hidden, rows).t()
    elif how == "strided":
        x, dy = torch.randn(rows, 2 * hidden)[:, ::2], torch.randn(2 * rows, hidden)[::2]
    elif how == "misaligned":
        x, dy = (
            torch.randn(rows * hidden + 1)[1:].view(rows, hidden),
            torch.randn(rows * hidden + 3)[3:].view(rows, hidden),
        )
    weight = torch.randn(hidden)
    leading: tuple[int, ...] = (rows,)
    if how == "three dimensions":
        leading = (2, 3)
    elif how == "one dimension":
        x, dy, leading = x[0], dy[0], ()
    elif how == "two normalized":
        shape = (6, 8)  # type: ignore[assignment]
    x, dy, weight = (
        t if how in ("expanded", "transposed", "strided") else t.reshape(*lead, *shape)
        for t, lead in ((x, leading), (dy, leading), (weight, ()))
    )
    _, mean, rstd = torch.native_layer_norm(x.double(), shape, None, None, 1e-5)
    theirs = torch.ops.aten.native_layer_norm_backward(
        dy.double(), x.double(), shape, mean, rstd, weight.double(), weight.double(), [True] * 3
    )
    with torch.no_grad():
        for _ in range(2):
            ours = layer_norm_backward(
                dy, x, shape, mean.float().flatten(), rstd.float().flatten(), weight, weight
            )
            for mine, other in zip(ours, theirs, strict=True):
                assert mine is not None and mine.shape == other.shape
                torch.testing.assert_close(mine.double(), other, atol=1e-5, rtol=1e-5)


def test_calls_are_direct_after_the_first() -> None:
    """The second call of a kind needs no Python beyond the look-up; a row of one element is not
    taken for its weight.
    """
    lntune.reload()
    g = given(20, 64)
    run(g)
    table = module._direct[True, True, True]
    assert table.ready
    with torch.no_grad():
        assert (
            table.call(g["dy"], g["x"], (64,), g["mean"], g["rstd"], g["weight"], g["weight"])
            is not None
        )
        assert (
            table.call(g["dy"], g["x"][:7], (64,), g["mean"], g["rstd"], g["weight"], g["weight"])
            is None
        )


def test_eager_where_it_must_be() -> None:
    """float64 is PyTorch's, to the bit, and so is what is being recorded for a second
    derivative.
    """
    g = {name: value.double() for name, value in given(5, 16).items()}
    grads = layer_norm_backward(
        g["dy"], g["x"], (16,), g["mean"], g["rstd"], g["weight"], g["weight"]
    )
    theirs = torch.ops.aten.native_layer_norm_backward(
        g["dy"],
        g["x"],
        [16],
        g["mean"][:, None],
        g["rstd"][:, None],
        g["weight"],
        g["weight"],
        [True] * 3,
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, theirs, strict=True) if a is not None)
    g = given(5, 16)
    dx = layer_norm_backward(
        g["dy"].requires_grad_(), g["x"], (16,), g["mean"], g["rstd"], g["weight"]
    )[0]
    assert dx is not None and dx.requires_grad


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "x of another shape": ("grad_out", {"x": torch.zeros(5, 16)}),
    "x of another width": ("input", {"x": torch.zeros(4, 15)}),
    "too few means": ("mean", {"mean": torch.zeros(3)}),
    "too many rstd": ("rstd", {"rstd": torch.zeros(5)}),
    "weight too short": ("weight", {"weight": torch.zeros(15)}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    """Each wrong argument is an error that begins with its name, before and after a good call."""
    argument, change = BAD[what]
    good = given(4, 16)
    for _ in range(2):
        with pytest.raises(lntune.LntuneError, match=f"^{argument}: got shape"):
            run({**good, **change})
        run(good)


def test_arguments_of_another_kind() -> None:
    """A normalized_shape that does not fit, and statistics or vectors in a dtype no kernel takes,
    are told, before and after a good call.
    """
    g = given(4, 16, "bfloat16")
    wrong: list[tuple[str, Any, dict[str, Any]]] = [
        ("input: got shape", (15,), {}),
        ("normalized_shape: got 16", 16, {}),
        ("mean: got torch.bfloat16", (16,), {"mean": g["mean"].bfloat16()}),
        ("rstd: got torch.float64", (16,), {"rstd": g["rstd"].double()}),
        ("weight: got torch.float16", (16,), {"weight": g["weight"].half()}),
    ]
    for _ in range(2):
        for message, shape, change in wrong:
            a = {**g, **change}
            with torch.no_grad(), pytest.raises(lntune.LntuneError, match=f"^{message}"):
                layer_norm_backward(
                    a["dy"], a["x"], shape, a["mean"], a["rstd"], a["weight"], a["weight"]
                )
        run(g)


def test_the_custom_op() -> None:
    """What torch.compile puts into a graph passes PyTorch's own checks of custom operators."""
    g = given(6, 32)
    for mask in ([True, True, True], [True, False, True], [False, True, False]):
        call = (g["dy"], g["x"], [32], g["mean"], g["rstd"], g["weight"], g["weight"], mask)
        with torch.no_grad():
            torch.library.opcheck(
                torch.ops.lntune.layer_norm_backward,
                call,
                test_utils=("test_schema", "test_faketensor"),
            )


def test_names_of_variants() -> None:
    """What a call brings and wants has a name that is known; the gradient of what is not there is
    not in it.
    """
    kinds = (None, "same", "float32")
    for weight, bias, wanted in itertools.product(
        kinds, kinds, itertools.product((True, False), repeat=3)
    ):
        name = variant(weight, bias, wanted)
        assert name in VARIANTS or not (wanted[0] or (wanted[1] and weight) or (wanted[2] and bias))
    assert variant("float32", "same", (True, True, True)) == "weight32+dx+dgamma32+dbeta"
    assert variant("same", None, (False, True, True)) == "dgamma"


def test_why_says_what_serves() -> None:
    """The choice for a case is explained like any other operator's."""
    choice = lntune.explain("layer_norm_backward", 1000, "float16", 7)
    assert choice.tier == "default" and choice.schedule == "blocked_rows"


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
@pytest.mark.parametrize(
    ("shape", "dtype", "affine"),
    product(
        ((5, 48), (2, 3, 48), (48,), (0, 48), (4, 3, 16)),
        (torch.float32, torch.bfloat16, torch.float64),
        (True, False),
    ),
    ids=str,
)
def test_the_forward_with_its_statistics(
    shape: tuple[int, ...], dtype: torch.dtype, affine: bool
) -> None:
    """layer_norm_forward gives PyTorch's y, mean and rstd, which layer_norm_backward takes as they
    are; y is differentiable.
    """
    normalized = shape[-2:] if shape[-1] == 16 else shape[-1:]
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 2).to(dtype).requires_grad_()
    weight, bias = (
        ((torch.randn(normalized, dtype=torch.float64) + 1).to(dtype) for _ in range(2))
        if affine
        else (None, None)
    )
    y, mean, rstd = lntune.layer_norm_forward(x, normalized, weight, bias)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = torch.native_layer_norm(wide[0], list(normalized), wide[1], wide[2], 1e-5)
    rows = x.numel() // math.prod(normalized)
    assert mean.shape == rstd.shape == (rows,) and mean.dtype == torch.promote_types(
        dtype, torch.float32
    )
    loose = (
        {"atol": 3e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    )
    for ours, theirs in zip((y, mean, rstd), expected, strict=True):
        torch.testing.assert_close(ours.double().flatten(), theirs.flatten(), **loose)
    dy = torch.ones_like(y)
    dx, *_ = lntune.layer_norm_backward(
        dy, x.detach(), normalized, mean.detach(), rstd.detach(), weight, bias
    )
    (through,) = torch.autograd.grad(y, x, dy)
    assert dx is not None
    torch.testing.assert_close(dx, through)


def test_the_forward_refuses_what_layer_norm_refuses() -> None:
    """A shape that does not fit is an error that names it."""
    with pytest.raises(InputError, match="normalized_shape"):
        lntune.layer_norm_forward(torch.randn(3, 48), (47,))
