"""Calls of layer norm that eager mode serves by decision go to PyTorch at once: the same calls and
no others, until something changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_records import final_here
from torch.nn import functional

import lntune
from lntune import device
from lntune.case import Case
from lntune.errors import InputError
from lntune.log import records
from lntune.system import paths
from lntune.torch import known_eager, layer_norm

HERE, HIDDEN, ROWS = device.current(), 24, 5
SHAPE = (HIDDEN,)
Call = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def eager_wins(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A log in which eager mode is faster."""
    record = final_here(Case("layer_norm", HIDDEN, "float32", ROWS), tuned=2.0, eager=1.0)
    records.append(log_dir, record)
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    lntune.reload()
    yield
    lntune.reload()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list of the inputs that went the long way."""
    inputs: list[Any] = []
    general = layer_norm._general

    def noting(input: Any, *rest: Any) -> torch.Tensor:
        inputs.append(input)
        return general(input, *rest)

    monkeypatch.setattr(layer_norm, "_general", noting)
    return inputs


def tensors(rows: int = ROWS, grad: bool = False) -> tuple[torch.Tensor, ...]:
    """Input, weight and bias."""
    made = torch.randn(rows, HIDDEN), torch.randn(HIDDEN), torch.randn(HIDDEN)
    return tuple(t.requires_grad_(grad) for t in made)


@pytest.mark.parametrize("grad", [False, True])
def test_the_second_call_of_its_kind_is_pytorchs(grad: bool, asked: list[Any]) -> None:
    """New tensors of the same sizes do not go the long way again, and have PyTorch's result and its
    node of the graph.
    """
    for _ in range(3):
        x, *affine = tensors(grad=grad)
        y = lntune.layer_norm(x, SHAPE, *affine)
        expected = functional.layer_norm(x, SHAPE, *affine)
        assert torch.equal(y, expected) and type(y.grad_fn) is type(expected.grad_fn)
    assert len(asked) == 1


def test_other_calls_are_asked_about(asked: list[Any]) -> None:
    """Other rows, an affine that is missing, another eps, other dtypes, gradients that are asked
    for, and what is no tensor of PyTorch's own class: none of it is taken for what is known.
    """
    x, weight, bias = tensors()

    class Own(torch.Tensor):
        """A class of a user's."""

    calls: list[tuple[Any, ...]] = [
        (x, SHAPE, weight, bias),
        (x[:3], SHAPE, weight, bias),
        (x, SHAPE, weight),
        (x, SHAPE, None, bias),
        (x, SHAPE),
        (x, SHAPE, weight, bias, 1e-3),
        (x.double(), SHAPE, weight.double(), bias.double()),
        (x.clone().requires_grad_(), SHAPE, weight, bias),
        (x.as_subclass(Own), SHAPE, weight, bias),
        (x, SHAPE, weight.as_subclass(Own), bias),
    ]
    for count, call in enumerate(calls, 1):
        got = lntune.layer_norm(*call)
        torch.testing.assert_close(got, functional.layer_norm(*call), check_dtype=True)
        assert len(asked) == count


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: (x, SHAPE, w[:-1], b),
        lambda x, w, b: (x, SHAPE, w, b[None]),
        lambda x, w, b: (x, (HIDDEN + 1,), w, b),
        lambda x, w, b: (x, SHAPE, w, b, "1e-5"),
        lambda x, w, b: (x.long(), SHAPE, w, b),
    ],
)
def test_what_is_wrong_is_said_as_before(wrong: Callable[..., tuple[Any, ...]]) -> None:
    """A call with a wrong argument is lntune's error, also where the right one is known."""
    for _ in range(2):
        lntune.layer_norm(tensors()[0], SHAPE, *tensors()[1:])
    assert known_eager._known
    with pytest.raises(InputError):
        lntune.layer_norm(*wrong(*tensors()))


def test_a_new_log_is_heeded(asked: list[Any]) -> None:
    """After reload(), and when strict mode begins or ends, calls are decided again."""
    for count, change in enumerate((lntune.reload, lntune.strict, lambda: lntune.strict(False)), 2):
        lntune.layer_norm(tensors()[0], SHAPE, *tensors()[1:])
        change()
        assert not known_eager._known
        lntune.layer_norm(tensors()[0], SHAPE, *tensors()[1:])
        assert len(asked) == count


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_and_transforms_of_known_calls(asked: list[Any]) -> None:
    """What is traced or transformed has PyTorch's result, though the call is known."""
    x, weight, bias = tensors()

    def function(x: torch.Tensor) -> torch.Tensor:
        return lntune.layer_norm(x, SHAPE, weight, bias)

    expected = function(x)
    assert torch.equal(function(x), expected) and len(asked) == 1
    with torch.no_grad():
        traced = torch.jit.trace(function, x)
    other = torch.randn(2, HIDDEN)
    assert torch.equal(traced(other), functional.layer_norm(other, SHAPE, weight, bias))
    batch = torch.randn(2, ROWS, HIDDEN)
    assert torch.allclose(
        torch.vmap(function)(batch), functional.layer_norm(batch, SHAPE, weight, bias)
    )
    graph = torch.fx.symbolic_trace(function)
    assert torch.equal(graph(other), functional.layer_norm(other, SHAPE, weight, bias))
    _, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert torch.isfinite(tangent).all()


def test_so_many_sizes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more, all are forgotten and learned again."""
    monkeypatch.setattr(known_eager, "MOST", 3)
    for rows in range(2, 9):
        x, *affine = tensors(rows)
        assert torch.equal(
            lntune.layer_norm(x, SHAPE, *affine), functional.layer_norm(x, SHAPE, *affine)
        )
        assert 1 <= len(known_eager._known) <= 3
