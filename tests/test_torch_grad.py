"""Gradients of lntune.layer_norm: against float64 autograd, for every subset, twice, shared,
batched and checkpointed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from grids import product
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lntune
from lntune.torch import layer_norm as module
from lntune.torch import layer_norm_node

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")


@pytest.fixture(params=["node", "function"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test with the backward in C++, and as an autograd.Function, as on machines where that
    cannot be compiled.
    """
    assert not layer_norm_node.reason_missing()
    if request.param == "function":
        monkeypatch.setattr(layer_norm_node, "ready", lambda: False)
        lntune.reload()
    yield request.param
    if request.param == "function":
        lntune.reload()


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 16 * 2.0**-24, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
HIDDEN = 128


def leaf(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = True
) -> Tensor:
    """Random numbers around 0.5."""
    return (
        (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5)
        .to(dtype)
        .requires_grad_(grad)
    )


def gradients(
    f: Callable[..., Tensor],
    given: list[Tensor | None],
    dy: Tensor | None = None,
    shape: tuple[int, ...] = (HIDDEN,),
) -> list[Tensor | None]:
    """y and the gradients of (input, weight, bias); dy None: of the sum, whose gradient has stride
    0.
    """
    given = [
        None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in given
    ]
    y = f(given[0], shape, given[1], given[2])
    if dy is None:
        y.sum().backward()
    else:
        y.backward(dy.to(y.dtype))
    return [y.detach(), *[None if t is None else t.grad for t in given]]


def eager(x: Tensor, shape: tuple[int, ...], w: Tensor | None, b: Tensor | None) -> Tensor:
    """PyTorch's, given both vectors in float32 where it would refuse them (a mixed pair; in
    backward, a float32 bias alone).
    """
    if b is not None and b.dtype != (x if w is None else w).dtype:
        w, b = torch.ones(shape) if w is None else w.float(), b.float()
    return functional.layer_norm(x, shape, w, b)


def check(
    given: list[Tensor | None], dy: Tensor | None = None, shape: tuple[int, ...] = (HIDDEN,)
) -> None:
    """y, dx, dw and db: the dtypes and gaps of eager's, and errors against float64 of at most twice
    eager's and a rounding.
    """
    wide = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given
    ]
    truth = gradients(functional.layer_norm, wide, dy, shape)
    theirs = gradients(eager, given, dy, shape)
    ours = gradients(lntune.layer_norm, given, dy, shape)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        if other is None or true is None or mine is None:
            assert mine is other is None
            continue
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        if mine.numel():
            error, eager_error = ((t.double() - true).abs().max().item() for t in (mine, other))
            scale = max(1.0, true.abs().max().item())
            assert error <= 2 * eager_error + ROUNDING[mine.dtype] * scale


@pytest.mark.parametrize(("dtype", "dy"), product(DTYPES, ("random", "sum")), ids=str)
def test_against_float64(dtype: torch.dtype, dy: str) -> None:
    """Every combination of affine vectors and of their dtypes, in float16 each dtype of either; dy
    dense, and with stride 0.
    """
    kinds = [None, torch.float32] if dtype == torch.float32 else [None, torch.float32, dtype]
    pairs = zip(kinds, reversed(kinds), strict=True) if dtype == torch.float16 else None
    for w, b in pairs or itertools.product(kinds, kinds):
        given = [
            leaf(6, HIDDEN, dtype=dtype),
            None if w is None else leaf(HIDDEN, dtype=w, seed=1),
            None if b is None else leaf(HIDDEN, dtype=b, seed=2),
        ]
        check(given, leaf(6, HIDDEN, seed=3, grad=False) if dy == "random" else None)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (0, 3), (2, 3), (2, 1, 3)], ids=str)
def test_leading_shapes(leading: tuple[int, ...]) -> None:
    """Any leading shape; no rows give zero gradients of the affine."""
    check(
        [leaf(*leading, HIDDEN), leaf(HIDDEN, seed=1), leaf(HIDDEN, seed=2)],
        leaf(*leading, HIDDEN, seed=3, grad=False),
    )


