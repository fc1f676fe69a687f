"""Recording cases: all calls are seen, whoever serves them and from wherever; nothing is lost
between processes; what goes wrong with the file leaves the program alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lntune
from lntune import device
from lntune.case import MAX_HIDDEN
from lntune.errors import InputError
from lntune.kernels import direct
from lntune.log import cases
from lntune.log.cases import CasesWarning, Tallies, Tally, What
from lntune.torch import layer_norm_node, recording

HERE = device.current()
pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
WEIGHT, BIAS = torch.ones(16), torch.zeros(16)


def counts(path: Path) -> dict[tuple[str, int, str], int]:
    """Calls by operator, rows and variant."""
    return {(w.op, w.rows, w.variant): t.calls for w, t in cases.read(path).items()}


def norm(rows: int = 3) -> None:
    """A norm in inference."""
    lntune.layer_norm(torch.randn(rows, 16), (16,), WEIGHT, BIAS)


def step() -> None:
    """A norm in training."""
    x = torch.randn(3, 16, requires_grad=True)
    lntune.layer_norm(x, (16,), WEIGHT, BIAS).sum().backward()


def strided() -> None:
    """Rows that lie apart."""
    lntune.layer_norm(torch.randn(3, 32)[:, :16], (16,), WEIGHT, BIAS)


def sequence() -> None:
    """Five time steps of two sequences in training."""
    output, _ = lntune.LayerNormLSTM(3, 16)(torch.randn(5, 2, 3))
    output.sum().backward()


def compiled() -> None:
    """A norm in compiled code, in training."""
    torch.compiler.reset()
    x = torch.randn(3, 16, requires_grad=True)
    call = torch.compile(
        lambda x: lntune.layer_norm(x, (16,), WEIGHT, BIAS) * 2, backend="aot_eager", fullgraph=True
    )
    call(x).sum().backward()


FORWARD, KEPT, BACKWARD = "weight+bias", "weight+bias+stats", "dx"
SEEN: dict[str, tuple[Callable[[], None], dict[tuple[str, int, str], int]]] = {
    "inference": (norm, {("layer_norm", 3, FORWARD): 1}),
    "training": (step, {("layer_norm", 3, KEPT): 1, ("layer_norm_backward", 3, "weight+dx"): 1}),
    "strided": (strided, {("layer_norm", 3, FORWARD): 1}),
    "compiled": (
        compiled,
        {("layer_norm", 3, KEPT): 1, ("layer_norm_backward", 3, "weight+dx"): 1},
    ),
    "sequence": (
        sequence,
        {
            ("lnlstm_step", 2, "raw+bias+bias_c+stats"): 5,
            ("lnlstm_step_backward", 2, "raw+bias+bias_c"): 5,
        },
    ),
}


@pytest.mark.parametrize("way", SEEN)
@pytest.mark.parametrize("node", [True, False])
def test_every_way_of_a_call_is_counted(
    way: str, node: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls on the direct path as on the general one, backwards in C++ and in Python, in compiled
    code and in sequences: each is counted once, with its time.
    """
    if node:
        layer_norm_node.reason_missing()
    else:
        monkeypatch.setattr(layer_norm_node, "ready", lambda: False)
        monkeypatch.setattr(layer_norm_node, "compile_once", lambda: False)
        lntune.reload()
    call, expected = SEEN[way]
    with lntune.record_cases(tmp_path / "cases.jsonl"):
        for _ in range(4):
            call()
    assert counts(tmp_path / "cases.jsonl") == {key: 4 * count for key, count in expected.items()}
    for what, tally in cases.read(tmp_path / "cases.jsonl").items():
        assert (what.hidden, what.dtype, what.device, what.reason) == (16, "float32", HERE, "")
        assert tally.timed == tally.calls and tally.us > 0


