"""How often the verdicts of `lntune compare` are wrong, and how often they find what is there.

    python bench/calibration.py                       # simulated, and what is shipped
    python bench/calibration.py --record FILE         # measures kernels against themselves
    python bench/calibration.py FILE [FILE ...]       # simulated, and what was recorded

In an A/A run both sides are the same kernel, so every FASTER or SLOWER is wrong. Three kinds:

* simulated: samples with heavy tails, phases that slow everyone or one side down, and between runs
  a drift; where the sides differ, B is 3 % faster.
* resampled: blocks of consecutive rounds of what was recorded, drawn again, with and without 3 %.
* recorded: what was measured, within a process and, for each two files, between their processes;
  and the kernels that two of the shipped runs of tuning and of benchmarks have in common.

A family is all cases that are compared at once; it is wrong when one of its verdicts is. What the
table comes to is also written as JSON, with --output.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy
from scipy.signal import lfilter

from lntune import certainty
from lntune.case import Case
from lntune.certainty import Estimate
from lntune.commands.compare import LONGER
from lntune.compare.judge import compare_records
from lntune.compare.sides import Runs
from lntune.device import Device
from lntune.log.records import Record, Timing, read_file
from lntune.report.columns import Column, Table, key
from lntune.report.output import Output, print_table
from lntune.report.tables import console, percent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[numpy.float64]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FASTER = 0.03
"""How much faster B is where there is something to find."""
CASES = 48
"""Of a simulated family."""
FAMILIES = 200
ROUNDS = (30, 100, 300, 1000)
OWN = (0.0, 0.01, 0.02)
"""How much a side is slowed down by phases that the other does not have."""
MOVED = (0.0, 0.05, 0.2)
PLACED = (0.002, 0.01, 0.02)
DEVICE = Device("cpu", "made up", "x86-64-v4", 2)
LEAST_ROUNDS, LEAST_CASES = 9, 12
SECONDS = 6.0
"""A case at least, as `lntune compare --measure` has it."""
BLOCK = 10
"""Rounds that are drawn together, so that neighbours stay alike."""
SCATTER, TAIL, TAILED = 0.03, 0.6, 0.06
"""Of a simulated sample: its usual scatter, and how far and how often it lies above that."""
PHASE, LENGTH = 0.05, 20.0
"""Of phases: how much they slow down, and how many rounds they last."""


class Outcome(NamedTuple):
    """What became of families of comparisons: `verdicts` of each, without and with a difference."""

    kind: str
    sides: str
    rounds: int
    same: list[list[str]]
    different: list[list[str]]

    @property
    def facts(self) -> dict[str, object]:
        """The figures of a row."""
        flat = [v for family in self.same for v in family]
        found = [v for family in self.different for v in family]
        wrong = [[v in ("FASTER", "SLOWER") for v in family] for family in self.same]
        return {
            "kind": self.kind,
            "sides": self.sides,
            "rounds": self.rounds,
            "families": len(self.same),
            "cases": len(flat) // max(1, len(self.same)),
            "wrong": sum(map(sum, wrong)) / len(flat) if flat else None,
            "families_wrong": sum(map(any, wrong)) / len(wrong) if wrong else None,
            "same": flat.count("SAME") / len(flat) if flat else None,
            "found": found.count("FASTER") / len(found) if found else None,
            "found_slower": found.count("SLOWER") / len(found) if found else None,
        }


def phases(rng: numpy.random.Generator, rounds: int, size: float) -> Samples:
    """The logarithm by which a machine is slowed down, by rounds: it wanders, and comes back."""
    kept = math.exp(-1 / LENGTH)
    steps = rng.normal(0, size * math.sqrt(1 - kept * kept), rounds)
    levels, _ = lfilter([1], [1, -kept], steps, zi=[kept * rng.normal(0, size)])
    return levels


def samples(rng: numpy.random.Generator, shared: Samples, own: float, log: float) -> Samples:
    """Samples of one contender, in microseconds: `log` above what all have, with phases of its own
    of size `own`, and tails.
    """
    rounds = len(shared)
    tails = rng.exponential(TAIL, rounds) * (rng.random(rounds) < TAILED)
    scatter = rng.normal(0, SCATTER, rounds)
    return numpy.exp(log + shared + phases(rng, rounds, own) + scatter + tails) * 10


def simulated_pairs(rounds: int, own: float, seed: int = 0) -> Outcome:
    """Families of paired comparisons."""

    def family(rng: numpy.random.Generator, faster: float) -> list[str]:
        estimates = []
        for _ in range(CASES):
            shared = phases(rng, rounds, PHASE)
            a = samples(rng, shared, own, math.log1p(faster))
            estimates.append(certainty.paired(a, samples(rng, shared, own, 0.0)))
        return list(certainty.verdicts(estimates))

    kind = "simulated" if not own else f"simulated, phases of a side's own {percent(own)}"
    return _families(kind, "paired", rounds, family, seed)


def simulated_runs(moved: float, placed: float, seed: int = 0) -> Outcome:
    """Families of comparisons between two runs: `moved` is how far the whole machine's speed lies
    apart, and half as much that of a case; `placed` how far each contender's does, whose memory
    lies elsewhere in every process.
    """
    rounds = 300

    def run(rng: numpy.random.Generator, faster: float) -> list[Record]:
        speed, records = rng.normal(0, moved), []
        for number in range(CASES):
            shared = phases(rng, rounds, PHASE) + speed + rng.normal(0, moved / 2)
            timings = {}
            for name, log in (("tuned", -math.log1p(faster)), ("eager", 0.7), ("copy", -0.5)):
                times = samples(rng, shared, 0.0, log + rng.normal(0, placed))
                timings[name] = Timing(tuple(times.tolist()), float(numpy.median(times)))
            case = Case("layer_norm", 64 * (number + 1), "float32", 512)
            records.append(
                Record(
                    case=case,
                    device=DEVICE,
                    threads=1,
                    schedule="cached_rows",
                    knobs={},
                    status="ok",
                    timings=timings,
                    busy=False,
                )
            )
        return records

    def family(rng: numpy.random.Generator, faster: float) -> list[str]:
        sides = Runs("A", run(rng, 0.0)), Runs("B", run(rng, faster))
        (result,) = compare_records(sides)
        return [c.verdict for c in result.cases]

    kind = f"simulated, machine moved {percent(moved)}, contenders {placed:.1%}"
    return _families(kind, "two runs", rounds, family, seed, FAMILIES // 5)


def _families(
    kind: str,
    sides: str,
    rounds: int,
    family: Callable[[numpy.random.Generator, float], list[str]],
    seed: int,
    families: int = FAMILIES,
) -> Outcome:
    rng = numpy.random.default_rng(seed)
    same = [family(rng, 0.0) for _ in range(families)]
    return Outcome(kind, sides, rounds, same, [family(rng, FASTER) for _ in range(families // 4)])


def resampled(records: Sequence[Record], kind: str, seed: int = 0) -> Outcome:
    """Families of paired comparisons whose ratios are drawn from recorded rounds in blocks, around
    no difference, and around 3 %.
    """
    ratios = []
    for record in records:
        a, b = (numpy.asarray(record.timings[n].samples_us) for n in ("tuned", "again"))
        logs = numpy.log(a / b)
        ratios.append(logs - numpy.median(logs))

    def family(rng: numpy.random.Generator, faster: float) -> list[str]:
        estimates = []
        for logs in ratios:
            starts = rng.integers(0, max(1, len(logs) - BLOCK + 1), -(-len(logs) // BLOCK))
            drawn = numpy.concatenate([logs[s : s + BLOCK] for s in starts])[: len(logs)]
            ones = numpy.ones(len(drawn))
            estimates.append(certainty.paired(numpy.exp(drawn + math.log1p(faster)), ones))
        return list(certainty.verdicts(estimates))

    rounds = int(numpy.median([len(logs) for logs in ratios]))
    return _families(kind, "paired", rounds, family, seed)


def record(path: Path, seconds: float, every: int = 1) -> None:
    """Measure what serves each case that the logs have of this machine, or where they have none the
    default knobs of each case of the default grids, against itself, eager mode and a copy, and
    write the records after every one.
    """
    import datetime
    import warnings

    import torch

    from lntune import backends, device, ops, schedule, timing
    from lntune.kernels import cache
    from lntune.log import records as log
    from lntune.log import select
    from lntune.measure.calls import bind
    from lntune.system import paths, toolchain
    from lntune.system.heap import kept_heap

    here = device.current()
    backend = backends.of(here)
    finals = log.read(paths.log_dirs(), None, here, role="final")
    served = list(select.served(finals, schedule.all_schedules()).values()) or list(_untuned(here))
    served = served[::every]
    measured: list[Record] = []
    warnings.simplefilter("ignore")
    with kept_heap(), torch.inference_mode():
        for number, final in enumerate(served, 1):
            print(f"[{number}/{len(served)}] {final.case}", file=sys.stderr)
            chosen, setting = schedule.resolve(final.schedule, final.case.op, final.knobs)
            kernel = cache.kernel(final.case, chosen, setting, here)
            copies = backend.inputs(final.case, here)
            first = ops.get(final.case.op).arguments(final.case)[0].name
            contenders = {
                "tuned": bind(final.case, kernel, copies, allocate=True),
                "again": bind(final.case, kernel, copies, allocate=True),
                "eager": [backend.baseline(here, final.case, given) for given in copies],
                "copy": [given[first].clone for given in copies],
            }
            took = timing.quietest(
                lambda contenders=contenders: backend.measure(
                    contenders,
                    here,
                    seconds,
                    rounds=LEAST_ROUNDS,
                    enough=timing.precise(seconds, LONGER * seconds, ["tuned", "again"]),
                )
            )
            now = datetime.datetime.now(datetime.timezone.utc)
            measured.append(
                msgspec.structs.replace(
                    final,
                    role="bench",
                    timings=took.timings,
                    busy=took.busy,
                    rivals=(),
                    default=None,
                    versions=toolchain.versions(),
                    time=now.isoformat(timespec="seconds"),
                )
            )
            path.write_bytes(msgspec.json.encode({"records": measured}) + b"\n")


def paired_in(records: Sequence[Record]) -> list[Estimate]:
    """The same kernel against itself, in the rounds of one process."""
    return [
        certainty.paired(r.timings["tuned"].samples_us, r.timings["again"].samples_us)
        for r in records
    ]


def _untuned(device: Device) -> Iterator[Record]:
    """Records without measurements of the default knobs of every operator's default grid."""
    import torch

    from lntune import knobs, ops, schedule
    from lntune.log import select

    for op in ops.OPS.values():
        usable = schedule.for_op(op.name, device.kind)
        for case in op.grid:
            found = select.untuned(case, device, usable)
            if found.schedule:
                code = usable[found.schedule].code
                yield Record(
                    role="bench",
                    case=case,
                    device=device,
                    threads=torch.get_num_threads(),
                    schedule=found.schedule,
                    code=code,
                    knobs=knobs.to_dict(found.setting),
                    status="ok",
                    timings={},
                    time="",
                )


