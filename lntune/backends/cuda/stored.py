"""A kernel for GPUs as it is stored in a file: device code for one or more architectures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from lntune import knobs as knobs_module
from lntune import ops
from lntune.architectures import ARCHITECTURES, architecture
from lntune.backends import cuda
from lntune.backends.backend import Scheduled
from lntune.backends.cuda import device_code
from lntune.backends.cuda.device_code import Binary, Program
from lntune.case import Case
from lntune.system import sealed
from lntune.system.sealed import DamagedError, Facts
from lntune.transforms import strides


def vector_width(knobs: Any) -> int:
    """Elements of the widest load or store of a kernel, by its knobs."""
    return int(knobs_module.to_dict(knobs).get("vector_width", device_code.WIDEST))


def widest(knobs: Any, case: Case) -> int:
    """Elements that an access to rows that lie anywhere may have, see Backend.widest."""
    return min(vector_width(knobs), device_code.WIDEST // case.itemsize)


def binary(scheduled: Scheduled, program: Program, archs: Sequence[str] = ()) -> Binary:
    """A program with device code for each of `archs`, or for the device's own alone.

    Raises:
        BuildError: the CUDA compiler refuses it; ToolchainError: there is none.
        UnknownNameError: there is no such architecture.
    """
    wanted = {architecture(arch).name for arch in archs or (scheduled.device.isa,)}
    compiled = {
        arch: cuda.to_cubin(program.source, arch)
        for arch in sorted(wanted, key=list(ARCHITECTURES).index)
    }
    images = {arch: one.cubin for arch, one in compiled.items()}
    return described(scheduled, program, images, list(compiled.values())[-1].ptx, cuda.identity())


def described(
    scheduled: Scheduled, program: Program, images: dict[str, bytes], ptx: str, compiler: str
) -> Binary:
    """Device code with what is needed to check a call and launch it."""
    case, device = scheduled.case, scheduled.device
    arguments = ops.get(case.op).arguments(case)
    free = strides.names(arguments) if scheduled.strided else {}
    blocks = case.blocks(device)

    def shape(argument: ops.Arg) -> tuple[str, ...]:
        sizes = zip(argument.shape, argument.sizes(0, case.hidden, blocks), strict=True)
        return tuple("rows" if axis == "rows" else str(size) for axis, size in sizes)

    variant = f", {case.variant}" if case.variant else ""
    name = scheduled.schedule.name
    return Binary(
        title=f"{case.op} of hidden size {case.hidden}, {case.dtype}{variant} ({name})",
        arguments=tuple(
            device_code.Argument(a.name, a.role, a.dtype, shape(a), free.get(a.name, ""))
            for a in arguments
        ),
        vector_width=vector_width(scheduled.knobs),
        launches=program.launches,
        scratch=program.scratch,
        images=images,
        ptx=ptx,
        compiler=compiler,
    )


def write(path: Path, binary: Binary) -> Facts:
    """Put a kernel into a new file; the answer is what is to be kept with it."""
    path.write_bytes(msgspec.msgpack.encode(binary))
    return {"compiler": binary.compiler}


def read(path: Path) -> Binary:
    """A stored kernel.

    Raises:
        DamagedError: the file is missing, damaged, or of another release of lntune.
    """
    try:
        return msgspec.msgpack.decode(sealed.read(path).content, type=Binary)
    except DamagedError as e:
        raise DamagedError(f"cannot load the kernel {e}") from e
    except (OSError, msgspec.MsgspecError) as e:
        raise DamagedError(f"cannot load the kernel {path}: {e}") from e


def architectures(path: Path) -> set[str]:
    """What a stored kernel has code for; nothing where there is none, or a damaged one."""
    try:
        return set(read(path).images)
    except DamagedError:
        return set()