def test_calls_that_eager_mode_serves_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for which it was chosen, with all that is asked and at once; and those that no kernel
    takes, with the reason.
    """
    path = tmp_path / "cases.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("lntune.torch.dispatch._obtain", lambda *key: decided(key))
        lntune.reload()
        with lntune.record_cases(path):
            for _ in range(3):
                norm()
    lntune.reload()
    assert counts(path) == {("layer_norm", 3, FORWARD): 3}
    with lntune.record_cases(path):
        lntune.layer_norm(torch.randn(2, 16, dtype=torch.float64), (16,))
        lntune.layer_norm(torch.randn(1, MAX_HIDDEN + 1), (MAX_HIDDEN + 1,))
        lntune.LayerNormLSTM(3, 16, per_gate=True)(torch.randn(5, 2, 3))
    others = {(w.op, w.dtype, w.rows): (w.reason, t.calls) for w, t in cases.read(path).items()}
    assert others["layer_norm", "float64", 2] == ("float64 is not built", 1)
    assert "is not built" in others["layer_norm", "float32", 1][0]
    assert others["lnlstm_step", "float32", 2][1] == 5
    assert all(cases.why_not(w) == w.reason for w in cases.read(path))


def decided(key: tuple[object, ...]) -> None:
    """Eager mode was chosen."""
    from lntune.torch import dispatch

    dispatch._decided_on_eager.add(key)  # type: ignore[arg-type]


def test_nothing_is_counted_without_a_file(tmp_path: Path) -> None:
    """Before, between and behind recordings; one inside another has its own."""
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    norm()
    with lntune.record_cases(outer):
        norm()
        with lntune.record_cases(inner):
            norm()
    norm()
    assert not direct.take_counts() and not recording.SINKS
    assert (counts(outer), counts(inner)) == (
        {("layer_norm", 3, FORWARD): 2},
        {("layer_norm", 3, FORWARD): 1},
    )
    with lntune.record_cases(outer):
        norm(5)
    assert counts(outer) == {("layer_norm", 3, FORWARD): 2, ("layer_norm", 5, FORWARD): 1}


def test_threads(tmp_path: Path) -> None:
    """Calls of several threads at once, on both paths, are all counted."""
    path = tmp_path / "cases.jsonl"

    def work() -> None:
        for _ in range(100):
            norm()
            strided()
            recording.flush()

    threads = [threading.Thread(target=work) for _ in range(4)]
    with lntune.record_cases(path):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts(path) == {("layer_norm", 3, FORWARD): 800}


def test_many_numbers_of_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of them rows are those of their bucket; no call is lost."""
    monkeypatch.setattr(cases, "MOST_ROWS", 8)
    with lntune.record_cases(tmp_path / "cases.jsonl"):
        for rows in range(200, 300):
            norm(rows)
            norm(222)
    found = counts(tmp_path / "cases.jsonl")
    assert len(found) == 8 and sum(found.values()) == 200
    assert found["layer_norm", 222, FORWARD] == 101 and ("layer_norm", 512, FORWARD) in found


PROGRAM = """
import os, sys, time, torch, lntune
x, w, b = torch.randn(3, 16), torch.ones(16), torch.zeros(16)
for _ in range(int(sys.argv[1])):
    lntune.layer_norm(x, (16,), w, b)
if len(sys.argv) > 2:
    print("ready", flush=True)
    time.sleep(60)
"""


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A program that calls a norm."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        env={**os.environ, "LNTUNE_RECORD_CASES": str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    """Several processes that the environment tells to record add to one file, one that is killed
    what it had written before.
    """
    path = tmp_path / "cases.jsonl"
    killed = start(path, "5", "wait")
    assert killed.stdout is not None and killed.stdout.readline() == "ready\n"
    processes = [start(path, str(10 + n)) for n in range(3)]
    for process in processes:
        assert process.communicate(timeout=100) == ("", "")
        assert process.returncode == 0
    deadline = time.monotonic() + 30
    while sum(counts(path).values()) < 38 and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert counts(path) == {("layer_norm", 3, FORWARD): 5 + 10 + 11 + 12}
    assert {p.name for p in tmp_path.iterdir()} == {"cases.jsonl", "cases.jsonl.lock"}


class Normalized(torch.utils.data.Dataset[torch.Tensor]):
    """A norm in a worker of a DataLoader."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return lntune.layer_norm(torch.randn(3, 16), (16,), WEIGHT, BIAS)


def test_forks(tmp_path: Path) -> None:
    """Forked children, workers of a DataLoader among them, count their own calls and none of their
    parent's.
    """
    path = tmp_path / "cases.jsonl"
    with lntune.record_cases(path):
        norm()
        for _ in torch.utils.data.DataLoader(
            Normalized(), num_workers=2, multiprocessing_context="fork"
        ):
            pass
        child = multiprocessing.get_context("fork").Process(target=norm)
        child.start()
        child.join()
        norm()
    assert counts(path) == {("layer_norm", 3, FORWARD): 2 + 6 + 1}


def unusable(folder: Path) -> dict[str, Path]:
    """Files that cannot be recorded to."""
    (folder / "notes.txt").write_text("buy milk\n")
    (folder / "records.jsonl").write_text('{"role": "final"}\n')
    return {
        "a folder": folder,
        "below a file": folder / "notes.txt" / "cases.jsonl",
        "something else": folder / "notes.txt",
        "a tuning log": folder / "records.jsonl",
        "a device": Path("/dev/null"),
    }