def recorded(files: Sequence[Path]) -> list[Outcome]:
    """What was measured, within each run and between each two."""
    from lntune.compare import compare

    runs = {path.stem: _read(path) for path in files}
    outcomes = []
    for name, records in runs.items():
        rounds = int(numpy.median([len(r.timings["tuned"].samples_us) for r in records]))
        outcomes.append(resampled(records, f"resampled from {name}"))
        found = list(certainty.verdicts(paired_in(records)))
        outcomes.append(Outcome(f"recorded, {name}", "paired", rounds, [found], []))
    for one, other in itertools.combinations(files, 2):
        result = compare(str(one), str(other))
        found = [c.verdict for c in result.cases]
        kind = f"recorded, {one.stem} and {other.stem}"
        outcomes.append(Outcome(kind, "two runs", 0, [found], []))
    return outcomes


def shipped() -> Outcome:
    """Each two of the shipped runs that have kernels in common, with LEAST_CASES at least."""
    runs: dict[str, dict[Case, Record]] = {}
    for path in sorted((ROOT / "tuning_logs").glob("*/*.jsonl")):
        for record in read_file(path, "final"):
            runs.setdefault(f"{path.parent.name} {record.run}", {})[record.case] = record
    for path in sorted((ROOT / "bench" / "results").glob("*/l*.json")):
        measured = msgspec.convert(
            msgspec.json.decode(path.read_bytes()).get("records", []), list[Record]
        )
        runs[str(path)] = {r.case: r for r in measured if r.role == "bench"}
    families = []
    for one, other in itertools.combinations(runs.values(), 2):
        same = [c for c in one if c in other and _same_kernel(one[c], other[c])]
        if len(same) >= LEAST_CASES:
            sides = (Runs(name, [run[c] for c in same]) for name, run in (("A", one), ("B", other)))
            (result,) = compare_records(tuple(sides), across_devices=True)
            families.append([c.verdict for c in result.cases])
    return Outcome("recorded, shipped runs of one kernel", "two runs", 0, families, [])


