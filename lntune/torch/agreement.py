"""Whether the processes of a training run call the same kernels: `lntune.choices_digest`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lntune.errors import DisagreementError, InputError, got_expected
from lntune.torch import dispatch

_SHOWN = 3
"""Cases that an error names."""


def choices_digest(compare: bool = False, group: Any = None) -> str:
    """What serves the cases that calls of this process have met so far, as 16 hexadecimal digits:
    those of two processes are the same where the same cases are served by the same kernels.

    Args:
        compare: hold it against the other processes of a group of torch.distributed, all of which
            have to call this then. Cases that one process met and another did not are no matter.
        group: of torch.distributed; the default one for None.

    Raises:
        DisagreementError: a case is served by different kernels, in all processes of the group.
        InputError: `compare`, and torch.distributed is not initialized.
    """
    own = dispatch.served()
    if compare:
        _ensure_alike(own, group)
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def _ensure_alike(own: dict[str, str], group: Any) -> None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        got = "True without a group of processes"
        remedy = "Call torch.distributed.init_process_group first."
        raise InputError(got_expected("compare", got, "torch.distributed initialized", remedy))
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, own, group)
    different = []
    for case in sorted(set().union(*everyone)):
        ways: dict[str, list[int]] = {}
        for rank, served in enumerate(everyone):
            if case in served:
                ways.setdefault(served[case], []).append(rank)
        if len(ways) > 1:
            sides = ", ".join(f"{way} on rank {_ranks(ranks)}" for way, ranks in ways.items())
            different.append(f"{case}: {sides}")
    if different:
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise DisagreementError(
            f"processes call different kernels: {'; '.join(different[:_SHOWN])}{more}. Give all of"
            " them the same tuning logs (LNTUNE_LOG_DIR), or one bundle (lntune.load)."
        )


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
