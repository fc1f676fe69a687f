"""`lntune.explain`: which kernel serves calls of an operator, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from lntune import knobs as knobs_module
from lntune import ops
from lntune.backends import DEFAULT, device_of, option
from lntune.case import MAX_HIDDEN, Case, bucket_label, dtype_name
from lntune.device import Device
from lntune.log.select import Choice, Tier
from lntune.torch import dispatch, first_check
from lntune.torch.support import NO_ROWS, size_support

SERVED_BY: dict[Tier, str] = {
    "exact": "its own record",
    "bucket": "a record of another row bucket",
    "near": "the record of a nearby hidden size",
    "default": "the schedule's default knobs (not measured here)",
    "eager": "eager mode",
}
"""Tier of a choice -> what serves, in words."""


class Other(msgspec.Struct, frozen=True, kw_only=True):
    """Another kernel that calls of a case get, and that was checked on this machine: for another
    variant, or for matrices whose rows lie apart (`strided`). `wrong` says what was found wrong,
    where something was: of this kernel if it is not `right`, else of those that it serves in place
    of.
    """

    variant: str
    strided: bool
    schedule: str
    knobs: dict[str, knobs_module.Value]
    right: bool
    wrong: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Which it is, in words."""
        return f"{self.variant}{', rows apart' if self.strided else ''}"


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What serves a case on a device, and how it came to that. `str` of it is the text of `lntune
    why`.

    `schedule` and `knobs` are the kernel's (empty for eager mode), `steps` what was looked at, in
    order; `others` are kernels that other calls of these sizes get; `tuned_us` and `eager_us` are
    the medians, in microseconds, of the record that it rests on, `stale` and `disturbed` say what
    speaks against that record. `training` says what serves calls of which gradients are asked, and
    why, where that is something else. `command` tunes the case or measures it again, where that is
    of use; `foreign` are the devices whose records cannot be used, and in what they differ.
    `bundle` is the folder of the bundle that decides, empty where the logs do.
    """

    case: dict[str, Any]
    device: str
    tier: Tier
    schedule: str = ""
    knobs: dict[str, knobs_module.Value] = {}
    steps: tuple[str, ...] = ()
    tuned_us: float | None = None
    eager_us: float | None = None
    stale: bool = False
    disturbed: bool = False
    training: str = ""
    others: tuple[Other, ...] = ()
    command: str = ""
    foreign: dict[str, str] = {}
    bundle: str = ""

    @property
    def title(self) -> str:
        """The case, in words."""
        return (
            f"{self.case['op']} hidden {self.case['hidden']} {self.case['dtype']} rows"
            f" {self.case['rows']}{self.device and f' on {self.device}'}"
        )

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What `str` of it says, in lines, see `told`."""
        return self.told()

    def told(self, every: bool = False) -> list[tuple[str, str]]:
        """What serves, how it came to that and what tunes it, in lines: what stands before a
        sentence, and the sentence. `every`: also of each device whose records are not used.
        """
        again = "measure it again" if self.stale or self.disturbed else "tune it"
        kernel = (
            [("  ", f"{self.schedule} {knobs_module.describe(self.knobs)}")]
            if self.schedule
            else []
        )
        return [
            (f"{self.title}: ", f"served by {SERVED_BY[self.tier]}{self._shipped}"),
            *kernel,
            *(("  - ", step) for step in self.steps),
            *([("  in training: ", self.training)] if self.training else []),
            *self._of_others(),
            *((f"  - not used: {slug}: ", why) for slug, why in self.foreign.items() if every),
            *([(f"  {again}: ", self.command)] if self.command else []),
        ]

    @property
    def _shipped(self) -> str:
        return f", out of the bundle {self.bundle}" if self.bundle else ""

    def _of_others(self) -> list[tuple[str, str]]:
        right = "; ".join(other.name for other in self.others if other.right)
        found = [("  - ", f"found right, too: {right}")] if right else []
        for other in self.others:
            found += [("  - ", f"{other.name}: {wrong}") for wrong in other.wrong]
        return found

    def __str__(self) -> str:
        return "\n".join(lead + sentence for lead, sentence in self.lines)