@pytest.mark.parametrize(
    "kind", ["a folder", "below a file", "something else", "a tuning log", "a device"]
)
def test_a_file_that_cannot_be_recorded_to(kind: str, tmp_path: Path) -> None:
    """It is said on entering, with its name, and stays as it was; nothing is recorded."""
    path = unusable(tmp_path)[kind]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(InputError, match=path.name), lntune.record_cases(path):
        pytest.fail("it was entered")
    assert not recording.SINKS
    assert not path.is_file() or path.read_bytes() == before


def test_a_bad_file_in_the_environment_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program goes on without recording."""
    monkeypatch.setenv(recording.VARIABLE, str(tmp_path))
    with pytest.warns(CasesWarning, match="LNTUNE_RECORD_CASES.*Nothing is recorded") as caught:
        recording._from_environment()
    assert len(caught) == 1 and not recording.SINKS


def test_a_file_that_cannot_be_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or a folder that went away, is one warning; what was counted is written as soon
    as it can be.
    """
    path = tmp_path / "cases.jsonl"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with lntune.record_cases(path):
        norm()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.warns(CasesWarning, match="No space left"):
                recording.flush()
            norm()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                recording.flush()
        assert counts(path) == {}
        norm()
    assert counts(path) == {("layer_norm", 3, FORWARD): 3}


def test_an_exception_in_the_block_is_the_users(tmp_path: Path) -> None:
    """It passes, and what was counted before is written."""
    with contextlib.suppress(KeyError), lntune.record_cases(tmp_path / "c"):
        norm()
        raise KeyError
    assert counts(tmp_path / "c") == {("layer_norm", 3, FORWARD): 1}


SOME: Tallies = {
    What("layer_norm", 768, "float32", 128, FORWARD, HERE): Tally(9, 9, 81.5),
    What("layer_norm", 768, "float64", 128, "", HERE, "float64 is not built"): Tally(2, 2, 8.0),
    What("lnlstm_step", 512, "bfloat16", 32, "", None): Tally(3),
}


def test_a_file_is_added_to(tmp_path: Path) -> None:
    """Numbers add up, lines of a newer lntune stay, links stay links, as does the file's mode."""
    file, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(file)
    cases.add(link, SOME)
    newer = b'{"schema":99,"op":"layer_norm","hidden":1,"dtype":"x","rows":1,"calls":1}\n'
    file.write_bytes(newer + file.read_bytes())
    file.chmod(0o640)
    cases.add(link, SOME)
    with pytest.warns(CasesWarning, match="line 4.*schema 99"):
        found = cases.read(link)
    assert found == {what: tally.plus(tally) for what, tally in SOME.items()}
    assert link.is_symlink() and newer in file.read_bytes() and file.stat().st_mode & 0o777 == 0o640


def test_those_with_the_most_time_come_first() -> None:
    """Calls that were not timed count as those that were; where none was, what has to be moved
    tells.
    """
    whats = list(SOME)
    assert cases.by_time(SOME) == whats
    assert cases.by_time({**SOME, whats[1]: Tally(200, 2, 8.0)})[0] == whats[1]
    assert cases.case_of(whats[2]) is None and "device" in cases.why_not(whats[2])


def test_a_mutated_file_is_data(tmp_path: Path) -> None:
    """Whatever stands in a file, it is read as cases within bounds, or refused in words."""
    path, rng = tmp_path / "cases.jsonl", random.Random(0)
    cases.add(path, SOME)
    whole = path.read_bytes()
    pieces = [b'"', b"{", b"]", b"1e999", b"-1", b"9" * 400, b"null", b"\xff", b"\n", b"[" * 5000]
    pieces += [
        b"../../x",
        b'"\\u0000"',
        b"nan",
        b"true",
        b'"calls":1',
        b"",
        b"18446744073709551616",
    ]
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CasesWarning)
        for _ in range(400):
            a, b = sorted(rng.randrange(len(whole)) for _ in range(2))
            text = whole[:a] + rng.choice(pieces) + whole[min(b, a + rng.choice((0, 1, 9, 99))) :]
            path.write_bytes(text)
            try:
                found = cases.read(path)
            except InputError as e:
                assert str(path) in str(e)
                refused += 1
                continue
            for what, tally in found.items():
                assert 0 <= tally.timed <= tally.calls <= 2**60 and 0 <= tally.us < float("inf")
                case = cases.case_of(what)
                assert case is None or 1 <= case.hidden <= MAX_HIDDEN
            cases.by_time(found)
    assert refused < 400
    path.write_bytes(b"x" * (cases.MOST_BYTES + 1))
    with pytest.raises(InputError, match="more than 64 MiB"):
        cases.read(path)
