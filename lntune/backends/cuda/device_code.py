"""CUDA source of scheduled GPU kernels, and how to launch them: what a program is, how it is
stored, and how TVM makes it. The passes between are in lntune/backends/cuda/lowering.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from lntune.backends.cuda import lowering, sizes, source_only
from lntune.errors import BuildError, gist
from lntune.ops.op import ArgRole
from lntune.transforms.gpu import cache_hints, early_start, launch_bounds, pairs, thread_private
from lntune.transforms.strides import CONTIGUOUS

WIDEST = 16
"""Bytes of the widest load or store that kernels are built with."""


class Launch(msgspec.Struct, frozen=True):
    """One kernel of a program. `arguments` are what it takes, in order: names of the operator's,
    and whole numbers as Python expressions in `rows` and row strides (strides.py); `grid` and
    `block` are (x, y, z), such expressions and numbers; `shared` is dynamic shared memory in bytes;
    `steps` are how often the first block goes round each of its loops over rows, expressions too;
    `waits` says that it waits for the kernel before it, on architectures that can begin it earlier
    (lntune/transforms/gpu/early_start.py).
    """

    kernel: str
    arguments: tuple[str, ...]
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    shared: int = 0
    steps: tuple[str, ...] = ()
    waits: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        x, y, z = self.block
        return x * y * z

    def blocks(self, rows: int) -> tuple[int, int, int]:
        """The grid for a number of rows."""
        x, y, z = (sizes.number(size, rows) for size in self.grid)
        return x, y, z

    def total(self, rows: int) -> int:
        """Blocks of the grid for a number of rows."""
        return math.prod(self.blocks(rows))


def _bytes_of(dtype: str) -> int:
    """Bytes of an element: 2 of "bfloat16"."""
    return int(re.sub(r"\D", "", dtype)) // 8


class Scratch(msgspec.Struct, frozen=True):
    """Memory that one kernel of a program leaves for a later one; `shape` is of numbers, or
    expressions in `rows` as in Launch.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str

    def sizes(self, rows: int) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(sizes.number(size, rows) for size in self.shape)

    @property
    def bytes_of_one(self) -> int:
        """Bytes of an element."""
        return _bytes_of(self.dtype)


class Program(msgspec.Struct, frozen=True):
    """CUDA C++ source, and the kernels to launch in order; launches name `scratch` like the
    operator's own arguments.
    """

    source: str
    launches: tuple[Launch, ...]
    scratch: tuple[Scratch, ...] = ()


class Argument(msgspec.Struct, frozen=True):
    """An argument of a built kernel. `shape` is of numbers and "rows"; `stride` is what launches
    call its row stride, or empty where its rows are contiguous.
    """

    name: str
    role: ArgRole
    dtype: str
    shape: tuple[str, ...]
    stride: str = ""


class Binary(msgspec.Struct, frozen=True):
    """A program as it is stored: device code for one or more architectures, and all that is needed
    to check a call and launch it.

    `title` names operator, case and schedule in errors; `vector_width` is the number of elements of
    the widest load or store; `images` is architecture ("sm_90") -> cubin; `ptx` is for GPUs that
    are newer than the last of them; `compiler` is what compiled them.
    """

    title: str
    arguments: tuple[Argument, ...]
    vector_width: int
    launches: tuple[Launch, ...]
    scratch: tuple[Scratch, ...]
    images: dict[str, bytes]
    ptx: str
    compiler: str

    def alignment(self, argument: Argument) -> int:
        """What the address of a tensor must be a multiple of, in bytes; statistics, a number for
        each row, are loaded one by one.
        """
        if argument.role == "scalar":
            return 1
        return min(
            WIDEST,
            (1 if argument.shape[-1:] == ("rows",) else self.vector_width)
            * _bytes_of(argument.dtype),
        )


def _name(name: str) -> str:
    """A parameter's or buffer's name as arguments have it, spelled as in CUDA source."""
    return name.removesuffix("_ptr").replace(".", "_")


