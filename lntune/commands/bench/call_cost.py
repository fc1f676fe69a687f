"""`lntune bench --call-cost`: what is spent around a kernel, in one call from Python at one row, in
loading a cached kernel and in importing the package.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lntune import ops, timing
from lntune.case import Case
from lntune.commands.bench import ROUNDS
from lntune.errors import BuildError, InputError, got_expected
from lntune.ops import layer_norm
from lntune.report.costs import FORMS, Costs
from lntune.system import paths
from lntune.torch import dispatch

PROCESSES = 5

_SCRIPT = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
start = time.perf_counter()
import lntune
lntune.layer_norm
imported = time.perf_counter()
import msgspec
from lntune.case import Case
from lntune.torch import dispatch
first, second = msgspec.json.decode(sys.argv[1], type=list[Case])
times = [time.perf_counter()]
kernel = dispatch.kernel_for(first)
times.append(time.perf_counter())
dispatch.kernel_for(second)
times.append(time.perf_counter())
milliseconds = [1e3 * (imported - start), 1e3 * (times[1] - times[0]), 1e3 * (times[2] - times[1])]
facts = {"milliseconds": milliseconds, "kernel": kernel is not None, "tvm": "tvm" in sys.modules}
print(msgspec.json.encode(facts).decode())
"""


class _Fresh(msgspec.Struct):
    milliseconds: tuple[float, float, float]  # importing, the first kernel, the second
    kernel: bool
    tvm: bool


def measure(case: Case, seconds: float, processes: int = PROCESSES) -> Costs:
    """The costs of a case: its calls interleaved for about `seconds`, import and load the medians
    of fresh processes.

    Raises:
        InputError: an operator that is no layer norm.
        BuildError: a fresh process failed.
    """
    import torch

    from lntune.torch.layer_norm import layer_norm as own

    if case.op != layer_norm.NAME:
        remedy = (
            "It is the cost of a call in inference; other operators are benchmarked without it."
        )
        raise InputError(got_expected("--call-cost", case.op, layer_norm.NAME, remedy))
    op = ops.get(case.op)
    given = op.inputs(case, case.rows, "normal", 0)
    contenders: dict[str, Callable[[], Any]] = {}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", dispatch.UntunedWarning)
        for form in FORMS:
            contenders[f"eager {form}"] = _call(torch.nn.functional.layer_norm, given, form)
            contenders[f"tuned {form}"] = _call(own, given, form)
        measured = timing.quietest(lambda: timing.measure(contenders, seconds, rounds=ROUNDS))
        second = msgspec.structs.replace(case, variant=op.checked[0])
        # in the cache from now on
        kernel, _ = dispatch.kernel_for(case), dispatch.kernel_for(second)
    fresh = [_fresh(case, second) for _ in range(processes)]
    ratios = {
        n: timing.ratio(measured.timings[f"eager {n}"], measured.timings[f"tuned {n}"])
        for n in FORMS
    }
    imported, first, loaded = (
        round(statistics.median(f.milliseconds[i] for f in fresh), 3) for i in range(3)
    )
    return Costs(
        case=case,
        call_us={name: timing_.median_us for name, timing_ in measured.timings.items()},
        eager_over_tuned={
            n: None if measured.busy else round(ratio, 4) for n, ratio in ratios.items()
        },
        first_load_ms=None if kernel is None else first,
        load_ms=None if kernel is None else loaded,
        loading_imports_tvm=any(f.tvm for f in fresh),
        import_ms=imported,
        processes=processes,
        busy=bool(measured.busy),
    )


def _call(function: Callable[..., Any], given: Mapping[str, Any], form: str) -> Callable[[], Any]:
    """A layer norm of the operator's inputs, brought into a form."""
    x, hidden = given["x"], given["x"].shape[-1]
    first = 1 if hidden % 2 else 2
    shape = (first, hidden // first) if form == "2-D rows" else (hidden,)
    x = x.unsqueeze(0) if form == "3-D" else x.view(*x.shape[:-1], *shape)
    weight, bias = (
        None if vector is None else vector.view(shape)
        for vector in (given.get("weight"), given.get("bias"))
    )
    eps = float(given["eps"])
    return lambda: function(x, shape, weight, bias, eps)


def _fresh(first: Case, second: Case) -> _Fresh:
    """Import and load in a process that has done nothing but `import torch`."""
    path = os.pathsep.join(
        [str(paths.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-c", _SCRIPT, msgspec.json.encode([first, second]).decode()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise BuildError(
            f"a fresh process could not load the kernel of {first}:"
            f" {done.stderr.strip().splitlines()[-1:]}"
        )
    return msgspec.json.decode(done.stdout, type=_Fresh)