def explain(
    op: str, hidden: int, dtype: Any = "float32", rows: int = 1, target: str = DEFAULT
) -> Explanation:
    """Which kernel serves calls of an operator, and why: decided on the tuning logs, as a call
    decides it.

    Args:
        op: such as "layer_norm"; `lntune ops` lists them.
        hidden: elements of a row.
        dtype: of the input: a torch.dtype or its name.
        rows: number of rows; what serves one number serves its bucket.
        target: "cpu", or a GPU, which need not be here: "cuda" (the one that is), "cuda:sm_90",
            "nvidia/nvidia-h100".

    Raises:
        UnknownNameError: there is no such operator or target.
        InputError: a size that makes no sense, or a dtype that lntune does not know.
        ToolchainError: the GPU that is here was asked for, and there is none that can be used.
    """
    ops.get(op)
    device, dtype = device_of(target), dtype_name(str(dtype))
    where = "" if target == DEFAULT else device.name
    if dtype == "float64" or hidden > MAX_HIDDEN:
        asked = {"op": op, "hidden": hidden, "dtype": dtype, "rows": rows}
        return Explanation(
            case=asked,
            device=where,
            tier="eager",
            steps=(f"eager: {size_support(dtype, hidden).reason}; PyTorch serves it",),
        )
    if rows == 0:
        asked = {"op": op, "hidden": hidden, "dtype": dtype, "rows": rows}
        Case(op, hidden, dtype, 1)  # complains of what makes no sense
        return Explanation(
            case=asked,
            device=where,
            tier="eager",
            steps=(f"eager: {NO_ROWS.reason}; PyTorch serves it",),
        )
    case = Case(op, hidden, dtype, rows)
    choice = dispatch.choose(case, device)
    record = choice.record
    known = first_check.state(case, choice, device)
    return Explanation(
        case={
            "op": op,
            "hidden": hidden,
            "dtype": dtype,
            "rows": rows,
            "bucket": bucket_label(case.bucket),
        },
        device=where,
        tier=choice.tier,
        schedule=choice.schedule,
        knobs=choice.knobs,
        steps=(*choice.steps, *([f"its kernel: {known}"] if known else [])),
        tuned_us=_served_us(choice),
        eager_us=record.median("eager") if record else None,
        stale=choice.stale,
        disturbed=bool(record and record.disturbance),
        training=_in_training(case, choice, device),
        others=tuple(_others(case, device)),
        command=_command(case, choice, device),
        foreign=choice.foreign,
        bundle=choice.bundle,
    )


def _command(case: Case, choice: Choice, device: Device) -> str:
    """What tunes a case, or measures it again where something speaks against its record; empty
    where neither would change what serves it.
    """
    record = choice.record
    doubtful = record is not None and (choice.stale or bool(record.disturbance))
    untuned = choice.schedule != "" and not choice.measured
    if choice.bundle or not (doubtful or untuned):  # a bundle decides before the logs
        return ""
    sizes = f"--hidden {case.hidden} --dtype {case.dtype} --rows {case.rows}"
    return f"lntune tune {case.op} {sizes}{option(device)}"


def _in_training(case: Case, alone: Choice, device: Device) -> str:
    """What serves calls of a case of which gradients are asked; empty where that is what serves the
    others.
    """
    op = ops.get(case.op)
    if not op.backward:
        return ""
    choice = dispatch.choose(msgspec.structs.replace(case, variant=op.training), device)
    if (choice.schedule, choice.knobs) == (alone.schedule, alone.knobs):
        return ""
    kernel = f", {choice.schedule} {knobs_module.describe(choice.knobs)}" if choice.schedule else ""
    return f"served by {SERVED_BY[choice.tier]}{kernel}; {choice.steps[-1]}"


def _others(case: Case, device: Device) -> Iterator[Other]:
    """The kernels that other calls get than those of contiguous rows in the default variant, as far
    as checks here have found something.
    """
    default, *rest = ops.get(case.op).variants
    for variant in (default, *rest):
        one = msgspec.structs.replace(case, variant=variant)
        choice = dispatch.choose(one, device)
        for strided in (False, True):
            if variant == default and not strided:
                continue
            found = first_check.verdict(one, choice, device, strided)
            wrong = () if strided else choice.wrong
            if found is not None and not found.ok:
                wrong = (*wrong, f"its kernel is wrong: {found.message}")
            if found is not None or wrong:
                yield Other(
                    variant=variant,
                    strided=strided,
                    schedule=choice.schedule,
                    knobs=dict(choice.knobs),
                    right=found is not None and found.ok,
                    wrong=wrong,
                )


def _served_us(choice: Choice) -> float | None:
    """What the kernel that serves a case took in the record that says so, in microseconds; where
    eager mode does, the best kernel.
    """
    record = choice.record
    if record is None:
        return None
    own = choice.tier == "eager" or (choice.schedule, choice.knobs) == (
        record.schedule,
        record.knobs,
    )
    return record.median("tuned" if own else "default")
