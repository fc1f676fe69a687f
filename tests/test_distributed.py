"""Several processes on one machine, as torchrun starts them: one builds, the others wait, and all
call the same kernels.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

import lntune
from lntune.case import Case
from lntune.errors import InputError
from lntune.system import paths, turns
from lntune.torch import dispatch

pytestmark = pytest.mark.slow

TRAIN = """
import os, sys
from datetime import timedelta
import torch, lntune
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from lntune.kernels import compiler

to_file = compiler.to_file
def noted(case, schedule, setting, device, path, *rest):
    with open(sys.argv[1], "a") as file:
        file.write(f"{path.name}\\n")
    return to_file(case, schedule, setting, device, path, *rest)
compiler.to_file = noted

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=90))
rank, world = dist.get_rank(), dist.get_world_size()

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.LayerNorm(24))

def train(net, x):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in net.parameters()]

torch.manual_seed(1)
everything = torch.randn(4 * world, 8)
x = everything.chunk(world)[rank]
alone = train(model(), everything)
ddp = lntune.convert(DistributedDataParallel(model()))
mesh = init_device_mesh("cpu", (world,))
sharded = model()
for layer in sharded:
    fully_shard(layer, mesh=mesh)
sharded = lntune.convert(fully_shard(sharded, mesh=mesh))
for net in (ddp, sharded):
    assert len(lntune.conversion(net).converted) == 2, lntune.conversion(net)
    for one, other in zip(train(net, x), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
digest = lntune.choices_digest(compare=True)
every = [None] * world
dist.all_gather_object(every, digest)
assert every == [digest] * world and len(digest) == 16
if rank == 1:  # another choice on one process is found by all
    lntune.torch.dispatch.served = lambda: {"one case": "another kernel"}
else:
    lntune.torch.dispatch.served = lambda: {"one case": "a kernel"}
try:
    lntune.choices_digest(compare=True)
except lntune.DisagreementError as e:
    assert "another kernel on rank 1" in str(e)
else:
    raise AssertionError("nobody has noticed")
if rank == 0:
    print("trained", world, digest)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_torchrun(count: int, own_cache: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 models convert, train as one process alone does, and all processes call the
    same kernels, each of which one process has built; a process that calls another one is found.
    """
    script, built = tmp_path / "train.py", tmp_path / "built.txt"
    script.write_text(TRAIN)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    root = str(paths.PACKAGE.parent)
    done = subprocess.run(
        [sys.executable, *command, str(script), str(built)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"trained {count} " in done.stdout
    names = built.read_text().split()
    assert names and len(names) == len(set(names)), "one process builds a kernel, the others wait"


BUILD = """
import sys, time
from pathlib import Path
from lntune import device, schedule
from lntune.case import Case
from lntune.kernels import cache, compiler

if sys.argv[1] == "hang":
    def to_file(*_):
        print("building", flush=True)
        time.sleep(600)
    compiler.to_file = to_file
here, case = device.current(), Case("layer_norm", 24, "float32", 8)
plan = schedule.get("cached_rows")
print(cache.prepare(case, plan, plan.default(case, here), here), flush=True)
"""


def build(how: str) -> subprocess.Popen[str]:
    """A process that builds a kernel, or begins to."""
    root = str(paths.PACKAGE.parent)
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_nobody_waits_for_the_dead(own_cache: Path) -> None:
    """A process that is killed while it builds gives up its turn: the one that waited builds."""
    first = build("hang")
    assert first.stdout is not None and first.stdout.readline() == "building\n"
    second = build("well")
    time.sleep(0.5)
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    out, _ = second.communicate(timeout=100)
    assert second.returncode == 0 and Path(out.strip()).is_file()


def test_waiting_ends(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the limit a kernel is built here as well, which is logged, however long the other
    process takes; before, that it is waited for.
    """
    monkeypatch.setattr(turns, "LIMIT", 0.3)
    monkeypatch.setattr(turns, "SAID", 0.1)
    path = paths.cached("kernels", "some.so")
    name = paths.cached("turns", "some.so.lock")
    name.parent.mkdir()
    with (
        filelock.FileLock(name),
        caplog.at_level(logging.INFO, "lntune"),
        turns.turn(path) as made,
    ):
        assert not made
    said = [record.message for record in caplog.records]
    assert "waiting for another process that builds some.so" in said[0]
    assert "it is built here as well" in said[-1]


def test_what_another_has_built_is_taken(own_cache: Path) -> None:
    """Who waited is told that there is a new file; who did not wait, or finds the old one, is
    not.
    """
    path = paths.cached("kernels", "some.so")
    path.parent.mkdir()
    answers: list[bool] = []

    def second() -> None:
        with turns.turn(path) as made:
            answers.append(made)

    with turns.turn(path) as made:
        assert not made
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.2)
        path.write_text("built")
    waiting.join()
    second()
    assert answers == [True, False]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_has_no_turns(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is waited for where no lock can be made."""
    own_cache.chmod(0o500)
    with turns.turn(own_cache / "kernels" / "some.so") as made:
        assert not made
    own_cache.chmod(0o700)


def test_locks_that_cannot_be_made(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a lock cannot be made or taken, kernels are built all the same."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(turns.os, "open", refuse)
        with turns.turn(paths.cached("kernels", "some.so")) as made:
            assert not made
    monkeypatch.setattr(turns.fcntl, "flock", refuse)
    with turns.turn(own_cache / "kernels" / "some.so") as made:
        assert not made


def test_the_digest_tells_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes with what serves a case that was met, and with nothing else; nothing was met after
    a reload.
    """
    lntune.reload()
    nothing = lntune.choices_digest()
    case = Case("layer_norm", 24, "float32", 8)
    dispatch.kernel_for(case)
    first = lntune.choices_digest()
    assert first != nothing and first == lntune.choices_digest()
    (words,) = dispatch.served().values()
    assert words.startswith("cached_rows (") and "version " in words
    monkeypatch.setitem(dispatch._kernels, next(iter(dispatch._kernels)), None)
    assert dispatch.served() != {} and lntune.choices_digest() != first
    lntune.reload()
    assert lntune.choices_digest() == nothing
    with pytest.raises(InputError, match="init_process_group"):
        lntune.choices_digest(compare=True)
