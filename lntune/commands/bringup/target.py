"""The device a bringup is for, from what `--target` says."""

from __future__ import annotations

from lntune import backends
from lntune.device import Device
from lntune.errors import InputError, LntuneError, UnknownNameError, got_expected

_ELSEWHERE = "For a GPU that is not here: lntune inspect, or lntune tune --dry-run."


def find(target: str) -> tuple[Device, str]:
    """(device, a note in words or the empty string) of "cpu", "cuda", "cuda:1", or of nothing: the
    first GPU, else this machine's CPU.

    Raises:
        InputError: anything else, or a GPU that is not here or cannot be used, with the reason.
    """
    if not target:
        return backends.best()
    try:
        device = backends.device_of(target)
        backend = backends.of(device)
    except UnknownNameError as e:
        raise _expected(target, "cpu, cuda, or cuda:N for the GPU number N of this machine") from e
    except LntuneError as e:
        raise _expected(target, f"a GPU that is here ({e})", "See lntune doctor.") from e
    try:
        backend.torch_device(device)
    except InputError as e:
        raise _expected(target, "cpu, cuda, or cuda:N for the GPU number N of this machine") from e
    if why := backend.missing():
        raise _expected(target, f"a GPU that is here ({why})", "See lntune doctor.")
    return device, ""


def _expected(target: str, expected: str, remedy: str = _ELSEWHERE) -> InputError:
    return InputError(got_expected("--target", repr(target), expected, remedy))
