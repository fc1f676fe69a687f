"""The benchmark of a training iteration: equal contenders, exact memory, a profile that sees what
it should, files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from grids import exhaustive
from torch import nn
from typer.testing import CliRunner

import lntune
from lntune.kernels import cache
from lntune.torch import dispatch, products
from lntune.torch.direct_calls import Direct

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SEQUENCE, BATCH, HIDDEN = 4, 3, 16


def problem(
    script: ModuleType, dtype: torch.dtype, features: int = HIDDEN
) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """lntune's module, an input that wants a gradient, and the reference."""
    torch.manual_seed(0)
    source = script.lntune_module((features, HIDDEN, 2), dtype)
    x = torch.randn(SEQUENCE, BATCH, features).to(dtype).requires_grad_()
    return (
        source,
        x,
        script.results(
            script.eager_modules(source, torch.float64), x.detach().double().requires_grad_()
        ),
    )


FORMS: dict[str, Callable[[ModuleType, Any], nn.Module]] = {
    "eager modules": lambda script, source: script.eager_modules(source),
    "TorchScript, hoisted": lambda script, source: script.scripted(source),
    "TorchScript, by step": lambda script, source: script.scripted(source, hoisted=False),
    "compiled step": lambda script, source: script.compiled(source, 1, "eager"),
    # and a rest of one step
    "compiled chunks": lambda script, source: script.compiled(source, 3, "eager"),
    "lntune": lambda script, source: source,
}


@pytest.mark.parametrize("dtype", ["float32", *map(exhaustive, ("float64", "bfloat16"))])
def test_contenders_agree(script: ModuleType, dtype: str) -> None:
    """Everyone's output and gradients, the input's among them, are float64's within the stated
    tolerances.
    """
    source, x, reference = problem(script, getattr(torch, dtype), features=5)
    assert len(reference) == 1 + 2 * 9 + 1 and all(t.norm() > 0 for t in reference)
    torch._dynamo.reset()
    off = script.checked(
        {name: make(script, source) for name, make in FORMS.items()}, x, reference, dtype
    )
    assert set(off) == set(FORMS)
    if dtype != "bfloat16":
        assert max(off.values()) <= script.TOLERANCES[dtype][0]


