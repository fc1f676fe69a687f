"""What code a schedule's name stands for: three numbers that are raised when it changes, kept with
every record and cached kernel.

A number says more than a hash: which of two records is older, and that moving, renaming and
rewording change nothing. That the numbers are honest is held by tests/test_versions.py, which
compares digests of the code that schedules make with committed ones.
"""

from __future__ import annotations

import msgspec

from lntune import bounds

LOWERING = {"cpu": 1, "gpu": 2}
"""For each kind of device the version of what every scheduled module of its goes through on the way
to machine code: transformations that schedules share, passes, edits of LLVM IR and CUDA source.
Raised where a change of them changes the code of kernels.
"""


class Code(msgspec.Struct, frozen=True):
    """What a kernel's code was made by. Two kernels of one schedule, case, knobs and target whose
    `Code` is equal are the same.

    `schedule` is the version that a schedule declares, or the hash of its file where it declares
    none; `op` that of the operator's definition; `lowering` that of LOWERING. 0 stands for what is
    not known, and for PyTorch's operators.
    """

    schedule: bounds.Whole | bounds.Name = 0
    op: bounds.Whole = 0
    lowering: bounds.Whole = 0


_FIRST = Code(1, 1, 1)
_EARLIER = dict.fromkeys(
    (
        "01b7e0bcf590",  # cached_rows, widened_rows
        "05496553555b",  # blocked_rows
        "96e8db4fe0ca",  # fused_step
        "6c582fc2f175",  # blocked_step
        "2718dfc9ddc9",  # shared_row
        "980d16dd4848",  # shared_row_backward
        "bc85a53e028a",  # gated_row
        "cd16b70c7cd1",  # gated_row_backward
    ),
    _FIRST,
)


def of_hash(source: str) -> Code:
    """The versions that a hash of source files stood for, by which records were told apart before
    schema 3.
    """
    return _EARLIER.get(source, Code())
