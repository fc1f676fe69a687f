"""How a kernel is called from Python with little overhead: one function in C checks the arguments,
allocates outputs and calls the kernel (`direct.c` says how and why).
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lntune.case import Case
from lntune.ops.op import Arg
from lntune.system import exchange, native, paths

SOURCE = paths.PACKAGE / "kernels" / "direct.c"
_DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}
_MAX_ARGUMENTS, _MAX_OUTPUTS, _MAX_DIMS = 24, 8, 2  # as in direct.c
_ROWS, _NORMALIZED = -1, -2


def dtype_number(name: str) -> int:
    """The number that our C has for a dtype."""
    return _DTYPES[name]


def _pointer(record: ctypes.c_void_p | None) -> ctypes.c_void_p:
    """A pointer to a function's address, null without one."""
    return ctypes.c_void_p(None if record is None else ctypes.addressof(record))


@functools.cache
def _library() -> tuple[ctypes.PyDLL, bool]:
    """The compiled C, connected to torch and tvm_ffi, and whether torch's shim was found.

    Raises:
        BuildError: it cannot be compiled, stored or loaded.
        LntuneError: this PyTorch has no DLPack exchange table, or Python runs without the GIL.
    """
    import torch

    table = exchange.require_table()
    library = native.load(SOURCE, ctypes.PyDLL, native.Build(tuple(exchange.includes())))
    functions = exchange.functions(
        "TVMFFIFunctionCall", "TVMFFIErrorMoveFromRaised", "TVMFFIObjectDecRef"
    )
    suffix = "dylib" if sys.platform == "darwin" else "so"
    torch_libraries = [
        os.fsencode(Path(torch.__file__).parent / "lib" / f"lib{name}.{suffix}")
        for name in ("torch_cpu", "torch_python")
    ]
    shim = bool(library.lntune_direct_init(table, *functions, *torch_libraries))
    library.lntune_direct_table.restype = ctypes.py_object
    library.lntune_direct_table.argtypes = [
        ctypes.c_char_p,
        *[ctypes.py_object] * 5,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    library.lntune_counts_take.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.lntune_counts_take.restype = ctypes.c_int64
    library.lntune_counting(int(_counting[0]))
    _loaded.append(library)
    return library, shim


_loaded: list[ctypes.PyDLL] = []
_counting = [False]


class Count(NamedTuple):
    """Calls of one tag and number of rows: how many, how many of them were timed, and their
    nanoseconds.
    """

    tag: int
    rows: int
    calls: int
    timed: int
    ns: int


def count_calls(on: bool) -> None:
    """Count direct calls from now on, or no longer."""
    _counting[0] = on
    for library in _loaded:
        library.lntune_counting(int(on))


def count_function() -> int:
    """The address of the function by which other C++ of ours counts calls; 0 where no call can be
    direct.
    """
    if not _loaded:
        return 0
    return ctypes.cast(_loaded[0].lntune_count, ctypes.c_void_p).value or 0


def take_counts() -> list[Count]:
    """What was counted since this was asked last."""
    counts: list[Count] = []
    for library in _loaded:
        room, found = 0, library.lntune_counts_take(None, 0)
        buffer = (ctypes.c_int64 * 0)()
        while found > room:  # others count meanwhile
            room = 2 * found
            buffer = (ctypes.c_int64 * (room * len(Count._fields)))()
            found = library.lntune_counts_take(buffer, room)
        width = len(Count._fields)
        counts += (Count(*buffer[i * width : (i + 1) * width]) for i in range(found))
    return counts


def has_shim() -> bool:
    """True when torch's C shim makes the outputs; otherwise DLPack does."""
    return _library()[1]


def ensure_library() -> Path:
    """Compile the C if it is not there yet (once per machine); the answer is its file."""
    return native.compiled(SOURCE, native.Build(tuple(exchange.includes())))


class Table:
    """Kernels by what a call looks like: which tensors are there, their dtypes, the hidden size,
    the bit length of the rows.

    `signature` has a letter for each argument of a call: "t" a tensor, "o" a tensor or None, "f" a
    float that is not negative, "n" a normalized_shape. Leading dimensions of the first tensor, a
    "t", are rows, its last is hidden. With a normalized_shape a "t" ends in its dimensions, which
    together are hidden, an "o" has exactly these, and a tensor that is neither is an "s". What a
    call looks like is the same then whether a row has one dimension or several.

    `call(*arguments)` gives the output (several as a tuple), or None and nothing done where no
    kernel is known, an argument is unusual (another device or dtype, a subclass, strided but for
    rows evenly apart, on a GPU not aligned to 16 bytes, negated, requiring gradients while they are
    recorded) or a torch mode, transform or trace wants to see the call; `serves(*arguments)` says
    whether it would serve them if no gradients were recorded. `shim=False` allocates through DLPack
    as if torch's C shim were not there. `record` is the place, empty so far maybe, for the address
    of a function that makes an output part of the autograd graph (`Record` in direct.c).

    Raises:
        BuildError: the C cannot be compiled, stored or loaded.
        LntuneError: this PyTorch has no DLPack exchange table, or Python runs without the GIL.
    """

    def __init__(
        self, signature: str, shim: bool = True, record: ctypes.c_void_p | None = None
    ) -> None:
        import torch

        quiet = (
            # without arguments a GPU's, where PyTorch's layer norm is then another
            torch.is_autocast_enabled,
            torch._C._is_torch_function_mode_enabled,
            torch._C._len_torch_dispatch_stack,
            torch._C._is_tracing,
            torch._C._functorch.peek_interpreter_stack,
        )
        library, shim_found = _library()
        known = (torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled, torch.autograd.forward_ad)
        functions = library.lntune_direct_table(
            signature.encode(), *known, quiet, int(shim and shim_found), _pointer(record)
        )
        self._normalized = "n" in signature
        self.call: Callable[..., Any] = functions[0]
        self.serves: Callable[..., bool] = functions[1]
        self._remember: Callable[..., bool] = functions[2]
        self.forget: Callable[[], None] = functions[3]

    def remember(
        self,
        kernel: Any,
        arguments: Sequence[Arg],
        names: Sequence[str],
        bits: tuple[int, int],
        call: Sequence[Any],
        case: Case,
        recorded: bool = False,
        tag: int = 0,
    ) -> bool:
        """Serve calls like `call` by this kernel when their rows have a bit length of bits[0] to
        bits[1].

        `arguments` are the kernel's, `names` say which of them each argument of a call is. Where
        rows in `call` do not lie one behind the other, it is a kernel that takes them so.
        `recorded`: those whose gradients are recorded, instead of those whose are not. Calls are
        counted under `tag`. False where `call` is itself of the kind that a table does not serve.
        """
        outputs = [a for a in arguments if a.role == "out"]
        order = [
            -1 - outputs.index(a) if a.role == "out" else names.index(a.name) for a in arguments
        ]
        if len(order) > _MAX_ARGUMENTS or len(outputs) > _MAX_OUTPUTS:
            return False
        matrices = sum(1 << i for i, a in enumerate(arguments) if a.shape == arguments[0].shape)
        numbers = [
            0,
            0,
            kernel.__chandle__(),
            tag,
            matrices,
            len(order),
            *order,
            *[0] * (_MAX_ARGUMENTS - len(order)),
            len(outputs),
        ]
        for out in outputs:
            like_first = out.shape == arguments[0].shape
            dims: list[int] = []
            if self._normalized and out.shape == ("hidden",):
                dims = [_NORMALIZED]
            elif not like_first:
                sizes = zip(out.shape, out.sizes(1, case.hidden), strict=True)
                dims = [_ROWS if axis == "rows" else size for axis, size in sizes]
            if len(dims) > _MAX_DIMS:
                return False
            numbers += [_DTYPES[out.dtype], len(dims), *dims, *[0] * (_MAX_DIMS - len(dims))]
        numbers += [0] * (_MAX_OUTPUTS - len(outputs)) * (2 + _MAX_DIMS)
        known = self._remember(struct.pack(f"{len(numbers)}q", *numbers), *bits, recorded, *call)
        if known:
            _kept[kernel.__chandle__()] = kernel
        return known


_kept: dict[int, Any] = {}  # kernels that tables point to
