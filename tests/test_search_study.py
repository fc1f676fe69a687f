"""Searches on tables of costs: made-up logs, and those that are committed. Nothing is built."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from lntune import device, search
from lntune.case import Case
from lntune.cli import app
from lntune.commands import search_study
from lntune.errors import InputError, ToolchainError
from lntune.log import records
from lntune.log.records import Key, Record, Timing
from lntune.measure.jobs import Candidate
from lntune.search import Budget, replay, tpe
from lntune.tune import nearby
from lntune.tune.candidates import Candidates

CASE = Case("lnlstm_step", 256, "float32", 32)
OTHER = Case("lnlstm_step", 256, "bfloat16", 32)
CPU = device.Device("cpu", "a CPU", "x86-64-v3", 2, l1=32 << 10, l2=512 << 10, l3=32 << 20)
COMMITTED = Path(__file__).resolve().parents[1] / "bench" / "results"


def cost(candidate: Candidate) -> float:
    """Microseconds that follow from the knobs: the best has lanes 4, store 4, unroll 2."""
    of: dict[str, Any] = candidate.knobs
    us = 20 + 3 * abs(math.log2(of["lanes"]) - 2) + 2 * (2 - math.log2(of["store"]))
    return float(us + (2 - of["unroll"]) + (0 if of["parallel"] else 12))


def record(case: Case, candidate: Candidate, us: float) -> Record:
    """The trial of a candidate, which failed where it cost infinitely much."""
    ok = us < math.inf
    return Record(
        case=case,
        device=CPU,
        threads=2,
        schedule=candidate.schedule,
        knobs=candidate.knobs,
        status="ok" if ok else "wrong",
        timings={"tuned": Timing((us,), us)} if ok else {},
    )


def log(
    folder: Path,
    case: Case = CASE,
    keep: Callable[[Candidate], bool] = lambda _: True,
    us: Callable[[Candidate], float] = cost,
) -> Path:
    """A log of those candidates of a case that are to be kept, in a random order."""
    chosen = [c for c in Candidates(case, CPU) if keep(c)]
    random.Random(0).shuffle(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.op}_{case.dtype}.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(record(case, c, us(c))) + b"\n" for c in chosen))
    return path


def table(path: Path) -> search_study.Table:
    """The one table of a log."""
    (found,), left_out = search_study.tables([path])
    assert not left_out
    return found


def test_a_whole_space_is_a_table(tmp_path: Path) -> None:
    """All of a case's candidates with their costs, the default knobs first."""
    found = table(log(tmp_path))
    candidates = Candidates(CASE, CPU)
    assert next(iter(found.costs)) == candidates.defaults[0]
    assert found.costs == {c: cost(c) for c in candidates}
    assert found.best == 20


def test_of_several_trials_the_median_counts(tmp_path: Path) -> None:
    """A candidate that was measured again costs the median of its trials, failures among them."""
    path, candidate = log(tmp_path), Candidates(CASE, CPU).defaults[0]
    more = [record(CASE, candidate, us) for us in (1000.0, 2000.0)]
    with path.open("ab") as file:
        file.writelines(msgspec.json.encode(r) + b"\n" for r in more)
    assert table(path).costs[candidate] == 1000


@pytest.mark.parametrize("missing", [4, 5])
def test_nearly_all_is_enough(tmp_path: Path, missing: int) -> None:
    """A case counts where 90 % of its space were tried; else it is named, with how much was."""
    left_out = list(Candidates(CASE, CPU))[-missing:]
    found, uncovered = search_study.tables([log(tmp_path, keep=lambda c: c not in left_out)])
    assert bool(found) == (missing == 4) and bool(uncovered) == (missing == 5)
    if uncovered:
        assert uncovered[0].reason == "43 of 48 candidates were tried"
        assert (uncovered[0].case, uncovered[0].tried, uncovered[0].of) == (CASE, 43, 48)


def test_a_thinned_space_is_a_space(tmp_path: Path) -> None:
    """Where values of knobs were left out throughout, the others are all there is, and a step leads
    from one of them to the next.
    """
    found = table(log(tmp_path, keep=lambda c: c.knobs["lanes"] != 2))
    assert len(found.costs) == found.of == 36
    space = search_study.space_of(found)
    one = next(c for c in found.costs if c.knobs["lanes"] == 1)
    lanes = {c.knobs["lanes"] for c in space.neighbours(one)}
    assert lanes == {1, 4}
    assert space.scales["lanes"] == (1, 4, 8)


