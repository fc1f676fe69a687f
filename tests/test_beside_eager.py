"""A finalist's outputs beside eager mode's: on all rows of the case and on more, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lntune import backends, device, ops
from lntune.backends import inputs
from lntune.backends.cpu import backend
from lntune.case import Case
from lntune.check import beside_eager

HERE = device.current()
CPU = backends.of(HERE)
CASE = Case("layer_norm", 16, "float32", 500)
Kernel = Callable[..., None]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inputs and what eager mode makes of them are made anew; few elements are many."""
    for name, value in (("COMPARED_ELEMENTS", 1 << 10), ("MOST_COMPARED", 1 << 14)):
        monkeypatch.setattr(backend, name, value)
    monkeypatch.setattr(beside_eager, "PIECE", 160)
    for forget in (beside_eager.forget, backend._plain.cache_clear):
        forget()
    yield
    for forget in (beside_eager.forget, backend._plain.cache_clear):
        forget()


def kernel(calls: list[int], spoil: Callable[[torch.Tensor], Any] = lambda _: None) -> Kernel:
    """Layer norm whose y is then spoiled; the rows of each call go to `calls`."""

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, y: Any) -> None:
        y.copy_(torch.nn.functional.layer_norm(x, (CASE.hidden,), weight, bias, eps))
        calls.append(len(x))
        spoil(y)

    return call


def compared(kernel: Kernel, case: Case = CASE) -> str:
    """What is said of a kernel on a case's own inputs."""
    return CPU.compare(case, HERE, kernel, inputs.plain(case, HERE))


def test_all_rows_of_a_case_and_more_are_compared() -> None:
    """Rows beyond the case's own, in cases with more elements than are drawn, too."""
    calls: list[int] = []
    assert compared(kernel(calls)) == ""
    assert calls == [500, 500 + 500 // 8 + backend.BEYOND]


@pytest.mark.parametrize("row", [0, 9, 10, 499, 500, 662])
@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_one_wrong_element_is_found_in_any_piece(row: int, value: float) -> None:
    """Wherever it is: in the first piece, at a border, in the last row, beyond the case's own."""

    def spoil(y: torch.Tensor) -> None:
        if row < len(y):
            y[row, 7] += value

    message = compared(kernel([], spoil))
    assert "y: " in message and f"from row {row // 10 * 10} on" in message
    assert f"{500 if row < 500 else 663} rows" in message


@pytest.mark.parametrize(
    ("name", "module", "value"),
    [
        ("MOST_COMPARED", backend, 1 << 13),
        ("memory", inputs, lambda: 663 * 16 * 8 * backend.OF_MEMORY),
    ],
)
def test_what_would_take_too_much_is_left_out(
    name: str, module: Any, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many elements, or too little memory, the case's own rows are compared alone."""
    monkeypatch.setattr(module, name, value)
    calls: list[int] = []
    assert compared(kernel(calls)) == "" and calls == [500]


@pytest.mark.parametrize("op", ops.OPS)
def test_cases_of_the_default_grid_have_more_rows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limits as they are, on a machine with enough memory."""
    monkeypatch.undo()
    monkeypatch.setattr(inputs, "memory", lambda: 1 << 36)
    assert all(backend.more_than(case) > case.rows for case in ops.get(op).grid)
