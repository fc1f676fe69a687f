"""The device that a bringup is for, from the option `--target`."""

from __future__ import annotations

import re

from lntune import device as device_module
from lntune.backends.cuda import driver
from lntune.device import Device
from lntune.errors import InputError, got_expected


def find(target: str) -> tuple[Device, str]:
    """(device, a note in words or the empty string) of "cpu", "cuda", "cuda:1", or of nothing: the
    first GPU, else this machine's CPU.

    Raises:
        InputError: anything else, or a GPU that is not here or cannot be used, with the reason.
    """
    if target == "cpu":
        return device_module.current(), ""
    if not target and (why := _unusable()):
        return device_module.current(), f"no GPU that can be used ({why}): this is for the CPU"
    match = re.fullmatch(r"cuda(?::(\d+))?", target or "cuda")
    if match is None:
        remedy = "For a GPU that is not here: lntune inspect, or lntune tune --dry-run."
        raise InputError(
            got_expected(
                "--target",
                repr(target),
                "cpu, cuda, or cuda:N for the GPU number N of this machine",
                remedy,
            )
        )
    ordinal = int(match[1] or 0)
    if (why := _unusable()) or ordinal >= driver.count():
        raise InputError(
            got_expected(
                "--target",
                repr(target),
                f"a GPU that is here ({why or f'there are {driver.count()}'})",
                "See lntune doctor.",
            )
        )
    return driver.device(ordinal), ""


def _unusable() -> str:
    """Why no GPU can be used: the driver's reason, or PyTorch's, whose tensors kernels run on;
    empty when one can.
    """
    import torch

    if not driver.count():
        return driver.missing().rstrip(".")
    if driver.place(0) != "cpu" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} uses none; install one that is built for CUDA"
    return ""