class _HostCode:
    """What the host's functions of a lowered program do: the kernels they call, the values they
    give names, what they allocate between the kernels; and the kernels' parameters. `known` are the
    numbers that a call brings.
    """

    def __init__(self, known: Collection[str], host: Iterable[Any], kernels: Iterable[Any]) -> None:
        self.known = known
        self.calls: list[Any] = []
        self.bound: dict[str, Any] = {}
        self.buffers: list[Any] = []
        self.computed: list[str] = []
        """Buffers that the host itself would compute: TVM 0.27's VerifyMemory lets that pass, and
        nobody runs it.
        """
        for function in host:
            self._collect(function)
        self.kernels = {str(kernel.attrs["global_symbol"]): kernel for kernel in kernels}
        self.parameters = {name: self._parameters(kernel) for name, kernel in self.kernels.items()}
        """Of each kernel: (name of a parameter, whether it is a whole number)."""

    def _collect(self, function: Any) -> None:
        import tvm
        import tvm_ffi
        from tvm import tirx

        def visit(call: Any) -> None:
            if isinstance(call.attrs, tirx.CallFFIKernelAttr):
                self.calls.append(call)

        def bind(statement: Any) -> None:
            self.bound[str(statement.var.name)] = statement.value

        def allocate(statement: Any) -> None:
            self.buffers.append(statement.buffer)

        def store(statement: Any) -> None:
            self.computed.append(_name(str(statement.buffer.name)))

        kinds = [
            (tvm.ir.Call, visit),
            (tirx.Bind, bind),
            (tirx.AllocBuffer, allocate),
            (tirx.BufferStore, store),
        ]
        tvm_ffi.structural_walk(function.body, kinds)

    def _parameters(self, kernel: Any) -> list[tuple[str, bool]]:
        named = [(str(p.name), str(p.ty)) for p in kernel.params]
        return [
            (_name(name), "int64" in kind and not name.endswith("_ptr")) for name, kind in named
        ]

    def launches(self) -> tuple[Launch, ...]:
        """The kernels in the order of their launches."""
        return tuple(self._launch(call) for call in self.calls)

    def scratch(self) -> tuple[Scratch, ...]:
        """What the host allocates between the kernels."""
        return tuple(
            Scratch(
                _name(b.name),
                tuple(sizes.text(size, self.known, self.bound) for size in b.shape),
                str(b.dtype),
            )
            for b in self.buffers
        )

    def _launch(self, call: Any) -> Launch:
        """From a call's arguments: the kernel's name, what it takes, and its launch parameters in
        the order of their tags.
        """
        tags = [str(tag) for tag in call.attrs.launch_params]
        name = str(call.args[0].value)
        extents = dict(zip(tags, list(call.args)[-len(tags) :], strict=True))
        grid = tuple(
            (
                sizes.text(extents[tag], self.known, self.bound)
                if (tag := f"blockIdx.{axis}") in extents
                else "1"
            )
            for axis in "xyz"
        )
        block = tuple(
            int(extents[tag]) if (tag := f"threadIdx.{axis}") in extents else 1 for axis in "xyz"
        )
        shared = int(extents.get("tirx.use_dyn_shared_memory", 0))
        given = list(zip(self.parameters[name], list(call.args)[1:], strict=False))
        arguments = tuple(
            sizes.text(value, self.known, self.bound) if whole else parameter
            for (parameter, whole), value in given
        )
        numbers = {parameter: value for (parameter, whole), value in given if whole}
        steps = sizes.of_loops(self.kernels[name], self.known, self.bound | numbers)
        return Launch(name, arguments, grid, block, shared, steps)  # type: ignore[arg-type]


def _with_bfloat16(target: dict[str, object]) -> dict[str, object]:
    """The target, sm_75 as sm_80, which has bfloat16: for sm_75 TVM 0.27 emulates it in code that
    it then cannot write as CUDA, while CUDA's own header converts in software there. `generate`
    moves the guard around that header in TVM's source accordingly.
    """
    return {**target, "arch": "sm_80"} if target.get("arch") == "sm_75" else target


