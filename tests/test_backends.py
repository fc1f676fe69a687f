"""What differs between kinds of devices: where tensors are, how many copies of them, what times
calls; and that nothing outside the backends asks which kind it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fake_gpu import FakeGpu
from host_gpu import HostGpu

import lntune
from lntune import backends, ops, schedule
from lntune import device as device_module
from lntune.backends import BACKENDS, DEFAULT, device_of, inputs
from lntune.backends.cuda import backend as cuda_backend
from lntune.backends.cuda import launcher
from lntune.backends.cuda import timing as gpu_timing
from lntune.case import Case
from lntune.commands import bench
from lntune.commands.check import check_cases
from lntune.device import Device
from lntune.errors import InputError, LntuneError, UnknownNameError
from lntune.kernels import cache
from lntune.log import records
from lntune.log.select import select
from lntune.measure import calls as calls_module
from lntune.torch import devices as torch_devices
from lntune.torch import first_check
from lntune.tune import Settings, times
from lntune.tune import tune as run_tuner

PACKAGE = Path(__file__).resolve().parent.parent / "lntune"
GPU = device_of("cuda:sm_90")
CPU = device_module.current()
EMULATED = device_of("emulated:sm_90")


def tensors(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a case's inputs."""
    return {name: v for name, v in given.items() if isinstance(v, torch.Tensor)}


# --- the registry


KINDS = re.compile(
    r"""(\bin|==|!=)\s*\(?["'](cpu|gpu|cuda)["']|["'](cpu|gpu|cuda)["']\s*(==|!=)"""
    r"""|startswith\(["']cuda|\bon_gpu\b"""
)
"""Places that ask for a kind of device by its name."""
ALLOWED = {
    "bundle/fit.py": 1,  # what of a bundle a CPU's levels of instructions let through
    "bundle/hub.py": 1,  # what the layout of Hugging Face's kernels has for CPUs
    "bundle/hub_kernel.py": 1,  # the same where it runs, without lntune's backends
    "commands/candidates/measure.py": 1,  # it measures in a folder that has no lntune's log
    "commands/tune.py": 2,  # which devices of this machine recorded cases are tuned on
    "device.py": 1,  # what tells two CPUs apart whose records do not name a model
    "torch/eager.py": 4,  # which dtypes PyTorch's own kernels take and give
    "torch/graphs.py": 2,  # what torch.cuda is asked of tensors that are its
    "torch/recording.py": 1,  # whose calls are timed, and whose are counted alone
    "torch/products.py": 2,  # which of PyTorch's libraries for CPUs multiplies
}
"""Outside the backends; a number here may only become smaller."""


def test_nothing_else_asks_for_a_kind_of_device() -> None:
    """Outside lntune/backends the code asks a backend and not for "cpu", "gpu" or "cuda"."""
    counted: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("backends/") or "_bundled" in path.parts:
            continue
        if number := len(KINDS.findall(path.read_text(encoding="utf-8"))):
            counted[name] = number
    assert counted == ALLOWED


def test_the_pattern_finds_what_it_looks_for() -> None:
    """The test above sees the ways to ask that the code once had."""
    for text in (
        'if device.kind == "gpu":',
        'kind not in ("cpu", "cuda")',
        'if place.type == "cuda":',
        'if "cuda" == place.type',
        'name.startswith("cuda")',
        "on_gpu = place.gpu is not None",
    ):
        assert KINDS.search(text), text


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_whole(name: str) -> None:
    """Each has a name of its own, a kind that schedules are for, and targets that lead back to it;
    a target's TVM target is a dictionary with a kind.
    """
    backend = backends.get(name)
    assert backend.name == name and backend.kind in schedule.KINDS
    assert backend.targets() and len({backends.get(n).suffix for n in BACKENDS}) == len(BACKENDS)
    for target in backend.targets():
        if target in ("cuda",):  # one that is here
            continue
        device = device_of(target)
        assert backends.of(device) is backend
        assert device.kind == backend.kind
        assert backend.target(device)["kind"]


def test_unknown_targets_and_backends() -> None:
    """What is no target is answered with those there are; so is what is no backend."""
    for wrong in ("gpu", "cuda:sm_1", "emulated", "emulated:sm_1", ""):
        with pytest.raises(UnknownNameError, match="target"):
            device_of(wrong)
    with pytest.raises(UnknownNameError, match="backend"):
        backends.get("tpu")


