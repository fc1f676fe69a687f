"""Direct calls of an operator from PyTorch: one step of C from a call's arguments to its kernel.

Held by each public function, filled by its general path, and forgotten when kernels change.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from lntune import ops
from lntune.case import BUCKETS, Case
from lntune.kernels.direct import Table
from lntune.system.later import Later
from lntune.torch import devices, recording
from lntune.torch.dispatch import FILTERED_WARNINGS, Kernel
from lntune.torch.reloading import LOCK, on_kernels_changed


class Direct:
    """The direct calls of one operator: a `lntune.kernels.direct.Table` made when the first kernel
    is known, forgotten on reload.

    `names` says which argument of the kernels each argument of a call is. Where a table cannot be
    made every call takes the general path, which is slower by some microseconds and otherwise the
    same; `lntune doctor` says so. `signature` and `record` are as Table's.
    """

    def __init__(
        self, signature: str, names: tuple[str, ...], record: ctypes.c_void_p | None = None
    ) -> None:
        self.call: Callable[..., Any] = _unknown
        self.serves: Callable[..., Any] = _unknown
        self._signature, self._names, self._record = signature, names, record
        self._table: Table | None = None
        self._later = Later()
        on_kernels_changed(self.forget)

    def remember(
        self, case: Case, kernel: Kernel, call: tuple[Any, ...], recorded: bool = False
    ) -> None:
        """Have calls like `call`, in the row bucket of `case`, served directly by this kernel;
        `recorded`: those whose gradients are recorded, instead of the others.
        """
        with LOCK:
            # copies its arguments; only kernels can be called from C
            if isinstance(kernel, functools.partial):
                return
            if self._table is None and not self._later.due:
                return
            try:
                with self._later.trying():
                    self._table = self._table or Table(self._signature, record=self._record)
                    first, last = BUCKETS[case.bucket]
                    # a bucket is a range of bit lengths
                    bits = (first.bit_length(), last.bit_length())
                    known = self._table.remember(
                        kernel,
                        ops.get(case.op).arguments(case),
                        self._names,
                        bits,
                        call,
                        case,
                        recorded,
                        recording.tag(case, devices.of(call[0].device)),
                    )
            except FILTERED_WARNINGS:
                raise
            except Exception:  # the general path serves as well
                return
            if known:
                self.call, self.serves = self._table.call, self._table.serves

    @property
    def ready(self) -> bool:
        """True when a kernel was remembered, so that some calls are direct."""
        return self.call is not _unknown

    def forget(self) -> None:
        """Have every call go the general path again."""
        if self._table is not None:
            self._table.forget()
        self.call = self.serves = _unknown


def _unknown(*_: Any) -> None:
    """The direct call before the first kernel is known."""