_RELOAD = (
    "#ifdef __CUDACC__\n"
    '#define lntune_reload(pointer) asm volatile("" : "+l"(pointer))'
    " /* to the compiler it is another from here on */\n"
    "#else\n"
    "#define lntune_reload(pointer)\n"
    "#endif\n"
)


_KERNEL = re.compile(
    r"__global__ void __launch_bounds__\(\d+\) (\w+)\(([^{;]*)\) \{.*?^\}$",
    re.DOTALL | re.MULTILINE,
)
_STORE = re.compile(
    r"^( *)\*\(((?:float|uint)[24])\*\)\((\w+_ptr) \+ (.*)\) = (.*);$", re.MULTILINE
)


def _complete(source: str, launches: tuple[Launch, ...], guarded: bool = False) -> str:
    """The source with the macros it uses (see reload.py, pairs.py and early_start.py in
    lntune/transforms/gpu), and with vector stores that nvcc does not split.

    Where stores are `guarded`, as they are where a block has several rows, nvcc 13.0 cuts some of
    these into single elements, unless they are written as calls of __stwb.
    """
    several = {launch.kernel for launch in launches if guarded or launch.block[1] > 1}

    def kernel(match: re.Match[str]) -> str:
        parameters = re.findall(r"(\w+)(?:,|$)", match[2])

        def store(one: re.Match[str]) -> str:
            indent, kind, pointer, offset, value = one.groups()
            return (
                f"{indent}__stwb(({kind}*)({pointer} + {offset}), {value});"
                if pointer in parameters
                else one[0]
            )

        return _STORE.sub(store, match[0]) if match[1] in several else match[0]

    source = _KERNEL.sub(kernel, source)
    for function, macros in (
        ("lntune_reload(", _RELOAD),
        (pairs.SECOND, pairs.SOURCE),
        (f"{early_start.WAIT}(", early_start.SOURCE),
    ):
        source = macros + source if function in source else source
    return source


def generate(module: Any, target: dict[str, object], strides: tuple[str, ...] = ()) -> Program:
    """CUDA source of a scheduled IRModule for a target, as tvm.target.Target takes it; `strides`
    names those of its parameters that are row strides.

    Raises:
        BuildError: TVM cannot compile it.
    """
    import tvm

    goal = tvm.target.Target(_with_bfloat16(target))
    try:
        with (
            source_only.kept(),
            goal,
            tvm.transform.PassContext(disabled_pass=thread_private.passes_to_skip(module)),
        ):
            host, kernels = lowering.lower(module, goal)
            compiled = tvm.get_global_func("target.build.cuda")(kernels, goal)
        source = str(compiled.inspect_source("cuda")).replace(
            "(__CUDA_ARCH__ >= 800)", "(__CUDA_ARCH__ >= 750)"
        )
    except Exception as e:
        raise BuildError(f"TVM failed to compile: {type(e).__name__}: {gist(e)}") from e
    host_code = _HostCode(("rows", *strides), host, kernels.functions.values())
    launches = host_code.launches()
    if not launches or host_code.computed:
        what = ", ".join(host_code.computed) or "all of it"
        left = f"{what}: bind its loops to blockIdx and threadIdx"
        raise BuildError(f"the schedule leaves to the host what only a kernel can compute, {left}.")
    waiting = {kernel[1] for kernel in _KERNEL.finditer(source) if early_start.WAIT in kernel[0]}
    launches = tuple(
        msgspec.structs.replace(launch, waits=launch.kernel in waiting) for launch in launches
    )
    hinted = cache_hints.apply(source, cache_hints.requested(module))
    source = _complete(hinted, launches, CONTIGUOUS in (module["main"].attrs or ()))
    source = launch_bounds.apply(module, source, launches[0].kernel)
    return Program(thread_private.with_launch_bounds(module, source), launches, host_code.scratch())
