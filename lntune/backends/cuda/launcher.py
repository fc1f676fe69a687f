"""Built GPU kernels as functions, launched by launcher.c through NVIDIA's driver and nothing else.

TVM 0.27's own ways were tried, and left out for these reasons (layer norm, hidden 1024, float16,
sm_90; one machine without a GPU):

- `export_library` with libtvm_runtime_cuda. Without a driver `tvm.compile` keeps CUDA source and
  says nothing, so the file needs TVM's compiler when it is loaded. It also needs
  libtvm_runtime_cuda, and with it libcudart.so.13, which is not what a PyTorch of CUDA 12 brings;
  loading these two libraries takes 1.5 ms.
- `export_cuda_host`, one CUDA C++ file with the host's part in it. It loads in 0.3 ms and needs
  `tvm_ffi` alone, but only nvcc with a host compiler can build it (NVRTC cannot), in 2.4 s of a
  core where the device's part takes 0.9, as a file of 1 MB (a CUDA runtime in each). Its launches
  make a grid of no blocks one of one block, which for no rows reads and writes memory that is not
  there; alignment is not checked; it has no memory between kernels; and the stream is the one that
  tvm_ffi's Python was given, not PyTorch's, when it is called from C as direct.py does.
- This one: 1.5 ms for the first kernel of a process and 0.2 ms for each after that, beside the
  driver's own time; files of 30 KB; the driver and nothing else; a call costs 0.7 us of Python,
  checks and launcher before the driver's launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lntune.backends.cuda import driver, packed, row_counts
from lntune.backends.cuda.driver import capability_of, count, device, missing, ordinal_of, use
from lntune.errors import BuildError, InputError, LaunchError, ToolchainError
from lntune.transforms.gpu import early_start

if TYPE_CHECKING:
    from lntune.backends.cuda.device_code import Binary

__all__ = ["count", "device", "load", "missing", "ordinal_of", "overlapping", "use"]

_EARLY = capability_of(early_start.FIRST)
_keep: list[Any] = []
"""Functions, for ever: a CUDA graph may hold their kernels when nothing else does any more."""


@functools.cache
def _wrap() -> Callable[[int], Callable[..., None]]:
    """A program's address -> its function; launcher.c seen as a module of tvm_ffi's."""
    import tvm_ffi

    tvm_ffi.register_error("lntune.InputError", InputError)
    tvm_ffi.register_error("lntune.LaunchError", LaunchError)
    # the one that is loaded, wherever the cache is by now
    module = tvm_ffi.load_module(str(Path(driver.library()._name).resolve()))
    _keep.append(module)
    return module["wrap"]  # type: ignore[no-any-return]


def image_for(binary: Binary, capability: tuple[int, int]) -> str | None:
    """Which image a GPU runs: its own architecture's, the nearest below it of its family, "ptx", or
    None where there is none.
    """
    family = [
        arch
        for arch in binary.images
        if capability_of(arch)[0] == capability[0] and capability_of(arch)[1] <= capability[1]
    ]
    if family:
        return max(family, key=capability_of)
    # PTX is that of the newest architecture, and runs on every one that is as new or newer.
    return (
        "ptx"
        if binary.ptx and capability >= max(capability_of(arch) for arch in binary.images)
        else None
    )


def load(binary: Binary) -> Callable[..., None]:
    """A built kernel as a tvm_ffi.Function of tensors in the operator's order, on any GPU here that
    it has an image for.

    A call launches on PyTorch's current stream and returns at once. It checks every argument:
    number, kind, dtype, shape, contiguity, device, alignment. No rows launch nothing.

    Raises:
        ToolchainError: there is no driver or GPU that can be used.
        BuildError: the kernel has no code for a GPU that is here, or the driver cannot load it;
            when called:
        InputError: an argument does not fit.
        LaunchError: the driver refuses the launch, or there is no memory.
    """
    gpus = driver.opened()
    if gpus.missing or not gpus.handle:
        raise ToolchainError(f"{binary.title}: no GPU can be used here: {gpus.missing}")
    chosen = [image_for(binary, gpus.capability(i)) for i in range(gpus.count)]
    names = sorted({name for name in chosen if name})
    if not names:
        here = ", ".join(sorted({"sm_{}{}".format(*gpus.capability(i)) for i in range(gpus.count)}))
        raise BuildError(
            f"{binary.title} is built for {', '.join(binary.images)}; the GPUs here are {here}."
            " Build it for one of these."
        )
    words, text = packed.pack(binary)
    images = [
        binary.ptx.encode() + b"\0" if name == "ptx" else binary.images[name] for name in names
    ]
    newest = max(map(capability_of, binary.images))
    capabilities = {"ptx": newest} | {arch: capability_of(arch) for arch in binary.images}
    early = [name is not None and capabilities[name] >= _EARLY for name in chosen]
    why = ctypes.create_string_buffer(1024)
    address = driver.library().lntune_program(
        gpus.handle,
        (ctypes.c_int64 * len(words))(*words),
        ctypes.c_int64(len(words)),
        text,
        ctypes.c_int64(len(text)),
        (ctypes.c_char_p * len(images))(*images),
        len(images),
        (ctypes.c_int * gpus.count)(*(names.index(name) if name else -1 for name in chosen)),
        (ctypes.c_int * gpus.count)(*early),
        why,
        len(why),
    )
    if not address:
        which = ", ".join(names)
        tools = f"made by {binary.compiler}, for a driver of CUDA {gpus.release}"
        raise BuildError(
            f"{binary.title} ({which}, {tools}): {why.value.decode(errors='replace')}."
        )
    function = row_counts.with_launches(_wrap()(address), binary.launches)
    _keep.append(function)
    return function


@contextlib.contextmanager
def overlapping() -> Iterator[None]:
    """See Backend.overlapping."""
    overlap = driver.library().lntune_overlap
    before = overlap(-1)
    try:
        overlap(1)  # in here, since a signal's handler may raise as soon as it has returned
        yield
    finally:
        overlap(before)
