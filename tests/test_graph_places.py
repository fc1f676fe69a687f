"""Time loops as graphs on their callers' memory: nothing is copied where tensors come where others
were, and whatever comes from anywhere, results are a plain call's and stay what they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from imagined_memory import Memory
from on_gpu import Recorder
from torch import Tensor

from lntune.device import Device
from lntune.torch import devices, graphs

GPU = Device("gpu", "imagined", "sm_90", 132, l2=50 << 20, shared_memory=227 * 1024)
ROWS, HIDDEN = 8, 32


def forward(
    x: Tensor, matrix: Tensor, gain: Tensor, into: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """As a time loop: (a large output, what the backward needs, a small output)."""
    kept = x @ matrix.t()
    return written((kept * gain, kept, kept[-1] + gain), into)


def backward(
    dy: Tensor, kept: Tensor, x: Tensor, matrix: Tensor, into: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """As its backward."""
    return written((dy @ matrix, (dy * kept).t() @ x), into)


def written(values: tuple[Tensor, ...], into: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """The values, where they are wanted."""
    if into is None:
        return values
    return tuple(place.copy_(value) for place, value in zip(into, values, strict=True))


def set_up(patch: pytest.MonkeyPatch) -> Memory:
    """Tensors of the CPU count as a GPU's, outputs come from an imagined memory."""
    memory = Memory()
    patch.setattr(devices, "_known", lambda kind, index: GPU)
    patch.setattr(graphs, "Recorder", Recorder)
    patch.setattr(graphs, "_new", memory.like)
    patch.setattr(graphs, "traffic", graphs.Traffic())
    patch.delenv("LNTUNE_CUDA_GRAPHS", raising=False)
    graphs.forget()
    return memory


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """The imagined memory of a GPU."""
    yield set_up(monkeypatch)
    graphs.forget()


