"""The device a bringup is for, from what `--target` says."""

from __future__ import annotations

import re

from lntune import device as device_module
from lntune.cuda import driver
from lntune.device import Device
from lntune.errors import InputError, got_expected


def find(target: str) -> tuple[Device, str]:
    """(device, a note in words or the empty string) of "cpu", "cuda", "cuda:1", or of nothing: the first GPU, else this machine's CPU.

    Raises:
        InputError: anything else, or a GPU that is not here or cannot be used, with the reason.
    """
    if target == "cpu":
        return device_module.current(), ""
    if not target and not driver.count():
        return device_module.current(), f"no GPU that can be used ({driver.missing()}): this is for the CPU"
    match = re.fullmatch(r"cuda(?::(\d+))?", target or "cuda")
    if match is None:
        remedy = "For a GPU that is not here: lntune inspect, or lntune tune --dry-run."
        raise InputError(got_expected("--target", repr(target), "cpu, cuda, or cuda:N for the GPU number N of this machine", remedy))
    ordinal = int(match[1] or 0)
    if ordinal >= driver.count():
        why = driver.missing() or f"there are {driver.count()}"
        raise InputError(got_expected("--target", repr(target), f"a GPU that is here ({why})", "lntune doctor says what was found."))
    return driver.device(ordinal), ""
