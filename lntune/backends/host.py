"""What kinds of devices share whose tensors are the CPU's: one copy of the inputs, eager mode's
calls as a user of the CPU writes them, and time by the machine's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lntune import check, ops, timing
from lntune.backends import inputs
from lntune.backends.backend import Backend, Call, Kernel
from lntune.case import Case
from lntune.check import Verdict
from lntune.device import Device
from lntune.timing import Enough, Measured


class HostBackend(Backend):
    """A backend whose kernels take tensors of the CPU."""

    torch_type = "cpu"

    def torch_device(self, device: Device) -> str:
        """See Backend."""
        return "cpu"

    def inputs(self, case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
        """See Backend."""
        return [inputs.plain(case, device, seed)]

    def baseline(self, device: Device, case: Case, given: Mapping[str, Any]) -> Call:
        """See Backend."""
        return ops.get(case.op).baseline(case, given)

    def verify(
        self, case: Case, device: Device, kernel: Kernel, thoroughly: bool = False
    ) -> Verdict:
        """See Backend."""
        more = self.more_rows(case, device, kernel)
        return check.verify(case, kernel, self.fence, "cpu", device, more)

    def measure(
        self,
        contenders: Mapping[str, Sequence[Call]],
        device: Device,
        seconds: float,
        rounds: int = 5,
        seed: int = 0,
        enough: Enough | None = None,
    ) -> Measured:
        """See Backend."""
        first = {name: calls[0] for name, calls in contenders.items()}
        return timing.measure(first, seconds, rounds, seed, enough)
