"""Tuning on a GPU, imagined (tests/fake_gpu.py): kernels are built ahead, launched through the
launcher and run by the emulator.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gpu import FakeGpu
from typer.testing import CliRunner

from lntune import knobs, schedule, tune
from lntune.backends import device_of
from lntune.backends.cuda import backend as cuda_backend
from lntune.backends.cuda import launcher, model
from lntune.case import Case
from lntune.cli import app
from lntune.device import Device
from lntune.errors import InputError
from lntune.kernels import cache
from lntune.log import records
from lntune.log.records import Record
from lntune.measure import trial
from lntune.measure.jobs import Build, Candidate, Open, Try
from lntune.tune import Progress, Settings, builders, times

FAULTY = Path(__file__).parent / "faulty_gpu"
LONG = 600.0
"""Seconds for a run that never ends for want of them."""
CASE = Case("layer_norm", 64, "float32", 8)
OTHER = Case("layer_norm", 96, "bfloat16", 4)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedules of tests/faulty_gpu beside the shipped ones, finals as short as they may be,
    however long the run, and one process that builds: each imports PyTorch and TVM.
    """
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(FAULTY))
    monkeypatch.setattr(times, "FINAL_SHARE", 1e-4)
    monkeypatch.setattr(builders, "MOST", 1)
    schedule._load.cache_clear()
    cuda_backend._clock.cache_clear()
    yield
    schedule._load.cache_clear()
    cuda_backend._clock.cache_clear()


@pytest.fixture
def device(fake_gpu: FakeGpu) -> Device:
    """The imagined GPU."""
    return launcher.device(0)


def alive(pid: int) -> bool:
    """Whether a process is there and not only waits to be waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(of: int | None = None) -> set[int]:
    """Processes that this one, or another, has started and that still are."""
    pids = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == (of or os.getpid()):
            pids.add(int(stat.parent.name))
    return pids


def logged(folder: Path, role: str = "trial") -> list[Record]:
    """The records of the test's log, by role."""
    return [r for r in records.read([folder]) if r.role == role]


def candidate(name: str, device: Device) -> Candidate:
    """A schedule at its default knobs."""
    return Candidate.of(name, schedule.get(name).default(CASE, device))


def job(name: str, device: Device) -> Try:
    """A short trial of a schedule at its default knobs."""
    return Try(CASE, device, candidate(name, device), 0.001)


@pytest.mark.slow
def test_a_run_on_a_gpu(device: Device, log_dir: Path) -> None:
    """Two cases: trials and finals of the GPU, with its clocks, everyone measured, each trial
    beside what the model predicts; winners are in the cache of kernels, and no process is left.
    """
    before = children()
    seen: list[tuple[str, int]] = []
    asked = Settings(trials=2, seconds=LONG, device=device, schedules=("shared_row",))
    summary = tune.tune([CASE, OTHER], asked, lambda p: seen.append((p.phase, p.index)))
    trials, finals = logged(log_dir), logged(log_dir, "final")
    assert (summary.statuses, summary.untuned, summary.interrupted) == ({"ok": 4}, {}, False)
    assert [t.case for t in trials] == [CASE] * 2 + [OTHER] * 2
    assert summary.finals == finals
    assert [f.case for f in finals] == [CASE, OTHER]
    for record in (*trials, *finals):
        assert record.device == device
        assert set(record.clocks) == {1980}
        assert 0 < record.errors["y"] <= 1
        # of the little code that stands for a kernel on an imagined GPU
        counts = [record.instructions, *(rival.instructions for rival in record.rivals)]
        assert all(counts)
    for pair, record in zip(summary.pairs, trials, strict=True):
        assert pair.what.startswith(f"{record.case} {record.schedule} threads_per_row=")
        assert pair.measured_us == record.timings["tuned"].median_us
        assert pair.predicted_us == model.predict(pair.parts, pair.least, device).us > 0
    for final in finals:
        assert set(final.timings) == {"tuned", "default", "eager", "copy"}
        plan = schedule.get(final.schedule)
        assert cache.built(final.case, plan, knobs.from_dict(plan.knobs, final.knobs), device)
    first = schedule.get("shared_row")
    assert trials[0].knobs == Candidate.of("shared_row", first.default(CASE, device)).knobs
    assert ("final", 0) in seen and ("done", 1) in seen
    assert children() == before


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_among_broken_schedules(device: Device, log_dir: Path) -> None:
    """What crashes its builder, stalls it, answers wrongly or breaks the GPU's context is logged as
    that, and the sound one wins.
    """
    expected = {
        "crashes": "compile",
        "stalls": "timeout",
        "misses": "wrong",
        "strays": "run",
        "sound": "ok",
    }
    before = children()
    # Defaults come first, whatever the rank; the sound one has three more.
    asked = Settings(
        seconds=LONG,
        trials=len(expected) + 3,
        device=device,
        schedules=tuple(expected),
        timeout=4.0,
        search="exhaustive",
    )
    seen: dict[str, Record] = {}

    def enough(progress: Progress) -> None:
        seen.update({r.schedule: r for r in logged(log_dir)})
        if progress.phase == "search" and set(seen) == set(expected):
            raise KeyboardInterrupt

    summary = tune.tune([CASE], asked, enough)
    assert {name: r.status for name, r in seen.items()} == expected
    assert "SIGABRT" in seen["crashes"].message
    assert "LAUNCH_FAILED" in seen["strays"].message
    assert "times what is allowed" in seen["misses"].message
    assert all(not r.timings for r in seen.values() if r.status != "ok")
    (final,) = summary.finals
    assert (final.schedule, final.status) == ("sound", "ok")
    assert summary.interrupted
    assert children() == before


