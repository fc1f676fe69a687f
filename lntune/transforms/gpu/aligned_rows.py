"""Rows that are no whole number of vectors, loaded and stored in whole, aligned ones all the same.

Row r of a matrix begins at element r * hidden, `shift` = (r * hidden) mod width elements behind the
last whole vector of the matrix before it. A thread has vectors of the matrix, not of the row: such
a row lies in at most `columns` elements of them, of which those before the shift and those behind
the row's end are others'. Vectors that are the row's alone are moved whole, the first and the last
element by element, those of the row; elements of others are zeros in registers, and are never
loaded or stored.

A schedule is written for rows of `columns` elements, as `define` makes them of its operator, and
`real` puts the matrices and vectors there are in the place of those. The rows of a block of threads
must all have the shift of its own number: rows are shared out in strides of a multiple of `period`,
or one to a block.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from lntune.case import Case
from lntune.ops.op import RowSum, Term, Total
from lntune.transforms import strides, tir
from lntune.transforms.gpu import threads

EXPECT = "__builtin_expect"
"""What says to a compiler which way a branch goes, so that the other one's code lies apart."""


def needed(hidden: int, width: int) -> bool:
    """Whether rows of `hidden` elements are no whole number of vectors of `width`."""
    return hidden % width != 0


def reason_invalid(case: Case, width: int) -> str | None:
    """Why rows that vectors of `width` do not divide cannot be had in such vectors, or None."""
    if width * case.itemsize < threads.WIDEST_BYTES:
        return f"vectors of {width} elements do not divide a row of {case.hidden}"
    if case.hidden < 2 * width:
        return f"a row of {case.hidden} elements may have no whole vector of {width}"
    return None


def period(hidden: int, width: int) -> int:
    """Every so many rows one begins at the same place in a vector."""
    return width // math.gcd(hidden, width)


