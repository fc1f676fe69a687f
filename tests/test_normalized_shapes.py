"""Rows of several dimensions: as good as PyTorch's, forward and backward, and to the kernels what
rows of one dimension are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from grids import product
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lntune
from lntune.errors import InputError
from lntune.torch import layer_norm as module
from lntune.torch import layer_norm_backward as backward_module
from lntune.torch import layer_norm_node

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

HIDDEN = 64
SHAPES = [(4, 16), (64, 1), (2, 4, 8)]
"""Of HIDDEN elements each."""
AFFINES = ["weight+bias", "weight", "bias", "plain"]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
"""Of the input and of the affine tensors."""
several = pytest.mark.parametrize("shape", SHAPES, ids=str)
kinds = pytest.mark.parametrize(
    ("shape", "affine", "dtypes"), product(SHAPES, AFFINES, DTYPES), ids=str
)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers around 0.5."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + 0.5).to(dtype)


def given(
    shape: tuple[int, ...],
    leading: tuple[int, ...] = (5,),
    dtype: torch.dtype = torch.float32,
    vectors: torch.dtype = torch.float32,
    affine: str = "weight+bias",
    grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input, weight and bias, of which `affine` says which are there."""
    x = drawn(*leading, *shape, dtype=dtype).requires_grad_(grad)
    w, b = (
        drawn(*shape, dtype=vectors, seed=seed).requires_grad_(grad) if name in affine else None
        for seed, name in enumerate(("weight", "bias"), 1)
    )
    return x, w, b


