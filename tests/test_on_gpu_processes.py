"""What needs a process of its own: kernels under compute-sanitizer, and a GPU that is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_gpu import Here, here

from lntune.backends.cuda import locate
from lntune.schedule import all_schedules

__all__ = ["here"]

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "synccheck")


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that imports what this one does, with more in its environment."""
    path = os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), *(p for p in sys.path if p)]
    )
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=500,
    )


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(here: Here, tool: str) -> None:
    """A small set of kernels under compute-sanitizer is right, without an access out of bounds, a
    race in shared memory or a barrier that some threads miss. On the imagined GPU there is no tool,
    but the emulator, which looks for the same.
    """
    command = [sys.executable, str(HERE / "gpu_small_set.py")]
    if here.real:
        sanitizer = locate.program("compute-sanitizer")
        if sanitizer is None:
            pytest.skip("compute-sanitizer is not installed")
        # Our kernels alone, in this process alone: compilers it starts use no CUDA, and calls of
        # the driver's that PyTorch expects to fail are none of our business.
        options = [
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--target-processes",
            "application-only",
            "--kernel-name",
            "kernel_substring=main_kernel",
        ]
        command = [
            sanitizer,
            *options,
            *(["--report-api-errors", "no"] if tool == "memcheck" else []),
            *command,
        ]
    elif tool == TOOLS[0]:
        command.append("few")
    else:
        pytest.skip("one run is enough where there is no tool")
    # Without PyTorch's cache of memory each tensor is an allocation of its own, and what lies
    # beyond it is nobody's.
    done = process(*command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count(": right") >= (2 if here.real else 1) * len(
        {plan.op for plan in all_schedules().values() if plan.kind == "gpu"}
    )


BROKEN = """
import os
import torch
import lntune
from lntune.errors import LaunchError

{imagine}
x = torch.randn(8, 64, device={device!r})
lntune.layer_norm(x, (64,))
{wreck}
try:
    lntune.layer_norm(x, (64,))
except LaunchError as e:
    print("LaunchError", e, flush=True)
os._exit(0)  # PyTorch's own end may fail on such a GPU
"""

# A real one is broken for this process by an assertion in a kernel of PyTorch's, the imagined one
# by what its driver says from then on.
REAL = """
try:
    torch.zeros(4, device="cuda")[torch.tensor([1000000], device="cuda")]
    torch.cuda.synchronize()
except RuntimeError:
    pass
"""
IMAGINE = """
import warnings
warnings.simplefilter("ignore")
import fake_gpu
from lntune.backends.cuda import launcher
from lntune.torch import devices
devices._known = lambda kind, index: launcher.device(0)
"""
IMAGINED = 'fake_gpu.FakeGpu().fail("cuLaunchKernel", 710)'


def test_a_broken_gpu_is_an_exception(here: Here) -> None:
    """On a GPU whose context is broken, by whomever, a call is a LaunchError that names the
    operator, and no crash.
    """
    script = BROKEN.format(
        imagine="" if here.real else IMAGINE,
        device=here.name,
        wreck=REAL if here.real else IMAGINED,
    )
    done = process(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LaunchError") and "layer_norm" in done.stdout
