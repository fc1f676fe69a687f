"""A kernel that begins while the one before it on its stream still runs: what nobody writes
meanwhile is loaded first, then all threads wait until the other has ended.

CUDA calls this programmatic dependent launch (CUDA C++ Programming Guide; PTX
`griddepcontrol.wait`, from sm_90 on). What it hides is the time from the end of one kernel to the
beginning of the next, and the latency of those loads. Whether a kernel begins early is said by who
launches it (lntune/backends/cuda/launcher.c); where it does not, the wait is one instruction that
waits for nothing.

What holds for a kernel here:

- Nothing is stored before the wait, and every block waits, so that a kernel which has ended says
  that those before it have, too.
- What is loaded before it is none of the arguments named here, which a loop over time steps writes
  as it goes (tests/test_early_start.py).
- Accesses stay on their side of the wait. What a kernel never writes nvcc takes for constant, and
  ptxas 13.0 moves such loads (ld.global.nc) across anything: with plain code all of them came
  behind the wait. So all pointers are made others to the compiler right before they are used; of
  what these lead to it knows nothing, and keeps what goes through them in order with the wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune.architectures import ARCHITECTURES
from lntune.device import Device
from lntune.knobs import knob
from lntune.transforms import tir
from lntune.transforms.gpu.row_prefetch import copied

WAIT, IN_ORDER = "lntune_wait", "lntune_in_order"
"""What CUDA source calls: macros, see SOURCE."""
SOURCE = f"""#ifndef __CUDACC__
#define {WAIT}() cudaGridDependencySynchronize()
#define {IN_ORDER}(pointer)
#elif __CUDA_ARCH__ >= 900
#define {WAIT}() asm volatile("griddepcontrol.wait;" : : : "memory")
#define {IN_ORDER}(pointer) \\
  asm volatile("" : "+l"(pointer) : : "memory"); \\
  __builtin_assume(__isGlobal(pointer))
#else
#define {WAIT}()
#define {IN_ORDER}(pointer)
#endif
"""
FIRST = "sm_90"
"""The first architecture on which a kernel can begin early."""


def switch() -> Any:
    """The knob of schedules whose kernels can begin early."""
    return knob(
        True,
        (False, True),
        "the kernel may begin before the matrix product before it has ended, where GPUs have that,"
        " and loads meanwhile what the time loop does not write; only in such a loop does it gain",
        searched=False,
    )


def possible(device: Device) -> bool:
    """Whether kernels can begin early on a GPU."""
    order = list(ARCHITECTURES)
    return order.index(device.isa) >= order.index(FIRST)


def load_first(mod: Any, late: Sequence[str], annotation: str) -> Any:
    """The scheduled module with a wait in its loop over rows, which has the annotation: behind what
    copies arguments to registers, those named `late` excepted, and before all else. What follows
    the loop, which for some blocks may have no turn, has a wait before it, too.

    Raises:
        RuntimeError: there is no such loop, or it copies no other argument.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    func = mod["main"]
    found = False

    def in_order(parts: Sequence[Any]) -> list[Any]:
        """Those statements, which may be moved across nothing of what they follow."""
        used: list[Any] = []

        def collect(block: Any) -> None:
            used.extend(region.source for region in (*block.reads, *block.writes))

        for part in parts:
            tvm_ffi.structural_walk(part, [(SBlock, collect)])
        pointers = [p for p in func.params if any(p.same_as(one) for one in used)]
        return [*(_call(IN_ORDER, p.data) for p in pointers), *parts]

    def is_early(part: Any) -> bool:
        block = copied(part)
        return block is not None and str(block.body.value.source.name) not in late

    def row_loop(loop: Any, mutator: Any) -> Any:
        nonlocal found
        if annotation not in loop.annotations:
            return mutator.default_mutate(loop)
        parts = list(loop.body.seq) if isinstance(loop.body, tirx.SeqStmt) else [loop.body]
        early = [part for part in parts if is_early(part)]
        rest = [part for part in parts if not is_early(part)]
        found = found or bool(early)
        return tir.loop_with(loop, tirx.SeqStmt([*in_order(early), _call(WAIT), *in_order(rest)]))

    def around(sequence: Any, mutator: Any) -> Any:
        parts = [mutator.mutate(part) for part in sequence.seq]
        is_loop = [isinstance(p, tirx.For) and annotation in p.annotations for p in sequence.seq]
        if any(is_loop):
            end = is_loop.index(True) + 1
            parts = [*parts[:end], _call(WAIT), *in_order(parts[end:])]
        return tirx.SeqStmt(parts)

    kinds = [(tirx.For, row_loop), (tirx.SeqStmt, around)]
    body = tvm_ffi.structural_mutate(func.body, kinds)
    if not found:
        raise RuntimeError(f"no loop {annotation} that copies arguments to registers")
    return tir.module_with(mod, body)


def _call(function: str, *arguments: Any) -> Any:
    from tvm import tirx

    return tirx.Evaluate(tirx.call_extern("int32", function, *arguments))
