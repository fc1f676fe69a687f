"""Odd tensors in every mode: what comes of a call, values, gradients, kind of tensor or error, is
what eager gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lntune

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

HIDDEN = 16


class Marked(Tensor):
    """A subclass without anything of its own."""


class Calls(TorchFunctionMode):
    """A mode that hands every function on."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """The same below autograd."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def random(*shape: int) -> Tensor:
    """Numbers around 0.5, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


def with_value(value: float) -> Tensor:
    """One element is not finite, or far from the others."""
    x = random(4, HIDDEN)
    x[1, 3] = value
    return x


# Each is made of float32 and cast in the test; strides and offsets that a cast would straighten are
# made after it.
TENSORS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "plain": lambda r: r(4, HIDDEN),
    "one row": lambda r: r(HIDDEN),
    "no rows": lambda r: r(0, HIDDEN),
    "no rows within": lambda r: r(3, 0, HIDDEN),
    "zero-dim": lambda r: r(HIDDEN).sum(),
    "hidden of another size": lambda r: r(4, HIDDEN + 1),
    "transposed": lambda r: r(HIDDEN, 4).T,
    "permuted": lambda r: r(HIDDEN, 3, 2).permute(2, 1, 0),
    "rows swapped": lambda r: r(2, 3, HIDDEN).transpose(0, 1),
    "every other row": lambda r: r(8, HIDDEN)[::2],
    "every other element": lambda r: r(4, 2 * HIDDEN)[:, ::2],
    "halves of rows": lambda r: r(4, 2 * HIDDEN)[:, HIDDEN:],
    "one element in": lambda r: r(4 * HIDDEN + 1)[1:].view(4, HIDDEN),
    "expanded rows": lambda r: r(1, HIDDEN).expand(4, HIDDEN),
    "expanded elements": lambda r: r(4, 1).expand(4, HIDDEN),
    "expanded scalar": lambda r: r(1)[0].expand(4, HIDDEN),
    "overlapping": lambda r: r(64).as_strided((4, HIDDEN), (5, 1)),
    "channels last": lambda r: r(2, 3, 4, HIDDEN).to(memory_format=torch.channels_last),
    "negative bit": lambda r: torch._neg_view(r(4, HIDDEN)),
    "imaginary part": (
        lambda r: torch.complex(r(4, HIDDEN).float(), r(4, HIDDEN).float()).conj().imag
    ),
    "subclass": lambda r: r(4, HIDDEN).as_subclass(Marked),
    "parameter": lambda r: nn.Parameter(r(4, HIDDEN)),
    "made in inference": lambda r: _inferred(r),  # noqa: PLW0108 (defined below)
    "meta": lambda r: r(4, HIDDEN).to("meta"),
    "sparse": lambda r: r(4, HIDDEN).to_sparse(),
    "not finite": lambda r: with_value(float("nan")).to(r(1).dtype),
    "infinite": lambda r: with_value(float("inf")).to(r(1).dtype),
    "very large": lambda r: with_value(6e4).to(r(1).dtype),
    "zeros": lambda r: 0 * r(4, HIDDEN),
    "subnormal": lambda r: 1e-38 * r(4, HIDDEN),
    "conjugate": lambda r: torch.complex(r(4, HIDDEN).float(), r(4, HIDDEN).float()).conj(),
    "integers": lambda r: r(4, HIDDEN).to(torch.int32),
    "booleans": lambda r: r(4, HIDDEN) > 0,
    "float64": lambda r: r(4, HIDDEN).double(),
}

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function mode": Calls,
    "dispatch mode": Dispatches,
}

DTYPES = (torch.float32, torch.bfloat16)


def _inferred(r: Callable[..., Tensor]) -> Tensor:
    with torch.inference_mode():
        return r(4, HIDDEN)


def combinations() -> Iterator[Any]:
    """Every tensor in float32 with gradients recorded, in inference and under autocast; the others
    by turns.
    """
    modes = list(MODES)
    for number, (tensor, dtype) in enumerate(itertools.product(TENSORS, DTYPES)):
        chosen = (
            {"grad", modes[1 + number % 5], modes[1 + (number + 2) % 5]}
            if dtype is torch.float32
            else {modes[number % 6]}
        )
        for mode in modes:
            if mode in chosen:
                yield pytest.param(tensor, dtype, mode, id=f"{tensor}-{str(dtype)[6:]}-{mode}")


def came_of(
    call: Callable[..., Tensor], tensor: str, dtype: torch.dtype, mode: str
) -> tuple[type, dict[str, Tensor]] | type:
    """(class of the result, the result and its gradients); the class of error where it is one."""
    sample = TENSORS[tensor](lambda *shape: random(*shape).to(dtype))
    x = sample
    if (
        mode in ("grad", "dispatch mode", "function mode")
        and x.is_floating_point()
        and x.is_leaf
        and not x.is_inference()
    ):
        x.requires_grad_()
    weight = (
        (random(HIDDEN) + 0.5)
        .to(dtype if x.is_floating_point() else torch.float32)
        .to(x.device)
        .requires_grad_()
    )
    try:
        with MODES[mode]():
            y = call(x, (HIDDEN,), weight, None)
        values = {"y": y.detach()}
        if y.requires_grad and y.device.type == "cpu":
            y.float().square().sum().backward()
            values |= {
                name: t.grad
                for name, t in (("dx", x), ("dgamma", weight))
                if t.is_leaf and t.grad is not None
            }
        return type(y), values
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as e:
        return RuntimeError if isinstance(e, (RuntimeError, ValueError)) else type(e)


@pytest.mark.parametrize(("tensor", "dtype", "mode"), list(combinations()))
def test_as_eager(tensor: str, dtype: torch.dtype, mode: str) -> None:
    """The first call and the next give what eager gives: class, dtype, shape, device, whether it is
    an inference tensor, values and gradients within rounding; where eager raises, an error.
    """
    expected = came_of(functional.layer_norm, tensor, dtype, mode)
    for _ in range(2):
        result = came_of(lntune.layer_norm, tensor, dtype, mode)
        if isinstance(expected, type):
            assert isinstance(result, type), f"eager raises {expected.__name__}"
            continue
        assert not isinstance(result, type), f"raises {result}"
        assert result[0] is expected[0] and result[1].keys() == expected[1].keys()
        for name, value in expected[1].items():
            got = result[1][name]
            facts = ("dtype", "shape", "device", "requires_grad")
            assert [getattr(got, fact) for fact in facts] == [
                getattr(value, fact) for fact in facts
            ], name
            assert got.is_inference() == value.is_inference()
            if value.device.type == "cpu":
                near = 2e-5 if value.dtype in (torch.float32, torch.float64) else 4e-2
                torch.testing.assert_close(
                    got,
                    value,
                    rtol=near,
                    atol=near
                    * max(
                        1.0,
                        (
                            value.nan_to_num(posinf=0, neginf=0).abs().max().item()
                            if value.numel()
                            else 1.0
                        ),
                    ),
                    equal_nan=True,
                )


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_lazy_minus_after_a_good_call(which: str, grad: bool) -> None:
    """A tensor that has its minus as a bit alone, in a call like one that went well before, is as
    one that has it in its numbers.
    """
    lazily, plainly = (
        {"x": random(4, HIDDEN), "weight": random(HIDDEN) + 0.5, "bias": random(HIDDEN)}
        | {which: negated}
        for negated in _both_ways(which == "x")
    )

    def called(given: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_(grad) for name, t in given.items()}
        y = lntune.layer_norm(leaves["x"], (HIDDEN,), leaves["weight"], leaves["bias"])
        if grad:
            y.square().sum().backward()
        return [y.detach(), *(t.grad for t in leaves.values() if t.grad is not None)]

    good = [called(plainly) for _ in range(3)][-1]
    assert lazily[which].is_neg()
    for _ in range(2):
        torch.testing.assert_close(called(lazily), good, rtol=1e-5, atol=1e-5)


def _both_ways(rows: bool) -> tuple[Tensor, Tensor]:
    numbers = random(4, HIDDEN) if rows else random(HIDDEN)
    return torch._neg_view(numbers), -numbers