def test_devices_of_two_backends_are_different() -> None:
    """An emulated GPU is not the GPU whose code it runs: no record of one serves the other."""
    gpu = msgspec.structs.replace(EMULATED, backend="")
    assert [text.partition(":")[0] for text in gpu.differences(EMULATED)] == ["backend"]
    plan = schedule.get("shared_row")
    case = Case("layer_norm", 96, "float32", 8)
    setting = plan.default(case, gpu)
    keys = {cache.key_of(case, plan, setting, one).digest for one in (gpu, EMULATED)}
    assert len(keys) == 2


def test_options_of_commands() -> None:
    """Commands are for the CPU unless they are told otherwise; a device that a newer version knows
    has none.
    """
    assert device_of(DEFAULT) == CPU
    assert backends.option(CPU) == ""
    assert backends.option(GPU) == " --target cuda"
    assert backends.option(msgspec.structs.replace(CPU, kind="npu")) == ""
    assert backends.option(msgspec.structs.replace(CPU, backend="later")) == ""


# --- the emulated GPU


@pytest.mark.slow
def test_calls_served_by_an_emulated_gpu(request: pytest.FixtureRequest) -> None:
    """PyTorch's calls on tensors of the CPU, forward and backward, run GPU schedules' kernels."""
    request.addfinalizer(lambda: (backends.serve(), lntune.reload()))
    backends.serve(EMULATED)
    lntune.reload()
    with pytest.warns(lntune.UntunedWarning, match="layer_norm"):
        choice = lntune.explain("layer_norm", 96, rows=5, target="emulated:sm_90")
        assert choice.schedule == "shared_row"
        x, w, b = torch.randn(5, 96), torch.randn(96), torch.randn(96)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        others = [t.clone().requires_grad_() for t in (x, w, b)]
        ours = lntune.layer_norm(leaves[0], (96,), leaves[1], leaves[2])
        eager = torch.nn.functional.layer_norm(others[0], (96,), others[1], others[2])
        torch.testing.assert_close(ours, eager)
        ours.pow(2).sum().backward()
        eager.pow(2).sum().backward()
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_who_serves_is_asked_anew_after_a_reload(request: pytest.FixtureRequest) -> None:
    """Calls before `serve` do not keep the CPU as what serves, nor calls under it the emulated
    GPU.
    """
    request.addfinalizer(lambda: (backends.serve(), lntune.reload()))
    here = torch.device("cpu")
    for stand_in, expected in ((None, CPU), (EMULATED, EMULATED), (None, CPU)):
        backends.serve(stand_in)
        lntune.reload()
        assert torch_devices.of(here) == expected == torch_devices.of(here)


@pytest.mark.slow
def test_a_stored_emulated_kernel(cache_dir: Path) -> None:
    """It lies in the cache under its own ending, is found again, and its verdict is right."""
    case, plan = Case("layer_norm", 96, "float32", 8), schedule.get("shared_row")
    setting = plan.default(case, EMULATED)
    path = cache.prepare(case, plan, setting, EMULATED)
    assert path.suffix == ".emulated" and cache.built(case, plan, setting, EMULATED)
    kernel = cache.kernel(case, plan, setting, EMULATED)
    assert backends.of(EMULATED).verify(case, EMULATED, kernel).ok


@pytest.mark.slow
def test_an_emulated_gpu_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner goes through the same steps as for any device: what wins is of a GPU's schedule, in
    a log folder of the emulated device, and serves that device alone.
    """
    monkeypatch.setattr(times, "FINAL_SHARE", 1e-4)
    case = Case("layer_norm", 64, "float32", 8)
    summary = run_tuner([case], Settings(device=EMULATED, seconds=None, trials=2, log_dir=tmp_path))
    assert not summary.untuned
    (final,) = records.read([tmp_path], "layer_norm", EMULATED, role="final")
    assert (final.schedule, final.status) == ("shared_row", "ok")
    assert {"tuned", "eager", "copy", "default"} <= set(final.timings)
    assert (
        records.read([tmp_path], "layer_norm", msgspec.structs.replace(EMULATED, backend="")) == []
    )
    by_name = schedule.for_op("layer_norm", "gpu")
    assert select(case, EMULATED, [final], by_name).tier in ("exact", "eager")
    assert select(case, GPU, [final], by_name).tier == "default"


# --- measuring


def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend of GPUs with one imagined, whose tensors are the CPU's."""
    backend = backends.of(GPU)
    monkeypatch.setattr(cuda_backend, "_clock", lambda name: HostGpu(0))
    monkeypatch.setattr(type(backend), "torch_device", lambda self, device: "cpu")
    return backend