@pytest.mark.parametrize(
    "name",
    [
        "bias_l0",
        "ln_ih_bias_l1",
        "ln_hh_bias_l0",
        "ln_hh_weight_l1",
        "ln_c_bias_l0",
        "weight_hh_l1",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_contender_that_loses_a_parameter_is_refused(
    script: ModuleType, dtype: str, name: str
) -> None:
    """Other mathematics than everyone else's is not timed: not without one of the parameters, and
    not with a gradient that is no number.
    """
    source, x, reference = problem(script, getattr(torch, dtype))
    eager = script.eager_modules(source)
    script.checked({"eager modules": eager, "lntune": source}, x, reference, dtype)
    with torch.no_grad():
        getattr(source, name).zero_()
    with pytest.raises(AssertionError, match=r"lntune is .* from float64"):
        script.checked({"eager modules": eager, "lntune": source}, x, reference, dtype)
    with torch.no_grad():
        getattr(source, name).fill_(torch.nan)
    with pytest.raises(AssertionError, match="lntune is inf from float64"):
        script.checked({"eager modules": eager, "lntune": source}, x, reference, dtype)


def test_an_iteration_starts_without_gradients(script: ModuleType) -> None:
    """Gradients are those of one iteration however often it runs, so that nobody is timed adding
    up.
    """
    source, x, _ = problem(script, torch.float64)
    once = script.results(source, x)
    again = script.results(source, x)
    torch.testing.assert_close(again, once)


# --- the fastest form


def test_the_fastest_chunk(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest that compiles in time is used; what would take too long, as the two before tell,
    is not tried.
    """
    facts = {1: (10.0, 50.0), 5: (14.0, 40.0), 10: (19.0, 30.0), 25: (90.0, 10.0), 50: (1.0, 1.0)}
    prepared = []

    def prepare(make: Callable[[], int], x: torch.Tensor, name: str = "") -> tuple[int, Any]:
        prepared.append(make())
        return prepared[-1], script.Form(name, *facts[prepared[-1]])

    monkeypatch.setattr(script, "prepare", prepare)
    module, best, tried, left_out = script.fastest_chunk(
        lambda chunk: chunk, torch.ones(1), [50, 25, 10, 5, 1], 60.0
    )
    assert (module, best.ms, prepared) == (
        10,
        30.0,
        [1, 5, 10, 25, 10],
    ), "25 compiled for longer than its forerunners promised"
    assert [f.start_s for f in tried] == [10.0, 14.0, 19.0, 90.0]
    assert len(left_out) == 1 and left_out[0].startswith(
        "compiled by 50 steps: not tried, since it would take some 208 s"
    )
    prepared.clear()
    assert script.fastest_chunk(lambda chunk: chunk, torch.ones(1), [1, 10, 5], 60.0)[0] == 10
    assert prepared == [1, 5, 10], "the last is kept as it is"


# --- memory


def test_peak_memory_is_exact(script: ModuleType) -> None:
    """The largest sum of what was held at one time, to the byte: what was freed before and what was
    there before do not count.
    """
    before: list[torch.Tensor] = [torch.empty(1 << 22)]

    def allocate() -> None:
        a = torch.empty(3001, dtype=torch.uint8)
        b = torch.empty(2003, dtype=torch.float64)
        del a
        before.clear()
        c = torch.empty(1009, dtype=torch.bfloat16)
        del b, c
        torch.empty(4001)

    assert script.peak_memory(allocate) == 2003 * 8 + 3001
    assert script.peak_memory(lambda: None) == 0
    assert script.peak_memory(lambda: before.append(torch.empty(77, dtype=torch.uint8))) == 77, (
        "what stays counts too"
    )


def test_peak_memory_of_kernels(script: ModuleType) -> None:
    """The output that a direct call of a kernel makes is seen, and so are the statistics that
    training keeps.
    """
    x, weight = torch.randn(10, 64), torch.ones(64)
    with torch.inference_mode():
        lntune.layer_norm(x, (64,), weight)
        assert script.peak_memory(lambda: lntune.layer_norm(x, (64,), weight)) == x.nbytes
    weight.requires_grad_()
    lntune.layer_norm(x, (64,), weight)
    assert script.peak_memory(lambda: lntune.layer_norm(x, (64,), weight)) == x.nbytes + 2 * 4 * 10


# --- the profile


def test_profile_of_matrix_products(script: ModuleType) -> None:
    """Products are seen in a forward, in autograd's backward and with out=, and the shares add up
    to 1.
    """
    a = torch.randn(400, 400, requires_grad=True)
    out = torch.empty(400, 400)

    def multiply() -> None:
        nn.functional.linear(a, a).backward(out)
        with torch.no_grad():
            torch.mm(a, a, out=out)
            torch.addmm(out, a, a, out=out)
            out.zero_()

    p = script.profile(multiply, rounds=3)
    assert sum(p.shares.values()) == pytest.approx(1)
    assert (p.kernels_ms, p.kernel_calls) == (0, 0)
    assert p.shares["matrix products"] > 0.6
    assert not [
        name for name, _, _ in p.others if any(word in name for word in ("mm", "mul", "linear"))
    ]
    assert ("aten::zero_", 1) in {(name, calls) for name, _, calls in p.others}


def test_profile_of_kernels(script: ModuleType) -> None:
    """Kernels are seen, called directly and through autograd, each call once; afterwards nothing is
    left of the timers.
    """
    obtain, remember = cache.kernel, Direct.remember
    x, weight = torch.randn(2000, 512), torch.ones(512, requires_grad=True)

    def normalize() -> torch.Tensor:
        with torch.no_grad():
            y = lntune.layer_norm(x, (512,), weight)
        lntune.layer_norm(x, (512,), weight).backward(y)
        return y

    expected = normalize()
    p = script.profile(normalize, rounds=3)
    assert p.kernel_calls == 3, "inference, forward, backward"
    assert p.products_ms == 0 and p.shares["lntune's kernels"] > 0.5
    assert sum(p.shares.values()) == pytest.approx(1)
    assert (cache.kernel, Direct.remember) == (obtain, remember)
    with torch.no_grad():
        again = [lntune.layer_norm(x, (512,), weight) for _ in range(2)]
    assert all(torch.equal(y, expected) for y in again)
    assert not any(isinstance(k, script._TimedKernel) for k in dispatch._kernels.values())


def test_profile_of_the_rest(script: ModuleType) -> None:
    """What is neither a product nor a kernel is the rest."""
    p = script.profile(lambda: time.sleep(0.01), rounds=1)
    assert p.shares == {"matrix products": 0, "lntune's kernels": 0, "the rest": 1}


# --- the command


def test_command(script: ModuleType, tmp_path: Path) -> None:
    """One table per dtype on the screen and in the text file, and everything in the JSON file."""
    app = typer.Typer()
    app.command()(script.main)
    sizes = [
        "--sequence",
        str(SEQUENCE),
        "--batch",
        str(BATCH),
        "--hidden",
        str(HIDDEN),
        "--input",
        "5",
        "--layers",
        "1",
    ]
    folder = tmp_path / "new" / "results"
    command = [
        "--dtype",
        "float32,bfloat16",
        *sizes,
        "--seconds",
        "0.01",
        "--rounds",
        "2",
        "--chunks",
        "",
        "--output",
        str(folder),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    text, facts = (
        (folder / "lnlstm_training.txt").read_text(),
        json.loads((folder / "lnlstm_training.json").read_text()),
    )
    for dtype in ("float32", "bfloat16"):
        title = f"Training iteration of 1 layers, sequence 4, batch 3, input 5, hidden 16, {dtype}"
        assert title in text and title in done.output
    assert facts["name"] in text and facts["versions"]["torch"] in text
    assert (
        facts["settings"]["sequence"],
        facts["settings"]["input"],
        facts["settings"]["chunks"],
    ) == (4, 5, [])
    for result in facts["results"]:
        rows = {r["contender"]: r for r in result["rows"]}
        # otherwise PyTorch's
        ours = (
            {"eager, lntune's products"}
            if result["dtype"] == "float32" and products.onednn_pays()
            else set()
        )
        assert (
            set(rows) == set(result["timings"]) == {"eager modules", "TorchScript", "lntune"} | ours
        )
        assert rows["lntune"]["ratio"] == 1 and rows["TorchScript"]["form"] in (
            "input hoisted",
            "input step by step",
        )
        for name, row in rows.items():
            assert row["ms"] == result["timings"][name]["median_us"] / 1e3 and row["peak_mib"] > 0
            assert f"{row['ms']:.1f}" in text and f"{row['peak_mib']:.1f}" in text
        assert sum(result["shares"].values()) == pytest.approx(1)
        for name, share in result["shares"].items():
            assert f"{name} {100 * share:.1f} %" in text
    assert [r["dtype"] for r in facts["results"]] == ["float32", "bfloat16"]


def test_how_it_scales(script: ModuleType, tmp_path: Path) -> None:
    """Several sequences and batches are measured each with each, and go to files of their own."""
    app = typer.Typer()
    app.command()(script.main)
    sizes = ["--sequence", "2,3", "--batch", "3,1", "--hidden", str(HIDDEN), "--layers", "1"]
    brief = ["--dtype", "float32", "--seconds", "0.01", "--rounds", "1", "--chunks", ""]
    done = CliRunner().invoke(app, [*sizes, *brief, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "lnlstm_scaling.json",
        "lnlstm_scaling.txt",
    }
    results = json.loads((tmp_path / "lnlstm_scaling.json").read_text())["results"]
    measured = [(r["sequence"], r["batch"]) for r in results]
    assert measured == [(2, 3), (2, 1), (3, 3), (3, 1)]
    for steps, rows in measured:
        assert f"sequence {steps}, batch {rows}," in done.output
