"""NVIDIA's GPUs: CUDA source is compiled, inspected, stored, loaded, launched and timed.

On the way of a kernel: `program` asks `lowering` and `device_code` for CUDA source and its
launches; `compiler` makes machine code of it by `nvcc` or `nvrtc`, which `locate` finds; `stored`
writes and reads the file; `launcher` hands it, as `packed` numbers, to launcher.c, which asks the
`driver`; `timing` times calls by events and graphs (`capture`, `nvml`). What is known of machine
code without a GPU: `resources`, `sass`, `ptx`, `code`, `occupancy`. `targets` are GPUs by name.
"""

from __future__ import annotations

import msgspec

from lntune.architectures import ARCHITECTURES, Architecture, architecture
from lntune.backends.cuda import ptx, resources, sass
from lntune.backends.cuda.code import Code, Work
from lntune.backends.cuda.compiler import Compiled, available, find, identity, stamp, to_cubin
from lntune.backends.cuda.occupancy import Occupancy, occupancy
from lntune.backends.cuda.resources import Resources
from lntune.errors import BuildError, InputError, got_expected, unknown

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Code",
    "Compiled",
    "Inspection",
    "Occupancy",
    "Resources",
    "Work",
    "architecture",
    "available",
    "identity",
    "inspect_kernel",
    "stamp",
    "to_cubin",
]


class Inspection(msgspec.Struct, frozen=True):
    """One kernel as compiled for one architecture and launched with `threads` a block; JSON by
    msgspec.
    """

    kernel: str
    arch: str
    threads: int
    dynamic_shared: int
    compiler: str
    resources: Resources
    code: Code
    occupancy: Occupancy
    depths: tuple[Work, ...] = ()
    """As of `code`, but always read from PTX, so that what is reckoned from it is the same on
    machines with a disassembler and without."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What a good kernel has none of, one sentence each: spills, a stack frame, shuffles that
        a part of a warp reaches alone, no room to run.
        """
        used = self.resources
        sentences = []
        if spilled := used.spilled_bytes:
            sentences.append(f"spills {spilled} bytes")
        if used.stack_bytes:
            sentences.append(f"has a stack frame of {used.stack_bytes} bytes")
        if self.code.divergent_shuffles:
            sentences.append(f"reaches {self.code.divergent_shuffles} shuffles in divergent code")
        if self.occupancy.refused:
            sentences.append(f"zero occupancy: {self.occupancy.refused}")
        return tuple(sentences)


def inspect_kernel(
    source: str,
    arch: str,
    threads: int,
    dynamic_shared: int = 0,
    kernel: str | None = None,
    machine: bool = True,
) -> Inspection:
    """Compile a CUDA C++ source for an architecture such as "sm_90" and gather what is known of its
    kernel without running it.

    `threads` and `dynamic_shared` are what a block is launched with; `kernel` is needed if the
    source has several. Instructions are counted in the machine code, where there is a disassembler,
    or with `machine` false in the PTX, which takes no time.

    Raises:
        UnknownNameError: there is no such architecture, or no such kernel in the source.
        ToolchainError: there is no CUDA compiler.
        BuildError: the source does not compile, or has no kernel.
        InputError: `threads` or `dynamic_shared` is no possible number, or the source has several
            kernels and none is named.
    """
    compiled = to_cubin(source, arch)
    known = resources.parse(compiled.log)
    if not known:
        raise BuildError(
            f"the source compiles for {arch}, but ptxas reports no kernel in it; expected one"
            " __global__ function."
        )
    if kernel is None and len(known) > 1:
        raise InputError(
            got_expected("kernel", "none", f"one of the source's {len(known)}: {', '.join(known)}")
        )
    name = kernel or next(iter(known))
    if name not in known:
        raise unknown("kernel", name, known)
    used = known[name]
    codes, reason = sass.disassemble(compiled.cubin) if machine else ({}, "quicker")
    virtual = ptx.parse(compiled.ptx, reason)
    codes = codes if name in codes else virtual
    if name not in codes or name not in virtual:
        raise BuildError(
            f"neither the machine code nor the PTX of {name} for {arch} can be read"
            f" ({reason or 'it is not in them'})."
        )
    room = occupancy(
        arch, used.registers, threads, used.shared_bytes, dynamic_shared, used.barriers
    )
    return Inspection(
        name,
        arch,
        threads,
        dynamic_shared,
        find().identity,
        used,
        codes[name],
        room,
        virtual[name].depths,
    )
