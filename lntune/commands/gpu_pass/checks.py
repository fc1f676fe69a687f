"""Whether a kernel that was built beforehand is right on a GPU: against float64 on several numbers
of rows, and the same bits from another stream and from a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune import backends, check, ops
from lntune.backends.cuda import timing as gpu_timing
from lntune.backends.cuda.timing import Gpu
from lntune.case import Case
from lntune.check import Verdict
from lntune.device import Device
from lntune.errors import BuildError
from lntune.kernels import cache
from lntune.measure.jobs import Candidate


def load(case: Case, candidate: Candidate, device: Device) -> Any:
    """A kernel from the cache.

    Raises:
        BuildError: it is not there, nor can it be built.
    """
    chosen, setting = candidate.resolved(case.op)
    path = cache.path_of(case, chosen, setting, device)
    try:
        return cache.kernel(case, chosen, setting, device)
    except BuildError as e:
        if path.is_file():
            raise
        remedy = "Build it beforehand: lntune build --gpu-pass."
        raise BuildError(f"{case}: its kernel is not in the cache. {remedy} ({e})") from e


def clock_of(device: Device) -> Gpu:
    """What records and times work on a GPU."""
    place = backends.of(device).torch_device(device)
    return gpu_timing.Cuda(int(place.partition(":")[2] or 0))


def arguments(case: Case, given: dict[str, Any], rows: int, device: Device) -> dict[str, Any]:
    """A kernel's arguments by name on its device: inputs, outputs full of NaN, sums of zeros."""
    import torch

    place = backends.of(device).torch_device(device)
    values: dict[str, Any] = {}
    for a in ops.get(case.op).arguments(case):
        if a.role in ("out", "sum"):
            sizes = a.sizes(rows, case.hidden, case.blocks(device))
            fill = torch.nan if a.role == "out" else 0.0
            values[a.name] = torch.full(sizes, fill, dtype=getattr(torch, a.dtype), device=place)
        else:
            value = given[a.name]
            values[a.name] = value.to(place) if isinstance(value, torch.Tensor) else value
    return values


def against_float64(case: Case, kernel: Any, rows: Sequence[int], device: Device) -> Verdict:
    """A kernel checked on its device as any candidate is, and on these numbers of rows."""
    backend = backends.of(device)
    place = backend.torch_device(device)
    more = sorted({*backend.more_rows(case, device, kernel), *rows})
    return check.verify(case, kernel, backend.fence, place, device, more)


def elsewhere(case: Case, kernel: Any, rows: int, device: Device) -> list[str]:
    """The names of outputs that another stream, or a graph, gives in other bits than a plain call;
    "stream: dx", "graph: dx".
    """
    import torch

    given = ops.get(case.op).inputs(case, rows, "normal", 0)
    plain, streamed, replayed = (arguments(case, given, rows, device) for _ in range(3))
    kernel(*plain.values())
    gpu = clock_of(device)
    gpu.wait()
    with gpu.active():
        kernel(*streamed.values())
        replay = gpu.capture(lambda: kernel(*replayed.values()))
        fills = {
            a.name: torch.nan if a.role == "out" else 0.0
            for a in ops.get(case.op).arguments(case)
            if a.role in ("out", "sum")
        }
        for name, fill in fills.items():
            replayed[name].fill_(fill)
        replay()
    gpu.wait()
    return [
        f"{how}: {name}"
        for how, values in (("stream", streamed), ("graph", replayed))
        for name in fills
        if not torch.equal(values[name].view(torch.uint8), plain[name].view(torch.uint8))
    ]
