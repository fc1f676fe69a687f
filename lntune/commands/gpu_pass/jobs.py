"""What the pass asks of the process that works on the GPU, and what that answers: plain data that
crosses between processes as JSON.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from lntune.case import Case
from lntune.device import Device
from lntune.measure.jobs import Candidate

Status = Literal["ok", "wrong", "failed", "late", "cut"]
"""What came of a work: ok; a kernel answered wrongly; it raised, crashed or gave an exit code; it
took longer than it may; its step or its part was over before, and it is done again.
"""


class Find(msgspec.Struct, frozen=True, tag=True):
    """Say which `device` a target is, PyTorch's name of it, `place`, and the `sizes` for it."""

    target: str


class Compare(msgspec.Struct, frozen=True, tag=True):
    """Check a kernel as any candidate is and on more numbers of rows, on another stream and in a
    graph.
    """

    case: Case
    device: Device
    candidate: Candidate
    rows: tuple[int, ...]


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Time a copy of so many bytes."""

    device: Device
    bytes: int
    seconds: float


class RoundTrip(msgspec.Struct, frozen=True, tag=True):
    """Time one of the kernels of roundtrips.cu."""

    device: Device
    kernel: str
    seconds: float


class Called(msgspec.Struct, frozen=True, tag=True):
    """Time a case as it is called, against everyone."""

    case: Case
    device: Device
    seconds: float
    with_compile: bool = False


class Beside(msgspec.Struct, frozen=True, tag=True):
    """Time a candidate beside the default knobs."""

    case: Case
    device: Device
    candidate: Candidate
    default: Candidate
    seconds: float


class Sequence(msgspec.Struct, frozen=True, tag=True):
    """Time an LN-LSTM over a sequence."""

    device: Device
    batch: int
    hidden: int
    dtype: str
    steps: int
    seconds: float


Job = Find | Compare | Copy | RoundTrip | Called | Beside | Sequence


class Answer(msgspec.Struct, frozen=True):
    """What came of a work; `values` are its figures. `lost`: the process can do no more."""

    status: Status
    message: str = ""
    values: dict[str, Any] = {}
    lost: bool = False