@pytest.mark.parametrize("shape", [(4, 32), (1,), (3,), (1000,)], ids=str)
def test_normalized_shapes(shape: tuple[int, ...]) -> None:
    """Several normalized dimensions, and awkward sizes."""
    check(
        [leaf(5, *shape), leaf(*shape, seed=1), leaf(*shape, seed=2)],
        leaf(5, *shape, seed=3, grad=False),
        shape,
    )


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product((False, True), repeat=3) if any(w)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subsets(wanted: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    """Only what is wanted gets a gradient."""
    check(
        [
            leaf(6, HIDDEN, dtype=dtype, grad=wanted[0]),
            leaf(HIDDEN, dtype=dtype, seed=1, grad=wanted[1]),
            leaf(HIDDEN, dtype=dtype, seed=2, grad=wanted[2]),
        ]
    )


@pytest.mark.parametrize("view", ["transposed", "every other", "expanded"])
def test_layouts(view: str) -> None:
    """Views of inputs and of dy: gradients arrive at the leaf in its own shape."""
    views = {
        "transposed": lambda t: t.t(),
        "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda t: t[:1].expand(6, -1),
    }
    start = leaf(HIDDEN, 6) if view == "transposed" else leaf(6, HIDDEN)
    dy = leaf(HIDDEN, 6, seed=3, grad=False).t()

    def through(f: Callable[..., Tensor]) -> Tensor:
        x = start.detach().clone().requires_grad_()
        f(views[view](x), (HIDDEN,), leaf(HIDDEN, seed=1), leaf(HIDDEN, seed=2)).backward(dy)
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(
        through(lntune.layer_norm), through(functional.layer_norm), atol=1e-5, rtol=1e-5
    )


def test_gradcheck_in_float64() -> None:
    """float64 passes PyTorch's own first and second order checks."""
    given = (
        leaf(3, 5, dtype=torch.float64),
        leaf(5, dtype=torch.float64, seed=1),
        leaf(5, dtype=torch.float64, seed=2),
    )
    assert torch.autograd.gradcheck(lambda x, w, b: lntune.layer_norm(x, (5,), w, b), given)
    assert torch.autograd.gradgradcheck(lambda x, w, b: lntune.layer_norm(x, (5,), w, b), given)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_backward(dtype: torch.dtype, affine: bool) -> None:
    """A gradient penalty, differentiated through the kernel's backward, equals eager's."""

    def penalty(f: Callable[..., Tensor]) -> list[Tensor]:
        given = [
            leaf(6, HIDDEN, dtype=dtype),
            *(
                [leaf(HIDDEN, dtype=dtype, seed=1), leaf(HIDDEN, dtype=dtype, seed=2)]
                if affine
                else []
            ),
        ]
        y = f(given[0], (HIDDEN,), *given[1:])
        (dx,) = torch.autograd.grad(y.float().sin().sum(), given[0], create_graph=True)
        return [
            dx.detach(),
            *torch.autograd.grad(dx.float().square().sum(), given[: 2 if affine else 1]),
        ]

    loose = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for ours, theirs in zip(
        penalty(lntune.layer_norm), penalty(functional.layer_norm), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, atol=loose * float(theirs.detach().abs().max()), rtol=loose
        )


def test_shared_weights_and_accumulation() -> None:
    """One weight used in two layers, and two backward passes, add up."""

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        x, w, b = leaf(6, HIDDEN), leaf(HIDDEN, seed=1), leaf(HIDDEN, seed=2)
        for _ in range(2):
            f(f(x, (HIDDEN,), w, b).tanh(), (HIDDEN,), w, b).square().sum().backward()
        return [t.grad for t in (x, w, b) if t.grad is not None]

    for ours, theirs in zip(run(lntune.layer_norm), run(functional.layer_norm), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-4)


def test_gradient_modes() -> None:
    """no_grad and inference_mode build no graph, enable_grad inside does, and the ready fast path
    never swallows a gradient.
    """
    x, w, b = leaf(6, HIDDEN, grad=False), leaf(HIDDEN, seed=1), leaf(HIDDEN, seed=2)
    for _ in range(2):
        with torch.no_grad():
            assert not lntune.layer_norm(x, (HIDDEN,), w, b).requires_grad
            with torch.enable_grad():
                assert lntune.layer_norm(x, (HIDDEN,), w, b).grad_fn is not None
        with torch.inference_mode():
            assert not lntune.layer_norm(x, (HIDDEN,), w, b).requires_grad
        for wanting in (w, b):
            given = [w.detach(), b.detach()]
            given[wanting is b] = wanting
            assert lntune.layer_norm(x, (HIDDEN,), *given).requires_grad
        assert not lntune.layer_norm(x, (HIDDEN,), w.detach(), b.detach()).requires_grad
        assert lntune.layer_norm(x.clone().requires_grad_(), (HIDDEN,)).requires_grad


def test_saved_tensors_are_guarded() -> None:
    """Changing the input in place between forward and backward is the error autograd makes of it,
    not a wrong gradient.
    """
    x = leaf(6, HIDDEN)
    inner = x * 1
    y = lntune.layer_norm(inner, (HIDDEN,), leaf(HIDDEN, seed=1))
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_batched_and_functional_gradients() -> None:
    """is_grads_batched, vectorized jacobians and hooks work as on eager."""
    x, w = leaf(3, 8), leaf(8, seed=1)

    def results(f: Callable[..., Tensor]) -> list[Tensor]:
        y = f(x, (8,), w)
        basis = torch.eye(24).view(24, 3, 8)
        seen: list[Tensor] = []
        y.register_hook(seen.append)
        batched: Any = torch.autograd.grad(
            y, (x, w), basis, is_grads_batched=True, retain_graph=True
        )
        y.sum().backward(inputs=[x])
        jacobian = torch.autograd.functional.jacobian(lambda t: f(t, (8,), w), x, vectorize=True)
        return [*batched, jacobian, *seen[-1:]]

    for ours, theirs in zip(
        results(lntune.layer_norm), results(functional.layer_norm), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Recomputed in backward, the gradients are the same to the bit."""
    w = leaf(HIDDEN, seed=1)
    grads = []
    for use in (False, True):
        x = leaf(6, HIDDEN)

        def block(t: Tensor) -> Tensor:
            return lntune.layer_norm(t, (HIDDEN,), w).tanh()

        (checkpoint(block, x, use_reentrant=reentrant) if use else block(x)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_eager_mode_takes_every_mixture_too(dtype: torch.dtype) -> None:
    """No rows are eager mode's work, and eager by itself refuses some mixtures of dtypes: their
    gradients are zeros all the same.
    """
    for w, b in itertools.product([None, torch.float32, dtype], repeat=2):
        given = [
            leaf(0, HIDDEN, dtype=dtype),
            None if w is None else leaf(HIDDEN, dtype=w, seed=1),
            None if b is None else leaf(HIDDEN, dtype=b, seed=2),
        ]
        for gradient, t in zip(gradients(lntune.layer_norm, given)[1:], given, strict=True):
            assert (gradient is None) == (t is None)
            assert gradient is None or (gradient.dtype == t.dtype and not gradient.any())


def test_training_calls_are_direct_after_the_first(way: str) -> None:
    """A training step's second forward takes the quick way, with the same bits and gradients, and a
    reload forgets it.
    """
    lntune.reload()
    given = [leaf(9, HIDDEN), leaf(HIDDEN, seed=1), leaf(HIDDEN, seed=2)]

    def direct() -> bool:
        if way == "function":
            return bool(module._saving.serves(given[0], (HIDDEN,), given[1], given[2], 1e-5))
        return module._direct.call(given[0], (HIDDEN,), given[1], given[2], 1e-5) is not None

    assert not direct()
    first = gradients(lntune.layer_norm, given, leaf(9, HIDDEN, seed=3, grad=False))  # type: ignore[arg-type]
    assert direct()
    second = gradients(lntune.layer_norm, given, leaf(9, HIDDEN, seed=3, grad=False))  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    )
    lntune.reload()
    assert not direct()
