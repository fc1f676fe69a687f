"""LSTMs and layer norm where PyTorch traces them: sizes that change, exported programs,
torch.jit.trace; and sizes that are NumPy's.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from grids import product
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import lntune
from lntune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")


def close(got: Any, expected: Any) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Any]:
    """A function through torch.compile, without generating code, and what counts how often it was
    traced.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, **options), counter


@pytest.mark.parametrize(
    "options", [{"dynamic": True, "fullgraph": True}, {}], ids=["dynamic", "as it comes"]
)
def test_lengths_and_batches_that_change(options: dict[str, Any]) -> None:
    """One graph serves sequences of every length and batches of every size, forward and
    backward.
    """
    module = lntune.LayerNormLSTM(4, 8, bidirectional=True)
    function, counter = compiled(module, **options)
    for time, batch in ((3, 6), (5, 6), (7, 6), (20, 6), (20, 3), (4, 5)):
        x = torch.randn(time, batch, 4)
        grads = []
        for f in (function, module):
            module.zero_grad()
            output, (h, c) = f(x)
            (output.sum() + h.sum() + c.square().sum()).backward()
            grads.append(
                [output.detach(), h.detach(), c.detach(), *(p.grad for p in module.parameters())]
            )
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
    """A layer is one operator of an exported program, however long its sequence, and the program
    may take others.
    """
    module, x = lntune.LayerNormLSTM(4, 3).eval(), torch.randn(100, 2, 4)
    dims = ({0: torch.export.Dim("time", min=2, max=1000)},) if any_length else None
    program = torch.export.export(module, (x,), dynamic_shapes=dims, strict=strict)
    assert len(program.graph.nodes) < 60
    other = torch.randn(37 if any_length else 100, 2, 4)
    close(program.module()(other), module(other))


