"""Digests of the code that schedules make, by which tests see whether a version had to be
raised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from lntune import knobs
from lntune.backends import device_of
from lntune.backends.cuda import device_code, lowering
from lntune.backends.cuda.program import target as target_of
from lntune.case import Case
from lntune.device import Device
from lntune.kernels import compiler
from lntune.schedule import Schedule
from lntune.transforms.cpu import polynomials
from lntune.transforms.gpu import thread_private

_CPU = Device("cpu", "golden", "x86-64-v4", 8, l2=1 << 20, l3=32 << 20)
DEVICES = {
    "cpu": (_CPU, msgspec.structs.replace(_CPU, isa="x86-64-v3", cores=2)),
    "gpu": (device_of("cuda:sm_90"), device_of("cuda:sm_80")),
}
"""For each kind: what schedules are asked for, and one more for a look at what depends on the
device.
"""

_BINDINGS = (
    re.compile(r"^\s*for ([\w, ]+) in ", re.MULTILINE),
    re.compile(r"^\s*([\w, ]+?)(?:: [^=\n]+)? = ", re.MULTILINE),
    re.compile(r"\b(\w+): T\."),
    re.compile(r"\bas ([\w, ]+):$", re.MULTILINE),
)
_ALLOCATION = re.compile(r"^\s*\w+ = T\.\w*(?:alloc|decl)\w*\(.*\n", re.MULTILINE)
_NAMED = re.compile(r'(T\.sblock\(|"global_symbol": |T\.\w*call_\w*packed\w*\()"\w+"')


def normalized(script: str) -> str:
    """TVMScript of a module without what does not change its code: names, the order of its
    functions and of what they allocate.
    """
    functions = re.split(r"(?=^ *@T\.prim_func)", script, flags=re.MULTILINE)[1:]
    return "\n".join(sorted(map(_function, functions)))


def _function(text: str) -> str:
    text = re.sub(r"\s*#.*", "", text)
    text = _NAMED.sub(lambda m: m[1], text)
    text = re.sub(r"def \w+\(", "def f(", text)
    bound = {
        name.strip()
        for pattern in _BINDINGS
        for match in pattern.findall(text)
        for name in match.split(",")
    } | {"rows"}
    numbers: dict[str, str] = {}

    def renamed(part: str) -> str:
        return re.sub(
            r"(?<![\w.\"])[A-Za-z_]\w*",
            lambda m: numbers.setdefault(m[0], f"v{len(numbers)}") if m[0] in bound else m[0],
            part,
        )

    body = renamed(_ALLOCATION.sub("", text))
    return body + "".join(
        sorted(renamed(line).strip() + "\n" for line in _ALLOCATION.findall(text))
    )


def digest(text: str) -> str:
    """Of any text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of(plan: Schedule, case: Case, setting: Any, device: Device) -> str:
    """The digest of one kernel, before TVM's code generator."""
    module = compiler.scheduled(case, plan, setting, device)
    if device.kind == "cpu":
        module = polynomials.expanded(module, once=False)
        return digest(normalized(str(module.script())))
    import tvm

    goal = tvm.target.Target(device_code._with_bfloat16(target_of(device)))
    with goal, tvm.transform.PassContext(disabled_pass=thread_private.passes_to_skip(module)):
        host, kernels = lowering.lower(module, goal)
    asked = [
        str(module["main"].attrs[name])
        for name in sorted(map(str, module["main"].attrs.keys()))
        if name.startswith("lntune_")
    ]
    return digest(
        "\n".join(
            [
                *asked,
                *sorted(normalized(str(f.script())) for f in host),
                normalized(str(kernels.script())),
            ]
        )
    )


def spread(plan: Schedule, every: bool = True) -> Iterator[tuple[str, Case, Any, Device]]:
    """(label, case, knobs, device) of the kernels that are compared: every dtype, short and ragged
    rows, few and many of them, another device, and of the middle of these as many settings as it
    takes to have every value of every knob that fits it. Where not `every` one is asked for, of
    those settings that bring a single new value, a further number of threads mostly, only the last.
    """
    here, other = DEVICES[plan.kind]
    middle = Case(plan.op, 1024, "bfloat16", 512)
    cases = [
        (middle, here),
        (Case(plan.op, 1024, "float32", 4096), other),
        (Case(plan.op, 100, "float16", 512), here),
    ]
    cases += [(Case(plan.op, 1000, "float32", 1), here)]
    # which take seconds each
    for case, device in cases if plan.op != "lnlstm_step_backward" else cases[:2]:
        setting = plan.default(case, device)
        if plan.valid(setting, case, device) is None:
            yield f"{case} default {device.isa}", case, setting, device
    odd = Case(plan.op, 1003, "bfloat16", 512)  # rows that vectors do not divide
    for setting in (
        plan.first(odd, here)[:1] if plan.kind == "gpu" and plan.op.startswith("layer_norm") else ()
    ):
        yield f"{odd} {knobs.describe(setting)} {here.isa}", odd, setting, here
    settings = plan.space(middle, here)
    fresh = {id(setting): set(knobs.to_dict(setting).items()) for setting in settings}
    chosen: list[tuple[Any, int]] = []
    while new := fresh[id(one := max(settings, key=lambda s: len(fresh[id(s)])))]:
        chosen.append((one, len(new)))
        fresh = {number: values - new for number, values in fresh.items()}
    for number, (setting, values) in enumerate(chosen):
        if every or values > 1 or number == len(chosen) - 1:
            yield f"{middle} {knobs.describe(setting)}", middle, setting, here
