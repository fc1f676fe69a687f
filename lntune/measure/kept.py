"""Kernels of the best candidates of a case, kept as they were tried: they race each other, and to
build a kernel takes longer than to measure it.
"""

from __future__ import annotations

from lntune.backends.backend import Kernel
from lntune.case import Case
from lntune.device import Device
from lntune.measure.jobs import Candidate

MOST = 12
"""Kernels kept."""


class Kept:
    """The kernels of the quickest candidates of one case on one device."""

    def __init__(self) -> None:
        self._of: tuple[Case, Device] | None = None
        self._kernels: dict[Candidate, tuple[float, Kernel]] = {}

    def add(
        self, case: Case, device: Device, candidate: Candidate, kernel: Kernel, us: float
    ) -> None:
        """Keep a kernel that took so many microseconds, as long as MOST were not quicker; those of
        another case are given up.
        """
        if self._of != (case, device):
            self._of, self._kernels = (case, device), {}
        self._kernels[candidate] = us, kernel
        if len(self._kernels) > MOST:
            del self._kernels[max(self._kernels, key=lambda c: self._kernels[c][0])]

    def get(self, case: Case, device: Device, candidate: Candidate) -> Kernel | None:
        """The kernel of a candidate; None where it is not kept."""
        kept = self._kernels.get(candidate) if self._of == (case, device) else None
        return kept[1] if kept else None