def columns(hidden: int, width: int) -> int:
    """Elements of the vectors that a row touches at most; of whole vectors, the row's own."""
    return -(-(hidden + width - math.gcd(hidden, width)) // width) * width


def shift(row: Any, hidden: int, width: int) -> Any:
    """Elements of a row's first vector that are before the row."""
    from tvm import tirx

    return tirx.floormod(row * tirx.IntImm("int64", hidden), tirx.IntImm("int64", width))


def row_sum(hidden: int, width: int) -> RowSum:
    """The RowSum of such rows, as threads.row_sum; elements that are not the row's count as any
    other.
    """

    def sums(rows: Any, _: int, terms: Sequence[Term], name: str) -> list[Total]:
        return threads.row_sum(rows, columns(hidden, width), terms, name)

    return sums


def inside(hidden: int, width: int) -> Term:
    """Whether an element is the row's."""
    return lambda i, k: _inside(k, shift(i, hidden, width), hidden)


def _inside(column: Any, before: Any, hidden: int) -> Any:
    """Whether a column is one of the row's, of which `before` are not; compared as 32 bits, of
    which a row's columns have fewer.
    """
    from tvm import tirx

    column, before = (value.astype("int32") for value in (column, before))
    return tirx.And(column >= before, column < before + tirx.IntImm("int32", hidden))


def real(mod: Any, hidden: int, width: int, repeated: Collection[str] = ()) -> Any:
    """The scheduled module, for rows of `columns` elements, with the operator's own arguments of
    rows and vectors of `hidden`.

    Whatever is loaded of them goes to registers, whatever is stored comes from there, in loops over
    the elements of a vector. Elements that are not the row's are zeros, or in those `repeated` its
    first one.

    Raises:
        RuntimeError: an argument is accessed in another way.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    func = mod["main"]
    wide = columns(hidden, width)
    arguments: dict[Any, Any] = {}
    for old in func.params:
        shape = list(getattr(old.ty, "shape", []))
        if shape and isinstance(shape[-1], tirx.IntImm) and int(shape[-1]) == wide:
            sizes = [*shape[:-1], tirx.IntImm("int64", hidden)]
            arguments[old] = tirx.decl_buffer(sizes, old.dtype, name=str(old.name))
    block: list[Any] = []

    def changed(loop: Any, mutator: Any) -> Any:
        if loop.thread_binding is not None and str(loop.thread_binding.thread_tag) == "blockIdx.x":
            block.append(loop.loop_var)
        if loop.kind == tirx.ForKind.VECTORIZED and (copy := _Copy.of(loop, arguments)):
            again = str(copy.given.name) in repeated
            return copy.moved(shift(block[-1], hidden, width), hidden, width, again)
        return mutator.default_mutate(loop)

    body = tvm_ffi.structural_mutate(func.body, [(tirx.For, changed)])
    accessed: list[Any] = []
    kinds = [
        (tvm.ir.TensorLoad, lambda load: accessed.append(load.source)),
        (tirx.BufferStore, lambda store: accessed.append(store.buffer)),
    ]
    tvm_ffi.structural_walk(body, kinds)
    for argument in accessed:
        if argument in arguments:
            raise RuntimeError(f"{argument.name} is accessed other than in vectors")
    body = tir.with_variables(body, arguments)
    params = [arguments.get(old, old) for old in func.params]
    made = tirx.PrimFunc(params, body, func.ret_type, attrs=func.attrs)
    return tvm.IRModule({"main": made.with_attr(strides.CONTIGUOUS, 1)})


class _Copy:
    """A vectorized loop that copies the elements of a vector between an argument and registers:
    `given` is the argument for rows of whole vectors, `taken` that of the operator.
    """

    def __init__(self, loop: Any, given: Any, taken: Any, indices: Sequence[Any]) -> None:
        self.loop, self.given, self.taken, self.indices = loop, given, taken, list(indices)

    @classmethod
    def of(cls, loop: Any, arguments: dict[Any, Any]) -> _Copy | None:
        """The copy that a loop is of one of the arguments, if it is any."""
        import tvm
        from tvm import tirx

        store = getattr(getattr(loop.body, "block", None), "body", None)
        if not isinstance(store, tirx.BufferStore):
            return None
        if store.buffer in arguments:
            return cls(loop, store.buffer, arguments[store.buffer], store.indices)
        value = store.value
        if isinstance(value, tvm.ir.TensorLoad) and value.source in arguments:
            return cls(loop, value.source, arguments[value.source], value.indices)
        return None

    def moved(self, before: Any, hidden: int, width: int, again: bool) -> Any:
        """The copy of a row with `before` elements of its first vector before it; `again`: with the
        row's first element in the place of others'.
        """
        from tvm import tirx

        def i64(value: int) -> Any:
            return tirx.IntImm("int64", value)

        *row, column = self.indices
        element = [*row, column - before]
        vector = element
        if row:  # a vector of the matrix, and so aligned
            at = tirx.floordiv(row[0] * i64(hidden), i64(width)) * i64(width) + column
            vector = [tirx.floordiv(at, i64(hidden)), tirx.floormod(at, i64(hidden))]
        kind = tirx.ForKind.VECTORIZED if row else tirx.ForKind.UNROLLED
        inside = _inside(column, before, hidden)
        if again:
            element, inside = [*row, tirx.Select(inside, column - before, i64(0))], None
        return tirx.IfThenElse(
            self._whole(before, hidden, width),
            self._with(kind, vector, None),
            tir.with_own_variables(self._with(tirx.ForKind.UNROLLED, element, inside)),
        )

    def _whole(self, before: Any, hidden: int, width: int) -> Any:
        """Whether all elements of the vector are the row's, as of all vectors but two."""
        from tvm import tirx

        realize = self.loop.body
        values = {
            axis.var: value
            for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
        }
        first = tir.with_variables(
            tir.with_variables(self.indices[-1], values), {self.loop.loop_var: self.loop.min}
        )
        first, before = (value.astype("int32") for value in (first, before))
        last = before + tirx.IntImm("int32", hidden - width)
        whole = tirx.And(first >= before, first <= last).astype("int64")
        expected = tirx.call_pure_extern("int64", EXPECT, whole, tirx.IntImm("int64", 1))
        return expected != tirx.IntImm("int64", 0)

    def _with(self, kind: Any, indices: Sequence[Any], inside: Any) -> Any:
        """The loop of another kind, with the operator's argument at `indices`, where `inside`."""
        import tvm
        from tvm import tirx

        realize = self.loop.body
        old, store = realize.block, realize.block.body
        whole = [tvm.ir.Range(0, size) for size in self.taken.shape]
        region = [tirx.BufferRegion(self.taken, whole)]
        if store.buffer.same_as(self.given):
            body: Any = tirx.BufferStore(self.taken, store.value, indices)
            if inside is not None:
                body = tirx.IfThenElse(inside, body, None)
            fresh = tir.block_with(old, body=body, writes=region)
        else:
            value = tirx.BufferLoad(self.taken, indices)
            if inside is not None:
                zero = tirx.const(0, self.taken.dtype)
                value = tirx.if_then_else(inside, value, zero)
            body = tirx.BufferStore(store.buffer, value, store.indices)
            fresh = tir.block_with(old, body=body, reads=region)
        return type(self.loop)(
            self.loop.loop_var,
            self.loop.min,
            self.loop.extent,
            kind,
            type(realize)(realize.iter_values, realize.predicate, fresh),
        )
