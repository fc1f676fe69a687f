"""Comparisons of runs: what is paired, what verdicts rest on, and what is doubted."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from made_up_records import HERE, THERE, record, samples, timing

from lntune.compare import judge
from lntune.compare.comparison import Comparison, Result
from lntune.compare.sides import Contender, Runs
from lntune.errors import InputError
from lntune.log.records import Record
from lntune.report.rows import row_of

EAGER = samples(100, seed=50)
COPY = samples(40, seed=51)


def compare(before: Sequence[Record], after: Sequence[Record], **options: Any) -> Result:
    """Runs B against runs A."""
    sides = Runs("A", list(before)), Runs("B", list(after))
    (result,) = judge.compare_records(sides, **options)
    return result


def one(a: float, b: float, **fields: Any) -> Comparison:
    """The comparison of a case that took `a` us before and `b` after, on a machine that has not
    changed; `fields` are the second record's.
    """
    before, after = (
        record(timings={"tuned": samples(us, seed=i), "eager": EAGER, "copy": COPY})
        for i, us in enumerate((a, b))
    )
    after = msgspec.structs.replace(after, **{"run": "later", **fields})
    return compare([before], [after]).cases[0]


@pytest.mark.parametrize(("b", "verdict"), [(70, "FASTER"), (140, "SLOWER")])
def test_clear_changes_are_found(b: float, verdict: str) -> None:
    """Samples that lie well apart while nothing else changed are FASTER or SLOWER; the ratio is A /
    B, inside its interval.
    """
    comparison = one(100, b)
    assert comparison.verdict == verdict and not comparison.reason
    assert comparison.low <= comparison.ratio <= comparison.high
    assert comparison.ratio == pytest.approx(100 / b, rel=0.02)
    assert (comparison.method, comparison.drift) == ("direct", 1)
    assert comparison.p < 0.05


def test_the_same_measurement_is_the_same() -> None:
    """A record beside itself, read once or twice, is compared round by round: a ratio of 1."""
    own = record()
    again = msgspec.json.decode(msgspec.json.encode(own), type=Record)
    for other in (own, again):
        (comparison,) = compare([own], [other]).cases
        assert (comparison.verdict, comparison.ratio, comparison.method) == ("SAME", 1, "paired")


@pytest.mark.parametrize("contender", ["eager", "copy"])
@pytest.mark.parametrize("us", [-100.0, 0.0])
def test_times_that_make_no_sense_say_nothing_of_a_drift(contender: str, us: float) -> None:
    """A contender whose time is 0 or below tells nothing of what happened between runs."""
    timings = {"tuned": samples(50), "eager": EAGER, "copy": COPY, contender: timing(*[us] * 60)}
    comparison = compare([record()], [record(run="later", timings=timings)]).cases[0]
    assert comparison.ratio == pytest.approx(1, rel=0.1)


def test_noise_is_unsure() -> None:
    """Where samples scatter by more than they differ nothing is claimed."""
    noisy = {"tuned": samples(105, 0.3, 9, seed=1), "eager": EAGER, "copy": COPY}
    assert one(100, 100, timings=noisy).verdict == "UNSURE"


def test_one_case_of_two_runs_is_not_the_same_to_a_percent() -> None:
    """What a single case did between two runs may be by chance: equal medians are no proof."""
    comparison = one(100, 100)
    assert comparison.verdict == "UNSURE" and comparison.low < 1 / 1.01


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"busy": True}, "B was disturbed by other work on the machine"),
        ({"threads": 1}, "2 threads in A, 1 in B"),
        ({"role": "bench-given-output"}, "outputs were given in B only"),
        ({"role": "bench-strided"}, "rows lay apart in B only"),
        ({"role": "bench-training"}, "whole steps of training were measured in B only"),
        ({"timings": {"tuned": timing(50, 51, 52)}}, "B has fewer than 5 samples"),
        ({"timings": {"tuned": timing(50)}}, "B has fewer than 5 samples"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_compared_is_unsure(fields: dict[str, Any], reason: str) -> None:
    """A disturbed machine, other threads, another way of measuring or too few samples: UNSURE, with
    the reason.
    """
    comparison = one(100, 50, **fields)
    assert (comparison.verdict, comparison.reason) == ("UNSURE", reason)


@pytest.mark.parametrize(
    ("tuned", "eager", "verdict"),
    [
        (1000, 100, "SLOWER"),  # ten times slower, eager as before: no other work explains that
        (1000, None, "SLOWER"),
        (1000, 900, "UNSURE"),  # eager waited as long
        (250, 100, "UNSURE"),  # noise of a busy machine
        (10, 100, "FASTER"),
        (10, 12, "UNSURE"),
        (10, None, "UNSURE"),
    ],
)
def test_what_no_noise_explains_is_decided(tuned: float, eager: float | None, verdict: str) -> None:
    """A ratio beyond 3 that eager did not see in the same two runs is decided though a side was
    disturbed; the doubt is still told.
    """
    after = {"tuned": samples(tuned, seed=1), **({"eager": samples(eager)} if eager else {})}
    comparison = one(100, 1, busy=True, timings=after)
    assert (comparison.verdict, comparison.reason) == (
        verdict,
        "B was disturbed by other work on the machine",
    )
    assert one(100, 1, threads=1, timings=after).verdict == "UNSURE"


# --- many cases


def runs(
    speed: float, scatter: float, faster: float = 1.0, cases: int = 36, seed: int = 0
) -> list[Record]:
    """A run of many cases on a machine of some speed, where everything of a case is moved by so
    much more, and the kernels are `faster` beside that.
    """
    generator = random.Random(seed)
    measured = []
    for case in range(cases):
        own = speed * math.exp(scatter * generator.gauss(0, 1))
        timings = {
            name: samples(us * own, seed=seed + 7 * case + i)
            for i, (name, us) in enumerate((("tuned", 50 / faster), ("eager", 100), ("copy", 40)))
        }
        run = {"run": str(seed), "timings": timings}
        measured.append(record(hidden=64 * (case + 1), **run))
    return measured


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("speed", [1.0, 0.7])
def test_another_machine_is_no_gain(speed: float, scatter: float) -> None:
    """The same kernels on two machines of one kind, one slower than the other, every case by a
    different part: no case is FASTER or SLOWER when eager mode and a copy moved just as much.
    """
    result = compare(runs(1.0, 0.0), runs(speed, scatter, seed=100))
    counts = result.counts()
    assert counts["FASTER"] == counts["SLOWER"] == 0
    (between,) = result.between
    assert between.cases == 36
    assert between.eager == pytest.approx(1 / speed, rel=0.1)


@pytest.mark.parametrize("scatter", [0.0, 0.2])
def test_a_gain_is_found_on_another_machine(scatter: float) -> None:
    """Kernels that became a fifth faster do so also where the machine changed at the same time."""
    result = compare(runs(1.0, 0.0), runs(0.7, scatter, faster=1.2, seed=100))
    assert result.counts()["FASTER"] >= 34
    assert {c.method for c in result.cases} == {"over eager"}
    assert result.between[0].by_case == (scatter > 0)


def test_what_moves_alone_widens_its_own_interval() -> None:
    """Where a case's eager mode and copy moved apart, it is not known what its kernel did: its
    interval is wider than the others'.
    """
    before, after = runs(1.0, 0.0), runs(1.0, 0.0, seed=100)
    odd = dict(after[7].timings)
    odd["copy"] = samples(80, seed=1)
    after[7] = msgspec.structs.replace(after[7], timings=odd)
    widths = [c.high / c.low for c in compare(before, after).cases]
    assert widths[7] == max(widths) > 2 * sorted(widths)[-2]


def test_runs_without_anything_in_common_are_less_certain() -> None:
    """Without eager mode and a copy in both it is only assumed how much runs differ."""
    bare = {"tuned": samples(100)}
    other = {"tuned": samples(90, seed=1)}
    (comparison,) = compare([record(timings=bare)], [record(timings=other, run="2")]).cases
    assert (comparison.verdict, comparison.method, comparison.drift) == ("UNSURE", "direct", None)


def contenders(*names: str) -> tuple[Contender, ...]:
    """Words as sides."""
    return tuple(Contender(name, word=name) for name in names)


def test_verdicts_are_for_all_cases_together() -> None:
    """A difference that is just certain in one case is not so among forty cases without any: its
    p-value grows with their number.
    """
    close = record(timings={"tuned": samples(100, seed=1), "eager": samples(101.8)})
    equal = [
        record(hidden, timings={"tuned": samples(100, seed=hidden), "eager": samples(100)})
        for hidden in range(1, 40)
    ]
    (alone,) = judge.compare_records(contenders("eager", "tuned"), [close])
    (among,) = judge.compare_records(contenders("eager", "tuned"), [close, *equal])
    (p,) = (c.p for c in alone.cases)
    (p_among,) = (c.p for c in among.cases if c.case == close.case)
    assert 0 < p < 0.05 < p_among == pytest.approx(min(1, 40 * p))
    assert alone.counts()["FASTER"] == 1 and among.counts()["FASTER"] == 0


def test_differences_that_do_not_matter() -> None:
    """A difference below `smallest` is neither FASTER nor SLOWER, however certain it is."""
    after = record(timings={"tuned": samples(98, 0.001, seed=1), "eager": samples(100, 0.001)})
    before = record(timings={"tuned": samples(100, 0.001), "eager": samples(100, 0.001)})
    paired = msgspec.structs.replace(
        after, timings={**after.timings, "default": before.timings["tuned"]}
    )
    for smallest, verdict in ((0.01, "FASTER"), (0.05, "SAME")):
        sides = contenders("default", "tuned")
        (result,) = judge.compare_records(sides, [paired], smallest=smallest)
        (comparison,) = result.cases
        assert (comparison.verdict, comparison.method) == (verdict, "paired")
        assert result.smallest == smallest


# --- cases and devices


def test_cases_only_one_side_has_are_named() -> None:
    """Cases are matched by operator, hidden size, dtype, rows and variant; the others are listed,
    not compared.
    """
    result = compare([record(64), record(128)], [record(128), record(256)])
    assert [c.case.hidden for c in result.cases] == [128]
    missing = [(m.side, m.case.hidden, m.why, m.command) for m in result.missing]
    assert missing == [("A", 256, "not in it", ""), ("B", 64, "not in it", "")]
    assert not compare([record(64)], [record(128)]).cases


def test_different_devices_are_refused() -> None:
    """Measurements of two machines are compared only when asked to, and never two machines of one
    side with another.
    """
    a, b = record(), record(device=THERE)
    with pytest.raises(InputError, match="--across-devices"):
        compare([a], [b])
    features = msgspec.structs.replace(HERE, features=("avx512bf16",))
    with pytest.raises(InputError, match="features: "):
        compare([a], [msgspec.structs.replace(a, device=features)])
    assert len(compare([a], [b], across_devices=True).cases) == 1
    with pytest.raises(InputError, match="one device on each side"):
        compare([a, b], [b], across_devices=True)
    assert [c.device for c in compare([a, b], [b]).cases] == [THERE.slug]


def test_a_device_that_did_not_name_its_model_is_the_same() -> None:
    """An old record is compared with a new one of the same CPU, though their folders differ, and
    not with one of another generation.
    """
    old = msgspec.structs.replace(HERE, l1=32768, l2=1 << 20)
    new = msgspec.structs.replace(old, model="AuthenticAMD family 25 model 17 stepping 1")
    newer = msgspec.structs.replace(
        new, model="AuthenticAMD family 26 model 2 stepping 1", l1=49152
    )
    a, b, c = (record(device=device) for device in (old, new, newer))
    assert len(compare([a], [b]).cases) == 1
    for one_, other in ((a, c), (b, c)):
        with pytest.raises(InputError, match=r"l1: |model: "):
            compare([one_], [other])


def test_failing() -> None:
    """To fail on "slower" takes a case that is, or one that looks three times as slow and cannot be
    decided; on "unsure" any that cannot.
    """
    slower = compare([record()], [record(run="2", timings={"tuned": samples(200)}, busy=True)])
    assert slower.failing("slower") == ["layer_norm 512x1024 float32: SLOWER"]
    waited = {"tuned": samples(500), "eager": samples(1000)}
    lost = compare([record()], [record(run="2", timings=waited, busy=True)])
    assert lost.failing("slower") == [
        "layer_norm 512x1024 float32: UNSURE, B takes 10.0 times as long; measure again"
    ]
    mild = compare([record()], [record(run="2", timings={"tuned": samples(60)}, busy=True)])
    assert not mild.failing("slower") and len(mild.failing("unsure")) == 1
    same = compare([record()], [record()])
    assert same.failing("slower") == same.failing("unsure") == []


def test_shares_of_a_copy_are_those_of_reports() -> None:
    """A side's share of a copy's bandwidth is the one that a report has of the same record: of the
    ratios within rounds, not of the medians.
    """
    own = record(timings={"tuned": timing(10.0, 20.0, 80.0), "copy": timing(10.0, 30.0, 40.0)})
    share = compare([own], [own]).cases[0].a.of_copy
    assert share == row_of(own).of_copy != pytest.approx(30 / 20)
