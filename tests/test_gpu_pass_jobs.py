"""What tools/gpu_pass.sh measures and checks, job by job on a GPU that is imagined, and on a real
one: kernels that are right and some that are not, the kernels of round trips, what is built
beforehand.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import typer
from on_gpu import Here, here
from typer.testing import CliRunner

from lntune import ops
from lntune.backends import cuda, device_of
from lntune.backends.cuda import backend as cuda_backend
from lntune.backends.cuda import sass
from lntune.backends.cuda import timing as device_timing
from lntune.case import Case
from lntune.cli import app
from lntune.commands.gpu_pass import (
    checks,
    one,
    parts,
    perform,
    plan,
    prebuild,
    roundtrips,
    run,
    speed,
    works,
)
from lntune.commands.gpu_pass.child import Child
from lntune.commands.gpu_pass.jobs import (
    Answer,
    Beside,
    Called,
    Compare,
    Copy,
    Find,
    Job,
    RoundTrip,
    Sequence,
)
from lntune.errors import BuildError, InputError
from lntune.kernels import cache

__all__ = ["here"]
CASE = plan.case_of(plan.FORWARD, 40, "float32", 3)
BACKWARD = plan.case_of(plan.BACKWARD, 40, "float32", 3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A yardstick that takes no time; clocks of this test's GPU serve no other."""
    monkeypatch.setattr(device_timing, "COPY_BYTES", 1 << 16)
    cuda_backend._clock.cache_clear()
    yield
    cuda_backend._clock.cache_clear()


def done(job: Job) -> Answer:
    """What came of a job in this process; it crosses to another as it is."""
    answer = perform.perform(job)
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer).status == answer.status
    return answer


def compare(here: Here, case: Case = CASE, rows: tuple[int, ...] = (30,)) -> Answer:
    """The default kernel of a case compared with float64."""
    return done(Compare(case, here.device, plan.default_of(case, here.device), rows))


@pytest.mark.parametrize("case", [CASE, BACKWARD], ids=str)
def test_right_kernels(here: Here, case: Case) -> None:
    """Each output is within its tolerance on each number of rows, and the same from a stream and a
    graph.
    """
    answer = compare(here, case)
    assert (answer.status, answer.message) == ("ok", "")
    outputs = {a.name for a in ops.get(case.op).arguments(case) if a.role == "out"}
    assert set(answer.values["errors"]) == outputs
    assert all(0 <= error <= 1 for error in answer.values["errors"].values())


def by_eager(case: Case, spoil: Callable[[torch.Tensor, int], None]) -> Any:
    """A kernel that answers as eager mode does, but for what is then done to its first output; told
    how often it was called.
    """
    arguments, calls = ops.get(case.op).arguments(case), itertools.count()

    def kernel(*values: Any) -> None:
        named = dict(zip([a.name for a in arguments], values, strict=True))
        outputs = [a.name for a in arguments if a.role == "out"]
        made = ops.get(case.op).eager(
            case, {a.name: named[a.name] for a in arguments if a.role != "out"}
        )
        for name in outputs:
            named[name].copy_(made[name])
        spoil(named[outputs[0]], next(calls))

    return kernel


def wrong_later(out: torch.Tensor, _call: int) -> None:
    """From a row on that no candidate is checked on by itself."""
    out[25:] += 1


def unwritten(out: torch.Tensor, _call: int) -> None:
    """An element is left as it was."""
    out[-1, -1] = torch.nan


