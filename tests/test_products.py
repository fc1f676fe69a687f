"""Matrix products: whichever library makes them, they are PyTorch's to rounding, in every layout,
and differentiable as often.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lntune
from lntune import device
from lntune.torch import products
from lntune.torch.constants import constant
from lntune.torch.products import linear, product, repeated

needs_onednn = pytest.mark.skipif(
    not products._enabled(),
    reason="this PyTorch has no oneDNN, or not the operators of it that are used",
)


@pytest.fixture
def always_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN multiplies whatever this CPU is, from one multiplication on."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "_LEAST_RECORDED", 1)


@pytest.fixture(params=["pytorch", pytest.param("onednn", marks=needs_onednn)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either library."""
    if request.param == "onednn":
        request.getfixturevalue("always_onednn")
    else:
        monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    return str(request.param)


def calls(function: Callable[[], object]) -> set[str]:
    """The operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        function()
    return {e.key for e in trace.key_averages()}


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": torch.randn,
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "every other row": lambda rows, columns: torch.randn(2 * rows, columns)[::2],
    "some columns": lambda rows, columns: torch.randn(rows, columns + 3)[:, 1 : columns + 1],
    "every other column": lambda rows, columns: torch.randn(rows, 2 * columns)[:, ::2],
    "one row": lambda rows, columns: torch.randn(1, columns).expand(rows, -1),
}


def near(result: Tensor, truth: Tensor, terms: int) -> None:
    """Within what adding up so many products of normal numbers in float32 may round: a few units a
    term in the worst order.
    """
    assert result.shape == truth.shape
    assert result.dtype == torch.float32
    assert (
        float((result.double() - truth).abs().max() if result.numel() else 0.0)
        <= 2.0**-22 * (terms + 4) ** 0.5 * 16
    )


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("sizes", [(7, 5, 3), (64, 33, 17), (3, 40, 70)], ids=str)
@pytest.mark.usefixtures("library")
def test_any_layout(sizes: tuple[int, int, int], first: str, second: str) -> None:
    """The product of strided and expanded matrices, whichever of them is larger."""
    rows, out, terms = sizes
    a, matrix = LAYOUTS[first](rows, terms), LAYOUTS[second](out, terms)
    near(product(a, matrix), a.double() @ matrix.double().t(), terms)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0), (1, 1, 1)], ids=str)
@pytest.mark.usefixtures("library")
def test_nothing_to_multiply(sizes: tuple[int, int, int]) -> None:
    """Empty matrices, and those of one element, with gradients."""
    rows, out, terms = sizes
    x, weight = (
        torch.randn(rows, terms, requires_grad=True),
        torch.randn(out, terms, requires_grad=True),
    )
    y = linear(x, weight)
    near(y.detach(), (x.double() @ weight.double().t()).detach(), terms)
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


@pytest.mark.usefixtures("library")
def test_what_is_not_a_number_stays_so() -> None:
    """Infinities and NaN spread as far as they should and no further."""
    a = torch.randn(40, 30)
    a[0, 0], a[1, 1] = float("nan"), float("inf")
    result = product(a, torch.randn(9, 30))
    assert result[0].isnan().all()
    assert result[1].isinf().all()
    assert result[2:].isfinite().all()


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    out=st.integers(1, 40),
    terms=st.integers(1, 40),
    wanted=st.tuples(st.booleans(), st.booleans()),
)
def test_linear_is_pytorchs(
    lead: list[int], out: int, terms: int, wanted: tuple[bool, bool]
) -> None:
    """Any number of leading dimensions, any of the gradients; by oneDNN where it is there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("mkl_is_slow", lambda: True), ("_LEAST", 1), ("_LEAST_RECORDED", 1)):
            patch.setattr(products, name, value)
        tensors = torch.randn(*lead, terms), torch.randn(out, terms)
        ours, plain = (
            [t.clone().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
            for _ in range(2)
        )
        y, expected = linear(*ours), functional.linear(*plain)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        if any(wanted):
            (y * 3).sin().sum().backward()
            (expected * 3).sin().sum().backward()
        for a, b in zip(ours, plain, strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


@needs_onednn
@pytest.mark.usefixtures("always_onednn")
def test_differentiable_twice() -> None:
    """The gradient of a gradient, against PyTorch's; and oneDNN is what multiplies."""
    results = []
    for f in (linear, functional.linear):
        torch.manual_seed(0)
        x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        first = torch.autograd.grad(f(x, weight).square().sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))
        results.append((*first, *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert "mkldnn::_linear_pointwise" in calls(lambda: linear(x, weight).sum().backward())


@needs_onednn
@pytest.mark.usefixtures("always_onednn")
def test_left_to_pytorch() -> None:
    """float64, autocast, transforms, and everything while oneDNN is switched off."""
    x, weight = torch.randn(6, 5), torch.randn(4, 5)

    def by_onednn(function: Callable[[], object]) -> bool:
        return any(
            name.startswith(("lntune::", "mkldnn::_linear_pointwise")) for name in calls(function)
        )

    assert by_onednn(lambda: linear(x, weight))
    assert not by_onednn(lambda: linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(lambda: linear(x, weight))
        assert not by_onednn(lambda: product(x, weight))
        assert not by_onednn(lambda: repeated(weight, 6, 100)(x, None, None))
    torch.testing.assert_close(
        torch.func.vmap(linear, (0, None))(x, weight), functional.linear(x, weight)
    )
    tangents = torch.func.jvp(linear, (x, weight), (torch.ones_like(x), torch.zeros_like(weight)))[
        1
    ]
    torch.testing.assert_close(tangents, functional.linear(torch.ones_like(x), weight))


@needs_onednn
@pytest.mark.usefixtures("always_onednn")
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_checkpoints_that_are_watched(watched: str) -> None:
    """A dispatch mode around the forward of a checkpoint, or the backward that computes it again,
    sees the product that the other makes, and counts its multiplications as PyTorch's.
    """
    tensors, counts = (torch.randn(3, 4, 5), torch.randn(6, 5)), []
    for f in (linear, functional.linear):
        x, weight = (t.clone().requires_grad_() for t in tensors)
        with (
            FlopCounterMode(display=False) if watched == "forward" else contextlib.nullcontext()
        ) as forward:
            y = checkpoint(
                lambda x, weight, f=f: f(x, weight).sin(), x, weight, use_reentrant=False
            ).sum()
        with (
            FlopCounterMode(display=False) if watched == "backward" else contextlib.nullcontext()
        ) as backward:
            y.backward()
        counts.append([mode.get_total_flops() for mode in (forward, backward) if mode is not None])
        expected = torch.autograd.grad(functional.linear(x, weight).sin().sum(), (x, weight))
        torch.testing.assert_close((x.grad, weight.grad), expected, rtol=1e-4, atol=1e-4)
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_exported_for_any_size(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    """A program for batches of any size is exported on every CPU, also where large products are
    another library's, and holds PyTorch's product.
    """
    monkeypatch.setattr(products, "onednn_pays", constant(lambda: True))
    cell, x = lntune.LayerNormLSTMCell(4, 3), torch.randn(3, 4)
    program = torch.export.export(
        cell, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
    )
    assert "lntune.linear" not in str(program.graph)
    many = torch.randn(7, 4)
    torch.testing.assert_close(program.module()(many), cell(many))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("always_onednn")
def test_traced_for_any_size() -> None:
    """torch.jit.trace records PyTorch's product, whatever size it is shown."""
    weight = torch.randn(4, 5)
    traced: Any = torch.jit.trace(lambda x: linear(x, weight), torch.randn(6, 5))
    assert not any(node.kind().startswith("lntune::") for node in traced.graph.nodes())
    x = torch.randn(9, 5)
    torch.testing.assert_close(traced(x), functional.linear(x, weight))


@needs_onednn
@pytest.mark.usefixtures("always_onednn")
def test_transforms_inside_compiled_code() -> None:
    """vmap and forward derivatives of a product, and gradients of a layer, compile as they do of
    PyTorch's own.
    """
    torch.manual_seed(0)
    x, weight, layer = torch.randn(6, 5), torch.randn(4, 5), lntune.LayerNormLSTM(5, 4)

    def over_rows(x: Tensor) -> Tensor:
        return torch.func.vmap(linear, (0, None))(x, weight)

    def forwards(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: linear(x, weight), (x,), (torch.ones_like(x),))[1]

    def of_a_layer(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x)[0].sin().sum())(x)

    for f in (over_rows, forwards, of_a_layer):
        torch.testing.assert_close(
            torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("library")
def test_repeated(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool) -> None:
    """Products with one matrix: with a summand and without, into a tensor and into a new one, of
    rows in the matrix's dtype and in another.
    """
    monkeypatch.setattr(
        products, "_PACKED_FROM", dict.fromkeys((True, False), (1, 1) if packed else (10**9, 1))
    )
    torch.manual_seed(0)
    for matrix in (torch.randn(24, 40).to(dtype), torch.randn(40, 24).to(dtype).t()):
        times = repeated(matrix, 8, 10)
        for of in (dtype, torch.float32):
            a, plus = torch.randn(5, 40).to(of), torch.randn(5, 24).to(of)
            before = plus.clone()
            for summand in (None, plus):
                truth = a.to(dtype).double() @ matrix.double().t() + (
                    0 if summand is None else summand.double()
                )
                out = torch.empty(5, 24, dtype=of)
                rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}[dtype]
                for result in (times(a, summand, None), times(a, summand, out)):
                    assert result.dtype == of
                    assert float((result.double() - truth).abs().max()) <= rounding * float(
                        truth.abs().max()
                    )
                assert torch.equal(out, times(a, summand, None))
            assert torch.equal(plus, before)


@needs_onednn
@pytest.mark.usefixtures("always_onednn")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_trains_alike(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """LayerNormLSTM by either library: outputs and gradients are the same to rounding, in eager
    mode and in one graph.
    """
    torch.manual_seed(0)
    module = lntune.LayerNormLSTM(12, 16, 2)
    other, x = copy.deepcopy(module), torch.randn(5, 3, 12)
    model = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    y = model(x)[0]
    y.square().sum().backward()
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    expected = other(x)[0]
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "width", "slow"),
    [
        ("AuthenticAMD", 64, True),
        ("AuthenticAMD", 32, False),
        ("GenuineIntel", 64, False),
        ("", 64, False),
    ],
)
def test_where_mkl_is_slow(
    monkeypatch: pytest.MonkeyPatch, vendor: str, width: int, slow: bool
) -> None:
    """512-bit vectors on a CPU that is known not to be Intel's."""
    monkeypatch.setattr(device, "vendor", lambda: vendor)
    monkeypatch.setattr(device.Device, "vector_bytes", property(lambda self: width))
    assert products.mkl_is_slow() is slow