class Padded(nn.Module):
    """Padded sequences of some lengths, packed for a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]


LAYERS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"per_gate": True, "bias": False, "norm_bias": False},
    {"batch_first": True, "carried": True, "forget_bias": 1.0},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_traced_layers(options: dict[str, Any]) -> None:
    """torch.jit.trace records PyTorch's operators, which take sequences of any length and batches
    of any size, and train.
    """
    module = lntune.LayerNormLSTM(4, 3, dtype=torch.float64, **options)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, torch.randn(6, 2, 4, dtype=torch.float64)), file)
    assert b"lntune::" not in file.getvalue()
    file.seek(0)
    traced = torch.jit.load(file)
    for shape in ((6, 2, 4), (9, 5, 4), (1, 1, 4)):
        x = torch.randn(shape, dtype=torch.float64)
        results = []
        for f in (traced, module):
            f.zero_grad()
            output, (h, c) = f(x)
            (output.sum() + h.sum() + c.square().sum()).backward()
            grads = {name: p.grad for name, p in f.named_parameters()}
            results.append(
                [
                    output.detach(),
                    h.detach(),
                    c.detach(),
                    *(grads[name] for name, _ in module.named_parameters()),
                ]
            )
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("batch_first", [True, False])
def test_traced_layers_with_a_state(batch_first: bool) -> None:
    """A state that is given is an argument of the trace; kernels and the trace agree."""
    module, state = lntune.LayerNormLSTM(4, 8, batch_first=batch_first), torch.randn(1, 2, 8)
    short, long = (
        (torch.randn((2, time, 4) if batch_first else (time, 2, 4)), (state, -state))
        for time in (3, 7)
    )
    close(torch.jit.trace(module, short)(*long), module(*long))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
def test_traced_layers_of_packed_sequences(options: dict[str, Any]) -> None:
    """How long each sequence is may be another with each call of a trace."""
    model = Padded(lntune.LayerNormLSTM(4, 3, **options))
    traced = torch.jit.trace(model, (torch.randn(6, 3, 4), torch.tensor([3, 6, 2])))
    for lengths in ([3, 6, 2], [5, 1, 9, 2, 5], [4]):
        given = torch.randn(max(lengths), len(lengths), 4), torch.tensor(lengths)
        close(traced(*given), model(*given))


@pytest.mark.parametrize(
    "options",
    [{"tracing_mode": "real"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}],
    ids=str,
)
def test_graphs_of_make_fx(options: dict[str, Any]) -> None:
    """make_fx records one operator for a direction of a layer, forward and backward, however long
    the sequence, and sizes stay symbols.
    """
    module, x = lntune.LayerNormLSTM(4, 8, bidirectional=True), torch.randn(100, 3, 4)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def function(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        output = torch.func.functional_call(module, parameters, (x,))[0]
        return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]

    graph = make_fx(function, **options)(parameters, x)
    names = [str(node.target) for node in graph.graph.nodes if "lnlstm" in str(node.target)]
    assert (
        names.count("lntune.lnlstm_sequence.default")
        == names.count("lntune.lnlstm_sequence_backward.default")
        == 2
    )
    assert len(graph.graph.nodes) < 150
    other = torch.randn(37, 5, 4) if "symbolic" in options.values() else x
    close(graph(parameters, other), function(parameters, other))


def test_a_cell_is_exported_without_operators_of_ours() -> None:
    """A program of a cell, or of a step, holds PyTorch's operators alone, whichever way it is
    exported, and runs where lntune is not.
    """
    cell, x = lntune.LayerNormLSTMCell(4, 3), torch.randn(2, 4)
    for strict in (True, False):
        program = torch.export.export(cell, (x,), strict=strict)
        assert "lntune." not in str(program.graph)
        close(program.module()(x), cell(x))


def test_no_empty_list_is_in_a_program() -> None:
    """AOTInductor hands None to an operator for an empty list; a program says in another way that
    each step has the whole batch.
    """
    module, x = lntune.LayerNormLSTM(4, 3), torch.randn(5, 2, 4)
    graph = torch.export.export(module, (x,)).graph
    (node,) = (
        node for node in graph.nodes if node.target is torch.ops.lntune.lnlstm_sequence.default
    )
    assert [] not in node.args
    assert node.args[9] == [-1]


def test_graphs_that_kernels_do_not_serve() -> None:
    """Where the operator is not for the call, as in transforms of functions and other dtypes,
    make_fx records PyTorch's operators.
    """
    module, x = lntune.LayerNormLSTM(4, 3), torch.randn(5, 2, 4)

    def squares(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    wide = copy.deepcopy(module).double()
    for f, given in (
        (torch.func.grad(squares), x),
        (torch.func.vmap(squares), torch.stack((x, -x))),
        (lambda x: wide(x)[0], x.double()),
    ):
        graph = make_fx(f)(given)
        assert not any("lnlstm" in str(node.target) for node in graph.graph.nodes)
        close(graph(given), f(given))


def test_graphs_of_aot_export() -> None:
    """aot_export_module keeps a layer as one operator, and counts its multiplications as a graph of
    PyTorch's operators does.
    """
    module, x = lntune.LayerNormLSTM(4, 8).eval(), torch.randn(100, 3, 4)
    graph, _ = aot_export_module(module, (x,), trace_joint=False)
    assert len(graph.graph.nodes) < 60
    given = *module.parameters(), x
    close(graph(*given)[0], module(x)[0])
    with FlopCounterMode(display=False) as of_graph:
        graph(*given)
    with FlopCounterMode(display=False) as of_module:
        module(x)
    assert of_graph.get_total_flops() == of_module.get_total_flops()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "way"), product(("cell", "layers", "norm"), ("strict", "non-strict", "traced"))
)
def test_programs_written_without_gradients(name: str, way: str) -> None:
    """A program written without gradients has them later, once they are asked for, as such of
    PyTorch's modules do.
    """
    torch.manual_seed(0)  # a row of three all but equal numbers has no gradient to compare
    modules = {
        "layers": lntune.LayerNormLSTM(4, 3, 2),
        "cell": lntune.LayerNormLSTMCell(4, 3),
        "norm": lntune.LayerNorm(4),
    }
    shape = (5, 2, 4) if name == "layers" else (2, 4)
    module, x = modules[name], torch.randn(shape)
    with torch.no_grad():
        if way == "traced":
            program: Any = torch.jit.trace(module, x)
        else:
            program = torch.export.export(module, (x,), strict=way == "strict").module()
    grads = []
    for f in (program, module):
        given = x.clone().requires_grad_()
        y = f(given)
        while not isinstance(y, Tensor):
            y = y[0]
        y.square().sum().backward()
        grads.append(given.grad)
    close(*grads)


def test_operators_that_kept_nothing() -> None:
    """The operators of a graph that was written without gradients have the gradients of those which
    kept what a backward takes.
    """
    ops = torch.ops.lntune
    x, h, c, gain, gain_c = (torch.randn(n) for n in ((6, 12), (2, 3), (2, 3), (12,), (3,)))
    calls: list[Callable[[Tensor, bool], Tensor]] = [
        lambda x, keep: ops.layer_norm(x[:, :4], [4], gain[:4], gain[4:8], 1e-3, keep)[0],
        lambda x, keep: ops.lnlstm_step(
            x, x.flip(0), x[:, :3], gain, gain, gain_c, gain, gain_c, 1e-3, False, keep
        )[0],
        lambda x, keep: ops.lnlstm_sequence(
            x,
            h,
            c,
            x[:, :3].repeat(2, 1),
            gain,
            gain,
            gain_c,
            gain,
            gain_c,
            [],
            1e-3,
            False,
            True,
            keep,
        )[0],
    ]
    for f in calls:
        given = x.clone().requires_grad_()
        grads = [
            torch.autograd.grad(f(given, keep).sin().sum(), given)[0] for keep in (True, False)
        ]
        assert torch.equal(*grads) and grads[0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_cells() -> None:
    """The cell, with and without a state."""
    module = lntune.LayerNormLSTMCell(4, 3)
    for given in (
        (torch.randn(2, 4),),
        (torch.randn(2, 4), (torch.randn(2, 3), torch.randn(2, 3))),
    ):
        close(torch.jit.trace(module, given)(*given), module(*given))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(integer: type) -> None:
    """Sizes and flags of NumPy's types are integers and truth values like Python's; what is kept is
    Python's.
    """
    four, eight, two = integer(4), integer(8), integer(2)
    module = lntune.LayerNormLSTM(
        four, eight, num_layers=two, bidirectional=np.bool_(True), dropout=np.float32(0.5)
    )
    assert [
        type(v)
        for v in (module.input_size, module.hidden_size, module.num_layers, module.bidirectional)
    ] == [int, int, int, bool]
    assert module(torch.randn(3, 2, 4))[0].shape == (3, 2, 16)
    assert lntune.LayerNormLSTMCell(four, eight)(torch.randn(2, 4))[0].shape == (2, 8)
    assert lntune.LayerNorm(four)(torch.randn(2, 4)).shape == (2, 4)
    assert torch.equal(
        lntune.layer_norm(torch.ones(2, 4), (four,)),
        nn.functional.layer_norm(torch.ones(2, 4), (4,)),
    )


@pytest.mark.parametrize(
    "size", [0, np.int64(0), 2.0, np.float64(2), True, torch.tensor(2), "2", None], ids=repr
)
def test_what_is_no_size(size: Any) -> None:
    """Anything else is refused by the argument's name."""
    with pytest.raises(InputError, match="hidden_size: got"):
        lntune.LayerNormLSTM(4, size)
    with pytest.raises(InputError, match="bidirectional: got"):
        lntune.LayerNormLSTM(4, 3, bidirectional=2)  # type: ignore[arg-type]
