"""The faults that the emulator finds in a kernel, one exception each."""

from __future__ import annotations

from lntune.errors import LntuneError


class EmulatorError(LntuneError, RuntimeError):
    """A kernel does not compile, or broke a rule of the machine; the message names kernel, thread,
    buffer and offset.
    """


class BoundsError(EmulatorError):
    """A load or store outside of the buffers."""


class MisalignedError(EmulatorError):
    """An access at an address that is no multiple of its size."""


class RaceError(EmulatorError):
    """Two threads access the same bytes, one of them stores, and nothing says which comes first."""


class BarrierError(EmulatorError):
    """Threads wait for others that do not come: a divergent barrier, a shuffle with lanes missing,
    a deadlock.
    """