def test_what_cannot_be_a_table_is_named(tmp_path: Path) -> None:
    """A schedule that is not there, and a case in which nothing works, are left out with the
    reason.
    """
    path = log(tmp_path)
    gone = msgspec.structs.replace(record(CASE, next(iter(Candidates(CASE, CPU))), 1.0))
    gone = msgspec.structs.replace(gone, schedule="given_up")
    with path.open("ab") as file:
        file.write(msgspec.json.encode(gone) + b"\n")
    other = log(tmp_path, OTHER, us=lambda _: math.inf)
    found, left_out = search_study.tables([path, other])
    assert not found
    reasons = {u.case: u.reason for u in left_out}
    assert "of given_up in 1 trial " in reasons[CASE]
    assert reasons[OTHER] == "no candidate worked"


def test_logs_that_are_not_there(tmp_path: Path) -> None:
    """A path that leads nowhere, or to a folder without a log, is refused."""
    with pytest.raises(InputError, match="nowhere, which is not there"):
        search_study.tables([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="without a log"):
        search_study.tables([tmp_path])


def test_regret_and_trials_are_counted() -> None:
    """Regret is the share by which the best so far is slower; failures are trials."""
    costs = [math.inf, 12.0, 15.0, 10.4, 10.0]
    assert replay.regret(costs, 1, 10.0) == math.inf
    assert replay.regret(costs, 3, 10.0) == pytest.approx(0.2)
    assert replay.regret(costs, 50, 10.0) == 0
    assert replay.trials_to(costs, 10.5) == 4
    assert replay.trials_to(costs, 9.0) == math.inf


def test_the_study_of_a_search_whose_way_is_known(tmp_path: Path) -> None:
    """The exhaustive search comes upon the best where the log has it."""
    found = table(log(tmp_path))
    (result,) = search_study.study([found], ["exhaustive"], 5)
    costs = list(found.costs.values())
    near = next(n for n, us in enumerate(costs, 1) if us <= 1.05 * 20)
    assert (result.seeds, result.trials_to_near, result.candidates) == (1, near, 48)
    assert result.regret["10"] == round(min(costs[:10]) / 20 - 1, 4)
    assert result.near_in_time == (near <= 5)


def test_winners_of_other_cases_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that is given the other case's best tries it right after what the schedule wants
    tried first, here nothing, and says that it was given; those that keep an order of their own are
    not asked again.
    """
    log(tmp_path)
    log(tmp_path, OTHER)
    found, _ = search_study.tables([tmp_path])
    whole = search_study.space_of
    assert whole(found[0]).seeds
    monkeypatch.setattr(
        search_study, "space_of", lambda table: dataclasses.replace(whole(table), seeds=())
    )
    results = search_study.study(found, ["local", "random"], 3, (False, True))
    assert [(r.search, r.given) for r in results] == [
        *(("local", False), ("local", True), ("random", False))
    ] * 2
    assert all(r.trials_to_near == 2 for r in results if r.given)
    assert all(r.trials_to_near > 2 for r in results if not r.given and r.trials_to_near)


def test_the_command_says_what_the_study_found(tmp_path: Path) -> None:
    """JSON has the results and what is left out; the table's last lines say both; exit code 1 where
    no case is covered.
    """
    path, log_of_few = log(tmp_path), log(tmp_path, OTHER)
    with log_of_few.open("rb") as file:
        few = file.readlines()[:9]
    log_of_few.write_bytes(b"".join(few))
    asked = ["search-study", str(path), str(log_of_few), "--strategy", "local,bayesian"]
    done = CliRunner().invoke(app, [*asked, "--seeds", "3", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [r["search"] for r in facts["results"]] == ["local", "bayesian"]
    assert facts["results"][0]["regret"].keys() == {"5", "10", "20", "50"}
    assert facts["uncovered"][0]["tried"] == 9
    shown = CliRunner().invoke(app, [*asked, "--seeds", "3"]).stdout
    assert "of the trials in 1 of 1 case" in shown
    assert f"left out: {OTHER} on {CPU.slug}: 9 of" in shown
    assert CliRunner().invoke(app, ["search-study", str(log_of_few)]).exit_code == 1
    assert CliRunner().invoke(app, [*asked, "--at-once", "0"]).exit_code != 0
    several = CliRunner().invoke(app, [*asked, "--seeds", "3", "--json", "--at-once", "3"])
    assert several.exit_code == 0 and len(json.loads(several.stdout)["results"]) > 0


def test_a_missing_package_is_named_where_its_search_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without Optuna a study goes without its search, unless that was asked for."""
    monkeypatch.setattr(tpe, "installed", lambda: False)
    assert "optuna" not in search_study.searches([])
    with pytest.raises(ToolchainError, match=r"lntune\[search\]"):
        search_study.searches(["local", "optuna"])


# --- what is committed


@pytest.fixture(scope="module")
def committed() -> list[search_study.Table]:
    """The tables of all devices."""
    found, left_out = search_study.tables(sorted(COMMITTED.glob(f"*/{search_study.FOLDER}")))
    assert found and not left_out, "every committed table is of a whole space"
    return found


def test_committed_tables_are_small() -> None:
    """They are thinned and have few samples."""
    files = list(COMMITTED.glob(f"*/{search_study.FOLDER}/*.jsonl"))
    assert sum(p.stat().st_size for p in files) < 1_500_000


def test_the_default_search_finds_the_best_in_time(
    committed: Sequence[search_study.Table],
) -> None:
    """On every committed table the default search is within 5 % of the best after 20 trials, by the
    median over a few seeds; and after a tenth of the trials where these are more than ten.
    """
    results = search_study.study(committed, [DEFAULT], seeds=5)
    assert len({r.case.op for r in results}) == 4
    for r in results:
        after = r.regret["20"]
        assert after is not None and after <= search_study.NEAR, str(r.case)
        assert r.near_in_time or r.candidates < 100, str(r.case)


DEFAULT = "bayesian"


def test_the_default_search_is_the_one_that_is_tried_here() -> None:
    """CPUs have it where none is asked for."""
    from lntune.tune import Settings

    assert Settings(device=CPU).strategy == DEFAULT


def test_the_default_search_gets_by_with_thousands_of_trials(
    monkeypatch: pytest.MonkeyPatch, committed: Sequence[search_study.Table]
) -> None:
    """What the model learns from is bounded, and it goes on choosing beyond that."""
    from lntune.search import bayesian

    monkeypatch.setattr(bayesian, "MOST", 10)
    one = committed[0]
    costs = replay.tried(search.get("bayesian"), search_study.space_of(one), one.costs, 0)
    assert sorted(costs) == sorted(one.costs.values())


# --- winners of other cases, in a tuning run


def final(case: Case, candidate: Candidate) -> Record:
    """A final that the candidate won."""
    from lntune import schedule

    code = schedule.get(candidate.schedule).code
    return msgspec.structs.replace(record(case, candidate, 1.0), role="final", code=code)


def test_the_nearest_winners_are_given() -> None:
    """Winners of the nearest hidden sizes, rows and dtypes, those that fit, each once, and not the
    case's own.
    """
    candidates = Candidates(CASE, CPU)
    a, b, c, d = list(candidates)[:4]
    cases = {
        CASE: d,
        msgspec.structs.replace(CASE, hidden=512): a,
        msgspec.structs.replace(CASE, hidden=1024): a,
        msgspec.structs.replace(CASE, dtype="bfloat16"): b,
        msgspec.structs.replace(CASE, hidden=8192): c,
    }
    finals = {Key.of(case): final(case, winner) for case, winner in cases.items()}
    assert nearby.winners(finals, CASE, candidates) == [a, b]
    assert nearby.winners(finals, CASE, [b, c]) == [b, c]
    assert nearby.winners({}, CASE, candidates) == []


def test_a_final_of_other_code_gives_nothing() -> None:
    """A schedule's code may have changed since."""
    other = msgspec.structs.replace(CASE, hidden=512)
    candidates = Candidates(CASE, CPU)
    old = msgspec.structs.replace(final(other, candidates.defaults[0]), code=records.Code(77, 1, 1))
    assert nearby.winners({Key.of(other): old}, CASE, candidates) == []


def test_replay_ends_when_it_has_seen_enough() -> None:
    """So many trials at least, and on until one is good enough."""
    costs = dict(enumerate([9.0, 8.0, 7.0, 2.0, 6.0, 5.0]))
    space = search.Space(tuple(costs), lambda c: (c + 1,))
    exhaustive = search.get("exhaustive")
    assert replay.tried(exhaustive, space, costs, 0, 2, 7.5) == [9, 8, 7]
    assert replay.tried(exhaustive, space, costs, 0, 5, 7.5) == [9, 8, 7, 2, 6]
    assert replay.tried(exhaustive, space, costs, 0) == list(costs.values())
    assert Budget().part == 1.0
