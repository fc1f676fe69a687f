"""Cases that a record leaves to eager mode have PyTorch's results in whatever context they are
called, as PyTorch's own functions do it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_records import final_here
from torch import Tensor
from torch.nn import functional

import lntune
from lntune.case import Case
from lntune.log import records
from lntune.ops.lnlstm_step import formula
from lntune.system import paths

HIDDEN, ROWS = 24, 5
OPERATORS = ("layer_norm", "layer_norm_backward", "lnlstm_step", "lnlstm_step_backward")
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def eager_wins(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A log in which eager mode is faster in everything."""
    for op in OPERATORS:
        for dtype in ("float32", "bfloat16"):
            record = final_here(Case(op, HIDDEN, dtype, ROWS), tuned=2.0, eager=1.0)
            records.append(log_dir, record)
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    lntune.reload()
    yield
    lntune.reload()


def norm(function: Any) -> Function:
    """A layer norm and something behind it, so that a gradient is not 0."""
    return lambda x, w, b: function(x, (HIDDEN,), w, b).square() * x


def step(function: Any) -> Function:
    """A step of an LSTM as a function of three tensors."""

    def stepped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        gates, wide = torch.cat([x, -x, 2 * x, x + 1], -1), torch.cat([w, w, w, w])
        h, c = function(gates, gates.flip(-1), x, None, wide, w, wide, b, 1e-5, False)
        return h + c

    return stepped


PAIRS = {
    "layer_norm": (norm(lntune.layer_norm), norm(functional.layer_norm)),
    "lnlstm_step": (step(lntune.lnlstm_step), step(formula)),
}


def tensors(grad: bool = False) -> tuple[Tensor, ...]:
    """x, a gain and a bias, the same every time."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((ROWS, HIDDEN), (HIDDEN,), (HIDDEN,))
    return tuple(torch.randn(*s, generator=generator).requires_grad_(grad) for s in sizes)


def trained(function: Function) -> list[Tensor]:
    """The result and all gradients."""
    given = tensors(grad=True)
    y = function(*given)
    return [y.detach(), *torch.autograd.grad(y.float().sum(), given)]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """What PyTorch cannot do in the same way every time raises in the block."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast() -> Any:
    """Products in bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


WAYS: dict[str, Callable[[Function], Any]] = {
    "a call": lambda f: f(*tensors()),
    "training": trained,
    "bfloat16": lambda f: f(*(t.bfloat16() for t in tensors())),
    "vmap": lambda f: torch.vmap(f, (0, None, None))(tensors()[0][:, None], *tensors()[1:]),
    "vmap over gains": lambda f: torch.vmap(f, (None, 0, 0))(
        tensors()[0], *(t.expand(3, HIDDEN) * 2 for t in tensors()[1:])
    ),
    "grad": lambda f: torch.func.grad(lambda *t: f(*t).sum(), (0, 1, 2))(*tensors()),
    "jvp": lambda f: torch.func.jvp(f, tensors(), tensors()),
    "hessian": lambda f: torch.func.hessian(lambda *t: f(*t).sum())(*tensors()),
    "per-sample gradients": lambda f: torch.vmap(
        torch.func.grad(lambda x, w, b: f(x, w, b).sum(), (1, 2)), (0, None, None)
    )(tensors()[0][:, None], *tensors()[1:]),
    "compiled": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors()),
    "compiled training": lambda f: trained(torch.compile(f, fullgraph=True, backend="aot_eager")),
}
AROUND: dict[str, Callable[[], Any]] = {
    "as it is": contextlib.nullcontext,
    "autocast": autocast,
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}


def same(one: Any, other: Any, way: str) -> None:
    """Equal to the bit, dtypes and layout too. A compiled step has its own gradients, by the same
    formulas as a kernel's: to some roundings.
    """
    near = {"rtol": 1e-4, "atol": 1e-6} if way == "compiled training" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one, other, equal_nan=True, **near)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("op", PAIRS)
def test_pytorchs_results_in_every_context(op: str, around: str) -> None:
    """Whatever transforms, compiles, records or casts a call: what serves is PyTorch, the first
    time and when the call is known.
    """
    ours, theirs = PAIRS[op]
    for way, call in WAYS.items():
        if around == "inference mode" and way not in ("a call", "bfloat16", "compiled"):
            continue  # no gradients there
        torch._dynamo.reset()
        for _ in range(2):
            with AROUND[around]():
                got, expected = call(ours), call(theirs)
            try:
                same(got, expected, way)
            except AssertionError as e:
                raise AssertionError(f"{op}, {way}, {around}: {e}") from e
