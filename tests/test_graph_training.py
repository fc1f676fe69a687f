"""LSTMs trained by graphs on their callers' memory, with an allocator like that of a GPU: the bits
of training without graphs, and in the end nothing is copied.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lntune.system import native, paths, toolchain

HERE = Path(__file__).parent
ALLOCATOR = HERE / "caching_allocator.cc"
STEPS, BATCH, HIDDEN = 12, 3, 24
ITERATIONS = 24
SCRIPT = f"""
import json, sys
import torch
import lntune
from lntune.torch import graphs
from on_gpu import Recorder

def train(hold, **options):
    torch.manual_seed(0)
    rnn, held = lntune.LayerNormLSTM({HIDDEN}, {HIDDEN}, **options), None
    optimizer, copied, losses = torch.optim.Adam(rnn.parameters(), lr=1e-2), [], []

    def iterate():
        output, _ = rnn(torch.randn({STEPS}, {BATCH}, {HIDDEN}))
        loss = output.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        return output if hold else None

    for _ in range({ITERATIONS}):
        before = graphs.traffic.bytes
        held = iterate()
        copied.append(graphs.traffic.bytes - before)
    return copied, losses

torch.set_num_threads(1)
graphs.Recorder = Recorder
answer = []
for hold, options in json.loads(sys.argv[1]):
    graphs._possible = lambda device: False
    _, plain = train(hold, **options)
    graphs._possible = lambda device: True
    copied, losses = train(hold, **options)
    answer.append((copied, losses == plain))
print(json.dumps(answer))
"""
"""Tensors of the CPU count as a GPU's, but the CPU's kernels serve."""
ONE, FOUR = {}, {"num_layers": 2, "bidirectional": True}


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
def test_training_with_an_allocator_like_a_gpus() -> None:
    """Losses of every iteration are bit for bit those without graphs. Where outputs die before the
    next call and where they are held until then, replays copy nothing in the end, but the gradients
    of outputs that are columns of a larger matrix.
    """
    library = paths.cache_dir() / "runtime" / f"allocator-{native.source_hash(ALLOCATOR)}.so"
    if not library.is_file():
        with native.atomic(library) as temporary:
            toolchain.run_compiler(
                ["-std=c++17", "-O1", "-shared", "-fPIC", str(ALLOCATOR), "-ldl"], temporary
            )
    cases = [(False, ONE), (True, ONE), (True, FOUR)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(cases)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    columns = STEPS * BATCH * HIDDEN * 4
    for (hold, options), (copied, same) in zip(cases, json.loads(done.stdout), strict=True):
        print(f"held: {hold}, {options}: bytes copied by iteration: {copied}")
        assert same
        layers = 4 if options else 1
        assert max(copied) > layers * 20 * columns
        assert copied[-1] == (layers * columns if options else 0)
