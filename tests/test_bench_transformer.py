"""The benchmark of a transformer: the same mathematics in both models, a converted one that is one,
and its files.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import lntune

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def test_a_layer_is_bert(script: ModuleType) -> None:
    """Against PyTorch's own encoder layer, post-norm with GELU, given the same weights."""
    torch.manual_seed(0)
    ours, hidden = script.Layer(24), 24
    theirs = nn.TransformerEncoderLayer(
        hidden, 12, 4 * hidden, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
    )
    attention = {
        "in_proj_weight": ours.qkv.weight,
        "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight,
        "out_proj.bias": ours.out.bias,
    }
    state = {f"self_attn.{name}": value for name, value in attention.items()}
    for name, module in (
        ("linear1", ours.wide),
        ("linear2", ours.narrow),
        ("norm1", ours.norm1),
        ("norm2", ours.norm2),
    ):
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, hidden)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_a_small_run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference and training are measured, on PyTorch's norms and on ours, and the files hold what
    is shown.
    """
    served = []
    monkeypatch.setattr(
        lntune.LayerNorm,
        "forward",
        lambda self, x: (
            served.append(1) or functional.layer_norm(x, (24,), self.weight, self.bias, self.eps)
        ),
    )
    app = script.typer.Typer()
    app.command()(script.main)
    arguments = [
        "--dtype",
        "float32",
        "--batch",
        "1",
        "--sequence",
        "4",
        "--layers",
        "1",
        "--hidden",
        "24",
        "--seconds",
        "0.01",
    ]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and served
    facts = json.loads((tmp_path / "transformer.json").read_text())
    assert [(r["what"], r["dtype"]) for r in facts["results"]] == [
        ("inference", "float32"),
        ("training", "float32"),
    ]
    assert all(
        r["eager_ms"] > 0 and r["lntune_ms"] > 0 and r["norms"] > 0 for r in facts["results"]
    )
    assert all(r["difference"] < 1e-5 for r in facts["results"])
    assert "inference" in (tmp_path / "transformer.txt").read_text()
