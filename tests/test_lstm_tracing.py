"""LSTMs and layer norm where PyTorch traces them: sizes that change, exported programs, torch.jit.trace; and sizes that are NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import lntune
from lntune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")


def close(got: Any, expected: Any) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Any]:
    """A function through torch.compile, without generating code, and what counts how often it was traced."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, **options), counter


@pytest.mark.parametrize("options", [{"dynamic": True, "fullgraph": True}, {}], ids=["dynamic", "as it comes"])
def test_lengths_and_batches_that_change(options: dict[str, Any]) -> None:
    """One graph serves sequences of every length and batches of every size, forward and backward."""
    module = lntune.LayerNormLSTM(4, 8, bidirectional=True)
    function, counter = compiled(module, **options)
    for time, batch in ((3, 6), (5, 6), (7, 6), (20, 6), (20, 3), (4, 5)):
        x = torch.randn(time, batch, 4)
        grads = []
        for f in (function, module):
            module.zero_grad()
            output, (h, c) = f(x)
            (output.sum() + h.sum() + c.square().sum()).backward()
            grads.append([output.detach(), h.detach(), c.detach(), *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 3, "one, and another for each size that turned out to change"


def test_normalized_shapes_that_change() -> None:
    """A normalized_shape taken from the input is a symbol like the input's, not a number."""

    def function(x: Tensor) -> Tensor:
        return lntune.layer_norm(x, x.shape[1:])

    traced, counter = compiled(function, dynamic=True, fullgraph=True)
    for hidden in (4, 8, 16, 33, 50):
        x = torch.randn(3, hidden)
        close(traced(x), function(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("any_length", [True, False])
def test_exported_programs_are_short(strict: bool, any_length: bool) -> None:
    """A layer is one operator of an exported program, however long its sequence, and the program may take others."""
    module, x = lntune.LayerNormLSTM(4, 3).eval(), torch.randn(100, 2, 4)
    dims = ({0: torch.export.Dim("time", min=2, max=1000)},) if any_length else None
    program = torch.export.export(module, (x,), dynamic_shapes=dims, strict=strict)
    assert len(program.graph.nodes) < 60
    other = torch.randn(37 if any_length else 100, 2, 4)
    close(program.module()(other), module(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"per_gate": True}, {"batch_first": True}], ids=str)
def test_traced_layers(options: dict[str, Any]) -> None:
    """torch.jit.trace records PyTorch's operators for the length it was shown."""
    module = lntune.LayerNormLSTM(4, 3, **options)
    traced = torch.jit.trace(module, torch.randn(6, 2, 4))
    x = torch.randn(6, 2, 4)
    close(traced(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_cells() -> None:
    """The cell, with and without a state."""
    module = lntune.LayerNormLSTMCell(4, 3)
    for given in ((torch.randn(2, 4),), (torch.randn(2, 4), (torch.randn(2, 3), torch.randn(2, 3)))):
        close(torch.jit.trace(module, given)(*given), module(*given))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(integer: type) -> None:
    """Sizes and flags of NumPy's types are integers and truth values like Python's; what is kept is Python's."""
    four, eight, two = integer(4), integer(8), integer(2)
    module = lntune.LayerNormLSTM(four, eight, num_layers=two, bidirectional=np.bool_(True), dropout=np.float32(0.5))
    assert [type(v) for v in (module.input_size, module.hidden_size, module.num_layers, module.bidirectional)] == [int, int, int, bool]
    assert module(torch.randn(3, 2, 4))[0].shape == (3, 2, 16)
    assert lntune.LayerNormLSTMCell(four, eight)(torch.randn(2, 4))[0].shape == (2, 8)
    assert lntune.LayerNorm(four)(torch.randn(2, 4)).shape == (2, 4)
    assert torch.equal(lntune.layer_norm(torch.ones(2, 4), (four,)), nn.functional.layer_norm(torch.ones(2, 4), (4,)))


@pytest.mark.parametrize("size", [0, np.int64(0), 2.0, np.float64(2), True, torch.tensor(2), "2", None], ids=repr)
def test_what_is_no_size(size: Any) -> None:
    """Anything else is refused by the argument's name."""
    with pytest.raises(InputError, match="hidden_size: got"):
        lntune.LayerNormLSTM(4, size)
    with pytest.raises(InputError, match="bidirectional: got"):
        lntune.LayerNormLSTM(4, 3, bidirectional=2)  # type: ignore[arg-type]
