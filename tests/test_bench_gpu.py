"""The benchmark on a GPU, imagined: who is measured, on how many copies, against which bandwidth;
and others' kernels.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from grids import exhaustive
from kernel_arguments import inputs
from on_gpu import Here, here
from typer.testing import CliRunner

from lntune import backends, ops
from lntune import device as device_module
from lntune.backends.cuda import backend as cuda_backend
from lntune.backends.cuda import launcher
from lntune.backends.cuda import timing as device_timing
from lntune.case import Case
from lntune.cli import app
from lntune.commands import bench
from lntune.commands.bench import peers
from lntune.log.records import Record, Timing
from lntune.report.rows import peer_lines, rows_of
from lntune.report.tables import cases_table

__all__ = ["here"]
CASE = Case("layer_norm", 64, "float32", 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A yardstick that takes no time; clocks of this test's GPU serve no other."""
    monkeypatch.setattr(device_timing, "COPY_BYTES", 1 << 16)
    cuda_backend._clock.cache_clear()
    yield
    cuda_backend._clock.cache_clear()


def liger(monkeypatch: pytest.MonkeyPatch, apply: Any) -> None:
    """A package of Liger-Kernel's name whose layer norm is `apply`."""
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("liger_kernel.ops.layer_norm")
    module.LigerLayerNormFunction = SimpleNamespace(apply=apply)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def by_torch(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """What a right one does."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize(
    "op",
    [
        "layer_norm",
        exhaustive("layer_norm_backward"),
        exhaustive("lnlstm_step"),
        "lnlstm_step_backward",
    ],
)
def test_everyone_on_the_gpu(here: Here, op: str) -> None:
    """Eager, the op as a user calls it and a copy are measured on the GPU's clock, the kernel is
    checked there, and the record is the GPU's.
    """
    case = Case(op, 64, "float32", 8)
    result = bench.run([case], 0.01, with_compile=False, device=here.device)
    (record,) = result.records
    assert {"eager", "tuned", "copy"} <= set(record.timings)
    assert len({len(t.samples_us) for t in record.timings.values()}) == 1
    assert (record.role, record.status, record.case, record.device) == (
        "bench",
        "ok",
        case,
        here.device,
    )
    assert record.message.startswith("default: ") and record.schedule and record.code.schedule
    assert record.errors and max(record.errors.values()) <= 1
    assert result.bandwidth is not None and result.bandwidth > 0
    assert result.outputs == "allocated by every call and held for a turn"
    if not here.real:
        assert set(record.clocks) == {1980}


def test_kernel_against_copy(here: Here) -> None:
    """With given outputs the kernel and a copy are measured, each with an output for each copy of
    the inputs.
    """
    (record,) = bench.run([CASE], 0.01, given_output=True, device=here.device).records
    assert set(record.timings) == {"tuned", "copy"}
    assert record.role == "bench-given-output"


def test_the_command(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`lntune bench --target cuda` shows the share of what a large copy reaches, and how it
    compares with others' kernels.
    """
    liger(monkeypatch, by_torch)
    # of which no figure is made, and who knows what else runs here
    monkeypatch.setattr(Record, "disturbance", property(lambda _: ""))
    file = tmp_path / "b.json"
    sizes = ["--hidden", "64", "--dtype", "float32", "--rows", "8"]
    done = CliRunner().invoke(
        app,
        [
            "bench",
            *sizes,
            "--target",
            "cuda",
            "--no-compile",
            "--time",
            "10ms",
            "--output",
            str(file),
        ],
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(file.read_text())
    assert facts["copy_bandwidth"] > 0
    assert "liger" in facts["records"][0]["timings"]
    assert "x over liger (1 case)" in done.stdout
    assert f"of {facts['copy_bandwidth'] / 1e9:.0f}" in done.stdout.replace("\n", " ")


def test_the_cpu_has_no_gpus_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU neither others' kernels nor the card's bandwidth are measured."""
    liger(monkeypatch, lambda *_: pytest.fail("called"))
    result = bench.run([CASE], 0.01, with_compile=False)
    assert set(result.records[0].timings) == {"eager", "tuned", "copy"}
    assert result.bandwidth is None
    assert result.records[0].clocks == ()


def test_only_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' kernels are there when their packages are, for layer norm with weight and bias
    alone.
    """
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.layer_norm", None)
    monkeypatch.setitem(sys.modules, "lntune.commands.bench.triton_layer_norm", None)
    assert peers.calls(CASE, inputs(CASE)) == {}
    liger(monkeypatch, by_torch)
    assert set(peers.calls(CASE, inputs(CASE))) == {"liger"}
    assert set(peers.calls(Case("layer_norm", 64, "float32", 8, "weight+bias"), inputs(CASE))) == {
        "liger"
    }
    for other in (
        Case("layer_norm", 64, "float32", 8, "plain"),
        Case("lnlstm_step", 64, "float32", 8),
    ):
        assert peers.calls(other, inputs(other)) == {}


def test_they_are_called_as_they_want_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets x, weight, bias and eps, and answers as eager does."""
    for name in ("triton", "triton.language"):
        module = ModuleType(name)
        module.jit, module.constexpr = (lambda f: f), int  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    name = ops.get("layer_norm").peers["triton"]
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "forward", by_torch)
    liger(monkeypatch, by_torch)
    values = inputs(CASE)
    calls = peers.calls(CASE, values)
    assert set(calls) == {"liger", "triton"}
    for call in calls.values():
        assert torch.equal(call(), ops.get("layer_norm").baseline(CASE, values)())
    del sys.modules[name]


def test_who_does_not_take_the_case_is_left_out(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of others' that refuses the case is not measured, and does not end the benchmark."""

    def refuses(*_: Any) -> Any:
        raise RuntimeError("This layer norm doesn't support feature dim >= 64KB.")

    liger(monkeypatch, refuses)
    (record,) = bench.run([CASE], 0.01, with_compile=False, device=here.device).records
    assert "liger" not in record.timings and record.status == "ok"


def test_without_a_torch_compile_that_works(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile fails, as without a C compiler for Triton, the others are measured, and
    the record says why it is missing.
    """

    def fails(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    (record,) = bench.run([CASE], 0.01, with_compile=True, device=here.device).records
    assert record.status == "ok" and {"eager", "tuned", "copy"} <= set(record.timings)
    assert "compile" not in record.timings
    assert record.message.endswith(
        "; torch.compile left out: RuntimeError: Failed to find C compiler. Please specify via CC"
        " environment variable."
    )


def test_tables_with_the_cards_bandwidth() -> None:
    """The table has a column for the share of the card's bandwidth where that is known, and
    sentences about others' kernels.
    """
    timings = {
        "tuned": Timing((10.0, 10.0), 10.0),
        "copy": Timing((11.0, 11.0), 11.0),
        "liger": Timing((15.0, 15.0), 15.0),
    }
    case = Case("layer_norm", 1024, "float32", 4096)
    record = Record(
        case=case,
        device=device_module.current(),
        threads=1,
        schedule="s",
        knobs={},
        status="ok",
        timings=timings,
    )
    rows = rows_of([record])
    plain, with_bandwidth = cases_table(rows, "t"), cases_table(rows, "t", bandwidth=4e12)
    assert len(with_bandwidth.columns) == len(plain.columns) + 1
    (column,) = [i for i, c in enumerate(with_bandwidth.columns) if c.name == "of 4000 GB/s"]
    assert [cells[column].plain for cells in with_bandwidth.rows] == [
        f"{100 * ops.get('layer_norm').bytes(case) / 10e-6 / 4e12:.0f}%"
    ]
    assert peer_lines([record]) == ["geomean 1.50x over liger (1 case)"]
    assert peer_lines([]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_others_agree_with_eager(dtype: str) -> None:
    """On a GPU, those of others' kernels that are installed are layer norm."""
    case = Case("layer_norm", 1000, dtype, 64)
    device = launcher.device(0)
    values, *_ = backends.of(device).inputs(case, device)
    for call in peers.calls(case, values).values():
        torch.testing.assert_close(
            call(),
            ops.get("layer_norm").baseline(case, values)(),
            rtol=2e-2,
            atol=2e-2 if dtype == "bfloat16" else 1e-4,
        )


def test_the_tutorials_kernel(tmp_path: Path) -> None:
    """Where triton is installed its tutorial's kernel answers as eager does, in triton's
    interpreter.
    """
    pytest.importorskip("triton")
    code = """
import torch
from torch.nn.functional import layer_norm
from lntune.commands.bench.triton_layer_norm import forward
for hidden in (64, 1000):
    x, weight, bias = torch.randn(5, hidden), torch.randn(hidden), torch.randn(hidden)
    eager = layer_norm(x, (hidden,), weight, bias, 1e-5)
    torch.testing.assert_close(forward(x, weight, bias, 1e-5), eager)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this triton's interpreter does not go with a NumPy of 2.4 or newer")
    assert done.returncode == 0, done.stderr
