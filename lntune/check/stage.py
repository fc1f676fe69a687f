"""A kernel's tensors, made once and filled and used again and again: what a kernel remembers of
them by their addresses is out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lntune import ops
from lntune.case import Case
from lntune.check.memory import ALIGNED, POISON, guarded
from lntune.device import Device

if TYPE_CHECKING:
    from lntune.check.memory import Guarded


@dataclass(frozen=True)
class Subject:
    """A kernel to be checked, what it is for, and where its tensors are to be: the arguments of
    check.verify.
    """

    case: Case
    kernel: Callable[..., Any]
    fence: int
    place: str
    device: Device


@dataclass
class Stage:
    """The tensors of a kernel for so many rows, aligned, between guards. `fill` them before a
    call.
    """

    subject: Subject
    rows: int
    tensors: dict[str, Guarded] = field(init=False)
    scalars: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        case, of = self.subject.case, self.subject
        self.arguments = ops.get(case.op).arguments(case)
        self.tensors = {
            a.name: guarded(
                a.sizes(self.rows, case.hidden, case.blocks(of.device)),
                getattr(torch, a.dtype),
                fence=ALIGNED,
                place=of.place,
            )
            for a in self.arguments
            if a.role != "scalar"
        }

    def fill(self, given: Mapping[str, Any]) -> None:
        """Put named inputs into the tensors."""
        for arg in self.arguments:
            if arg.role == "scalar":
                self.scalars[arg.name] = given[arg.name]
            elif arg.role == "in":
                self.tensors[arg.name].view.copy_(given[arg.name])

    def call(
        self, rows: int | None = None, moved: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The outputs, by name, of a call with the first `rows` rows, all where none are given;
        sums over rows that are kept from call to call as what the kernel adds. Outputs begin as
        NaNs. `moved` are tensors to take instead of some.
        """
        import torch

        rows = self.rows if rows is None else rows
        values: list[Any] = []
        outputs: dict[str, Any] = {}
        for arg in self.arguments:
            if arg.role == "scalar":
                values.append(self.scalars[arg.name])
                continue
            view = self.tensors[arg.name].view
            if moved is not None and arg.name in moved:
                view = moved[arg.name]
            if arg.shape[:1] == ("rows",):
                view = view[:rows]
            if arg.role == "out":
                view.view(torch.uint8).fill_(POISON)
                outputs[arg.name] = view
            elif arg.role == "sum":
                view.zero_()
                outputs[arg.name] = view
            values.append(view)
        self.subject.kernel(*values)
        sums = {a.name for a in self.arguments if a.role == "sum"}
        return {n: v.double().sum(0) if n in sums else v for n, v in outputs.items()}

    @property
    def broken(self) -> str:
        """What was written outside of a tensor, empty where nothing was."""
        names = [name for name, tensor in self.tensors.items() if tensor.broken]
        return f"wrote outside {', '.join(names)}" if names else ""
