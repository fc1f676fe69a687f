"""lntune.layer_norm gives what torch.nn.functional.layer_norm gives: values, layouts, transforms,
and its errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from grids import product
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lntune
from lntune.errors import InputError
from lntune.torch import layer_norm as module

pytestmark = pytest.mark.filterwarnings(
    "ignore::lntune.UntunedWarning", "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {
    torch.float32: 8 * 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float64: 8 * 2.0**-53,
}
LOW = (torch.float16, torch.bfloat16)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers around 0.5."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def affine(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight around 1 and a bias around 0."""
    return make(*shape, dtype=dtype, seed=1) + 0.5, make(*shape, dtype=dtype, seed=2) - 0.5


def widened(
    x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Layer norm in float64."""
    w, b = (v if v is None else v.double() for v in (weight, bias))
    return functional.layer_norm(x.double(), tuple(shape), w, b, eps)


def check(
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    calls: int = 3,
) -> Tensor:
    """Several calls, the first of which prepares the others: each as good as eager against float64;
    returns the last.
    """
    before = [None if t is None else t.clone() for t in (x, weight, bias)]
    truth = widened(x, shape, weight, bias, eps)
    w, b = (
        (weight, bias)
        if weight is None or bias is None or weight.dtype == bias.dtype
        else (weight.float(), bias.float())
    )
    eager = functional.layer_norm(x, tuple(shape), w, b, eps)
    for _ in range(calls):
        y = lntune.layer_norm(x, shape, weight, bias, eps)
        assert (y.shape, y.dtype, y.is_contiguous()) == (eager.shape, eager.dtype, True)
        assert torch.equal(y.isnan(), eager.isnan())
        if y.numel():
            error, eager_error = (
                (v.double() - truth).nan_to_num().abs().max().item() for v in (y, eager)
            )
            scale = max(1.0, truth.nan_to_num().abs().max().item())
            assert error <= 2 * eager_error + ROUNDING[x.dtype] * scale
    for tensor, old in zip((x, weight, bias), before, strict=True):
        assert tensor is None or torch.equal(tensor, old)
    return y


@pytest.mark.parametrize(
    ("dtype", "hidden"), product(DTYPES, (1, 2, 3, 769, 1000, 1024, 50257, 65536)), ids=str
)
def test_hidden_sizes(hidden: int, dtype: torch.dtype) -> None:
    """Every hidden size a kernel takes is as precise as eager, in every dtype, prepared or not."""
    check(make(4, hidden, dtype=dtype), (hidden,), *affine(hidden, dtype=dtype))


@pytest.mark.parametrize("hidden", [65537, 0])
def test_hidden_sizes_left_to_pytorch(hidden: int) -> None:
    """Rows too long for a kernel, and empty ones, are eager's to the bit."""
    x, (w, b) = make(3, hidden), affine(hidden)
    for _ in range(2):
        assert torch.equal(
            lntune.layer_norm(x, (hidden,), w, b), functional.layer_norm(x, (hidden,), w, b)
        )


@pytest.mark.parametrize(
    "leading",
    [(), (1,), (7,), (40,), (1, 1), (3, 5), (1, 6), (6, 1), (2, 3, 4), (1, 2, 1, 3)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leading_shapes(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    """One to five dimensions, any leading shape."""
    check(make(*leading, 128, dtype=dtype), (128,), *affine(128, dtype=dtype))


@pytest.mark.parametrize("leading", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_no_rows(leading: tuple[int, ...]) -> None:
    """An empty batch gives an empty result, also after a full one of the same dimensions."""
    check(make(*[2 for _ in leading], 128), (128,), *affine(128))
    check(make(*leading, 128), (128,), *affine(128))


@pytest.mark.parametrize(
    "shape", [(128,), [128], torch.Size([128]), (8, 16), [8, 16], (2, 8, 8)], ids=repr
)
def test_normalized_shapes(shape: Any) -> None:
    """normalized_shape is a tuple, a list or a Size, of one or several dimensions."""
    check(make(6, *shape), shape, *affine(*shape))
    check(make(2, 3, *shape), shape, *affine(*shape))
    check(make(*shape), shape, *affine(*shape))


@pytest.mark.parametrize(
    ("dtype", "leading"),
    [
        (torch.float32, (5,)),
        (torch.float32, (5, 2)),
        (torch.float16, (5,)),
        (torch.bfloat16, (5,)),
        (torch.bfloat16, (5, 2)),
    ],
    ids=str,
)
def test_affine_combinations(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    """weight and bias may be left out, and be in float32 beside a low-precision input, each by
    itself.
    """
    x = make(*leading, 128, dtype=dtype)
    kinds = [None, torch.float32] if dtype == torch.float32 else [None, torch.float32, dtype]
    w, b = affine(128)
    for _ in range(2):  # again, because calls that look alike take turns
        for weight in kinds:
            for bias in kinds:
                check(
                    x,
                    (128,),
                    None if weight is None else w.to(weight),
                    None if bias is None else b.to(bias),
                    calls=2,
                )


@pytest.mark.parametrize("eps", [0, 0.0, 1, 1e-12, 1e-5, 1e3, 1e30])
def test_eps(eps: float) -> None:
    """Any eps from 0 up, whole numbers too."""
    check(make(4, 128), (128,), *affine(128), eps=eps)


@pytest.mark.parametrize(
    "eps",
    [
        -0.5,
        -2.0,
        float("nan"),
        float("inf"),
        -float("inf"),
        True,
        np.float32(0.5),
        torch.tensor(0.5),
    ],
    ids=repr,
)
def test_any_eps_is_pytorchs(eps: Any) -> None:
    """An eps that PyTorch takes gives PyTorch's result and gradients, NaN where the variance and
    eps are below zero.
    """
    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)
    for _ in range(2):
        results = []
        for f in (lntune.layer_norm, functional.layer_norm):
            given = [t.clone().requires_grad_() for t in (x, w, b)]
            with torch.no_grad():
                plain = f(given[0], (128,), *given[1:], eps)
            y = f(given[0], (128,), *given[1:], eps)
            results.append([plain, y.detach(), *torch.autograd.grad(y.square().sum(), given)])
        torch.testing.assert_close(*results, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_eps_zero_of_a_constant_row() -> None:
    """With eps 0 a constant row is 0 times infinity: NaN, as eager has it."""
    x = torch.ones(4, 128)
    for _ in range(2):
        assert lntune.layer_norm(x, (128,), eps=0.0).isnan().all()


def test_float64_is_eager() -> None:
    """float64 has no kernel and goes to PyTorch, to the bit."""
    x, (w, b) = make(4, 128).double(), affine(128, dtype=torch.float64)
    assert torch.equal(lntune.layer_norm(x, (128,), w, b), functional.layer_norm(x, (128,), w, b))


def misaligned(t: Tensor) -> Tensor:
    """The same values one element off any alignment."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": misaligned,
    "row-strided": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one row of many": lambda x: torch.cat([x, x], -1)[:1, ..., : x.shape[-1]],
    "every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(6, *x.shape[1:]),
    "flipped storage": lambda x: x.flip(0),
    "slice of rows": lambda x: x[1:3],
    "negative": lambda x: (
        torch.complex(x.float(), -x.float()).conj().imag.to(x.dtype)
        if x.dtype != torch.float32
        else torch.complex(x, -x).conj().imag
    ),
    "negative, contiguous": torch._neg_view,
    "odd stride of one row": lambda x: x[:1].as_strided((1, *x.shape[1:]), (5, *x.stride()[1:])),
}


@pytest.mark.parametrize("leading", [(4,), (4, 2)], ids=["2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout: str, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    """Any view is normalized as its values are, also right after a contiguous input made the fast
    path ready.
    """
    x, (w, b) = make(*leading, 128, dtype=dtype), affine(128, dtype=dtype)
    check(x, (128,), w, b)
    check(LAYOUTS[layout](x), (128,), w, b)


@pytest.mark.parametrize("layout", ["misaligned", "every other element", "negative"])
def test_layouts_of_the_affine(layout: str) -> None:
    """weight and bias may be any view; the fast path, ready for plain ones, does not take them for
    plain.
    """
    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)
    check(x, (128,), LAYOUTS[layout](w), b)
    check(x, (128,), w, LAYOUTS[layout](b))
    check(x, (128,), w[:1].expand(128), b[:1].expand(128))


def test_hidden_one_with_a_negative_bias() -> None:
    """A view of one element is contiguous whatever its strides, and may still carry the negative
    bit.
    """
    x, w = make(4, 1), make(1)
    check(x, (1,), w, make(1))
    check(x, (1,), w, torch.complex(make(1), make(1)).conj().imag)


def test_parameters_and_numbers() -> None:
    """A Parameter as input or affine is served outside of autograd, and a tensor that wants
    gradients under no_grad.
    """
    w, b = (torch.nn.Parameter(v) for v in affine(128))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert check(torch.nn.Parameter(make(4, 128)), (128,), w, b).requires_grad is False
            assert (
                check(
                    make(4, 128).requires_grad_(context is torch.no_grad), (128,), w, b
                ).requires_grad
                is False
            )
    with torch.inference_mode():
        assert lntune.layer_norm(make(4, 128), (128,), w, b).is_inference()


def test_meta_tensors() -> None:
    """Meta tensors give a meta result of the right shape and dtype, also when the fast path is
    ready for real ones.
    """
    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)
    y = lntune.layer_norm(x.to("meta"), (128,), w.to("meta"), b.to("meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)


def test_nested_tensors() -> None:
    """Nested tensors of either layout are PyTorch's, also when the fast path is ready for plain
    ones of their dimensions.
    """
    w, b = affine(128)
    check(make(2, 4, 128), (128,), w, b)
    for layout in (torch.strided, torch.jagged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.nested.nested_tensor([make(3, 128), make(5, 128)], layout=layout)
        ours, theirs = (
            f(x, (128,), w, b).to_padded_tensor(0.0)
            for f in (lntune.layer_norm, functional.layer_norm)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the dtype of the result is eager's, and so is the value up to a rounding."""
    x, (w, b) = make(4, 128, dtype=dtype), affine(128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(x, (128,), w, b)
        linear = torch.nn.Linear(128, 128)
        check(linear(x).detach(), (128,), w, b)


def test_vmap_grad_and_jvp() -> None:
    """torch.func's transforms see through the function, over the input and over the weight, after
    the fast path is ready.
    """
    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)
    check(x[0], (128,), w, b)

    def results(f: Callable[..., Tensor]) -> list[Tensor]:
        def loss(x: Tensor, w: Tensor) -> Tensor:
            return f(x, (128,), w, b).sin().sum()

        return [
            torch.vmap(lambda row: f(row, (128,), w, b))(x),
            torch.vmap(lambda row: f(x, (128,), row, b))(x),
            torch.func.grad(loss)(x, w),
            torch.func.grad(loss, 1)(x, w),
            torch.vmap(torch.func.grad(loss), (0, None))(x, w),
            *torch.func.jvp(lambda x: f(x, (128,), w, b), (x,), (x.cos(),)),
            torch.func.hessian(loss)(x[0, :8].repeat(16), w),
        ]

    for ours, theirs in zip(
        results(lntune.layer_norm), results(functional.layer_norm), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_derivatives(which: int) -> None:
    """A dual number's tangent survives, whichever argument carries it."""
    given = [make(4, 128), *affine(128)]
    check(given[0], (128,), given[1], given[2])

    def tangent(f: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            args = [
                forward_ad.make_dual(t, t.cos()) if i == which else t for i, t in enumerate(given)
            ]
            return forward_ad.unpack_dual(f(args[0], (128,), *args[1:])).tangent

    assert torch.equal(tangent(lntune.layer_norm), tangent(functional.layer_norm))
    with forward_ad.dual_level():  # a level without dual numbers changes nothing
        check(given[0], (128,), given[1], given[2])


def test_modes_see_the_call() -> None:
    """Dispatch modes, function modes, fake tensors and the flop counter see what they see of
    eager.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    for mode, name in ((Dispatch, "aten.native_layer_norm.default"), (Function, "layer_norm")):
        seen: list[str] = []
        with mode():
            y = lntune.layer_norm(x, (128,), w, b)
        assert name in seen and torch.equal(y, functional.layer_norm(x, (128,), w, b))
    with FlopCounterMode(display=False) as counter:
        lntune.layer_norm(x, (128,), w, b)
        assert counter.get_total_flops() == 0
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert isinstance(
            lntune.layer_norm(
                fake.from_tensor(x), (128,), fake.from_tensor(w), fake.from_tensor(b)
            ),
            FakeTensor,
        )
        assert isinstance(lntune.layer_norm(x, (128,), w, b), FakeTensor)


def test_default_device_does_not_matter() -> None:
    """`with torch.device(...)` decides where new tensors go, not where a given one is normalized,
    with gradients or without.
    """
    x, (w, b) = make(4, 128), affine(128)
    wanting = x.clone().requires_grad_()
    with torch.device("meta"):
        plain, trained = (
            lntune.layer_norm(x, (128,), w, b),
            lntune.layer_norm(wanting, (128,), w, b),
        )
    assert plain.device.type == trained.device.type == "cpu"
    trained.sum().backward()
    assert torch.allclose(plain, functional.layer_norm(x, (128,), w, b), atol=1e-5)


def test_subclasses() -> None:
    """A tensor subclass as input or affine goes through its own __torch_function__."""

    class Mine(torch.Tensor):
        pass

    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)
    assert type(lntune.layer_norm(x.as_subclass(Mine), (128,), w, b)) is Mine
    assert type(lntune.layer_norm(x, (128,), w.as_subclass(Mine), b)) is Mine


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator() -> None:
    """A traced function computes, and does not hand out the result of the day it was traced."""
    x, (w, b) = make(4, 128), affine(128)
    check(x, (128,), w, b)
    traced = torch.jit.trace(lambda t: lntune.layer_norm(t, (128,), w, b), (x,))
    other = make(4, 128, seed=9)
    assert torch.equal(traced(other), functional.layer_norm(other, (128,), w, b))


X, (W, B) = make(4, 128), affine(128)
BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "input's shape": ("input", (make(4, 64), (128,), W, B)),
    "input of too few dimensions": ("input", (make(128), (4, 128), W, B)),
    "input of whole numbers": ("input", (X.int(), (128,), W, B)),
    "input a list": ("input", ([1.0], (1,))),
    "shape a number": ("normalized_shape", (X, 128, W, B)),
    "shape of fractions": ("normalized_shape", (X, (128.5,), W, B)),
    "shape of floats": ("normalized_shape", (make(5, 128), [128.0], W, B)),
    "shape empty": ("normalized_shape", (X, (), W, B)),
    "shape other": ("input", (X, (64,), W[:64], B[:64])),
    "weight's size": ("weight", (X, (128,), W[:64], B)),
    "weight's dimensions": ("weight", (X, (128,), W[None], B)),
    "weight's dtype": ("weight", (X, (128,), W.half(), B)),
    "weight's device": ("weight", (X, (128,), W.to("meta"), B)),
    "weight a list": ("weight", (X, (128,), W.tolist(), B)),
    "weight of a float64 input": ("weight", (X.double(), (128,), W, B)),
    "bias's size": ("bias", (X, (128,), W, B[:64])),
    "bias's dtype": ("bias", (X, (128,), W, B.double())),
    "bias's device": ("bias", (X, (128,), W, B.to("meta"))),
    "eps None": ("eps", (X, (128,), W, B, None)),
    "eps a word": ("eps", (X, (128,), W, B, "small")),
}


@pytest.mark.parametrize("ready", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str, ready: bool) -> None:
    """Each wrong argument is an InputError (a ValueError too) that begins with the argument's name;
    a right call works after.
    """
    argument, given = BAD[what]
    lntune.reload()
    if ready:
        check(X, (128,), W, B)
        check(X, (128,), W.clone(), None)
        assert module._direct.ready
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{argument}: got .*, expected "):
            lntune.layer_norm(*given)
    check(X, (128,), W, B, calls=1)