def another_each_time(out: torch.Tensor, call: int) -> None:
    """Within the tolerance, yet never the same."""
    out[0, 0] *= 1 + call % 2 * 1.2e-7


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_later, "y: .* times what is allowed.*30 rows"),
        (unwritten, "y: 1 element finite where eager has none, or the other way round"),
        (another_each_time, "other bits than a plain call's: (stream|graph): y"),
    ],
)
def test_wrong_kernels(
    spoil: Callable[[torch.Tensor, int], None],
    message: str,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong from a later turn on, is not written, or depends on when it runs, is found."""
    if here.real:
        pytest.skip("eager's kernels are those of the CPU here")
    monkeypatch.setattr(checks, "load", lambda *_: by_eager(CASE, spoil))
    answer = compare(here)
    assert answer.status == "wrong"
    assert re.search(message, answer.message), answer.message


def test_a_kernel_that_raises(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the answer, with its reason."""

    def raises(*_: Any) -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(checks, "load", lambda *_: raises)
    answer = compare(here)
    assert (answer.status, answer.message) == (
        "failed",
        "RuntimeError: unspecified launch failure",
    )
    assert not answer.lost


@pytest.mark.parametrize("kernel", roundtrips.BLOCKS)
def test_round_trips(here: Here, kernel: str) -> None:
    """Every kernel is launched, on a GPU comes back, and says what a round trip takes."""
    answer = done(RoundTrip(here.device, kernel, 0.01))
    assert answer.status == "ok", answer.message
    assert ("cycles" in answer.values) == (kernel != "empty_node")
    if not here.real and kernel != "empty_node":
        assert answer.values["cycles"] == 1


def test_a_wait_that_was_given_up(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no measurement."""
    monkeypatch.setattr(roundtrips.launcher, "load", lambda _: lambda out, flags: out[:1].fill_(-1))
    answer = done(RoundTrip(here.device, "l2_flag", 0.01))
    assert answer.status == "failed" and "given up" in answer.message


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_round_trips_compile(arch: str) -> None:
    """The CUDA compiler takes them; where there are clusters their barriers and distributed shared
    memory are in the machine code, and flags are loaded and stored past L1.
    """
    if why := cuda.available():
        pytest.skip(why)
    compiled = cuda.to_cubin(roundtrips.SOURCE.read_text(), arch)
    assert "spill stores" not in compiled.log or ", 0 bytes spill stores" in compiled.log
    for kernel in roundtrips.BLOCKS:
        assert f".entry {kernel}(" in compiled.ptx
    for instruction in ("barrier.cluster.arrive", "mapa.shared::cluster", "st.release.cluster"):
        assert (instruction in compiled.ptx) == (arch != "sm_80")
    for instruction in ("ld.acquire.gpu", "st.release.gpu"):
        assert instruction in compiled.ptx
    codes, reason = sass.disassemble(compiled.cubin)
    assert reason or set(codes) == set(roundtrips.BLOCKS)


def test_yardsticks_and_speeds(here: Here) -> None:
    """A copy, a case as it is called, a candidate beside the default, a sequence: all have figures,
    and what is compared is right.
    """
    answer = done(Copy(here.device, 1 << 16, 0.01))
    assert answer.status == "ok" and answer.values["gbps"] > 0
    for case in (CASE, BACKWARD):
        answer = done(Called(case, here.device, 0.01))
        assert answer.status == "ok", answer.message
        assert {"eager", "tuned", "copy"} <= set(answer.values["us"]) == set(answer.values["gbps"])
        assert answer.values["schedule"] and answer.values["errors"]
    (trial,) = plan.TINY.trials
    candidate, default = plan.other(trial, here.device), plan.default_of(trial.case, here.device)
    assert candidate is not None and candidate != default
    answer = done(Beside(trial.case, here.device, candidate, default, 0.01))
    assert answer.status == "ok", answer.message
    assert set(answer.values["us"]) == {"candidate", "default"} and answer.values["faster"] > 0
    assert answer.values["knobs"]["threads_per_row"] == trial.knobs["threads_per_row"]
    answer = done(Sequence(here.device, 2, 16, "float32", 3, 0.01))
    assert answer.status == "ok", answer.message
    assert set(answer.values["us"]) >= {"lntune", speed.IN_TURN, "eager loop", "nn.LSTM"}
    assert answer.values["off"] < 1e-4 and answer.values["notes"] == []


def test_eager_mode_is_not_timed_for_a_kernel(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel, calls are eager mode's; that is a failure here, no figure."""

    def missing(*_: Any) -> None:
        raise BuildError("it is not in the cache")

    monkeypatch.setattr(cache, "kernel", missing)
    for job in (
        Called(msgspec.structs.replace(CASE, hidden=72), here.device, 0.01),
        Sequence(here.device, 2, 24, "float32", 3, 0.01),
    ):
        answer = done(job)
        assert answer.status == "failed" and "no kernel" in answer.message, answer


def test_a_candidate_that_is_wrong_is_not_timed(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time would say nothing."""
    if here.real:
        pytest.skip("eager's kernels are those of the CPU here")
    (trial,) = plan.TINY.trials
    default = plan.default_of(trial.case, here.device)
    monkeypatch.setattr(checks, "load", lambda *_: by_eager(trial.case, unwritten))
    answer = done(Beside(trial.case, here.device, default, default, 0.01))
    assert answer.status == "wrong" and "us" not in answer.values


def test_built_beforehand(here: Here, own_cache: Path) -> None:
    """`lntune build --gpu-pass` builds every kernel of the first part, once, and the first part
    finds all of them.
    """
    if here.real:
        pytest.skip("takes minutes")
    listed = plan.kernels(here.device, plan.TINY)
    assert works.missing(listed, here.device)
    numbers: list[int] = []
    built = prebuild.build([here.device], lambda number, *_: numbers.append(number))
    assert {one.status for one in built} == {"built"}, [one.message for one in built]
    assert sorted(numbers) == list(range(len(listed)))
    assert works.missing(listed, here.device) == []
    assert all(roundtrips.path_of(k, here.device.isa).is_file() for k in roundtrips.BLOCKS)
    assert {one.status for one in prebuild.build([here.device])} == {"there"}


def test_build_for_the_pass_refuses(own_cache: Path) -> None:
    """It is for GPUs, and chooses sizes and knobs itself."""
    with pytest.raises(InputError, match=r"--target: got .*, expected a GPU"):
        prebuild.build([device_of("cpu")])
    for option in (("--hidden", "40"), ("--archs", "sm_80"), ("--strided",)):
        target = ("--target", "cuda:sm_90")
        result = CliRunner().invoke(app, ["build", "--gpu-pass", *target, *option])
        assert result.exit_code == 2 and "--gpu-pass: got" in result.output


def test_kernels_in_a_process_of_their_own(
    here: Here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that watches a process sees the kernel, which says whether it is right."""
    kernel = one.Kernel(CASE, plan.default_of(CASE, here.device), 30)
    text = msgspec.json.encode([kernel]).decode()
    assert one.main("check", "cuda", text) == 0
    assert one.main("profile", "cuda", text) == 0
    printed = capsys.readouterr().out
    assert "30 rows: right" in printed and "profiled layer_norm 30x40" in printed
    if not here.real:
        monkeypatch.setattr(checks, "load", lambda *_: by_eager(CASE, wrong_later))
        assert one.main("check", "cuda", text) == 1


def test_a_process_for_jobs(here: Here) -> None:
    """It finds the device, and says what it cannot find; the next job has its answer all the
    same.
    """
    with Child() as child:
        assert child.do(Find("cuda:7"), 120).status == "failed"
        answer = child.do(Find("cuda"), 120)
    assert answer.status == "ok", answer.message
    assert answer.values["device"]["isa"] == here.device.isa
    sizes = msgspec.convert(answer.values["sizes"], plan.Sizes)
    assert sizes == here.pick(plan.FULL, plan.TINY)


def test_what_programs_are_told(tmp_path: Path) -> None:
    """The commands of lntune's that parts run have these options."""
    commands: Any = typer.main.get_command(app)
    bringup = works.bringup("cuda:1", tmp_path / "tuning_logs").words
    build = ("lntune", "build", "--gpu-pass", "--target", "cuda")
    for words in (bringup[2:], build):
        name = words[1]
        given = [word.replace(run.LEFT, "9") for word in words[2:]]
        context = commands.commands[name].make_context(name, given)
        assert context.params["target"] == words[words.index("--target") + 1]
    assert parts.NUMBERS == (1, 2, 3)
    text = json.dumps(msgspec.to_builtins(plan.TINY))
    assert msgspec.json.decode(text, type=plan.Sizes) == plan.TINY