def normalized(x: Tensor, w: Tensor | None, b: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """lntune's."""
    return lntune.layer_norm(x, shape, w, b)


def by_pytorch(x: Tensor, w: Tensor | None, b: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """PyTorch's."""
    return functional.layer_norm(x, shape, w, b)


def in_one_dimension(
    x: Tensor, w: Tensor | None, b: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """lntune's of rows of one dimension, viewed as `shape` afterwards."""
    flat = (None if v is None else v.view(HIDDEN) for v in (w, b))
    y = lntune.layer_norm(x.flatten(x.ndim - len(shape)), (HIDDEN,), *flat)
    return y.unflatten(-1, shape)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """Leaves in float64."""
    return [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]


def close(got: Tensor, truth: Tensor) -> bool:
    """True where a result is as near to float64's as its dtype allows."""
    tolerance = (2e-5 if got.dtype == torch.float32 else 2e-2) * max(1.0, float(truth.abs().max()))
    return got.shape == truth.shape and float((got.double() - truth).abs().max()) <= tolerance


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that went through Python, "forward" or "backward", of a process that begins with
    none known.
    """
    assert not layer_norm_node.reason_missing()
    lntune.reload()
    assert lntune.layer_norm_backward  # the name keeps what it stood for when first asked for
    seen: list[str] = []

    def watch(place: Any, name: str, word: str) -> None:
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a: seen.append(word) or function(*a))

    watch(module, "_general", "forward")
    watch(backward_module, "layer_norm_backward", "backward")
    yield seen
    lntune.reload()


@kinds
def test_inference(
    shape: tuple[int, ...],
    affine: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    long_way: list[str],
) -> None:
    """What is known of rows of one dimension serves those of several: not one call of another shape
    goes the long way, and all are right.
    """
    in_one_dimension(*given((HIDDEN,), (5,), *dtypes, affine), (HIDDEN,))
    long_way.clear()
    for leading in ((5,), (2, 3), (1, 4, 1)):
        x, w, b = given(shape, leading, *dtypes, affine)
        for form in (shape, list(shape), torch.Size(shape)):
            y = lntune.layer_norm(x, form, w, b)
            assert y.dtype == x.dtype and y.is_contiguous()
            assert close(y, by_pytorch(*wide(x, w, b), shape))
    assert not long_way


@several
def test_a_single_row(shape: tuple[int, ...], long_way: list[str]) -> None:
    """An input without leading dimensions is one row, as one with a leading 1 is."""
    x, w, b = given(shape, ())
    for _ in range(3):
        assert close(normalized(x, w, b, shape), by_pytorch(*wide(x, w, b), shape))
        assert torch.equal(normalized(x[None], w, b, shape)[0], normalized(x, w, b, shape))
    assert long_way == ["forward"]


@kinds
def test_training(
    shape: tuple[int, ...],
    affine: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    long_way: list[str],
) -> None:
    """Gradients near float64's, in the shapes and dtypes of their tensors and with the bits of rows
    of one dimension; from the second step on without Python.
    """
    leaves = given(shape, (5,), *dtypes, affine, grad=True)
    there = [t for t in leaves if t is not None]
    dy = drawn(5, *shape, dtype=dtypes[0], seed=3)
    true = wide(*leaves)
    truth = torch.autograd.grad(
        by_pytorch(*true, shape), [t for t in true if t is not None], dy.double()
    )
    steps = []
    for forward in (normalized, normalized, in_one_dimension):
        long_way.clear()
        y = forward(*leaves, shape)
        steps.append([y, *torch.autograd.grad(y, there, dy)])
        if forward is normalized:
            assert y.grad_fn is not None and y.grad_fn.name() == "LntuneLayerNormBackward"
    assert not long_way
    for got in zip(*steps, strict=True):
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    for got, true_gradient, leaf in zip(steps[0][1:], truth, there, strict=True):
        assert got.dtype == leaf.dtype and got.is_contiguous() and close(got, true_gradient)


def test_the_same_hidden_size_in_several_shapes(long_way: list[str]) -> None:
    """Steps of training with rows of one, two and three dimensions in turns, each graph with
    backward of its own: nothing of one reaches another.
    """
    for _ in range(2):
        long_way.clear()
        graphs = []
        for shape in ((HIDDEN,), *SHAPES):
            leaves = given(shape, grad=True)
            graphs.append((shape, leaves, normalized(*leaves, shape)))
        for shape, leaves, y in graphs:
            (y * torch.arange(5.0).view(-1, *[1] * len(shape))).sum().backward()
            true = wide(*leaves)
            theirs = by_pytorch(*true, shape) * torch.arange(5.0).view(-1, *[1] * len(shape))
            theirs.sum().backward()
            assert all(close(t.grad, d.grad) for t, d in zip(leaves, true, strict=True))
    assert not long_way


@several
def test_without_the_node(
    shape: tuple[int, ...], long_way: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the node cannot be compiled an autograd.Function serves, its second forward direct."""
    monkeypatch.setattr(layer_norm_node, "ready", lambda: False)
    leaves = given(shape, grad=True)
    for _ in range(2):
        long_way.clear()
        y = normalized(*leaves, shape)
        grads = torch.autograd.grad(y.square().sum(), leaves)
    assert "forward" not in long_way
    assert y.grad_fn is not None and y.grad_fn.name() == "_LayerNormBackward"
    true = wide(*leaves)
    truth = torch.autograd.grad(by_pytorch(*true, shape).square().sum(), true)
    assert all(close(g, t) for g, t in zip(grads, truth, strict=True))


VIEWS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "rows apart": (True, lambda x: torch.stack([x, x], 1)[:, 1]),
    "expanded rows": (True, lambda x: x[:1].expand(5, *[-1] * (x.ndim - 1))),
    "elements apart": (False, lambda x: torch.stack([x, x], -1)[..., 0]),
    "columns apart": (False, lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]),
    "transposed": (False, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(4, 16), (2, 4, 8)], ids=str)
def test_views(view: str, shape: tuple[int, ...], long_way: list[str]) -> None:
    """Rows that lie apart are served directly; where the elements of a row do, the call is not
    taken for one that is known, and right.
    """
    direct, made = VIEWS[view]
    x, w, b = given(shape)
    normalized(x, w, b, shape)
    seen = made(x)
    expected = by_pytorch(*wide(seen, w, b), shape)
    assert not seen.is_contiguous()
    for _ in range(2):
        long_way.clear()
        y = normalized(seen, w, b, shape)
        assert y.is_contiguous() and close(y, expected)
    assert long_way == ([] if direct else ["forward"])


@several
@pytest.mark.parametrize("which", [1, 2])
def test_vectors_whose_elements_lie_apart(
    which: int, shape: tuple[int, ...], long_way: list[str]
) -> None:
    """They are copied, by the long way."""
    call = [*given(shape)]
    normalized(*call, shape)
    call[which] = torch.stack([call[which], call[which]], -1)[..., 0]  # type: ignore[list-item]
    assert close(normalized(*call, shape), by_pytorch(*wide(*call), shape))
    assert long_way == ["forward", "forward"]


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_no_rows(leading: tuple[int, ...], long_way: list[str]) -> None:
    """Nothing gives nothing, with zeros for the gradients of the affine; a row without elements is
    PyTorch's.
    """
    shape = (4, 16)
    normalized(*given(shape, (2, 3)), shape)
    leaves = given(shape, leading, grad=True)
    y = normalized(*leaves, shape)
    assert y.shape == (*leading, *shape)
    grads = torch.autograd.grad(y.sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf is not None and grad.shape == leaf.shape and not grad.any()
    assert normalized(torch.ones(3, 4, 0), None, None, (4, 0)).shape == (3, 4, 0)


X, W, B = given((4, 16))
WRONG: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "weight flat": lambda x: (x, (4, 16), W.view(-1), B),
    "weight transposed": lambda x: (x, (4, 16), W.t().contiguous(), B),
    "weight too short": lambda x: (x, (4, 16), W[:3], B),
    "weight of the last dimension": lambda x: (x, (4, 16), W[0], B),
    "weight with a leading 1": lambda x: (x, (4, 16), W[None], B),
    "bias flat": lambda x: (x, (4, 16), W, B.view(-1)),
    "bias of several rows": lambda x: (x, (4, 16), W, torch.stack([B, B])),
    "shape transposed": lambda x: (x, (16, 4), W.view(16, 4), B.view(16, 4)),
    "shape flat": lambda x: (x, (64,), W.view(-1), B.view(-1)),
    "shape of the last dimension": lambda x: (x, (16,), W, B),
    "shape with a 1 before it": lambda x: (x, (1, 4, 16), W[None], B[None]),
    "shape of more dimensions": lambda x: (x[0], (5, 4, 16), W, B),
    "shape negative": lambda x: (x, (-4, -16), W, B),
    "shape of floats": lambda x: (x, (4.0, 16.0), W, B),
    "shape of very many dimensions": lambda x: (x, (1,) * 40 + (4, 16), W, B),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("grad", [False, True])
def test_what_does_not_fit(what: str, grad: bool, long_way: list[str]) -> None:
    """A shape that does not fit is refused by the direct call, whatever number of elements it has,
    and is lntune's error.
    """
    x = X.clone().requires_grad_(grad)
    normalized(x, W, B, (4, 16)).sum()
    in_one_dimension(x, W, B, (4, 16))
    assert module._direct.call(x, (4, 16), W, B, 1e-5) is not None
    call = WRONG[what](x)
    assert module._direct.call(*call, 1e-5) is None
    assert not module._direct.serves(*call, 1e-5)
    with pytest.raises(InputError):
        lntune.layer_norm(*call)
    assert module._direct.call(x, (4, 16), W, B, 1e-5) is not None


@several
@torch.no_grad()
def test_the_backward_by_itself(shape: tuple[int, ...], long_way: list[str]) -> None:
    """lntune.layer_norm_backward is direct, with gradients in the shapes of their tensors, for each
    set of them; tensors of another shape are refused.
    """
    x, w, b = given(shape, (2, 3))
    assert w is not None and b is not None
    _, mean, rstd = lntune.layer_norm_forward(x, shape, w, b)
    assert mean.shape == rstd.shape == (6,)
    dy = drawn(2, 3, *shape, seed=3)
    for wanted in ((True, True, True), (False, True, True), (True, False, False)):
        call = (dy, x, shape, mean, rstd, w, b)
        first = lntune.layer_norm_backward(*call, wanted)
        outputs = backward_module._direct[wanted].call(*call)
        assert outputs is not None
        got = backward_module._by_position(outputs, wanted)
        for one, other, like in zip(got, first, (x, w, b), strict=True):
            assert (one is None) == (other is None)
            assert one is None or (torch.equal(one, other) and one.shape == like.shape)
        for i, t in ((0, dy[:1]), (1, x.flatten(2)), (5, w.view(-1)), (6, b.view(-1)), (6, b[:1])):
            wrong = [*call]
            wrong[i] = t
            if w.ndim > 1 and not torch.equal(t, call[i]):
                assert backward_module._direct[wanted].call(*wrong) is None
                with pytest.raises(InputError):
                    lntune.layer_norm_backward(*wrong, wanted)


@several
def test_where_eager_serves_the_backward(
    shape: tuple[int, ...], long_way: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward whose record says that eager is faster is PyTorch's operator, without a detour."""
    kernel_for, choose = module.dispatch.kernel_for, module.dispatch.choose

    def is_backward(case: Any) -> bool:
        return bool(case.op == "layer_norm_backward")

    monkeypatch.setattr(
        module.dispatch,
        "kernel_for",
        lambda case, tensors=(): None if is_backward(case) else kernel_for(case, tensors),
    )
    monkeypatch.setattr(
        module.dispatch,
        "choose",
        lambda case, device=None: (
            msgspec.structs.replace(choose(case, device), tier="eager")
            if is_backward(case)
            else choose(case, device)
        ),
    )
    leaves = given(shape, grad=True)
    for _ in range(2):
        long_way.clear()
        grads = torch.autograd.grad(normalized(*leaves, shape).square().sum(), leaves)
    assert not long_way
    true = wide(*leaves)
    truth = torch.autograd.grad(by_pytorch(*true, shape).square().sum(), true)
    assert all(close(g, t) for g, t in zip(grads, truth, strict=True))


def both(f: Callable[[Callable[..., Tensor]], Any]) -> None:
    """What `f` makes of lntune's layer norm is close to what it makes of PyTorch's."""
    for _ in range(2):
        torch.testing.assert_close(f(normalized), f(by_pytorch), atol=1e-4, rtol=1e-4)


@several
def test_twice_differentiated(shape: tuple[int, ...]) -> None:
    """A backward that is recorded can be differentiated again."""

    def twice(f: Callable[..., Tensor]) -> Any:
        x, w, b = given(shape, grad=True)
        (dx,) = torch.autograd.grad(f(x, w, b, shape).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    both(twice)


@several
def test_transforms_and_checkpoints(shape: tuple[int, ...]) -> None:
    """vmap over rows, torch.func's gradients, gradients of many outputs at once, a checkpoint."""
    x, w, b = given(shape, (3, 2))
    both(lambda f: torch.func.vmap(lambda t: f(t, w, b, shape))(x))
    both(lambda f: torch.func.grad(lambda t: f(x, t, b, shape).sin().sum())(w))
    basis = torch.eye(x.numel()).view(-1, *x.shape)[::37]

    def batched(f: Callable[..., Tensor]) -> Any:
        leaves = given(shape, (3, 2), grad=True)
        y = f(*leaves, shape)
        return torch.autograd.grad(y, leaves, basis, is_grads_batched=True)

    both(batched)

    def checkpointed(f: Callable[..., Tensor]) -> Any:
        leaves = given(shape, (3, 2), grad=True)
        y = checkpoint(lambda t: f(t, *leaves[1:], shape).tanh(), leaves[0], use_reentrant=False)
        y.square().sum().backward()
        return [t.grad for t in leaves]

    both(checkpointed)


CHANGED: dict[str, tuple[int, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "input of one row": (0, lambda t: t[:1], InputError, "grad_out: got"),
    "input without dimensions": (0, lambda t: t[0, 0, 0], RuntimeError, "fewer dimensions"),
    "weight cut": (1, lambda t: t[:1], InputError, "weight: got"),
    "bias cut": (2, lambda t: t[:1], InputError, "bias: got"),
    "weight transposed": (1, lambda t: t.t(), InputError, "weight: got"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_hooks_that_give_back_other_tensors(what: str, long_way: list[str]) -> None:
    """Saved tensors that come back in another shape are an error, not memory that is none of
    theirs.
    """
    which, change, error, words = CHANGED[what]
    shape, leaves = (4, 16), given((4, 16), grad=True)
    torch.autograd.grad(normalized(*leaves, shape).sum(), leaves)  # the kernel is known
    torch.autograd.grad(normalized(*leaves, shape).sum(), leaves)
    assert long_way == ["forward", "backward"]
    own = leaves[which].data_ptr()

    def unpack(t: Tensor) -> Tensor:
        return change(t.detach()).clone() if t.data_ptr() == own else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = normalized(*leaves, shape)
    with pytest.raises(error, match=words):
        y.sum().backward()


def test_modules() -> None:
    """lntune.LayerNorm over several dimensions, training: as nn.LayerNorm."""
    ours = lntune.LayerNorm((4, 16))
    theirs = torch.nn.LayerNorm((4, 16))
    for _ in range(2):
        grads = []
        for norm in (ours, theirs):
            norm.zero_grad()
            x = drawn(3, 2, 4, 16).requires_grad_()
            norm(x).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in norm.parameters())])
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
