"""What may be chosen about a kernel: every variant of an operator and every knob of a schedule is
right, on this machine's instruction set.
"""

from __future__ import annotations

import random

import pytest
from cpu_kernels import DEVICE, PLANS, assert_right, built, schedule_cases
from grids import each, exhaustive, pairwise, thinned
from knob_samples import sample

from lntune import check, knobs, ops
from lntune.case import Case
from lntune.kernels import compiler
from lntune.ops.op import Op


def options(variant: str) -> set[str]:
    """The options of a variant that are there."""
    return set(variant.split("+")) - {"plain"}


def variants(op: Op) -> list[tuple[str, bool]]:
    """(variant, whether its kernel is to have a tail) of an operator.

    The steps of an LSTM take longer to build: of their options, which are there or not, every
    combination of all but any one, and what PyTorch calls; only every third has a tail.
    """
    if not op.name.startswith("lnlstm"):
        return [(variant, True) for variant in op.variants]
    chosen = [
        variant
        for variant in op.variants
        if len(options(variant)) % 2 == 0 or variant in op.checked
    ]
    return [(variant, number % 3 == 0) for number, variant in enumerate(chosen)]


@pytest.mark.parametrize("name", ["lnlstm_step", "lnlstm_step_backward"])
def test_the_variants_of_a_step(name: str) -> None:
    """Any options but one have all their combinations among the variants below, and each option is
    there and is not among those with a tail.
    """
    op = ops.get(name)
    every = set().union(*map(options, op.variants))
    chosen = [options(variant) for variant, _ in variants(op)]
    assert all(
        len({frozenset(v - {left_out}) for v in chosen}) == 2 ** (len(every) - 1)
        for left_out in every
    )
    tails = [options(variant) for variant, tail in variants(op) if tail]
    assert all({option in v for v in tails} == {True, False} for option in every)


@pytest.mark.parametrize(
    ("name", "case"), schedule_cases(dtypes=("bfloat16",), short=(130,), long=())
)
@pytest.mark.parametrize("part", ["few", exhaustive("others")])
def test_every_variant(name: str, case: Case, part: str) -> None:
    """Every combination of what an operator takes and gives (see `variants`), in either dtype, is
    right; bfloat16, where the two differ. In every run each option is there and is not; of layer
    norm's any two have all combinations.
    """
    every = variants(ops.get(case.op))
    few = each if case.op.startswith("lnlstm") else pairwise
    numbers = few([frozenset(options(variant)) for variant, _ in every])
    for number, (variant, tail) in enumerate(every):
        if (number in numbers) != (part == "few"):
            continue
        # of what takes long to build every run has whole vectors alone
        whole = not tail or (few is each and part == "few")
        one = Case(case.op, 16 if whole else case.hidden, case.dtype, case.rows, variant)
        assert_right(one, built(name, one))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_variants_in_other_dtypes(dtype: str) -> None:
    """The variants that differ most from the default are right in the other dtypes, for a row
    shorter than a vector.
    """
    for name, plan in PLANS.items():
        for variant in (
            ("plain", "weight32+bias+stats", "bias32") if plan.op == "layer_norm" else ()
        ):
            case = Case(plan.op, 7, dtype, 512, variant)
            if plan.reason_invalid(plan.default(case, DEVICE), case, DEVICE) is None:
                assert_right(case, built(name, case))


@pytest.mark.parametrize(
    ("name", "case"),
    thinned(schedule_cases(dtypes=("float32", "bfloat16"), short=(1000,), long=()), 3),
)
def test_sampled_knobs_are_right(name: str, case: Case) -> None:
    """Whatever valid knobs a search may pick, the kernel is right: a seeded sample of the whole
    space, another one for every case. Rows of whole vectors have every value of every knob below.
    """
    plan = PLANS[name]
    space = plan.space(case, DEVICE)
    count = 1 if plan.op.startswith("lnlstm") else 4  # they take longer to build
    for setting in random.Random(str(case)).sample(space, min(count, len(space))):
        verdict = check.verify(case, compiler.in_memory(case, plan, setting, DEVICE))
        assert verdict.ok, f"{setting}: {verdict.message}"


@pytest.mark.parametrize("name", PLANS)
def test_each_knob_value_is_right(name: str) -> None:
    """Every value of every knob that fits occurs in some of a few settings, and is right; some
    switches only fit small work.
    """
    plan = PLANS[name]
    seen: set[tuple[str, object]] = set()
    for rows in (512, 8):
        case = Case(plan.op, 1024, "bfloat16", rows)
        for setting in sample(plan, case, DEVICE, count=1):
            values = set(knobs.to_dict(setting).items())
            if values <= seen:
                continue
            seen |= values
            verdict = check.verify(case, compiler.in_memory(case, plan, setting, DEVICE))
            assert verdict.ok, f"{setting}: {verdict.message}"
    assert {name for name, _ in seen} == set(knobs.values_of(plan.knobs))
    assert len(seen) > len(knobs.values_of(plan.knobs))