def _same_kernel(a: Record, b: Record) -> bool:
    """Whether two records hold, undisturbed, one schedule with the same knobs."""
    measured = all(r.status == "ok" and not r.disturbance for r in (a, b))
    return measured and (a.schedule, a.knobs) == (b.schedule, b.knobs)


class _File(msgspec.Struct):
    records: list[Record]


def _read(path: Path) -> list[Record]:
    """The records of a run whose samples hold."""
    records = msgspec.json.decode(path.read_bytes(), type=_File).records
    return [r for r in records if not r.disturbance]


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each kind."""
    columns = [
        *key("kind", "sides"),
        Column("rounds"),
        Column("families"),
        Column("cases"),
        Column("wrong"),
        Column("families wrong"),
        Column("SAME"),
        Column("3 % found"),
    ]
    rows = Table(
        "verdicts FASTER and SLOWER where there is no difference, and where B is 3 % faster",
        columns,
    )
    for outcome in outcomes:
        f = outcome.facts
        shares = [f["wrong"], f["families_wrong"], f["same"], f["found"]]
        rows.add(
            outcome.kind,
            outcome.sides,
            str(f["rounds"] or "-"),
            *(str(f[name]) for name in ("families", "cases")),
            *("-" if v is None else f"{100 * v:.1f}%" for v in shares),
        )
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--time", type=float, default=SECONDS, help="seconds a case, to record")
    parser.add_argument("--every", type=int, default=1, help="record every so many cases only")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    given = parser.parse_args()
    if given.record:
        record(given.record, given.time, given.every)
        return
    outcomes = [simulated_pairs(rounds, own) for own in OWN for rounds in ROUNDS]
    outcomes += [simulated_runs(moved, placed) for moved in MOVED for placed in PLACED]
    outcomes += [shipped(), *recorded(given.files)]
    facts = {"cases": [o.facts for o in outcomes]}
    print_table(Output(facts, [table(outcomes)]), console())
    if given.output:
        given.output.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n")


if __name__ == "__main__":
    main()
