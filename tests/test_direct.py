"""Direct calls: what a table serves is right, what it does not serve is left alone, and nothing
unusual slips past it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lntune import device, ops, schedule
from lntune.case import Case
from lntune.kernels import compiler
from lntune.kernels.direct import Table
from lntune.ops.layer_norm import reference

OP = ops.get("layer_norm")
NAMES = ("x", "normalized_shape", "weight", "bias", "eps")
HIDDEN = 48
DEVICE = device.current()


@functools.cache
def kernel_of(case: Case) -> Any:
    """The kernel of a case with default knobs."""
    plan = next(iter(schedule.for_op(case.op, DEVICE.kind).values()))
    return compiler.in_memory(case, plan, plan.default(case, DEVICE), DEVICE)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, W, B = make(3, HIDDEN), make(HIDDEN, seed=1), make(HIDDEN, seed=2)
FLOAT32 = Case("layer_norm", HIDDEN, "float32", 8, "weight+bias")


def remember(
    table: Table, case: Case, *call: Any, bits: tuple[int, int] = (1, 10), kernel: Any = None
) -> None:
    """Have the table serve calls like this one."""
    assert table.remember(kernel or kernel_of(case), OP.arguments(case), NAMES, bits, call, case)


def right(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None = W,
    bias: torch.Tensor | None = B,
    eps: float = 1e-5,
) -> bool:
    """True when y has the form of x and the values of float64's layer norm."""
    wide = [None if v is None else v.double() for v in (weight, bias)]
    truth = torch.nn.functional.layer_norm(x.double(), (HIDDEN,), *wide, eps)
    return (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True) and torch.allclose(
        y.double(), truth, rtol=1e-2, atol=1e-2
    )


@pytest.fixture(params=[True, False], ids=["shim", "dlpack"])
def table(request: pytest.FixtureRequest) -> Table:
    """An empty table that allocates in either way."""
    return Table("tnoof", shim=request.param)


@pytest.fixture
def ready(table: Table) -> Iterator[Callable[..., Any]]:
    """The call of a table that serves float32 with weight and bias."""
    remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5)
    assert right(X, table.call(X, (HIDDEN,), W, B, 1e-5))
    yield table.call
    assert right(X, table.call(X, (HIDDEN,), W, B, 1e-5))  # whatever was refused did no harm


