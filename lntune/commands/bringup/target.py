"""The device a bringup is for, from what `--target` says."""

from __future__ import annotations

from lntune import backends
from lntune.backends import BACKENDS
from lntune.device import Device
from lntune.errors import InputError, LntuneError, got_expected

_ELSEWHERE = "For a GPU that is not here: lntune inspect, or lntune tune --dry-run."


def find(target: str) -> tuple[Device, str]:
    """(device, a note in words or the empty string) of "cpu", "cuda", "cuda:1", or of nothing: the
    first GPU, else this machine's CPU.

    Raises:
        InputError: anything else, or a GPU that is not here or cannot be used, with the reason.
    """
    if not target:
        return backends.best()
    kind, _, number = target.partition(":")
    backend = backends.get(kind) if kind in BACKENDS else None
    if backend and kind == backend.option and (not number or number.isdecimal()):
        if why := backend.missing():
            raise _expected(target, f"a GPU that is here ({why})", "See lntune doctor.")
        if number and int(number) >= backend.count():
            raise _expected(target, f"a GPU that is here (there are {backend.count()})")
        return backends.device_of(target), ""
    try:
        device = backends.device_of(target)
        backends.of(device).torch_device(device)
    except LntuneError as e:
        expected = "cpu, cuda, or cuda:N for the GPU number N of this machine"
        raise _expected(target, expected) from e
    return device, ""


def _expected(target: str, expected: str, remedy: str = _ELSEWHERE) -> InputError:
    return InputError(got_expected("--target", repr(target), expected, remedy))
