"""Cost tables for `lntune search-study`: every candidate of a thinned space, measured.

    python bench/search_tables.py [--case OP HIDDEN DTYPE ROWS] [--most 240] [--sittings 3]
                                  [--rounds 5] [--threads N] [--output FOLDER]

Writes tuning logs with a record for each candidate, the default first, to FOLDER (by default
bench/results/<device>/search_study), where records of the same case are replaced; of two cases an
operator, or of one.

The space is thinned until it has at most MOST candidates: by turns the knob with the most values
that may go loses one, the one in the middle; the last only where no knob has any between others;
never one of default knobs. So the rest is a space again, with steps from value to value.

Candidates are all built first and compared with eager mode on the inputs that they are timed on.
Then they are timed in sittings of several rounds, each round in a new random order; a sample is the
quickest that a candidate was in a sitting, which is what it takes where others leave the machine
alone for a moment, and its cost the median of these. What is left of noise is printed: how far the
quickest and the slowest sitting of a candidate are apart.
"""

from __future__ import annotations

import datetime
import functools
import math
import random
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
import typer

from lntune import backends, check, knobs
from lntune import device as devices
from lntune.case import Case
from lntune.errors import LntuneError, gist
from lntune.kernels import compiler
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.measure import calls
from lntune.measure.jobs import Candidate
from lntune.system import toolchain
from lntune.tune.candidates import Candidates

RESULTS = Path(__file__).resolve().parent / "results"
CASES = [
    Case(op, hidden, dtype, rows)
    for op, hidden, rows in (
        ("layer_norm", 1024, 512),
        ("layer_norm_backward", 1024, 512),
        ("lnlstm_step", 256, 32),
        ("lnlstm_step_backward", 256, 32),
    )
    for dtype in ("float32", "bfloat16")
]
SHORT = 3e-5
"""Seconds of a short sample at least, of one call or more, and how many of them in a round."""
REPEATS = 12