@pytest.mark.parametrize(
    "shape", [(3, HIDDEN), (HIDDEN,), (2, 3, HIDDEN), (2, 1, 2, 2, HIDDEN)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_known_call_is_served(table: Table, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any number of leading dimensions, every dtype, tuple, list and torch.Size; weights as
    Parameters too.
    """
    x, w, b = make(*shape, dtype=dtype), torch.nn.Parameter(W.to(dtype)), B.to(dtype)
    remember(
        table,
        Case("layer_norm", HIDDEN, str(dtype).removeprefix("torch."), 8, "weight+bias"),
        make(3, HIDDEN, dtype=dtype),
        (HIDDEN,),
        w,
        b,
        1e-5,
    )
    with torch.no_grad():
        for normalized in ((HIDDEN,), [HIDDEN], torch.Size([HIDDEN])):
            y = table.call(x, normalized, w, b, 1e-5)
            assert right(x, y, w, b) and not y.requires_grad and not y.is_inference()
    with torch.inference_mode():
        assert table.call(x, (HIDDEN,), w, b, 1e-5).is_inference()


def test_several_outputs(table: Table) -> None:
    """Statistics come with y, in the order of the kernel's outputs."""
    case = Case("layer_norm", HIDDEN, "bfloat16", 8, "weight+stats")
    w, x = W.bfloat16(), make(2, 3, HIDDEN, dtype=torch.bfloat16)
    remember(table, case, x, (HIDDEN,), w, None, 1e-5)
    y, mean, rstd = table.call(x, (HIDDEN,), w, None, 1e-5)
    truth = reference(case, {"x": x.view(-1, HIDDEN), "weight": w, "eps": 1e-5})
    assert right(x, y, w, None)
    assert mean.shape == rstd.shape == (6,) and mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), truth["mean"])
    torch.testing.assert_close(rstd.double(), truth["rstd"])
    assert table.call(x, (HIDDEN,), w, w, 1e-5) is None


def test_outputs_are_ordinary_tensors(table: Table) -> None:
    """An output outlives its inputs and the table, can be written, resized, saved and
    differentiated through.
    """
    remember(table, FLOAT32, make(3, HIDDEN), (HIDDEN,), W, B, 1e-5)
    x = make(3, HIDDEN)
    y = table.call(x, (HIDDEN,), W, B, 1e-5)
    kept = y.clone()
    del x, table
    for _ in range(50):
        torch.full((3, HIDDEN), 7.0)
    assert torch.equal(y, kept) and y.untyped_storage().nbytes() >= y.nbytes
    y.requires_grad_().square().sum().backward()
    assert torch.equal(y.grad, 2 * kept)
    y.detach().zero_()
    assert not y.any()


def test_the_key_distinguishes_calls(ready: Callable[..., Any]) -> None:
    """Another dtype, hidden size, combination of vectors or number of rows is not served by what is
    known.
    """
    x, n = make(3, HIDDEN), (HIDDEN,)
    assert ready(x.half(), n, W.half(), B.half(), 1e-5) is None
    assert ready(x.double(), n, W.double(), B.double(), 1e-5) is None
    assert ready(x.half(), n, W, B, 1e-5) is None
    assert ready(x, n, None, B, 1e-5) is None
    assert ready(x, n, W, None, 1e-5) is None
    assert (
        ready(make(3, HIDDEN + 1), (HIDDEN + 1,), make(HIDDEN + 1), make(HIDDEN + 1), 1e-5) is None
    )
    assert ready(make(1024, HIDDEN), n, W, B, 1e-5) is None  # 11 bits
    assert ready(make(0, HIDDEN), n, W, B, 1e-5) is None
    assert ready(make(3, 0), (0,), make(0), make(0), 1e-5) is None


UNUSUAL: dict[str, Callable[[], tuple[Any, ...]]] = {
    "transposed": lambda: (make(HIDDEN, 3).t(), (HIDDEN,), W, B, 1e-5),
    "row-strided": lambda: (make(3, 2 * HIDDEN)[:, :HIDDEN], (HIDDEN,), W, B, 1e-5),
    "negated": lambda: (torch._neg_view(X), (HIDDEN,), W, B, 1e-5),
    "meta": lambda: (X.to("meta"), (HIDDEN,), W, B, 1e-5),
    "sparse": lambda: (X.to_sparse(), (HIDDEN,), W, B, 1e-5),
    "nested": lambda: (torch.nested.nested_tensor([X, X]), (HIDDEN,), W, B, 1e-5),
    "integer": lambda: (X.int(), (HIDDEN,), W, B, 1e-5),
    "subclass": lambda: (X.as_subclass(Subclass), (HIDDEN,), W, B, 1e-5),
    "a list": lambda: (X.tolist(), (HIDDEN,), W, B, 1e-5),
    "None": lambda: (None, (HIDDEN,), W, B, 1e-5),
    "weight a number": lambda: (X, (HIDDEN,), 1.0, B, 1e-5),
    "two dimensions": lambda: (X, (3, HIDDEN), W, B, 1e-5),
    "another shape": lambda: (X, (HIDDEN - 1,), W, B, 1e-5),
    "shape a number": lambda: (X, HIDDEN, W, B, 1e-5),
    "shape of text": lambda: (X, "7", W, B, 1e-5),
    "shape of floats": lambda: (X, (float(HIDDEN),), W, B, 1e-5),
    "eps negative": lambda: (X, (HIDDEN,), W, B, -1e-5),
    "eps nan": lambda: (X, (HIDDEN,), W, B, float("nan")),
    "eps infinite": lambda: (X, (HIDDEN,), W, B, float("inf")),
    "eps a tensor": lambda: (X, (HIDDEN,), W, B, torch.tensor(1e-5)),
    "eps text": lambda: (X, (HIDDEN,), W, B, "small"),
    "too few": lambda: (X, (HIDDEN,), W, B),
    "too many": lambda: (X, (HIDDEN,), W, B, 1e-5, 1e-5),
    "nothing": lambda: (),
}


class Subclass(torch.Tensor):
    """A tensor subclass that wants to see what happens to it."""


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_arguments(ready: Callable[..., Any], what: str) -> None:
    """Arguments a kernel does not take are refused without an exception and without reaching the
    kernel.
    """
    assert ready(*UNUSUAL[what]()) is None


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode", [Watching, Dispatching, forward_ad.dual_level], ids=lambda m: m.__name__
)
def test_modes_see_the_call(ready: Callable[..., Any], mode: Callable[[], Any]) -> None:
    """Under a torch mode or forward-mode differentiation nothing is served."""
    with mode():
        assert ready(X, (HIDDEN,), W, B, 1e-5) is None


def test_transforms_see_the_call(ready: Callable[..., Any]) -> None:
    """vmap and jit.trace see the call: nothing is served inside them."""
    seen = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(ready(X, (HIDDEN,), W, B, 1e-5))
        return x + 1

    torch.func.vmap(inside)(X)
    torch.jit.trace(inside, (X,), check_trace=False)
    assert seen and all(s is None for s in seen)


@pytest.mark.parametrize("which", [0, 2, 3], ids=["input", "weight", "bias"])
def test_gradients_are_never_swallowed(ready: Callable[..., Any], which: int) -> None:
    """A tensor that requires a gradient is refused while gradients are recorded, and served while
    not.
    """
    call = [X.clone(), (HIDDEN,), W.clone(), B.clone(), 1e-5]
    call[which].requires_grad_()  # type: ignore[union-attr]
    assert ready(*call) is None


