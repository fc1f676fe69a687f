"""The backward of layer norm as a node in C++: what it saves, when it goes to the kernel, and that
autograd's tools see a usual node.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import lntune
from lntune.errors import NotTunedError, ToolchainError
from lntune.system import native
from lntune.torch import layer_norm as module
from lntune.torch import layer_norm_backward as backward_module
from lntune.torch import layer_norm_node as node

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

HIDDEN = 64


def leaves(rows: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight and bias that want gradients."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, HIDDEN), (HIDDEN,), (HIDDEN,))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def normalized(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """lntune's, whose backward is the node."""
    y = lntune.layer_norm(x, (HIDDEN,), w, b)
    assert y.grad_fn is not None and y.grad_fn.name() == "LntuneLayerNormBackward"
    return y


def by_pytorch(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """PyTorch's."""
    return functional.layer_norm(x, (HIDDEN,), w, b)


@pytest.fixture(autouse=True)
def built() -> None:
    """The node can be compiled here, as everywhere where kernels can."""
    assert not node.reason_missing()


@pytest.fixture
def python_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The backwards that went through Python."""
    seen: list[tuple[Any, ...]] = []
    general = backward_module.layer_norm_backward

    def watched(*arguments: Any) -> Any:
        seen.append(arguments)
        return general(*arguments)

    monkeypatch.setattr(backward_module, "layer_norm_backward", watched)
    return seen


def both(f: Callable[[Callable[..., Tensor]], Any]) -> None:
    """What `f` makes of lntune's layer norm is close to what it makes of PyTorch's."""
    torch.testing.assert_close(f(normalized), f(by_pytorch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 40, 300])
def test_a_usual_backward_goes_straight_to_the_kernel(rows: int, python_calls: list[Any]) -> None:
    """Dense or expanded gradients, all three of them wanted: no Python, and the gradients of
    PyTorch.
    """
    x, w, b = leaves(rows)
    dy = torch.randn(rows, HIDDEN)
    torch.autograd.grad(normalized(x, w, b), (x, w, b), dy)
    python_calls.clear()

    def grads(f: Callable[..., Tensor]) -> Any:
        return [
            *torch.autograd.grad(f(x, w, b), (x, w, b), dy),
            *torch.autograd.grad(f(x, w, b).sum(), (x, w, b)),
        ]

    both(grads)
    assert not python_calls


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (0, 1, 2)])
def test_kernels_are_learnt_from_the_first_backward(
    wanted: tuple[int, ...], python_calls: list[Any]
) -> None:
    """The first backward of a case, for each set of gradients, asks Python, later ones do not; the
    bits are the same.
    """
    lntune.reload()
    leaf = leaves()
    first, second, third = (
        torch.autograd.grad(normalized(*leaf).sum(), [leaf[i] for i in wanted]) for _ in range(3)
    )
    assert len(python_calls) == 1
    assert all(
        torch.equal(p, q) and torch.equal(p, r)
        for p, q, r in zip(first, second, third, strict=True)
    )


def test_a_reload_forgets_kernels(python_calls: list[Any]) -> None:
    """A graph made before lntune.reload() still has its backward, by way of Python."""
    x, w, b = leaves()
    torch.autograd.grad(normalized(x, w, b).sum(), (x, w, b))
    y = normalized(x, w, b)
    before = len(python_calls)
    lntune.reload()
    torch.autograd.grad(y.sum(), (x, w, b))
    assert len(python_calls) == before + 1


def test_a_forward_alone_builds_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is used without no_grad, and never trained, builds neither backward kernels nor
    the node.
    """
    lntune.reload()
    asked: list[str] = []
    kernel_for = module.dispatch.kernel_for
    monkeypatch.setattr(
        module.dispatch,
        "kernel_for",
        lambda case, tensors=(): asked.append(case.op) or kernel_for(case, tensors),
    )
    normalized(*leaves())
    assert asked == ["layer_norm"]


def test_the_first_backward_compiles_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the node is not compiled yet the first forward and backward are a Function's; the next
    ones are the node's.
    """
    loaded = node._loaded.copy()
    monkeypatch.setattr(node, "_loaded", [])
    monkeypatch.setattr(node, "ready", lambda: bool(node._loaded))
    monkeypatch.setattr(
        node, "compile_once", lambda: not node._loaded and not node._loaded.extend(loaded)
    )
    lntune.reload()
    x, w, b = leaves()
    for _ in range(2):
        y = lntune.layer_norm(x, (HIDDEN,), w, b)
        assert y.grad_fn is not None and y.grad_fn.name() == "_LayerNormBackward"
    y.sum().backward()
    normalized(x, w, b)


@pytest.mark.parametrize("tier", ["eager", "default"])
def test_where_eager_serves(
    tier: str, monkeypatch: pytest.MonkeyPatch, python_calls: list[Any]
) -> None:
    """A backward whose record says that eager is faster is PyTorch's operator, without a detour;
    one whose kernel only cannot be had at the moment asks for it again.
    """
    lntune.reload()
    kernel_for, choose = module.dispatch.kernel_for, module.dispatch.choose

    def eager_backwards(case: Any, tensors: Any = ()) -> Any:
        return None if case.op == "layer_norm_backward" else kernel_for(case, tensors)

    def choice(case: Any, device: Any = None) -> Any:
        return (
            msgspec.structs.replace(choose(case, device), tier=tier)
            if case.op == "layer_norm_backward"
            else choose(case, device)
        )

    monkeypatch.setattr(module.dispatch, "kernel_for", eager_backwards)
    monkeypatch.setattr(module.dispatch, "choose", choice)
    x, w, b = leaves(33)
    torch.autograd.grad(normalized(x, w, b).sum(), (x, w, b))
    python_calls.clear()
    both(lambda f: torch.autograd.grad(f(x, w, b).square().sum(), (x, w, b)))
    assert len(python_calls) == (tier != "eager")
    lntune.reload()


def test_saved_tensors_are_those_of_pytorch() -> None:
    """Hooks see input, weight, bias and the statistics in PyTorch's order, and what they give back
    is used.
    """

    def packed(f: Callable[..., Tensor]) -> tuple[list[int], list[Tensor]]:
        x, w, b = leaves()
        sizes: list[int] = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t * 1):
            y = f(x, w, b)
        return sorted(sizes), list(torch.autograd.grad(y.square().sum(), (x, w, b)))

    (sizes, ours), (expected, theirs) = packed(normalized), packed(by_pytorch)
    assert sizes == expected
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_errors_of_hooks_reach_the_caller() -> None:
    """A hook that raises while a tensor is saved or given back raises that very error."""

    class OwnError(Exception):
        pass

    def refuse(_: Tensor) -> Tensor:
        raise OwnError

    x, w, b = leaves()
    normalized(x, w, b)
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t), pytest.raises(OwnError):
        lntune.layer_norm(x, (HIDDEN,), w, b)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, refuse):
        y = normalized(x, w, b)
    with pytest.raises(OwnError):
        y.sum().backward()


def test_errors_of_autograd_are_those_of_pytorch() -> None:
    """A second backward, a saved tensor changed in place, an inference tensor: RuntimeErrors with
    PyTorch's words.
    """
    x, w, b = leaves()
    y = normalized(x, w, b)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = normalized(x, w, b)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        frozen = torch.randn(5, HIDDEN)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        lntune.layer_norm(frozen, (HIDDEN,), w, b)


def test_twice_differentiated() -> None:
    """A backward that is recorded can be differentiated again."""

    def twice(f: Callable[..., Tensor]) -> Any:
        x, w, b = leaves()
        (dx,) = torch.autograd.grad(f(x, w, b).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    both(twice)


def test_modes_see_the_backward() -> None:
    """A dispatch mode that is on while the backward runs sees PyTorch's operators, as it does
    without lntune.
    """

    def counted(f: Callable[..., Tensor]) -> float:
        x, w, b = leaves()
        y = f(x @ torch.eye(HIDDEN), w, b)
        with FlopCounterMode(display=False) as mode:
            y.sum().backward()
        return float(mode.get_total_flops())

    both(counted)
    assert counted(normalized) > 0


def test_batched_gradients() -> None:
    """vmap over the backward."""
    basis = torch.eye(5 * HIDDEN).view(-1, 5, HIDDEN)[::7]

    def batched(f: Callable[..., Tensor]) -> Any:
        x, w, b = leaves()
        return torch.autograd.grad(f(x, w, b), (x, w, b), basis, is_grads_batched=True)

    both(batched)


def test_views_of_inputs() -> None:
    """Rows that lie apart and gradients in any layout."""

    def strided(f: Callable[..., Tensor]) -> Any:
        wide = torch.randn(
            5, 2 * HIDDEN, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        _, w, b = leaves()
        dy = torch.randn(HIDDEN, 5, generator=torch.Generator().manual_seed(2)).t()
        return torch.autograd.grad(f(wide[:, HIDDEN:], w, b), (wide, w, b), dy)

    both(strided)


@pytest.mark.parametrize("affine", [torch.float32, torch.bfloat16])
def test_low_precision(affine: torch.dtype) -> None:
    """bfloat16 with an affine in its own dtype or in float32: gradients in the dtypes of their
    tensors.
    """
    x, w, b = leaves(7, torch.bfloat16)
    w, b = (t.detach().to(affine).requires_grad_() for t in (w, b))
    grads = torch.autograd.grad(normalized(x, w, b).float().square().sum(), (x, w, b))
    assert [g.dtype for g in grads] == [torch.bfloat16, affine, affine]
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(by_pytorch(*wide).square().sum(), wide)
    for got, true in zip(grads, expected, strict=True):
        torch.testing.assert_close(
            got.double(), true, atol=0.05 * float(true.abs().max()), rtol=0.05
        )


def test_undefined_gradients() -> None:
    """An output that nothing depends on gives no gradient, and no error."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    x, w, b = leaves()
    Cut.apply(normalized(x, w, b)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None or not x.grad.any()


def test_anomaly_mode_names_the_forward() -> None:
    """torch.autograd.detect_anomaly finds a NaN in the node's gradients."""
    x, w, b = leaves()
    with torch.no_grad():
        x[0, 0] = torch.nan
    torch.autograd.grad(normalized(x, w, b).sum(), x)
    with (
        pytest.warns(UserWarning, match="Error detected in LntuneLayerNormBackward"),
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.raises(RuntimeError, match="'LntuneLayerNormBackward' returned nan"),
    ):
        normalized(x, w, b).nan_to_num().sum().backward()


def test_compiled_autograd() -> None:
    """torch's compiled autograd traces the node."""

    def compiled(f: Callable[..., Tensor]) -> Any:
        x, w, b = leaves()
        y = f(x, w, b).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward()
        return [x.grad, w.grad, b.grad]

    both(compiled)


@pytest.mark.parametrize("wanted", ["x", "xwb"])
def test_compiled_autograd_of_several(wanted: str) -> None:
    """Two norms in one trace, other gradients in another, and a trace of another shape after it: as
    with PyTorch's norm.
    """

    def compiled(f: Callable[..., Tensor]) -> Any:
        grads = []
        for rows in (3, 5):
            x, w, b = leaves(rows)
            w, b = (v if "w" in wanted else v.detach() for v in (w, b))
            y = f(f(x, w, b).sin(), w, b).pow(3).sum()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                y.backward()
            grads += [v.grad for v in (x, w, b) if v.requires_grad]
        return grads

    both(compiled)


def test_compiled_autograd_of_rows_of_several_dimensions() -> None:
    """One input normalized over its last two, its last and all its dimensions in one process: how
    many they are is part of what a trace is kept for.
    """

    def compiled(f: Callable[..., Tensor], dims: int) -> Tensor:
        x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = f(x, x.shape[-dims:]).pow(3).sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward()
        assert x.grad is not None
        return x.grad

    for dims in (2, 1, 3, 2):
        ours, theirs = (compiled(f, dims) for f in (lntune.layer_norm, functional.layer_norm))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_strict_mode() -> None:
    """In strict mode a backward whose case was not measured is NotTunedError, as a forward is,
    through autograd's C++.
    """
    lntune.reload()
    x, w, b = leaves(17)
    y = normalized(x, w, b)
    try:
        lntune.strict()
        with pytest.raises(NotTunedError, match="lntune tune layer_norm_backward"):
            y.sum().backward()
    finally:
        lntune.strict(False)


def test_a_child_after_a_fork() -> None:
    """A forked process trains as its parent does."""
    given = leaves(9)
    expected = torch.autograd.grad(normalized(*given).sum(), given)
    child = os.fork()
    if not child:
        same = False
        with contextlib.suppress(BaseException):
            grads = torch.autograd.grad(normalized(*given).sum(), given)
            lntune.reload()
            same = all(torch.equal(p, q) for p, q in zip(grads, expected, strict=True))
        os._exit(not same)
    assert os.waitpid(child, 0)[1] == 0


def test_threads() -> None:
    """Forward and backward in several threads at once, and the graph of one thread in another."""
    expected = torch.autograd.grad(normalized(*(given := leaves(9))).sum(), given)
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        for _ in range(50):
            results.append(torch.autograd.grad(normalized(*given).sum(), given))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 200
    assert all(torch.equal(p, q) for grads in results for p, q in zip(grads, expected, strict=True))


def test_graphs_are_freed() -> None:
    """A node is not kept alive by what it saves."""
    x, w, b = leaves()
    inner = x * 1
    alive = weakref.ref(inner)
    y = normalized(inner, w, b)
    del inner
    assert alive() is not None or y.grad_fn is not None
    del y
    assert alive() is None


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the node cannot be compiled autograd.Function serves, and the reason is kept for
    `lntune doctor`.
    """
    monkeypatch.setattr(node, "_loaded", [])
    monkeypatch.setattr(node, "_missing", [])
    record = node.RECORD.value

    def none(*_: Any) -> Any:
        raise ToolchainError("no C++ compiler found")

    monkeypatch.setattr(native, "load", none)
    node.RECORD.value = None
    lntune.reload()
    try:
        assert "no C++ compiler" in node.reason_missing()
        x, w, b = leaves()
        y = lntune.layer_norm(x, (HIDDEN,), w, b)
        assert y.grad_fn is not None and y.grad_fn.name() != "LntuneLayerNormBackward"
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), x),
            torch.autograd.grad(by_pytorch(x, w, b).sum(), x),
            atol=1e-5,
            rtol=1e-5,
        )
    finally:
        node.RECORD.value = record
        lntune.reload()
