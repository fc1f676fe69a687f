"""Where a kernel's tensors lie: each is moved in turn, so that it is aligned otherwise than all
others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lntune.check import problems
from lntune.check.judging import judge
from lntune.check.memory import ALIGNED
from lntune.check.rows import same
from lntune.check.stage import Stage, Subject

if TYPE_CHECKING:
    import torch

ROWS = 3
BOUNDARY = 64
"""Bytes of a cache line, and of the widest vector."""
OFF, OFF_ALIGNED = (2, 4, 8, 16, 32, 48), (16, 32, 48)
"""Bytes behind a boundary at which a tensor begins; the latter for kernels that ask for whole
accesses of 16 bytes.
"""


def _moved(tensor: torch.Tensor, off: int) -> torch.Tensor:
    """A copy that begins so many bytes behind a boundary."""
    import torch

    size = tensor.numel() * tensor.element_size()
    room = torch.empty(size + 2 * BOUNDARY, dtype=torch.uint8, device=tensor.device)
    start = -room.data_ptr() % BOUNDARY + off
    copied = room[start : start + size].view(tensor.dtype).view(tensor.shape)
    return copied.copy_(tensor)


def wrong(subject: Subject) -> str:
    """What is wrong with a kernel that has one tensor off a boundary, or all but one; empty where
    nothing is.

    Raises:
        Exception: whatever the kernel itself raised.
    """
    problem = problems.of_rows(subject.case, ROWS, subject.place)
    stage = Stage(subject, problem.rows)
    stage.fill(problem.given)
    offsets = OFF_ALIGNED if subject.fence == ALIGNED else OFF
    outputs = stage.call()
    plain = {name: out.clone() for name, out in outputs.items()}
    message, _, _ = judge(outputs, problem)
    if message:
        return message

    def said(moved: dict[str, torch.Tensor], how: str) -> str:
        """What is wrong where some tensors are elsewhere."""
        outputs = stage.call(moved=moved)
        if all(same(out, plain[name]) for name, out in outputs.items()):
            return ""
        message, _, _ = judge(outputs, problem)
        return f"{message} {how}" if message else ""

    views = {name: tensor.view for name, tensor in stage.tensors.items()}
    every = {n: _moved(v, max(offsets[0], v.element_size())) for n, v in views.items()}
    for name, view in views.items():
        for off in offsets:
            if off % view.element_size() == 0:
                how = f"with {name} {off} bytes off a boundary of {BOUNDARY}"
                if message := said({name: _moved(view, off)}, how):
                    return message
        others = {n: v for n, v in every.items() if n != name}
        if message := said(others, f"with all but {name} off a boundary of {BOUNDARY} bytes"):
            return message
    return said(every, f"with all tensors off a boundary of {BOUNDARY} bytes")
