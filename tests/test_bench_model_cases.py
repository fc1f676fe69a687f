"""The benchmark of models before and after tuning their own cases: both models are causal or not as
theirs are, what is recorded are the calls of both uses, and its files hold what is shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lntune
from lntune.log import cases

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script sets is taken back."""
    monkeypatch.setenv("LNTUNE_LOG_DIR", "")
    monkeypatch.setenv("LNTUNE_SHIPPED_LOGS", "0")


@pytest.fixture(scope="module", autouse=True)
def beside() -> Any:
    """The script imports its neighbour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
        yield


def test_gpt2_looks_back_only(beside: None, script: ModuleType) -> None:
    """A later word changes no logit before it, in BERT it does; both learn by their loss."""
    torch.manual_seed(0)
    tokens = torch.randint(20, (1, 16))
    other = tokens.clone()
    other[0, -1] += 1
    gpt2, bert = script.Gpt2(24, 1, 30, 16), script.Bert(24, 1, 30, 16)
    a, b = gpt2(tokens), gpt2(other)
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])
    assert not torch.allclose(bert(tokens)[:, 0], bert(other)[:, 0], atol=0, rtol=1e-7)
    for model in (gpt2, bert):
        script.train(model, tokens)
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_small_run(
    name: str, beside: None, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded, measured, tuned and measured again, in this order."""
    found: list[tuple[str, int]] = []

    def tune(file: Path, log_dir: Path, seconds: float) -> list[str]:
        assert seconds == 1.0 and str(log_dir) in str(file)
        found.extend((w.op, t.calls) for w, t in cases.read(file).items())
        return ["as if tuned"]

    monkeypatch.setattr(script, "tune", tune)
    app = script.typer.Typer()
    app.command()(script.main)
    sizes = ("--batch", "1", "--sequence", "16", "--layers", "1", "--hidden", "24")
    brief = ("--seconds", "0.01", "--budget", "1", "--output", str(tmp_path))
    done = CliRunner().invoke(app, ["--models", name, *sizes, *brief], catch_exceptions=False)
    lntune.reload()
    assert done.exit_code == 0 and "as if tuned" in done.stdout
    assert sorted(found) == [("layer_norm", 9), ("layer_norm", 9), ("layer_norm_backward", 9)]
    facts = json.loads((tmp_path / "model_cases.json").read_text())
    assert [(r["what"], r["when"]) for r in facts["results"]] == [
        ("forward", "before"),
        ("training step", "before"),
        ("forward", "after"),
        ("training step", "after"),
    ]
    assert "training step" in (tmp_path / "model_cases.txt").read_text()
