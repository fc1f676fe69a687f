"""LN-LSTM steps over whole sequences on kernels: values and gradients against float64, every layout
of sequences, compiled too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import product
from torch import Tensor

import lntune
from lntune.torch import lnlstm_loops
from lntune.torch import products as module
from lntune.torch.lnlstm_arguments import SavedSteps, SequenceOptions, SequenceTensors
from lntune.torch.lnlstm_sequence import by_steps, lnlstm_sequence

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

NAMES = ("gates_x", "h_0", "c_0", "matrix", "weight_x", "weight_h", "weight_c", "bias", "bias_c")
HIDDEN = 24
SIZES: dict[str, list[int]] = {
    "one step": [3],
    "equal": [3] * 4,
    "packed": [5, 5, 3, 3, 1],
    "one by one": [4, 3, 2, 1],
    "one sequence": [1] * 3,
    "long": [2] * 9,
    "long and packed": [20] * 5 + [7] * 4 + [1],  # in three row buckets, each with sums of its own
    "empty": [0, 0],
}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and elements are enough for packing a matrix."""
    monkeypatch.setattr(module, "_PACKED_FROM", {True: (8, 0), False: (8, 0)})


def make_arguments(
    sizes: list[int], dtype: torch.dtype = torch.float32, hidden: int = HIDDEN
) -> dict[str, Tensor]:
    """Random arguments, all there."""
    generator, n = torch.Generator().manual_seed(0), max(sizes)
    gates, state = (4 * hidden,), (n, hidden)
    shapes = {
        "gates_x": (sum(sizes), *gates),
        "h_0": state,
        "c_0": state,
        "matrix": (*gates, hidden),
        "weight_c": (hidden,),
        "bias_c": (hidden,),
    }
    return {
        name: torch.randn(shapes.get(name, gates), generator=generator).to(dtype) for name in NAMES
    }


def run(function: Any, given: dict[str, Any], sizes: list[int], *options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of a function of all of them by "d" and the argument."""
    leaves = {
        name: t if t is None else t.detach().clone().requires_grad_() for name, t in given.items()
    }
    outputs = dict(
        zip(("out", "h_n", "c_n"), function(*leaves.values(), sizes, 1e-5, *options), strict=True)
    )
    (
        (outputs["out"] * 2).sin().sum()
        + outputs["h_n"].square().sum()
        + outputs["c_n"].sin().sum()
    ).backward()
    return {name: t.detach() for name, t in outputs.items()} | {
        f"d{name}": t.grad for name, t in leaves.items() if t is not None
    }


def check(given: dict[str, Any], sizes: list[int], *options: Any) -> None:
    """As near to float64 as PyTorch's operators come, and the same bits twice."""
    truth = run(
        by_steps,
        {name: None if t is None else t.double() for name, t in given.items()},
        sizes,
        *options,
    )
    eager, ours, again = (
        run(function, given, sizes, *options)
        for function in (by_steps, lnlstm_sequence, lnlstm_sequence)
    )
    rounding = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-6}[given["h_0"].dtype]
    for name, t in ours.items():
        assert (t.shape, t.dtype) == (eager[name].shape, eager[name].dtype), name
        assert torch.equal(t, again[name]), name
        if t.numel():
            error, eager_error = (
                float((v.double() - truth[name]).abs().max()) for v in (t, eager[name])
            )
            assert error <= 3 * eager_error + rounding * max(1.0, float(truth[name].abs().max())), (
                name
            )


@pytest.mark.parametrize(("what", "reverse"), product(tuple(SIZES), (False, True)))
def test_against_float64(what: str, reverse: bool) -> None:
    """Any number of steps and sequences, ending or beginning at different times."""
    check(make_arguments(SIZES[what]), SIZES[what], False, False, reverse)


@pytest.mark.parametrize(
    ("dtype", "options"),
    product((torch.float32, torch.bfloat16), ((True, False), (False, True))),
    ids=str,
)
def test_options(dtype: torch.dtype, options: tuple[bool, bool]) -> None:
    """The cell carried normalized, a layer norm for each gate, with biases left out, in low
    precision too. Each is further kernels: their rows are whole vectors, and of what is left out
    they are of one row bucket.
    """
    packed, one_bucket = SIZES["packed"], [5, 5, 3, 3]
    check(make_arguments(packed, dtype, 16), packed, *options, False)
    given = make_arguments(one_bucket, dtype, 16)
    check({**given, "bias": None, "bias_c": None}, one_bucket, *options, True)
    check({**given, "weight_x": None}, one_bucket, *options, False)