def test_this_cpu() -> None:
    """One copy of the inputs, timed by the CPU's clock."""
    case, backend = Case("layer_norm", 64, "float32", 8), backends.of(CPU)
    assert backend.torch_device(CPU) == "cpu"
    assert len(backend.inputs(case, CPU)) == 1
    measured = backend.measure({"a": [lambda: None]}, CPU, 0.0, rounds=2)
    assert len(measured.timings["a"].samples_us) == 2
    assert measured.clocks == ()


def test_a_gpu_that_is_here(fake_gpu: FakeGpu) -> None:
    """A GPU that is here has PyTorch's name and is measured by its own clock."""
    cuda_backend._clock.cache_clear()
    device = launcher.device(0)
    backend = backends.of(device)
    assert backend.torch_device(device) == "cpu"  # the imagined one's tensors are the CPU's
    assert isinstance(cuda_backend._clock("cpu"), HostGpu)
    assert cuda_backend._clock("cpu") is cuda_backend._clock("cpu")
    cuda_backend._clock.cache_clear()


def test_a_gpu_that_is_elsewhere() -> None:
    """It is named, with what is here and what can be done without it."""
    with pytest.raises(
        InputError,
        match=(
            r"device: got sm_90 \(sm_90\), .* a GPU of this machine: none \(.*[^.]\)\. .*--dry-run"
        ),
    ):
        backends.of(GPU).torch_device(GPU)


