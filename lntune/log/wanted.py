"""Which cases of a log are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lntune import ops as operators
from lntune.case import Case, bucket_of
from lntune.errors import InputError, got_expected


class Wanted(NamedTuple):
    """Cases of these operators, hidden sizes, dtypes and numbers of rows, of all where none are
    given; rows stand for their buckets. `device` is a part of the name of a device's folder.
    """

    ops: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    device: str = ""

    @classmethod
    def of(
        cls,
        ops: str | Iterable[str] = (),
        hidden: int | Iterable[int] = (),
        dtypes: Any = (),
        rows: int | Iterable[int] = (),
        device: str = "",
    ) -> Wanted:
        """What somebody asks for: one value or several of each; dtypes by any of their names, or as
        PyTorch has them. An empty string is none.

        Raises:
            UnknownNameError: there is no such operator or dtype.
            InputError: no kernel is built for that dtype or hidden size, or there are no rows.
        """
        single = isinstance(dtypes, str) or not isinstance(dtypes, Iterable)
        names = [str(one) for one in ((dtypes,) if single else dtypes)]
        sizes = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        counts = (rows,) if isinstance(rows, int) else tuple(rows)
        if any(count < 1 for count in counts):
            raise InputError(got_expected("rows", min(counts), "numbers of rows from 1 on"))
        return cls(
            tuple(operators.get(op).name for op in ((ops,) if isinstance(ops, str) else ops) if op),
            tuple(Case("", size, "float32", 1).hidden for size in sizes),
            tuple(Case("", 1, name, 1).dtype for name in names if name),
            counts,
            device,
        )

    def takes(self, case: Case) -> bool:
        """Whether a case is among them."""
        return (
            (not self.ops or case.op in self.ops)
            and (not self.hidden or case.hidden in self.hidden)
            and (not self.dtypes or case.dtype in self.dtypes)
            and (not self.rows or case.bucket in map(bucket_of, self.rows))
        )

    @property
    def narrowed(self) -> bool:
        """Whether some cases of a device are left out."""
        return self[:4] != ((),) * 4

    @property
    def op(self) -> str | None:
        """The only operator that is asked for, None where there are several."""
        return self.ops[0] if len(self.ops) == 1 else None


ALL = Wanted()
