"""NVIDIA's GPUs: CUDA source by TVM, device code by nvcc or NVRTC, launched through the driver and
timed by the GPU's own clock.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lntune import backends, check, ops
from lntune.backends import cuda, inputs
from lntune.backends.backend import Backend, Call, Kernel, Scheduled, not_here
from lntune.backends.cuda import driver, launcher, row_counts, stored, targets
from lntune.backends.cuda import program as programs
from lntune.backends.cuda import timing as gpu_timing
from lntune.backends.cuda.timing import Gpu
from lntune.case import Case
from lntune.check import Verdict
from lntune.device import Device
from lntune.errors import LntuneError, ToolchainError, gist
from lntune.log.records import Timing
from lntune.system.sealed import Facts
from lntune.timing import Enough, Measured


class CudaBackend(Backend):
    """GPUs, of this machine or by name."""

    name = "cuda"
    kind = "gpu"
    torch_type = "cuda"
    suffix = "gpu"
    builds_ahead = True
    search = "ranked"
    checks_elsewhere = True
    graphs = True
    aligned = True
    has_peers = True
    beside = "warm"
    inspects = True
    multi_arch = True
    fence = check.ALIGNED
    short_elements = 1 << 22
    case_seconds = 6.0
    trial_overhead = 0.15
    """Loading a kernel, checking it and finding out how to time it. Assumed: not measured yet."""
    option = "cuda"

    def targets(self) -> list[str]:
        """See Backend."""
        return targets.names()

    def find(self, target: str) -> Device | None:
        """See Backend."""
        return targets.find(target)

    def count(self) -> int:
        """See Backend."""
        return driver.count()

    def missing(self) -> str:
        """See Backend. The driver's reason, or PyTorch's, whose tensors kernels run on."""
        import torch

        if not driver.count():
            return driver.missing().rstrip(".")
        if driver.place(0) != "cpu" and not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} uses none; install one that is built for CUDA"
        return ""

    def device_of(self, index: int) -> Device:
        """See Backend."""
        import torch

        return driver.device(torch.cuda.current_device() if index < 0 else index)

    def torch_device(self, device: Device) -> str:
        """See Backend."""
        ordinal = launcher.ordinal_of(device)
        if ordinal is None:
            none = f"none ({launcher.missing().rstrip('.')})"
            here = ", ".join(f"cuda:{i}" for i in range(launcher.count())) or none
            raise not_here(device, f"a GPU of this machine: {here}")
        return driver.place(ordinal)

    def target(self, device: Device) -> dict[str, Any]:
        """See Backend."""
        return programs.target(device)

    def widest(self, knobs: Any, case: Case) -> int:
        """See Backend."""
        return stored.widest(knobs, case)

    def in_memory(self, scheduled: Scheduled) -> Kernel:
        """See Backend."""
        return launcher.load(stored.binary(scheduled, programs.program(scheduled)))

    def stand_in(self, scheduled: Scheduled) -> Kernel:
        """See Backend: run by the emulator."""
        return backends.get("emulated").stand_in(scheduled)

    def show(self, scheduled: Scheduled, form: str) -> str:
        """See Backend."""
        source = programs.program(scheduled).source
        return source if form == "source" else cuda.to_cubin(source, scheduled.device.isa).ptx

    def can_compile(self) -> bool:
        """See Backend."""
        return bool(cuda.stamp())

    def ensure_compiler(self) -> None:
        """See Backend."""
        cuda.identity()

    def compiler(self) -> str:
        """See Backend."""
        return cuda.identity()

    def store(self, scheduled: Scheduled, path: Path, archs: Sequence[str] = ()) -> Facts:
        """See Backend."""
        wanted = sorted({scheduled.device.isa, *archs})
        return stored.write(path, stored.binary(scheduled, programs.program(scheduled), wanted))

    def load(self, path: Path) -> Kernel:
        """See Backend."""
        return launcher.load(stored.read(path))

    def ensure_usable(self, what: str) -> None:
        """See Backend. What the driver says against a file that is whole would be said of a new one
        too.
        """
        if launcher.missing() and not launcher.count():
            raise ToolchainError(f"{what}: no GPU can be used here: {launcher.missing()}")

    def tools(self) -> Facts:
        """See Backend."""
        return {"cuda": stamp} if (stamp := cuda.stamp()) else {}

    def same_tools(self, facts: Facts) -> bool:
        """See Backend. What a compiler is takes long to ask, and is asked only where its place
        differs.
        """
        return super().same_tools(facts) or cuda.identity() == facts.get("compiler")

    def architectures(self, path: Path) -> set[str]:
        """See Backend."""
        return stored.architectures(path)

    def ensure_library(self) -> tuple[Path, ...]:
        """See Backend."""
        return (driver.ensure_library(),)

    def overlapping(self) -> contextlib.AbstractContextManager[None]:
        """See Backend."""
        return launcher.overlapping()

    def _gpu(self, device: Device) -> Gpu:
        return _clock(self.torch_device(device))

    def inputs(self, case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
        """See Backend: so many copies that calls in turn find none in the L2 cache."""
        count = gpu_timing.copies(ops.get(case.op).bytes(case), device.l2)
        with self._gpu(device).active():
            first = inputs.on_device(case, device, self.torch_device(device), seed)
            return [first, *(inputs.copied(first) for _ in range(count - 1))]

    def baseline(self, device: Device, case: Case, given: Mapping[str, Any]) -> Call:
        """See Backend."""
        op = ops.get(case.op)
        with self._gpu(device).active():
            return (op.gpu_baseline or op.baseline)(case, given)

    def more_rows(self, case: Case, device: Device, kernel: Kernel) -> tuple[int, ...]:
        """See Backend: what its blocks of threads do from their second step over the rows on."""
        return row_counts.of(kernel)

    def verify(
        self, case: Case, device: Device, kernel: Kernel, thoroughly: bool = False
    ) -> Verdict:
        """See Backend."""
        place, more, every = self.torch_device(device), self.more_rows(case, device, kernel), 0
        if thoroughly:
            more, every = row_counts.thorough(case, kernel)
        return check.verify(case, kernel, self.fence, place, device, more, thoroughly, every)

    def machine(self, device: Device) -> Facts:
        """See Backend."""
        if launcher.ordinal_of(device) is None:
            return {}
        return {"gpu": device.name, "isa": device.isa, "driver": driver.release()}

    def recording(self) -> bool:
        """See Backend."""
        import torch

        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def measure(
        self,
        contenders: Mapping[str, Sequence[Call]],
        device: Device,
        seconds: float,
        rounds: int = 5,
        seed: int = 0,
        enough: Enough | None = None,
    ) -> Measured:
        """See Backend, and timing.py beside this file."""
        return gpu_timing.measure(contenders, seconds, self._gpu(device), rounds, seed, enough)

    def inputs_beside(self, case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
        """See Backend: one copy, where several keep the cache cold."""
        if gpu_timing.copies(ops.get(case.op).bytes(case), device.l2) == 1:
            return []
        with self._gpu(device).active():
            return [inputs.on_device(case, device, self.torch_device(device), seed)]

    def measure_beside(
        self,
        contenders: Mapping[str, Sequence[Call]],
        case: Case,
        device: Device,
        seconds: float,
        seed: int = 0,
    ) -> dict[str, Timing]:
        """See Backend."""
        return dict(self.measure(contenders, device, seconds, seed=seed).timings)

    def copy_bandwidth(self, device: Device, seconds: float = 0.5) -> float:
        """See Backend."""
        name = self.torch_device(device)
        return gpu_timing.copy_bandwidth(name, seconds, self._gpu(device))

    def fault(self, device: Device) -> str:
        """See Backend. An illegal access breaks a GPU's context for good."""
        import torch

        try:
            torch.zeros(1, device=self.torch_device(device)).sum().item()
            self._gpu(device).wait()
        except Exception as e:
            return str(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {gist(e)}"
        return ""

    def give_back_memory(self, device: Device) -> None:
        """See Backend."""
        import torch

        check.forget()
        if self.torch_device(device).startswith("cuda"):
            torch.cuda.empty_cache()


@functools.lru_cache(maxsize=8)
def _clock(name: str) -> Gpu:
    """What time is measured with on a GPU of PyTorch's name."""
    return gpu_timing.Cuda(int(name.partition(":")[2] or 0))


BACKEND = CudaBackend()