def thinned(
    candidates: Sequence[Candidate], defaults: Sequence[Candidate], op: str, most: int
) -> list[Candidate]:
    """At most so many of the candidates, a grid again; those whose values of all knobs are left."""
    listed: dict[str, list[Any]] = {}
    for candidate in candidates:
        schedule, _ = candidate.resolved(op)
        for name, values in knobs.values_of(schedule.knobs).items():
            used = {c.knobs[name] for c in candidates if name in c.knobs}
            listed.setdefault(name, [v for v in values if v in used])
        if len(listed) == len(candidate.knobs):
            break
    kept = {name: {d.knobs[name] for d in defaults} for name in listed}

    def left() -> list[Candidate]:
        return [c for c in candidates if all(v in listed[n] for n, v in c.items)]

    def loose(name: str) -> tuple[list[Any], list[Any]]:
        """The values of a knob that may go: those between others, and all."""
        free = [v for v in listed[name] if v not in kept[name]]
        return [v for v in listed[name][1:-1] if v in free], free

    while len(rest := left()) > most:
        name = max(listed, key=lambda n: (bool(loose(n)[0]), len(loose(n)[1])))
        between, free = loose(name)
        if not free:
            break
        listed[name].remove(between[len(between) // 2] if between else free[-1])
    return rest


def built(case: Case, candidate: Candidate, given: dict[str, Any]) -> Callable[[], Any] | str:
    """A call of the candidate's kernel on the inputs, or what is wrong with it."""
    cpu = devices.current()
    schedule, setting = candidate.resolved(case.op)
    try:
        kernel = compiler.in_memory(case, schedule, setting, cpu)
    except LntuneError as e:
        return gist(e)
    if wrong := check.compare_with_eager(case, kernel, given, cpu):
        return wrong
    return calls.bind(case, kernel, [given], allocate=False)[0]


def quickest(call: Callable[[], Any], count: int) -> float:
    """Microseconds of a call: the quickest of several samples of so many calls."""
    taken = []
    call()
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        taken.append((time.perf_counter() - start) / count * 1e6)
    return min(taken)


def measured(
    kernels: dict[Candidate, Callable[[], Any]], sittings: int, rounds: int, seed: int
) -> dict[Candidate, list[float]]:
    """Each candidate's microseconds of every sitting."""
    order, rng, start = list(kernels), random.Random(seed), time.perf_counter()
    counts = {c: max(1, int(SHORT / (quickest(call, 1) * 1e-6))) for c, call in kernels.items()}
    taken: dict[Candidate, list[float]] = {c: [] for c in kernels}
    for sitting in range(sittings):
        least = dict.fromkeys(kernels, math.inf)
        for _ in range(rounds):
            rng.shuffle(order)
            for candidate in order:
                us = quickest(kernels[candidate], counts[candidate])
                least[candidate] = min(least[candidate], us)
        for candidate, us in least.items():
            taken[candidate].append(round(us, 4))
        seconds = time.perf_counter() - start
        print(f"sitting {sitting + 1} of {sittings}, {seconds:.0f} s", flush=True)
    return taken


class Options(NamedTuple):
    """How tables are made, see main."""

    most: int
    sittings: int
    rounds: int
    seed: int
    output: Path


def record(case: Case, options: Options) -> None:
    """Measure the candidates of a case's thinned space, and log them."""
    cpu = devices.current()
    candidates = Candidates(case, cpu)
    default = candidates.defaults[0]
    chosen = thinned(list(candidates), candidates.defaults, case.op, options.most)
    print(f"{case}: {len(chosen)} of {len(candidates)} candidates", flush=True)
    given = backends.of(cpu).inputs(case, cpu)[0]
    begun = time.monotonic()
    kernels: dict[Candidate, Callable[[], Any]] = {}
    wrong: dict[Candidate, str] = {}
    for number, candidate in enumerate(chosen, 1):
        one = built(case, candidate, given)
        if isinstance(one, str):
            wrong[candidate] = one
        else:
            kernels[candidate] = one
        if number % 20 == 0:
            print(f"built {number}, {time.monotonic() - begun:.0f} s", flush=True)
    with torch.inference_mode():
        taken = measured(kernels, options.sittings, options.rounds, options.seed)
    medians = {c: statistics.median(us) for c, us in taken.items()}
    apart = sorted(max(us) / min(us) - 1 for us in taken.values())
    ninety = apart[int(0.9 * len(apart))]
    print(f"sittings are {statistics.median(apart):.1%} apart (median), {ninety:.1%} (90 %)")
    best = min(medians, key=lambda c: medians[c])
    print(
        f"default {medians[default]:.2f} us, best {medians[best]:.2f} us: {best.schedule}"
        f" {knobs.describe(best.knobs)}",
        flush=True,
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    logged = functools.partial(
        Record,
        case=case,
        device=cpu,
        threads=torch.get_num_threads(),
        versions=toolchain.versions(),
        run=uuid.uuid4().hex[:12],
        time=now.isoformat(timespec="milliseconds"),
    )
    lines = []
    for candidate in chosen:
        schedule, _ = candidate.resolved(case.op)
        of = {"schedule": schedule.name, "code": schedule.code, "knobs": candidate.knobs}
        if candidate in wrong:
            lines.append(logged(**of, status="wrong", message=wrong[candidate]))
        else:
            timing = Timing(tuple(taken[candidate]), medians[candidate])
            lines.append(logged(**of, status="ok", timings={"tuned": timing}))
    path = options.output / f"{case.op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [r for r in records.read_file(path) if r.case != case] if path.exists() else []
    path.write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in (*others, *lines)))


def main(
    case: Annotated[
        tuple[str, int, str, int] | None,
        typer.Option(metavar="OP HIDDEN DTYPE ROWS", help="This one alone."),
    ] = None,
    most: Annotated[int, typer.Option(help="Candidates of a thinned space.")] = 240,
    sittings: Annotated[int, typer.Option(help="Samples of each candidate.")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds of a sitting.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the order of candidates.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; by default PyTorch's number.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of logs.")] = None,
) -> None:
    """Measure every candidate of thinned spaces, and log them."""
    if threads:
        torch.set_num_threads(threads)
    folder = output or RESULTS / devices.current().slug / "search_study"
    for one in [Case(*case)] if case else CASES:
        record(one, Options(most, sittings, rounds, seed, folder))


if __name__ == "__main__":
    typer.run(main)