def test_a_broken_context(device: Device, fake_gpu: FakeGpu) -> None:
    """After an error that stays the outcome says that the process is of no more use; after one that
    does not, that it is.
    """
    outcome = trial.run(job("strays", device))
    assert (outcome.status, outcome.lost) == ("run", True)
    assert trial.run(Open(device)).message == "RuntimeError: CUDA error: unspecified launch failure"
    assert len(fake_gpu.errors) == 1
    fake_gpu.errors.clear()
    fake_gpu.install(lambda *_: None)
    assert trial.run(Open(device)).status == "ok"
    fake_gpu.fail("cuLaunchKernel", 701)
    outcome = trial.run(job("sound", device))
    assert (outcome.status, outcome.lost) == ("run", False)
    assert "OUT_OF_RESOURCES" in outcome.message


def test_a_trial_uses_what_was_built_ahead(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that only builds leaves the kernel in the cache and tells what is known of it; the
    trial compiles nothing any more.
    """
    built = trial.run(Build(CASE, device, candidate("sound", device)))
    assert built.status == "ok" and built.facts is not None and built.seconds > 0
    (kernel,) = built.facts.kernels
    assert (kernel.resources.registers, built.facts.problems) == (32, ())
    assert cache.built(
        CASE, schedule.get("sound"), schedule.get("sound").default(CASE, device), device
    )
    monkeypatch.setattr("lntune.backends.cuda.stored.binary", lambda *_: pytest.fail("built again"))
    outcome = trial.run(job("sound", device))
    assert outcome.status == "ok" and outcome.timings["tuned"].median_us > 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_interrupt_ends_the_builders(device: Device, log_dir: Path) -> None:
    """Ctrl-C in the search: the case is settled with what there is, later cases are left, and no
    process goes on building. In every run test_ctrl_c has an interrupt.
    """
    before = children()

    def interrupt(progress: Progress) -> None:
        if progress.trials == 1 and progress.phase == "search":
            raise KeyboardInterrupt

    summary = tune.tune(
        [CASE, OTHER], Settings(seconds=LONG, device=device, schedules=("shared_row",)), interrupt
    )
    assert summary.interrupted
    assert [f.case for f in logged(log_dir, "final")] == [CASE]
    assert len(logged(log_dir)) == 1
    assert children() == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_command(device: Device, log_dir: Path) -> None:
    """`lntune tune --target cuda` tunes for the GPU, shows its table as for a CPU, and counts what
    was pruned among the trials. In every run test_ctrl_c has the command.
    """
    sizes = ["--hidden", "64", "--dtype", "float32", "--rows", "8", "--schedule", "shared_row"]
    done = CliRunner().invoke(app, ["tune", *sizes, "--target", "cuda", "--trials", "2", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["statuses"]["ok"] == 2
    assert facts["trials"] == sum(facts["statuses"].values())
    (case,) = facts["cases"]
    assert case["device"] == device.slug
    assert {r.device for r in logged(log_dir)} == {device}


@pytest.mark.slow
def test_ctrl_c(device: Device, log_dir: Path) -> None:
    """SIGINT to `lntune tune --target cuda`: it ends with what was found, exit code 0, and none of
    its processes is left.
    """
    brief = (
        "from lntune.tune import times; times.FINAL_SHARE = 1e-4;"
        " from lntune.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        brief,
        "tune",
        "--hidden",
        "64",
        "--dtype",
        "float32",
        "--rows",
        "8",
        "--target",
        "cuda",
        "--budget",
        "10m",
    ]
    command += ["--schedule", "shared_row"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            end = time.monotonic() + 120
            while (
                not (log_dir.exists() and logged(log_dir))
                and run.poll() is None
                and time.monotonic() < end
            ):
                time.sleep(0.1)
            of_its_own = children(run.pid)
            os.kill(run.pid, signal.SIGINT)
            out, err = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 0, out + err
    assert "(interrupted)" in out
    assert len(of_its_own) >= 2  # the one that measures, and builders
    assert not [pid for pid in of_its_own if alive(pid)]
    assert logged(log_dir, "final")


def test_a_gpu_that_is_not_here(log_dir: Path) -> None:
    """Tuning for a GPU of elsewhere is refused before anything is run, with what is here and the
    dry run as a remedy.
    """
    with pytest.raises(InputError, match=r"sm_90.*not here.*none.*--dry-run"):
        tune.tune([CASE], Settings(device=device_of("cuda:sm_90")))
    assert not log_dir.exists()