def test_serving_but_for_gradients(table: Table) -> None:
    """`serves` is true for what is known, gradients or not, and false for everything else that is
    refused.
    """
    assert not table.serves(X, (HIDDEN,), W, B, 1e-5)
    remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5)
    assert table.serves(X, (HIDDEN,), W, B, 1e-5)
    assert table.serves(X.clone().requires_grad_(), (HIDDEN,), torch.nn.Parameter(W), B, 1e-5)
    for what in UNUSUAL.values():
        assert not table.serves(*what())
    for mode in (Watching, Dispatching, forward_ad.dual_level):
        with mode():  # type: ignore[operator]
            assert not table.serves(X, (HIDDEN,), W, B, 1e-5)


def test_a_kernel_that_fails(table: Table) -> None:
    """An error of the kernel is None and not an exception, leaves no error behind, and the next
    call works.
    """
    remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5, kernel=stranger())
    for _ in range(3):
        assert table.call(X, (HIDDEN,), W, B, 1e-5) is None
    remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5)  # of two alike the latest counts
    assert right(X, table.call(X, (HIDDEN,), W, B, 1e-5))


def stranger() -> Any:
    """A kernel that refuses the arguments of these tests: it is for another hidden size."""
    return kernel_of(Case("layer_norm", HIDDEN + 1, "float32", 8, "weight+bias"))


def test_many_entries_and_forgetting(table: Table) -> None:
    """A table grows, tells its entries apart, and forgets."""
    for variant, w, b in (
        ("weight+bias", W, B),
        ("weight", W, None),
        ("bias", None, B),
        ("plain", None, None),
    ):
        remember(
            table,
            Case("layer_norm", HIDDEN, "float32", 8, variant),
            X,
            (HIDDEN,),
            w,
            b,
            1e-5,
            bits=(3, 60),
        )
    for rows in (4, 7, 8, 63, 64, 1000):
        x = make(rows, HIDDEN)
        for w, b in ((W, B), (W, None), (None, B), (None, None)):
            assert right(x, table.call(x, (HIDDEN,), w, b, 1e-5), w, b)
            assert table.call(x[:3], (HIDDEN,), w, b, 1e-5) is None
    table.forget()
    assert table.call(make(9, HIDDEN), (HIDDEN,), W, B, 1e-5) is None


def test_what_cannot_be_remembered(table: Table) -> None:
    """A call that would not be served is not remembered either."""
    case = FLOAT32
    assert not table.remember(
        kernel_of(case),
        OP.arguments(case),
        NAMES,
        (1, 10),
        (X.double(), (HIDDEN,), W, B, 1e-5),
        case,
    )
    assert table.call(X.double(), (HIDDEN,), W, B, 1e-5) is None


def test_what_is_refused_is_not_kept(table: Table) -> None:
    """Being asked again and again to remember what cannot be served, as a call of elements that lie
    apart does, holds on to nothing.
    """
    from lntune.kernels import direct

    strided, before = make(3, 2 * HIDDEN)[:, ::2], len(direct._kept)
    kernel = compiler.in_memory(FLOAT32, *_plan(), DEVICE)
    for _ in range(3):
        assert not table.remember(
            kernel, OP.arguments(FLOAT32), NAMES, (1, 10), (strided, (HIDDEN,), W, B, 1e-5), FLOAT32
        )
    assert len(direct._kept) == before
    for _ in range(3):
        remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5, kernel=kernel)
    assert len(direct._kept) == before + 1


def _plan() -> tuple[Any, Any]:
    plan = next(iter(schedule.for_op("layer_norm", DEVICE.kind).values()))
    return plan, plan.default(FLOAT32, DEVICE)


def test_no_memory_leaks(table: Table) -> None:
    """Served and refused calls hold on to nothing: reference counts stay, and so does the number of
    live tensors.
    """
    import gc
    import sys

    remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5)
    eps, shape = 1e-5 + 1e-9, (HIDDEN,)
    watched = (X, W, B, shape, eps, None, torch.Tensor, torch.nn.Parameter)
    table.call(X, shape, W, B, eps)
    before = [sys.getrefcount(o) for o in watched]
    alive = sum(type(o) is torch.Tensor for o in gc.get_objects())
    for _ in range(200):
        table.call(X, shape, W, B, eps)
        table.call(X, shape, None, B, eps)
        table.call(X.int(), shape, W, B, eps)
    after = [sys.getrefcount(o) for o in watched]
    assert all(abs(a - b) < 100 for a, b in zip(after, before, strict=True)), (before, after)
    assert abs(sum(type(o) is torch.Tensor for o in gc.get_objects()) - alive) < 100


def test_threads_and_forgetting_at_once(table: Table) -> None:
    """Calls from several threads while another remembers and forgets: every answer is right or
    None.
    """
    wrong: list[torch.Tensor] = []
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            y = table.call(X, (HIDDEN,), W, B, 1e-5)
            if y is not None and not right(X, y):
                wrong.append(y)

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for t in threads:
        t.start()
    for _ in range(100):
        remember(table, FLOAT32, X, (HIDDEN,), W, B, 1e-5)
        table.forget()
    stop.set()
    for t in threads:
        t.join()
    assert not wrong
