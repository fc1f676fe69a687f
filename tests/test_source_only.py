"""CUDA source is the same on a machine whose TVM finds CUDA: there TVM would compile it by itself,
with what may not be installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lntune import schedule
from lntune.backends import device_of
from lntune.backends.cuda import source_only
from lntune.case import Case
from lntune.kernels import compiler
from lntune.system import toolchain

CHILD = """
import ctypes, hashlib, sys
import tvm
from lntune import schedule
from lntune.kernels import compiler
from lntune.case import Case
from lntune.backends import device_of
case, device = Case("layer_norm", 96, "bfloat16", 8), device_of("cuda:sm_90")
plan = next(iter(schedule.for_op("layer_norm", "gpu").values()))
sys.stdout.write(compiler.program(case, plan, plan.default(case, device), device).source)
sys.stderr.write(open("/proc/self/maps").read())
"""


def libraries(folder: Path) -> None:
    """A driver and a CUDA runtime in which every function that TVM's CUDA runtime needs is there,
    and fails.
    """
    import tvm

    wants = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    if not wants.is_file():
        pytest.skip("this TVM has no CUDA runtime")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(wants)], capture_output=True, text=True, check=True
    ).stdout
    for name, pattern in (
        ("libcuda.so.1", r" U (cu[A-Z]\w+)"),
        ("libcudart.so.13", r" U (cuda[A-Z]\w+)"),
    ):
        source, script = folder / f"{name}.c", folder / f"{name}.map"
        source.write_text(
            "\n".join(
                f"int {function}(void) {{ return 100; }}"
                for function in sorted(set(re.findall(pattern, listed)))
            )
        )
        script.write_text(f"{name} {{ global: *; }};\n")
        toolchain.run_compiler(
            [
                "-x",
                "c",
                "-shared",
                "-fPIC",
                "-w",
                str(source),
                f"-Wl,-soname,{name},--version-script={script}",
            ],
            folder / name,
        )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_where_tvm_finds_cuda(tmp_path: Path) -> None:
    """With a driver and a CUDA runtime there TVM loads its own; the source of a kernel is what it
    is without, and nothing is compiled.
    """
    libraries(tmp_path)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "libtvm_runtime_cuda.so" in done.stderr
    case, device = Case("layer_norm", 96, "bfloat16", 8), device_of("cuda:sm_90")
    plan = next(iter(schedule.for_op("layer_norm", "gpu").values()))
    assert done.stdout == compiler.program(case, plan, plan.default(case, device), device).source


def test_other_compilations_are_left_alone() -> None:
    """Behind the block, and for other threads in it, TVM's own way to compile is what it was."""
    import threading

    import tvm_ffi

    name = "tvm_callback_cuda_compile"
    compiler.warm_up()
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    asked: list[str] = []
    tvm_ffi.register_global_func(
        name, lambda code: asked.append(code) or b"compiled", override=True
    )
    try:
        with source_only.kept():
            inside = tvm_ffi.get_global_func(name)
            assert bytes(inside("mine")) == b"mine"
            other = threading.Thread(target=lambda: inside("theirs"))
            other.start()
            other.join()
        assert bytes(tvm_ffi.get_global_func(name)("later")) == b"compiled"
        assert asked == ["theirs", "later"]
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, before, override=True)
