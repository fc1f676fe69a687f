"""PyTorch's own tools on a converted model: tracing, scripting, exporting and quantizing do what
they do on the model unconverted.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import lntune

pytestmark = pytest.mark.filterwarnings("ignore")

HIDDEN = 16


def networks(*around: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model with a layer norm between two linear layers, and its converted copy."""
    torch.manual_seed(0)
    parts = [nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN, eps=1e-3), nn.Linear(HIDDEN, HIDDEN)]
    nn.init.normal_(parts[1].weight)
    nn.init.normal_(parts[1].bias)
    if around:
        parts = [around[0](), *parts, around[1]()]
    model = nn.Sequential(*parts).eval()
    return model, lntune.convert(copy.deepcopy(model))


def rows(count: int = 4) -> Tensor:
    """Input of so many rows."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))


@pytest.fixture(autouse=True)
def ready() -> None:
    """The direct calls are ready for such rows, and must not be taken where a tool looks on."""
    ours = lntune.LayerNorm(HIDDEN, eps=1e-3)
    ours(rows())
    with torch.no_grad():
        ours(rows())


def test_symbolic_tracing() -> None:
    """torch.fx.symbolic_trace records PyTorch's layer norm, of a model, of the norm alone, and of a
    function with any argument traced.
    """
    theirs, ours = networks()
    for model in (ours, lntune.convert(nn.Sequential(nn.LayerNorm(HIDDEN))), ours[1]):
        traced = torch.fx.symbolic_trace(model)
        assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
            functional.layer_norm
        ]
        torch.testing.assert_close(traced(rows()), model(rows()))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(rows()), theirs(rows()))
    x, w = rows(), rows(1)[0]
    traced = torch.fx.symbolic_trace(lambda w: lntune.layer_norm(x, (HIDDEN,), weight=w))
    torch.testing.assert_close(traced(w), functional.layer_norm(x, (HIDDEN,), w))


def test_symbolic_tracing_of_the_backward() -> None:
    """A graph of a call of the backward holds PyTorch's operator, with the gradients that were
    wanted.
    """
    x, dy, w = rows(), rows(5)[:4], rows(1)[0]
    _, mean, rstd = torch.native_layer_norm(x, [HIDDEN], w, None, 1e-5)

    def call(dy: Any, x: Any, mean: Any, rstd: Any, w: Any) -> Any:
        return lntune.layer_norm_backward(dy, x, (HIDDEN,), mean, rstd, w, None)[:2]

    traced = torch.fx.symbolic_trace(call)
    assert "aten.native_layer_norm_backward" in traced.code
    torch.testing.assert_close(
        traced(dy, x, mean, rstd, w), call(dy, x, mean, rstd, w), atol=1e-4, rtol=1e-4
    )


class Wrapper:
    """No tensor, but something with a __torch_function__."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, types, args, kwargs


class Sub(Tensor):
    """A tensor that notes which functions it went through."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
def test_torch_function_takes_the_call_over(which: int) -> None:
    """An argument with a __torch_function__, a tensor or not, gets just what
    torch.nn.functional.layer_norm would have given it.
    """
    given: list[Any] = [rows(), torch.ones(HIDDEN), torch.zeros(HIDDEN)]
    given[which] = Wrapper()
    assert lntune.layer_norm(
        given[0], (HIDDEN,), given[1], given[2], eps=0.5
    ) == functional.layer_norm(given[0], (HIDDEN,), *given[1:], eps=0.5)
    given[which] = rows(4 if which == 0 else 1).squeeze(0).as_subclass(Sub)
    Sub.seen = []
    y = lntune.layer_norm(given[0], (HIDDEN,), *given[1:])
    assert type(y) is Sub and Sub.seen[0] is functional.layer_norm
    Sub.seen = []
    with torch._C.DisableTorchFunctionSubclass():
        lntune.layer_norm(given[0], (HIDDEN,), *given[1:])
    assert not Sub.seen


def test_function_modes_are_stacked() -> None:
    """Modes see the call from the innermost outwards, also one whose arguments are no tensors, and
    whatever a default device adds.
    """

    class Mode(TorchFunctionMode):
        def __init__(self, name: str, ends: bool) -> None:
            super().__init__()
            self.name, self.ends = name, ends

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is functional.layer_norm:
                seen.append(self.name)
                if self.ends:
                    return self.name
            return func(*args, **(kwargs or {}))

    for given in (rows(), [1.0]):
        seen: list[str] = []
        with Mode("outer", True), torch.device("cpu"), Mode("inner", False):
            assert lntune.layer_norm(given, (HIDDEN,)) == "outer"  # type: ignore[arg-type, comparison-overlap]
        assert seen == ["inner", "outer"]


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode: str) -> None:
    """make_fx sees PyTorch's own operator."""
    x, w = rows(), rows(1)[0]
    graph = make_fx(lambda x, w: lntune.layer_norm(x, (HIDDEN,), w), tracing_mode=mode)(x, w)
    assert "aten.native_layer_norm" in graph.code
    torch.testing.assert_close(graph(x, w), functional.layer_norm(x, (HIDDEN,), w))


