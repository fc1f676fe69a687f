"""LSTMs and layer norm under batched gradients, checkpoints whose recomputation is watched, and
torch.fx.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import exhaustive
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lntune
from lntune.errors import InputError
from lntune.ops.lnlstm_step import formula

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

HIDDEN = 3


def close(got: Any, expected: Any) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def step(x: Tensor) -> Tensor:
    """One step, of gates made of x (batch, 4 * hidden); h and c of it side by side."""
    gains = torch.linspace(0.5, 1.5, 4 * HIDDEN)
    h, c = lntune.lnlstm_step(x, x.flip(0), x[:, :HIDDEN], gains, gains, gains[:HIDDEN])
    return torch.cat((h, c), 1)


def modules() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Functions of one tensor, and an input that wants gradients."""
    torch.manual_seed(0)
    layers, cell, norm = (
        lntune.LayerNormLSTM(4, HIDDEN, bidirectional=True),
        lntune.LayerNormLSTMCell(4, HIDDEN),
        lntune.LayerNorm(4),
    )
    return {
        "layers": (lambda x: layers(x)[0], torch.randn(5, 2, 4, requires_grad=True)),
        "cell": (lambda x: cell(x)[0], torch.randn(2, 4, requires_grad=True)),
        "step": (step, torch.randn(2, 4 * HIDDEN, requires_grad=True)),
        "norm": (norm, torch.randn(5, 4, requires_grad=True)),
    }


@pytest.mark.parametrize("name", ["layers", exhaustive("cell"), exhaustive("step"), "norm"])
def test_batched_gradients(name: str) -> None:
    """Gradients of many outputs at once, and a vectorized jacobian, are those of one output after
    the other.
    """
    f, x = modules()[name]
    y = f(x)
    basis = torch.eye(y.numel()).view(-1, *y.shape)
    rows = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in basis])
    close(torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)[0], rows)
    close(
        torch.func.vmap(lambda one: torch.autograd.grad(y, x, one, retain_graph=True)[0])(basis),
        rows,
    )
    close(torch.autograd.functional.jacobian(f, x, vectorize=True), rows.view(*y.shape, *x.shape))


@pytest.mark.parametrize("name", ["layers", exhaustive("cell"), "step"])
def test_gradients_that_are_recorded(name: str) -> None:
    """With create_graph the gradients are the same, also where one argument of a step is made of
    another, and can be differentiated again.
    """
    f, x = modules()[name]
    (plain,) = torch.autograd.grad(f(x).square().sum(), x)
    (recorded,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    close(recorded, plain)
    wide = x.detach().double().requires_grad_()
    twice = torch.autograd.grad(recorded.square().sum(), x)[0]
    assert twice.shape == wide.shape and twice.isfinite().all() and twice.any()


def test_a_cell_from_step_to_step() -> None:
    """A penalty on the gradients of two steps of a cell, whose state and weights come back, is
    float64's, and so are its own gradients.
    """
    torch.manual_seed(0)
    cell = lntune.LayerNormLSTMCell(4, HIDDEN)
    results = []
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(cell).to(dtype)
        x = torch.linspace(-1, 1, 16, dtype=dtype).view(2, 2, 4).sin().requires_grad_()
        h, c = model(x[0])
        h, c = model(x[1], (h, c))
        parameters = list(model.parameters())
        grads = torch.autograd.grad((h * c).sum(), parameters, create_graph=True)
        again = torch.autograd.grad(
            sum(g.square().sum() for g in grads), parameters, allow_unused=True
        )
        results.append(
            [t.detach().double() for t in (*grads, *(a for a in again if a is not None))]
        )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got, expected, atol=1e-4 * float(expected.abs().max() + 1), rtol=1e-3
        )


@pytest.mark.parametrize("watched", ["forward", "backward", "both", "neither"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["layers", "cell", "step", "norm"])
def test_checkpoints_that_are_watched(name: str, reentrant: bool, watched: str) -> None:
    """A dispatch mode around the forward, or the backward that computes it again, changes neither
    what is saved nor the gradients.
    """
    f, x = modules()[name]

    def mode(part: str) -> Any:
        return (
            FlopCounterMode(display=False)
            if watched in (part, "both")
            else contextlib.nullcontext()
        )

    (expected,) = torch.autograd.grad(f(x).square().sum(), x)
    other = x.detach().clone().requires_grad_()
    for _ in range(2):
        other.grad = None
        with mode("forward"):
            y = checkpoint(f, other, use_reentrant=reentrant).square().sum()
        with mode("backward"):
            y.backward()
        close(other.grad, expected)


@pytest.mark.parametrize("name", ["layers", "cell"])
def test_multiplications_in_a_checkpoint(name: str) -> None:
    """A FlopCounterMode counts in a checkpoint what it counts without one, forward, again, and
    backward.
    """
    f, x = modules()[name]
    counts = []
    for function in (f, lambda x: checkpoint(f, x, use_reentrant=False)):
        with FlopCounterMode(display=False) as forward:
            y = function(x).sum()
        with FlopCounterMode(display=False) as backward:
            y.backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    (once, back), (checkpointed, again) = counts
    assert checkpointed == once > 0
    assert again >= back + once


def test_an_lstm_as_the_root_of_a_graph() -> None:
    """An LSTM that is not part of anything cannot be kept whole, and what can be done is said."""
    for module in (lntune.LayerNormLSTM(4, HIDDEN), lntune.LayerNormLSTMCell(4, HIDDEN)):
        with pytest.raises(
            InputError,
            match=(
                rf"Trace a module that has it, such as torch.nn.Sequential\({type(module).__name__}"
            ),
        ):
            fx.symbolic_trace(module)


def test_modules_in_graphs_of_fx() -> None:
    """torch.fx keeps an LSTM as a module, as it keeps torch.nn.LSTM, and the traced model computes
    the same.
    """
    model = nn.Sequential(nn.Linear(4, 4), lntune.LayerNormLSTM(4, HIDDEN))
    theirs = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, HIDDEN)))
    traced = fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == [n.op for n in theirs.graph.nodes]
    x = torch.randn(5, 2, 4)
    close(traced(x), model(x))
    cell = fx.symbolic_trace(nn.Sequential(lntune.LayerNormLSTMCell(4, HIDDEN)))
    close(cell(x[0]), cell.get_submodule("0")(x[0]))


def test_steps_in_graphs_of_fx() -> None:
    """A step of proxies is recorded as PyTorch's operators."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.gain_c = (
                nn.Parameter(torch.ones(4 * HIDDEN)),
                nn.Parameter(torch.ones(HIDDEN)),
            )

        def forward(self, gates_x: Tensor, gates_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            return lntune.lnlstm_step(gates_x, gates_h, c, self.gain, self.gain, self.gain_c)

    model = Model()
    given = torch.randn(2, 4 * HIDDEN), torch.randn(2, 4 * HIDDEN), torch.randn(2, HIDDEN)
    close(fx.symbolic_trace(model)(*given), model(*given))
    close(
        model(*given),
        formula(*given, model.gain, model.gain, model.gain_c, None, None, 1e-5, False, False),
    )
