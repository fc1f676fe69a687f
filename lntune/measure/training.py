"""A step of training as a user makes it: a public call with gradients recorded, and its backward by
autograd. It costs more than both kernels alone: statistics are kept, a node of autograd's graph is
made, and gradients are handed on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from lntune import backends, ops
from lntune.backends.backend import Call, Kernel
from lntune.case import Case
from lntune.device import Device

WARM_UP = 3
"""Steps before the first that is timed: the first ones find out what serves them, and make it known
to direct calls and to the node of autograd's graph.
"""


def passes(backward: Case) -> tuple[Case, Case]:
    """The forward and the backward of a step of training with the gradients of all inputs, as calls
    name them; for a case of an operator that is the backward of another.
    """
    forward = ops.forward_of(backward.op)
    assert forward is not None
    return (
        msgspec.structs.replace(backward, op=forward.name, variant=forward.training),
        msgspec.structs.replace(backward, variant=ops.get(backward.op).variants[0]),
    )


def is_timed(case: Case, device: Device) -> bool:
    """Whether the final of a case is followed by steps of training: it is the backward of another
    operator, with the gradients of all inputs, on a device where the price of a call counts. On a
    GPU a step is a matter of when its kernels are launched, which says nothing of a whole model's;
    and a single one of a sequence's steps costs many times what each of its many does.
    """
    return (
        ops.forward_of(case.op) is not None
        and not ops.get(case.op).in_sequences
        and case.variant in ("", ops.get(case.op).variants[0])
        and backends.of(device).calls_directly
    )


@contextlib.contextmanager
def steps(
    backward: Case, device: Device, kernels: Mapping[Case, Kernel], seed: int = 0
) -> Iterator[dict[str, Sequence[Call]]]:
    """The contenders "tuned" and "eager", to be called in the block, in which `kernels` serve the
    cases of `passes`: each call is a step with the gradients of all inputs.
    """
    from lntune.torch import bound_call, dispatch

    backend = backends.of(device)
    case = msgspec.structs.replace(passes(backward)[0], variant="")
    copies = backend.inputs(case, device, seed)
    with dispatch.serving(kernels, device):
        contenders: dict[str, Sequence[Call]] = {
            "tuned": [_step(functools.partial(bound_call, case), given) for given in copies],
            "eager": [
                _step(functools.partial(backend.baseline, device, case), given) for given in copies
            ],
        }
        for calls in contenders.values():
            for _ in range(WARM_UP):
                for call in calls:
                    call()
        yield contenders


def _step(bind: Callable[[Mapping[str, Any]], Call], given: Mapping[str, Any]) -> Call:
    """A forward and a backward of the call that `bind` makes of named inputs, with the gradients of
    all that are tensors.
    """
    import torch

    own = {
        name: value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    call = bind(own)
    leaves = [value for value in own.values() if isinstance(value, torch.Tensor)]
    outputs = call()
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return lambda: torch.autograd.grad(call(), leaves, grads)