class Layer:
    """Parameters in the imagined memory, whose products are exact in whatever order."""

    def __init__(self, memory: Memory, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randint(-2, 3, (HIDDEN, HIDDEN), generator=generator) / 8
        self.matrix = memory.copy(matrix)
        self.gain = memory.copy(torch.randint(-2, 3, (HIDDEN,), generator=generator))

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """By whatever graph; compared with a plain call."""
        return checked(forward, (x, self.matrix, self.gain))


def checked(loop: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> Any:
    """What graphs.run gives, which is what the loop gives."""
    outputs = graphs.run(loop, tensors, ())
    for ours, plain in zip(outputs, loop(*tensors), strict=True):
        assert torch.equal(ours, plain)
    return outputs


def train(memory: Memory, layers: Sequence[Layer], steps: int, hold: bool) -> list[int]:
    """Iterations of training, each of which changes the parameters; tensors that each copied."""
    copied, held = [], None
    for step in range(steps):
        before = graphs.traffic.tensors
        inputs, kept = [memory.copy(torch.full((ROWS, HIDDEN), step % 7 + 1.0))], []
        for layer in layers:
            y, saved, last = layer(inputs[-1])
            inputs.append(y)
            kept.append(saved)
            del y, saved, last
        held = inputs[-1] if hold else None
        gradient = memory.copy(inputs[-1] * 0.1)
        for layer in reversed(layers):
            inputs.pop()
            gradient, dmatrix = checked(backward, (gradient, kept.pop(), inputs[-1], layer.matrix))
            layer.matrix -= 1e-3 * dmatrix.sign()
            del dmatrix
        copied.append(graphs.traffic.tensors - before)
        del gradient, inputs
    del held
    return copied


@pytest.mark.parametrize("hold", [False, True], ids=["", "outputs held for another call"])
@pytest.mark.parametrize("layers", [1, 3])
def test_training_copies_nothing_in_the_end(memory: Memory, layers: int, hold: bool) -> None:
    """Where each iteration's tensors are where an earlier one's were, replays copy neither inputs
    nor outputs, with several layers as well, and where outputs live as long as the next call, which
    then has others; a change of a parameter in its place shows.
    """
    copied = train(memory, [Layer(memory, seed) for seed in range(layers)], 160, hold)
    assert max(copied[:8]) > 0
    assert copied[-4:] == [0, 0, 0, 0]


def test_only_the_general_graph_copies(memory: Memory) -> None:
    """The first graph of a loop copies all its tensors, one on the caller's memory none; that is
    counted in tensors and bytes.
    """
    layer, sizes = Layer(memory), []
    for _ in range(12):
        before = graphs.traffic.bytes
        layer(memory.copy(torch.ones(ROWS, HIDDEN)))
        sizes.append(graphs.traffic.bytes - before)
    everything = 4 * (3 * ROWS * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN)
    assert sizes[:2] == [0, 0] and sizes[2] == everything and sizes[-1] == 0
    assert graphs.traffic.replays == 10 - 1  # a call whose place is captured is a plain one


def test_outputs_that_are_held_stay(memory: Memory) -> None:
    """However many calls come, and in whatever mode, outputs of earlier ones are what they were, as
    are views of outputs that are gone.
    """
    layer, held = Layer(memory), []
    for step in range(40):
        with torch.inference_mode(step % 3 == 0):
            y, kept, last = layer(memory.copy(torch.full((ROWS, HIDDEN), step + 1.0)))
        if step > 10:
            part = (y, kept[2:].detach().t(), last[:3])[step % 3]
            held.append((part, part.clone()))
        del y, kept, last
    for part, expected in held:
        assert torch.equal(part, expected)


def test_a_parameter_elsewhere(memory: Memory) -> None:
    """Parameters in new memory are read there; that of the old ones may be anybody's."""
    layer = Layer(memory)
    for step in range(60):
        if step % 20 == 19:
            spare = memory.empty(HIDDEN, HIDDEN)  # so that the new matrix has no old one's memory
            layer.matrix = memory.copy(layer.matrix + 1)
            layer.gain = memory.copy(layer.gain * 2)
            del spare
        layer(memory.copy(torch.full((ROWS, HIDDEN), step + 1.0)))
    assert graphs.traffic.replays > 40


def test_small_tensors_from_anywhere(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only small tensors wander, they alone are copied."""
    monkeypatch.setattr(graphs, "_SMALL", 8)
    layer, copied = Layer(memory), []
    gains = [memory.copy(torch.full((HIDDEN,), i + 1.0)) for i in range(6)]
    for step in range(40):
        layer.gain = gains[step % 6]
        before = graphs.traffic.tensors
        layer(memory.copy(torch.ones(ROWS, HIDDEN)))
        copied.append(graphs.traffic.tensors - before)
    assert copied[2] == 6 and copied[-1] == 1


def test_nothing_is_kept_alive(memory: Memory) -> None:
    """Graphs on callers' memory hold none of it."""
    layer = Layer(memory)
    for _ in range(20):
        layer(memory.copy(torch.ones(ROWS, HIDDEN)))
    assert any(p.replay for seen in graphs._seen.values() for p in seen.places.values())
    del layer
    gc.collect()
    assert memory.held == 0


def test_strided_and_misaligned_tensors_are_copied(memory: Memory) -> None:
    """A graph reads what kernels would not read at their best from a copy, as the first one does,
    and the rest where it is.
    """
    layer, wide = Layer(memory), memory.empty(ROWS, 2 * HIDDEN).fill_(1)
    shifted = memory.empty(ROWS * HIDDEN + 1).fill_(2)[1:].view(ROWS, HIDDEN)
    for x in (wide[:, :HIDDEN], shifted, wide[:1, :HIDDEN].expand(ROWS, HIDDEN)):
        graphs.forget()
        copied = []
        for _ in range(12):
            before = graphs.traffic.tensors
            layer(x)
            copied.append(graphs.traffic.tensors - before)
        assert copied[2] == 6 and copied[-1] == 1


def test_a_capture_there_that_fails(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once and not tried again, and the first graph goes on serving."""
    tries = []

    def refuse(*_: Any) -> Any:
        tries.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Recorder, "another", refuse)
    layer = Layer(memory)
    with pytest.warns(RuntimeWarning, match="callers' memory, and copies") as caught:
        for _ in range(40):
            layer(memory.copy(torch.ones(ROWS, HIDDEN)))
    assert len(caught) == len(tries) == 1
    assert graphs.traffic.replays == 40 - 2 - 1


def test_captures_become_rarer(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places that come for some time and then never again are captured ever more seldom, and only
    some are remembered.
    """
    monkeypatch.setattr(graphs, "PLACES", 3)
    captures = []
    another = Recorder.another

    def counted(*given: Any) -> Any:
        captures.append(step)
        return another(*given)

    monkeypatch.setattr(Recorder, "another", counted)
    layer, old = Layer(memory), []
    for step in range(300):
        if step % 10 == 0:
            old.append(layer.matrix)
            layer.matrix = memory.copy(layer.matrix)
        layer(memory.copy(torch.ones(ROWS, HIDDEN)))
    # three of 4 calls in one place, one of 8 after the first was dropped; 16 there never are
    assert len(captures) == 4, captures
    (seen,) = graphs._seen.values()
    assert len(seen.places) == 3


class Calls(RuleBasedStateMachine):
    """Calls of a loop, with whatever may happen between them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.memory = set_up(self.patch)
        self.patch.setattr(graphs, "_SETTLED", 1)
        self.patch.setattr(graphs, "_PATIENCE", 2)
        self.patch.setattr(graphs, "PLACES", 4)
        self.layer = Layer(self.memory)
        self.held: list[tuple[Tensor, Tensor]] = []
        self.inputs: list[Tensor] = []

    @rule(
        value=st.integers(-4, 4),
        times=st.integers(1, 4),
        x=st.sampled_from(["new", "held", "strided"]),
        keep=st.sampled_from(["nothing", "all", "large", "view"]),
    )
    def call(self, value: int, times: int, x: str, keep: str) -> None:
        """Some calls, each with an input in new memory, in that of the last call, or strided."""
        for _ in range(times):
            shape = (HIDDEN, ROWS) if x == "strided" else (ROWS, HIDDEN)
            if x != "held" or not self.inputs:
                self.inputs = [self.memory.empty(*shape)]
            given = self.inputs[-1]
            given.copy_((torch.arange(given.numel()) % 7 * value).view(given.shape))
            y, kept, last = self.layer(given.t() if given.shape[0] == HIDDEN else given)
            parts = {"nothing": [], "all": [y, kept, last], "large": [y], "view": [kept[1:3].t()]}
            self.held += [(part, part.clone()) for part in parts[keep]]
            del y, kept, last, parts

    @rule(count=st.integers(1, 6), first=st.booleans())
    def release(self, count: int, first: bool) -> None:
        """Outputs are given back, in any order."""
        self.held = self.held[count:] if first else self.held[:-count]

    @rule(factor=st.sampled_from([0.5, -1.0]))
    def update(self, factor: float) -> None:
        """Parameters change where they are."""
        self.layer.matrix.mul_(factor)
        self.layer.gain.add_(factor)

    @rule(keep=st.booleans())
    def replace(self, keep: bool) -> None:
        """Parameters are replaced by others, and the memory of the old ones may be anybody's."""
        old = self.layer
        self.layer = Layer(self.memory, 1)
        if keep:
            self.held.append((old.matrix, old.matrix.clone()))

    @rule()
    def write(self) -> None:
        """A caller writes into what it holds."""
        if self.held:
            part, _ = self.held.pop()
            part.add_(1)
            self.held.append((part, part.clone()))

    @invariant()
    def kept(self) -> None:
        """What is held is what it was."""
        for part, expected in self.held:
            assert torch.equal(part, expected)

    def teardown(self) -> None:
        graphs.forget()
        self.patch.undo()


def follow(*phases: Phase) -> None:
    """A search for calls after which something is wrong."""
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=100,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=True,
            phases=phases,
        ),
    )


def test_whatever_happens_between_calls() -> None:
    """Each call gives what a plain one gives, and what a caller holds stays."""
    follow(Phase.generate, Phase.shrink)


def unasked(seen: Any, tensors: Sequence[Tensor]) -> Any:
    """The latest place, wherever the tensors of a call are."""
    place = seen.places.setdefault((), graphs._Place(tuple(map(graphs._address, tensors))))
    place.seen += 1
    return place


def forgetful(seen: Any, tensors: Sequence[Tensor]) -> Any:
    """The place of the same large tensors, wherever the small ones are."""
    addresses = tuple(map(graphs._address, tensors))
    key = tuple(a for a, t in zip(addresses, tensors, strict=True) if t.nbytes > 1000)
    place = seen.places.setdefault(key, graphs._Place(addresses))
    place.seen += 1
    return place


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (graphs, "_place", unasked),
        (graphs, "_place", forgetful),
        (graphs, "_address", lambda t: t.data_ptr()),
        (graphs, "_copy", lambda to, tensors, wanted: None),
        (Memory, "like", lambda memory, t: t),
    ],
    ids=[
        "any place",
        "small tensors anywhere",
        "strides overlooked",
        "copies left out",
        "buffers handed out",
    ],
)
def test_faults_are_found(
    where: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search finds graphs that are replayed where they should not be."""
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        follow(Phase.generate)