@pytest.mark.parametrize(
    ("hidden", "rows", "count"), [(1024, 1, gpu_timing.FEW), (4096, 1024, 5), (16384, 4096, 1)]
)
def test_copies_fill_the_gpus_cache(
    hidden: int, rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU there are as many copies of the inputs as fill its cache, with values alike and
    memory of their own.
    """
    case = Case("layer_norm", hidden, "float32", rows)
    copies = gpu(monkeypatch).inputs(case, GPU)
    assert len(copies) == count == gpu_timing.copies(ops.get("layer_norm").bytes(case), GPU.l2)
    first, last = tensors(copies[0]), tensors(copies[-1])
    assert all(torch.equal(first[name], last[name]) for name in first)
    if count > 1:
        assert not {t.data_ptr() for t in first.values()} & {t.data_ptr() for t in last.values()}


def test_a_gpus_rows_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU draws the first rows of a GPU's inputs only; the others repeat them, whatever belongs
    to a row, and vectors are as they were.
    """
    monkeypatch.setattr(inputs, "DRAWN_ROWS", 3)
    case = Case("layer_norm_backward", 40, "float32", 8)
    few = inputs.plain(case, GPU, rows=3)
    given = gpu(monkeypatch).inputs(case, GPU)[0]
    for name in ("dy", "x", "mean", "rstd"):
        assert torch.equal(given[name], few[name][[0, 1, 2, 0, 1, 2, 0, 1]]), name
    assert torch.equal(given["weight"], few["weight"])


def test_sums_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many blocks of sums as the device asks for, each copy with zeros of its
    own.
    """
    case = Case("lnlstm_step_backward", 64, "float32", 4096)
    sums = [a.name for a in ops.get(case.op).arguments(case) if a.role == "sum"]
    for backend, device in ((gpu(monkeypatch), GPU), (backends.of(CPU), CPU)):
        given = backend.inputs(case, device)[0]
        assert {given[name].shape[0] for name in sums} == {case.blocks(device)}
        assert not any(given[name].any() for name in sums)


def test_a_gpu_checks_aligned_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a kernel is checked on tensors aligned as its wide accesses ask, on the CPU on
    misaligned ones.
    """
    case, seen = Case("layer_norm", 64, "float32", 8), list[int]()

    def kernel(*values: Any) -> None:
        seen.append(values[0].data_ptr() % 16)
        raise ValueError("seen")

    for backend, device in ((gpu(monkeypatch), GPU), (backends.of(CPU), CPU)):
        with pytest.raises(ValueError, match="seen"):
            backend.verify(case, device, kernel)
    assert seen[0] == 0 != seen[1]


# --- kernels bound to inputs


def by_eager(case: Case) -> Any:
    """A kernel of the operator, by eager's call."""
    plan = ops.get(case.op)
    arguments = plan.arguments(case)

    def kernel(*values: Any) -> None:
        named = dict(zip([a.name for a in arguments], values, strict=True))
        for name, output in plan.eager(
            case, {a.name: named[a.name] for a in arguments if a.role != "out"}
        ).items():
            if name in named:
                named[name].copy_(output)

    return kernel


@pytest.mark.parametrize("device", [EMULATED, CPU], ids=["emulated", "cpu"])
def test_what_is_checked_and_benchmarked_is_the_devices_own(
    device: Device, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """`lntune check` and `lntune bench` for an emulated GPU get its kernels, not the CPU's, whose
    tensors it works on; and those of the CPU where an emulated GPU serves calls.
    """
    seen: list[Device] = []

    def kernel(case: Case, plan: Any, setting: Any, device: Device, strided: bool = False) -> Any:
        seen.append(device)
        return by_eager(case)

    request.addfinalizer(lambda: (backends.serve(), lntune.reload()))
    monkeypatch.setattr(first_check, "kernel", kernel)
    other = EMULATED if device == CPU else None
    backends.serve(other)
    lntune.reload()
    case = Case("layer_norm", 64, "float32", 8)
    assert all(result.ok for result in check_cases([case], device))
    bench.run([case], 0.0, with_compile=False, device=device)
    assert len(seen) >= 3 and set(seen) == {device}
    assert torch_devices.of(torch.device("cpu")) == (other or CPU)


VARIANT = Case("layer_norm", 64, "float32", 8, "weight+bias+stats")


def test_calls_refused_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where direct calls are refused and others do not count, that is an error; else each call
    makes its outputs in Python.
    """
    copies = gpu(monkeypatch).inputs(VARIANT, GPU)[:2]
    monkeypatch.setattr(calls_module, "_direct", lambda *_: None)
    with pytest.raises(LntuneError, match="refused"):
        calls_module.bind(VARIANT, by_eager(VARIANT), copies, allocate=True)
    calls = calls_module.bind(VARIANT, by_eager(VARIANT), copies, allocate=True, directly=False)
    monkeypatch.undo()
    expected = ops.get("layer_norm").eager(VARIANT, copies[0])
    first, again, other = calls[0](), calls[0](), calls[1]()
    for name in ("y", "mean", "rstd"):
        assert torch.equal(first[name], expected[name]) and torch.equal(other[name], expected[name])
        assert first[name].data_ptr() != again[name].data_ptr()


def test_given_outputs_are_each_copys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that do not allocate write into outputs made beforehand, one set for each copy of the
    inputs.
    """
    copies = gpu(monkeypatch).inputs(VARIANT, GPU)[:3]
    seen: list[int] = []

    def kernel(*values: Any) -> None:
        seen.append(
            values[[a.name for a in ops.get("layer_norm").arguments(VARIANT)].index("y")].data_ptr()
        )

    calls = calls_module.bind(VARIANT, kernel, copies, allocate=False)
    for call in [*calls, *calls]:
        call()
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


def test_a_case_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case whose tensors the machine cannot hold is refused before it is tried, with the most
    rows that fit; what fits is not.
    """
    monkeypatch.setattr(inputs, "memory", lambda: 1 << 30)
    case = Case("layer_norm", 1024, "float32", 1 << 20)
    with pytest.raises(
        InputError,
        match=r"rows: got 1048576 of .* expected at most some (\d+) on a machine of 1 GB",
    ) as caught:
        inputs.check_size([Case("layer_norm", 64, "float32", 1), case])
    most = int(str(caught.value).split("at most some ")[1].split()[0])
    inputs.check_size([msgspec.structs.replace(case, rows=most - 1)])
    with pytest.raises(InputError):
        inputs.check_size([msgspec.structs.replace(case, rows=most + 10)])


def test_the_memory_of_this_machine() -> None:
    """Bytes, between a small machine's and a large one's."""
    assert 1 << 28 < inputs.memory() < 1 << 50