def test_without_a_packed_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN is missing or refuses, plain products give the same up to rounding."""
    sizes = SIZES["long"]
    packed = run(lnlstm_sequence, make_arguments(sizes), sizes, False, False, False)
    monkeypatch.setattr(module, "_PACKED_FROM", {True: (10**6, 0), False: (10**6, 0)})
    plain = run(lnlstm_sequence, make_arguments(sizes), sizes, False, False, False)
    for name, t in plain.items():
        torch.testing.assert_close(t, packed[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("what", "reverse"), product(tuple(SIZES), (False, True)))
def test_into_given_memory(what: str, reverse: bool) -> None:
    """The loops compute the same, bit for bit, into memory that is given, every part of it, with
    and without what the backward takes.
    """
    sizes, tensors = SIZES[what], SequenceTensors(**make_arguments(SIZES[what]))
    options = SequenceOptions(1e-5, False, False, reverse)

    def both(loop: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        expected = loop(*arguments)
        into = [torch.full_like(t, torch.nan) for t in expected]
        for t, place, now in zip(expected, into, loop(*arguments, into=into), strict=True):
            assert t.is_contiguous() and torch.equal(t, place)
            assert now.data_ptr() == place.data_ptr()
        return expected

    both(lnlstm_loops.forward, tensors, sizes, options, False)
    out, h_n, c_n, *kept = both(lnlstm_loops.forward, tensors, sizes, options, True)
    saved = SavedSteps(out, *kept)
    both(lnlstm_loops.backward, out.sin(), h_n, c_n, saved, tensors, sizes, False, reverse)


def test_inference_is_training() -> None:
    """Without gradients the same bits come out, and nothing is kept for a backward."""
    for sizes in (SIZES["packed"], SIZES["long"]):
        given = make_arguments(sizes)
        with torch.no_grad():
            plain = lnlstm_sequence(*given.values(), sizes, 1e-5, False, False, False)
        recorded = lnlstm_sequence(
            *(t.requires_grad_() for t in given.values()), sizes, 1e-5, False, False, False
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
        assert not any(t.requires_grad for t in plain) and all(t.requires_grad for t in recorded)


def test_views() -> None:
    """States and gradients that are strided or expanded are taken as their values are."""
    sizes = SIZES["equal"]
    given = make_arguments(sizes)
    given["h_0"], given["c_0"] = (
        torch.randn(HIDDEN, 3).t(),
        torch.randn(1, HIDDEN).expand(3, HIDDEN),
    )
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    results = []
    for function in (lnlstm_sequence, by_steps):
        out, h, c = function(*leaves.values(), sizes, 1e-5, False, False, False)
        results.append(
            torch.autograd.grad(out.sum() + h.t().sum() + c.sum(), list(leaves.values()))
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_some_gradients() -> None:
    """Only the last state, or only one argument, may have a gradient."""
    sizes, results = SIZES["packed"], []
    for function in (lnlstm_sequence, by_steps):
        given = {
            name: t.requires_grad_(name in ("matrix", "bias"))
            for name, t in make_arguments(sizes).items()
        }
        _, h, _ = function(*given.values(), sizes, 1e-5, False, False, False)
        results.append(torch.autograd.grad(h.sum(), [given["matrix"], given["bias"]]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_double_backward() -> None:
    """The gradient of a gradient is that of PyTorch's operators."""
    sizes, results = SIZES["packed"], []
    for function in (lnlstm_sequence, by_steps):
        given = {name: t.requires_grad_() for name, t in make_arguments(sizes).items()}
        out, _, _ = function(*given.values(), sizes, 1e-5, False, False, False)
        (first,) = torch.autograd.grad(out.square().sum(), given["h_0"], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [given["matrix"], given["c_0"]]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_double_backward_over_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is handed on from one call to the next was made with the same weights: each way
    from them to the result counts once.
    """
    torch.manual_seed(0)
    rnn, x, results = lntune.LayerNormLSTM(3, 8), torch.randn(4, 2, 3), []
    for function in (lnlstm_sequence, by_steps):
        monkeypatch.setattr("lntune.torch.lstm.lnlstm_sequence", function)
        output, _ = rnn(x, rnn(x)[1])
        first = torch.autograd.grad(output.sin().sum(), list(rnn.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(rnn.parameters()))
        results.append([g.detach() for g in (*first, *second)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_the_custom_op() -> None:
    """PyTorch's own checks of custom operators pass, gradients included."""
    sizes = SIZES["packed"]
    given = [t.requires_grad_() for t in make_arguments(sizes).values()]
    torch.library.opcheck(
        torch.ops.lntune.lnlstm_sequence, (*given, sizes, 1e-5, False, False, True)
    )
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.lntune.lnlstm_sequence,
            (*given, sizes, 1e-5, False, True, False),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiled_training_does_not_unroll() -> None:
    """torch.compile takes a layer in training as one graph with one operator per direction, however
    long the sequence.
    """
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    rnn = lntune.LayerNormLSTM(3, 5, 2, bidirectional=True)
    x = torch.randn(30, 2, 3)
    compiled = torch.compile(rnn, backend=backend, fullgraph=True)
    results = []
    for module_ in (rnn, compiled):
        rnn.zero_grad()
        module_(x)[0].square().sum().backward()
        results.append({name: p.grad.clone() for name, p in rnn.named_parameters()})
    torch.testing.assert_close(*results)
    assert [
        sum("lnlstm_sequence" in str(node.target) for node in g.graph.nodes) for g in graphs
    ] == [4]


def test_autocast_trains_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast matrix products are in low precision and all else in the parameters' dtype; no
    further from float32 than eager is.
    """
    torch.manual_seed(0)
    rnn, x = lntune.LayerNormLSTM(6, 8), torch.randn(12, 3, 6)

    def gradients(autocast: bool) -> dict[str, Tensor]:
        rnn.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, _ = rnn(x)
        assert out.dtype == torch.float32
        out.sin().sum().backward()
        return {name: p.grad.clone() for name, p in rnn.named_parameters()}

    monkeypatch.setattr("lntune.torch.lstm.lnlstm_sequence", by_steps)
    truth, eager = gradients(False), gradients(True)
    monkeypatch.undo()
    # would fail if it were called
    monkeypatch.setattr("lntune.torch.lnlstm_sequence.by_steps", None)
    ours = gradients(True)
    for name, grad in ours.items():
        error, eager_error = (
            float((g - truth[name]).norm() / truth[name].norm()) for g in (grad, eager[name])
        )
        assert grad.dtype == torch.float32 and 1e-6 < error <= 2 * eager_error, name


def test_a_backward_under_another_autocast() -> None:
    """The loop's products stay in the dtypes of its tensors, as the forward had them; those of the
    input are PyTorch's own.
    """
    rnn = lntune.LayerNormLSTM(6, HIDDEN)
    y, _ = rnn(torch.randn(4, 3, 6))
    expected = torch.autograd.grad(y.square().sum(), list(rnn.parameters()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y.square().sum(), list(rnn.parameters()))
    for mine, plain in zip(grads, expected, strict=True):
        assert (mine - plain).norm() <= 0.02 * plain.norm()


@pytest.mark.parametrize(
    ("kind", "shape"), [(lntune.LayerNormLSTM, (4, 3)), (lntune.LayerNormLSTMCell, (4,))], ids=str
)
def test_saved_tensors_in_another_layout(kind: type, shape: tuple[int, ...]) -> None:
    """Hooks that pack what is kept for a backward may give it back transposed in memory."""
    rnn, x = kind(6, HIDDEN), torch.randn(*shape, 6)
    results = []
    for packed in (lambda t: t, lambda t: t.t().contiguous() if t.ndim == 2 else t):
        unpacked = (lambda t: t) if not results else (lambda t: t.t() if t.ndim == 2 else t)
        with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
            y = rnn(x)[0]
        results.append(torch.autograd.grad(y.square().sum(), list(rnn.parameters())))
    torch.testing.assert_close(*results)