def test_scripting() -> None:
    """torch.jit.script compiles a converted model and a function of ours to PyTorch's layer norm;
    what it saves loads; training goes on.
    """
    theirs, ours = networks()
    scripted = torch.jit.script(ours)
    assert "aten::layer_norm" in str(scripted.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert b"lntune.layer_norm" not in file.getvalue()
    file.seek(0)
    for model in (
        scripted,
        torch.jit.load(file),
        torch.jit.trace(scripted, rows()),
        torch.jit.freeze(scripted),
    ):
        torch.testing.assert_close(model(rows(5)), theirs(rows(5)))
    function = torch.jit.script(plain_call)
    torch.testing.assert_close(function(rows()), functional.layer_norm(rows(), (HIDDEN,), eps=0.5))
    assert type(ours[1]) is lntune.LayerNorm


def plain_call(x: Tensor) -> Tensor:
    """A call for TorchScript to compile."""
    return lntune.layer_norm(x, (16,), eps=0.5)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_needs_no_lntune(strict: bool) -> None:
    """torch.export writes PyTorch's layer norm, in inference and in training, with mixed dtypes,
    for any number of rows; it trains.
    """
    theirs, ours = networks()
    for training in (False, True):
        ours.train(training)
        program = torch.export.export(
            ours, (rows(),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},), strict=strict
        )
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert "aten.layer_norm.default" in targets and not any("lntune" in t for t in targets)
        torch.testing.assert_close(program.module()(rows(7)), theirs(rows(7)))
    program.module()(rows(7)).sum().backward()
    assert ours[1].weight.grad is not None
    mixed = torch.export.export(
        lntune.LayerNorm(HIDDEN), (rows().bfloat16(),), strict=strict
    ).module()
    assert mixed(rows().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx(dynamo: bool) -> None:
    """Either of PyTorch's ONNX exporters writes the operator LayerNormalization."""
    for package in ("onnx", *(["onnxscript"] if dynamo else [])):
        pytest.importorskip(
            package,
            reason=(
                "the test's extra leaves the 40 MB of onnx out; pip install onnx onnxscript runs"
                " this"
            ),
        )
    import onnx

    _, ours = networks()
    file = io.BytesIO()
    if dynamo:
        program = torch.onnx.export(ours, (rows(),), dynamo=True, verbose=False)
        assert program is not None
        graph = program.model_proto.graph
    else:
        torch.onnx.export(ours, (rows(),), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
    assert [n.op_type for n in graph.node] == ["Gemm", "LayerNormalization", "Gemm"]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx_of_an_lstm(dynamo: bool) -> None:
    """Either exporter writes an LSTM in ONNX's own operators, which compute the same."""
    for package in ("onnx", *(["onnxscript"] if dynamo else [])):
        pytest.importorskip(
            package,
            reason=(
                "the test's extra leaves the 40 MB of onnx out; pip install onnx onnxscript runs"
                " this"
            ),
        )
    import onnx
    from onnx.reference import ReferenceEvaluator

    lstm, x, file = (
        lntune.LayerNormLSTM(4, 8, bidirectional=True).eval(),
        torch.randn(3, 2, 4),
        io.BytesIO(),
    )
    if dynamo:
        program = torch.onnx.export(lstm, (x,), dynamo=True, verbose=False)
        assert program is not None
        model = program.model_proto
    else:
        torch.onnx.export(lstm, (x,), file, dynamo=False)
        model = onnx.load_from_string(file.getvalue())
    session = ReferenceEvaluator(model)
    output = session.run(None, {session.input_names[0]: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), lstm(x)[0], atol=1e-4, rtol=1e-4)


def test_an_lstm_on_its_way_to_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model is exported to ONNX, which knows neither operators of ours nor a loop, an LSTM
    is PyTorch's operators step by step.
    """
    lstm, x = lntune.LayerNormLSTM(4, 8), torch.randn(3, 2, 4)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for strict in (True, False):
        assert "lntune." not in str(torch.export.export(lstm, (x,), strict=strict).graph)
    assert not torch.jit.trace(lstm, x).inlined_graph.findAllNodes("prim::Loop")


def test_static_quantization() -> None:
    """Eager-mode static quantization puts the quantized norm in the place of ours as in that of
    PyTorch's, with the same result.
    """
    results = []
    for model in networks(quantization.QuantStub, quantization.DeQuantStub):
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        prepared = quantization.prepare(model)
        prepared(rows(64))
        quantized = quantization.convert(prepared)
        assert type(quantized[2]) is torch.ao.nn.quantized.LayerNorm
        results.append(quantized(rows()))
    torch.testing.assert_close(*results, atol=0.05, rtol=0)


def test_quantization_aware_training() -> None:
    """A model prepared for quantization-aware training observes ours as PyTorch's, trains, and
    becomes the same quantized model.
    """
    for model in networks(quantization.QuantStub, quantization.DeQuantStub):
        model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
        prepared = quantization.prepare_qat(model)
        prepared(rows(64)).sum().backward()
        assert type(quantization.convert(prepared.eval())[2]) is torch.ao.nn.quantized.LayerNorm


def test_quantization_of_a_traced_model() -> None:
    """FX graph mode quantizes the norm of a converted model as that of the model unconverted."""
    results = []
    for model in networks():
        prepared = quantize_fx.prepare_fx(
            model, quantization.get_default_qconfig_mapping(), (rows(),)
        )
        prepared(rows(64))
        quantized = quantize_fx.convert_fx(prepared)
        assert not any(n.target is functional.layer_norm for n in quantized.graph.nodes)
        results.append(quantized(rows()))
    torch.testing.assert_close(*results, atol=0.05, rtol=0)


def test_dynamic_quantization() -> None:
    """Dynamic quantization changes the linear layers and leaves either norm what it is."""
    theirs, ours = (quantization.quantize_dynamic(model) for model in networks())
    assert type(ours[1]) is lntune.LayerNorm and type(ours[0]) is type(theirs[0]) is not nn.Linear
    torch.testing.assert_close(ours(rows()), theirs(rows()), atol=0.05, rtol=0)


@pytest.mark.slow
def test_compiled_code_leaves_subclasses_to_pytorch() -> None:
    """Under torch.compile a tensor of another class goes through PyTorch's operator, whose rules it
    knows, not through a custom op.
    """
    from torch.testing._internal.two_tensor import TwoTensor

    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: lntune.layer_norm(x, (HIDDEN,)), backend=backend, fullgraph=True
    )
    for x in (TwoTensor(rows(), 2 * rows()), rows()):
        compiled(x)
    assert [("torch.nn.functional.layer_norm" in code, "lntune" in code) for code in graphs] == [
        (True, False),
        (False, True),
    ]


LOAD = """
import sys
{first}
import torch
norm = torch.export.load("norm.pt2").module()
torch.testing.assert_close(norm(torch.ones(3, 16)), torch.load("norm.pt"), equal_nan=True)
assert "lntune" not in sys.modules or {needed}
lstm = torch.export.load("lstm.pt2").module()
print(*lstm(torch.ones(6, 2, 4))[0].shape)
"""


@pytest.mark.slow
def test_files_of_exported_programs(tmp_path: Path) -> None:
    """A saved program of a converted model runs where lntune is not loaded; one of an LSTM, whose
    operator PyTorch has not, names lntune there, and runs once LayerNormLSTM is imported.
    """
    _, ours = networks()
    torch.export.save(torch.export.export(ours, (torch.ones(3, HIDDEN),)), tmp_path / "norm.pt2")
    torch.save(ours(torch.ones(3, HIDDEN)).detach(), tmp_path / "norm.pt")
    torch.export.save(
        torch.export.export(lntune.LayerNormLSTM(4, 3), (torch.ones(6, 2, 4),), strict=True),
        tmp_path / "lstm.pt2",
    )

    def load(first: str) -> subprocess.CompletedProcess[str]:
        code = LOAD.format(first=first, needed=bool(first))
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    without, loaded = load(""), load("from lntune import LayerNormLSTM")
    assert (
        without.returncode == 1 and "failed to resolve torch.ops.lntune.lnlstm_" in without.stderr
    )
    assert (loaded.returncode, loaded.stdout) == (0, "6 2 3\n"), loaded.stderr
