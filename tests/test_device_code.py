"""CUDA source of scheduled kernels: what is launched, and that each deviation from TVM's pipeline is needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from lntune import build, check, cuda, device_code, emulated, inspection, schedule
from lntune.case import Case
from lntune.cli import app
from lntune.cuda.targets import PRODUCTS, device_of, names
from lntune.device_code import Launch, Program, number
from lntune.emulator import EmulatorError
from lntune.errors import BuildError, UnknownNameError
from lntune.schedule import get

GPU = device_of("cuda:sm_90")
WIDE = Case("layer_norm", 4096, "float32", 512)
"""Its default knobs share a row among several warps."""

needs_compiler = pytest.mark.skipif(bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}")


def scheduled(case: Case = WIDE, **changed: Any) -> Any:
    """The module of the first GPU schedule's default knobs, or others."""
    plan = get("shared_row")
    setting = plan.default(case, GPU)
    return plan.apply(case, type(setting)(**{**vars(setting), **changed}), GPU)


def stock(module: Any) -> Program:
    """The same by TVM's default pipeline, launched the same way."""
    import tvm

    ours = device_code.generate(module, GPU.target())
    target = tvm.target.Target(GPU.target())
    with target:
        source = tvm.compile(module, target=target).mod.imports[0].inspect_source("cuda")
    return Program(str(source), ours.launches)


def test_a_launch_says_arguments_and_sizes() -> None:
    """Arguments by the operator's names, the grid as an expression in rows, the block as numbers, dynamic shared memory in bytes."""
    (launch,) = device_code.generate(scheduled(threads=256, rows=2), GPU.target()).launches
    assert set(launch.arguments) >= {"x", "weight", "bias", "y", "eps"}
    assert launch.block == (256, 2, 1)
    assert launch.threads == 512
    assert launch.blocks(7) == (4, 1, 1)
    assert launch.shared == 0
    (launch,) = device_code.generate(scheduled(threads=256, keep="shared"), GPU.target()).launches
    assert launch.shared == WIDE.hidden * 4
    assert launch.blocks(7) == (7, 1, 1)


def test_numbers_are_arithmetic_only() -> None:
    """A launch's expression knows `rows` and nothing else, not even Python's own functions."""
    assert number("((rows + 3) // 4)", 9) == 3
    with pytest.raises(NameError):
        number("len('x')", 1)


def test_an_empty_batch_has_an_empty_grid() -> None:
    """No rows, no blocks; nothing is to be launched."""
    assert Launch("k", (), ("((rows + 3) // 4)", "1", "1"), (32, 4, 1)).blocks(0) == (0, 1, 1)


def test_storage_must_not_be_rewritten() -> None:
    """TVM's default pipeline lets all threads update one shared cell: the emulator sees the race, or float64 the wrong result."""
    module = scheduled()
    good = check.verify(WIDE, emulated.kernel(WIDE, device_code.generate(module, GPU.target())), check.ALIGNED)
    assert good.ok, good.message
    try:
        verdict = check.verify(WIDE, emulated.kernel(WIDE, stock(module)), check.ALIGNED)
    except EmulatorError as e:
        assert "mean" in str(e) or "shared" in str(e)
    else:
        assert not verdict.ok


@needs_compiler
def test_expressions_must_be_simplified_early() -> None:
    """By TVM's default pipeline a thread's part of the row lies in a stack frame; by ours in registers."""
    case = Case("layer_norm", 1000, "float16", 512)
    module = scheduled(case)
    frames = {}
    for name, program in (("ours", device_code.generate(module, GPU.target())), ("stock", stock(module))):
        (launch,) = program.launches
        frames[name] = cuda.inspect_kernel(program.source, "sm_90", launch.threads).resources.stack_bytes
    assert frames["ours"] == 0
    assert frames["stock"] > 0


def test_what_does_not_compile_is_a_build_error() -> None:
    """A module that is no GPU kernel is refused as such, with TVM's reason."""
    plan = get("cached_rows")
    from lntune import device

    here = device.current()
    module = plan.apply(WIDE, plan.default(WIDE, here), here)
    with pytest.raises(BuildError, match="TVM failed to compile"):
        device_code.generate(module, GPU.target())


@pytest.mark.parametrize("name", names())
def test_every_target_is_a_device(name: str) -> None:
    """Each name that --target takes stands for a device with an architecture and memory sizes."""
    found = device_of(name)
    assert found.kind == ("cpu" if name == "cpu" else "gpu")
    assert found.kind == "cpu" or (found.isa.startswith("sm_") and found.cores and found.l1 and found.l2)
    assert name not in PRODUCTS or found.name == PRODUCTS[name][0]


@pytest.mark.parametrize("name", ["cuda:", "cuda:sm_1", "sm_90", "nvidia/nvidia-h1000"])
def test_an_unknown_target_is_refused(name: str) -> None:
    """A near miss is named."""
    with pytest.raises(UnknownNameError, match="target"):
        device_of(name)


@needs_compiler
def test_inspect_tells_what_is_known_without_a_gpu() -> None:
    """`lntune inspect` gives registers, spills, bytes; default knobs move nothing twice, spill nothing, and end with exit code 0."""
    done = CliRunner().invoke(app, ["inspect", "layer_norm", "--hidden", "1024,12288", "--dtype", "bfloat16", "--target", "cuda:sm_80", "--json"])
    assert done.exit_code == 0, done.output
    for one in json.loads(done.stdout):
        (kernel,) = one["kernels"]
        assert kernel["resources"]["registers"] > 0
        assert kernel["resources"]["stack_bytes"] == kernel["resources"]["spill_store_bytes"] == 0
        assert one["read"] == {"x": 1.0}
        assert one["written"] == {"y": 1.0}
        assert one["extra"] < 0.05
        assert one["problems"] == []


def test_inspect_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has a row for each kernel, and what is wrong ends with exit code 1."""
    bad = inspection.Inspected(WIDE, "sm_90", "shared_row", {"threads": 8}, (), {"x": 2.0}, {"y": 1.0}, 0.5)
    monkeypatch.setattr(inspection, "inspect", lambda *_: bad)
    done = CliRunner().invoke(app, ["inspect", "layer_norm", "--hidden", "4096", "--dtype", "float32"])
    assert done.exit_code == 1
    assert "reads x 2 times" in done.output


@pytest.mark.parametrize("arguments", [["--target", "cpu"], ["--target", "cuda:sm_1"], ["--schedule", "cached_rows"]])
def test_inspect_refuses_what_is_no_gpu(arguments: list[str]) -> None:
    """A CPU, an unknown architecture and a CPU's schedule are refused with exit code 2."""
    assert CliRunner().invoke(app, ["inspect", "layer_norm", "--hidden", "64", "--dtype", "float32", *arguments]).exit_code == 2


def test_operators_without_a_schedule_for_gpus_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names those that have one."""
    there = schedule.for_op
    monkeypatch.setattr(schedule, "for_op", lambda op, kind: {} if op == "lnlstm_step" else there(op, kind))
    done = CliRunner().invoke(app, ["inspect", "lnlstm_step"])
    assert done.exit_code == 2
    assert "layer_norm" in done.output


def test_source_for_a_gpu_is_shown() -> None:
    """`show` gives the CUDA source of a GPU's kernel."""
    plan = get("shared_row")
    text = build.show(WIDE, plan, plan.default(WIDE, GPU), GPU, "source")
    assert 'extern "C" __global__' in text
