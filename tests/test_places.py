"""Where a case's tensors are, how many copies there are of them, and what is timed on them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from fake_gpu import FakeGpu
from host_gpu import HostGpu

from lntune import device as device_module
from lntune import ops
from lntune.backends import places
from lntune.backends.cuda import launcher
from lntune.backends.cuda import timing as device_timing
from lntune.backends.cuda.targets import device_of
from lntune.backends.places import Place
from lntune.case import Case
from lntune.errors import InputError, LntuneError
from lntune.measure import calls as calls_module

GPU = device_of("cuda:sm_90")


def tensors(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a case's inputs."""
    return {name: v for name, v in given.items() if isinstance(v, torch.Tensor)}


def test_this_cpu() -> None:
    """None and this machine's CPU are the CPU: one copy of the inputs, timed by the CPU's clock."""
    case = Case("layer_norm", 64, "float32", 8)
    for device in (None, device_module.current()):
        place = places.of(device)
        assert (place.device, place.name, place.gpu) == (device_module.current(), "cpu", None)
    assert len(place.inputs(case)) == 1
    measured = place.measure({"a": [lambda: None]}, 0.0, rounds=2)
    assert len(measured.timings["a"].samples_us) == 2
    assert measured.clocks == ()


def test_a_gpu_that_is_here(fake_gpu: FakeGpu) -> None:
    """A GPU that is here has PyTorch's name and is measured by its own clock; asking for it starts
    nothing.
    """
    places._gpu.cache_clear()
    device = launcher.device(0)
    place = places.of(device)
    assert (place.device, place.name) == (device, "cpu")  # the imagined one's tensors are the CPU's
    assert isinstance(place.gpu, HostGpu)
    assert places.of(device) is place
    places._gpu.cache_clear()


def test_a_gpu_that_is_elsewhere() -> None:
    """It is named, with what is here and what can be done without it."""
    with pytest.raises(
        InputError,
        match=(
            r"device: got sm_90 \(sm_90\), .* a GPU of this machine: none \(.*[^.]\)\. .*--dry-run"
        ),
    ):
        places.of(GPU)


@pytest.mark.parametrize(
    ("hidden", "rows", "count"), [(1024, 1, device_timing.FEW), (4096, 1024, 5), (16384, 4096, 1)]
)
def test_copies_fill_the_gpus_cache(hidden: int, rows: int, count: int) -> None:
    """On a GPU there are as many copies of the inputs as fill its cache, with values alike and
    memory of their own.
    """
    case = Case("layer_norm", hidden, "float32", rows)
    copies = Place(GPU, "cpu", HostGpu(0)).inputs(case)
    assert len(copies) == count == device_timing.copies(ops.get("layer_norm").bytes(case), GPU.l2)
    first, last = tensors(copies[0]), tensors(copies[-1])
    assert all(torch.equal(first[name], last[name]) for name in first)
    if count > 1:
        assert not {t.data_ptr() for t in first.values()} & {t.data_ptr() for t in last.values()}


def test_sums_are_those_of_the_device() -> None:
    """There are as many blocks of sums as the device's cores ask for, each copy with zeros of its
    own.
    """
    case = Case("lnlstm_step_backward", 64, "float32", 4096)
    sums = [a.name for a in ops.get(case.op).arguments(case) if a.role == "sum"]
    for place in (Place(GPU, "cpu", HostGpu(0)), places.of(None)):
        given = place.inputs(case)[0]
        assert {given[name].shape[0] for name in sums} == {case.blocks(place.device.cores)}
        assert not any(given[name].any() for name in sums)


def test_a_gpu_checks_aligned_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a kernel is checked on tensors aligned as its wide accesses ask, on the CPU on
    misaligned ones.
    """
    case, seen = Case("layer_norm", 64, "float32", 8), []

    def kernel(*values: Any) -> None:
        seen.append(values[0].data_ptr() % 16)
        raise ValueError("seen")

    for place in (Place(GPU, "cpu", HostGpu(0)), places.of(None)):
        with pytest.raises(ValueError, match="seen"):
            place.verify(case, kernel)
    assert seen[0] == 0 != seen[1]


# --- kernels bound to inputs


def by_eager(case: Case) -> Any:
    """A kernel of the operator, by eager's call."""
    plan = ops.get(case.op)
    arguments = plan.arguments(case)

    def kernel(*values: Any) -> None:
        named = dict(zip([a.name for a in arguments], values, strict=True))
        for name, made in plan.eager(
            case, {a.name: named[a.name] for a in arguments if a.role != "out"}
        ).items():
            if name in named:
                named[name].copy_(made)

    return kernel


VARIANT = Case("layer_norm", 64, "float32", 8, "weight+bias+stats")


def test_calls_refused_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where direct calls are refused the CPU has no other, which is an error; elsewhere each call
    makes its outputs in Python.
    """
    copies = Place(GPU, "cpu", HostGpu(0)).inputs(VARIANT)[:2]
    monkeypatch.setattr(calls_module, "_direct", lambda *_: None)
    with pytest.raises(LntuneError, match="refused"):
        calls_module.bind(VARIANT, by_eager(VARIANT), copies, allocate=True)
    monkeypatch.setattr(calls_module, "_device", lambda given: SimpleNamespace(type="cuda"))
    calls = calls_module.bind(VARIANT, by_eager(VARIANT), copies, allocate=True)
    monkeypatch.undo()
    expected = ops.get("layer_norm").eager(VARIANT, copies[0])
    first, again, other = calls[0](), calls[0](), calls[1]()
    for name in ("y", "mean", "rstd"):
        assert torch.equal(first[name], expected[name]) and torch.equal(other[name], expected[name])
        assert first[name].data_ptr() != again[name].data_ptr()


def test_given_outputs_are_each_copys_own() -> None:
    """Calls that do not allocate write into outputs made beforehand, one set for each copy of the
    inputs.
    """
    copies = Place(GPU, "cpu", HostGpu(0)).inputs(VARIANT)[:3]
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
    monkeypatch.setattr(places, "memory", lambda: 1 << 30)
    case = Case("layer_norm", 1024, "float32", 1 << 20)
    with pytest.raises(
        InputError,
        match=r"rows: got 1048576 of .* expected at most some (\d+) on a machine of 1 GB",
    ) as caught:
        places.check_size([Case("layer_norm", 64, "float32", 1), case])
    most = int(str(caught.value).split("at most some ")[1].split()[0])
    places.check_size([msgspec.structs.replace(case, rows=most - 1)])
    with pytest.raises(InputError):
        places.check_size([msgspec.structs.replace(case, rows=most + 10)])


def test_the_memory_of_this_machine() -> None:
    """Bytes, between a small machine's and a large one's."""
    assert 1 << 28 < places.memory() < 1 << 50
