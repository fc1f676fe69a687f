"""Time loops as graphs: when one is captured, what a replay gives, and when a loop stays as it
is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import Recorder

from lntune.case import Case
from lntune.device import Device
from lntune.log import cases
from lntune.torch import devices, dispatch, graphs, recording

GPU = Device("gpu", "imagined", "sm_90", 132, l2=50 << 20, shared_memory=227 * 1024)


class Loop:
    """A time loop that counts how often it is computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        times: list[int],
        into: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        outputs = (sum(times) * x if y is None else x + y, x.sum().reshape(1))
        if into is None:
            return outputs
        return tuple(place.copy_(t) for place, t in zip(into, outputs, strict=True))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU count as a GPU's, and a graph is a function called again."""
    monkeypatch.setattr(devices, "_known", lambda kind, index: GPU)
    monkeypatch.setattr(graphs, "Recorder", Recorder)
    monkeypatch.delenv("LNTUNE_CUDA_GRAPHS", raising=False)
    graphs.forget()
    yield
    graphs.forget()


def replayed() -> int:
    """Loops that have a graph."""
    return sum(seen.replay is not None for seen in graphs._seen.values())


def test_a_loop_is_captured_at_its_second_call() -> None:
    """The first call may be the only one; from the second on a graph gives what the loop gives, for
    other values too, in tensors that stay.
    """
    loop, results = Loop(), []
    for step in range(4):
        x, y = torch.full((3, 2), float(step)), torch.ones(3, 2)
        results.append((graphs.run(loop, (x, y), ([1, 2],)), x + y))
        assert replayed() == (step > 0)
    for (total, row_sum), expected in results:
        assert torch.equal(total, expected)
        assert row_sum == (expected - 1).sum()


def test_another_shape_dtype_or_option_is_another_loop() -> None:
    """A graph serves nothing but calls like the one it was captured from; a missing tensor is a
    difference, too.
    """
    loop, x, y = Loop(), torch.ones(3), torch.ones(3)
    for tensors, options in (
        ((x, y), ([1],)),
        ((x, None), ([1],)),
        ((x, None), ([2],)),
        ((x.double(), y.double()), ([1],)),
        ((torch.ones(4), torch.ones(4)), ([1],)),
    ):
        for _ in range(2):
            outputs = graphs.run(loop, tensors, options)
            assert torch.equal(outputs[0], Loop()(*tensors, *options)[0])
    assert replayed() == 5


def test_inputs_may_be_views() -> None:
    """Strided and expanded inputs are copied as their values are."""
    loop = Loop()
    for step in range(3):
        x, y = torch.arange(6.0).view(2, 3).t() + step, torch.ones(1, 2).expand(3, 2)
        assert torch.equal(graphs.run(loop, (x, y), ([1],))[0], x + y)


def test_inference_mode_leaves_no_mark() -> None:
    """A graph captured in inference mode serves outside of it, and the other way round."""
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        loop = Loop()
        for step in range(4):
            with modes[step // 2]():
                x = torch.full((3,), float(step))
                assert torch.equal(graphs.run(loop, (x, x), ([1],))[0], 2 * x)
        assert replayed() == 1
        graphs.forget()


def test_replays_are_recorded(tmp_path: Path) -> None:
    """Where cases are recorded each call of a kernel in a loop counts once, whether the loop runs
    or its graph does, and the capture not at all; a graph of before the recording is made anew.
    """
    case, path = Case("lnlstm_step", 16, "float32", 2), tmp_path / "cases.jsonl"

    class Noting(Loop):
        replayed = False

        def __call__(self, *arguments: Any, **given: Any) -> tuple[torch.Tensor, ...]:
            if not self.replayed:  # which does not go through Python
                for _ in range(5):
                    recording.noted(lambda: None, case, GPU)()
            return super().__call__(*arguments, **given)

    x, before = torch.ones(3), Loop()
    for _ in range(3):
        graphs.run(before, (x, x), ([1],))
    with recording.record_cases(path):
        assert replayed() == 0
        loop = Noting()
        for _ in range(4):
            graphs.run(loop, (x, x), ([1],))
            loop.replayed = replayed() == 1
        assert loop.replayed
    (what, tally), *others = cases.read(path).items()
    assert (what.op, what.rows, what.device, tally) == (case.op, 2, GPU, cases.Tally(20))
    assert not others


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails is said once and not tried again; the loop goes on without."""
    tries = []

    def refuse(*_: Any) -> Any:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "first", refuse)
    loop, x = Loop(), torch.ones(3)
    graphs.run(loop, (x, x), ([1],))
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        graphs.run(loop, (x, x), ([1],))
    assert torch.equal(graphs.run(loop, (x, x), ([1],))[0], 2 * x)
    assert len(tries) == 1 and loop.calls == 3


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond CAPACITY the one that was not used for longest goes, with its memory."""
    monkeypatch.setattr(graphs, "CAPACITY", 2)
    loop = Loop()
    for size in (1, 2, 3):
        for _ in range(2):
            graphs.run(loop, (torch.ones(size), None), ([1],))
    assert replayed() == 2
    assert [key[1][0][0] for key, seen in graphs._seen.items() if seen.replay] == [(2,), (3,)]


def test_loops_that_never_come_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of loops without a graph the latest REMEMBERED are known, however many there were; graphs
    stay.
    """
    monkeypatch.setattr(graphs, "CAPACITY", 2)
    monkeypatch.setattr(graphs, "REMEMBERED", 4)
    loop = Loop()
    for _ in range(2):
        graphs.run(loop, (torch.ones(1), None), ([1],))
    for size in range(2, 40):
        graphs.run(loop, (torch.ones(size), None), ([1],))
    assert replayed() == 1
    assert len(graphs._seen) <= graphs.CAPACITY + graphs.REMEMBERED
    calls = loop.calls
    graphs.run(loop, (torch.ones(1), None), ([1],))
    assert loop.calls == calls + 1  # its replay, see `Recorder`
    for _ in range(2):
        graphs.run(loop, (torch.ones(39), None), ([1],))
    assert replayed() == 2


def test_no_graph_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_CUDA_GRAPHS=0 and CPUs leave loops as they are; reload drops what was captured, since
    other kernels may serve then.
    """
    loop, x = Loop(), torch.ones(3)
    monkeypatch.setenv("LNTUNE_CUDA_GRAPHS", "0")
    for _ in range(3):
        graphs.run(loop, (x, x), ([1],))
    assert loop.calls == 3 and replayed() == 0
    monkeypatch.delenv("LNTUNE_CUDA_GRAPHS")
    for _ in range(2):
        graphs.run(loop, (x, x), ([1],))
    assert replayed() == 1
    dispatch.reload()
    assert replayed() == 0
    monkeypatch.setattr(devices, "_known", lambda kind, index: Device("cpu", "c", "x86-64", 2))
    for _ in range(3):
        graphs.run(loop, (x, x), ([1],))
    assert replayed() == 0
