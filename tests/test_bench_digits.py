"""The benchmark on handwritten digits: data without overlap, equal beginnings, the same curve up to
rounding, files, a word on what is missing.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import lntune

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

HIDDEN, UPDATES, RATE = 16, 30, 0.001


def curves(script: ModuleType, models: dict[str, Any], seed: int = 3) -> dict[str, Any]:
    """The validation curves of a short training."""
    settings = script.Settings(hidden=HIDDEN, updates=UPDATES)
    return script.train(models, dict.fromkeys(models, RATE), script.load(seed), settings, seed)  # type: ignore[no-any-return]


def test_split(script: ModuleType) -> None:
    """A seed always gives the same split, of all images and without overlap, a fifth of every class
    for validation; images are read row by row.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    data, again, other = script.load(0), script.load(0), script.load(1)
    train, valid = data.indices
    assert not set(train) & set(valid)
    assert sorted(train + valid) == list(range(1797))
    assert data.indices == again.indices != other.indices
    for x, y, part in ((data.x, data.y, train), (data.x_valid, data.y_valid, valid)):
        assert torch.equal(x.transpose(0, 1).double(), torch.from_numpy(digits.images[part]) / 16)
        assert torch.equal(y, torch.from_numpy(digits.target[part]).long())
        assert (x.min(), x.max()) == (0, 1)
    shares = data.y_valid.bincount() / torch.from_numpy(digits.target).bincount()
    assert ((shares - 0.2).abs() < 0.01).all()


def test_batches(script: ModuleType) -> None:
    """A seed's batches repeat; within an epoch no image comes twice, and epochs differ."""
    first, again = (
        torch.stack(list(itertools.islice(script.batches(100, 32, 5), 6))) for _ in range(2)
    )
    assert torch.equal(first, again)
    epochs = first.view(2, -1)
    assert all(len(set(e.tolist())) == 96 for e in epochs)
    assert not torch.equal(*epochs)


def test_equal_beginnings(script: ModuleType) -> None:
    """Everyone starts from nn.LSTM's matrices and one classifier; LSTMs with layer normalization
    have all parameters in common, but for those that are moved, each to a neighbouring float.
    """
    models = script.classifiers(HIDDEN, 3)
    lstm, ours = models[script.LSTM].rnn, models[script.OURS].rnn
    assert isinstance(lstm, torch.nn.LSTM)
    assert isinstance(ours, lntune.LayerNormLSTM)
    for name in (script.EAGER, script.OURS):
        for matrix in ("weight_ih_l0", "weight_hh_l0"):
            assert torch.equal(getattr(models[name].rnn, matrix), getattr(lstm, matrix))
        torch.testing.assert_close(
            models[name].head.state_dict(), models[script.LSTM].head.state_dict(), atol=0, rtol=0
        )
    eager, moved = models[script.EAGER].state_dict(), models[script.MOVED].state_dict()
    torch.testing.assert_close(models[script.OURS].state_dict(), eager, atol=0, rtol=0)
    assert eager.keys() == moved.keys()
    for name, p in eager.items():
        steps = [torch.nextafter(p, torch.full_like(p, way)) for way in (math.inf, -math.inf)]
        assert ((moved[name] == steps[0]) | (moved[name] == steps[1])).all(), name
    assert len({id(p) for model in models.values() for p in model.parameters()}) == sum(
        len(list(m.parameters())) for m in models.values()
    )


def test_same_curve(script: ModuleType) -> None:
    """lntune's curve is eager's within what rounding does, and repeats; another eps is not within
    it, nor is nn.LSTM.
    """
    models = script.classifiers(HIDDEN, 3)
    other = script.classifiers(HIDDEN, 3)[script.OURS]
    other.rnn.eps = 1e-4
    runs = curves(script, {**models, "other eps": other})
    eager = runs[script.EAGER]
    differences = {name: curve.difference(eager, UPDATES) for name, curve in runs.items()}
    allowed = 2e-6  # a hundred times what was found, and a hundredth of what another eps does
    assert differences[script.OURS] < allowed
    assert 0 < differences[script.MOVED] < allowed
    assert differences["other eps"] > 10 * allowed
    assert differences[script.LSTM] > 1000 * allowed
    assert all(
        len(c.losses) == len(c.accuracies) == UPDATES // script.EVERY + 1 for c in runs.values()
    )
    assert eager.losses[-1] < eager.losses[0]
    alone = script.classifiers(HIDDEN, 3)  # who else takes part changes nothing
    assert curves(script, {script.EAGER: alone[script.EAGER]})[script.EAGER].losses == eager.losses


def test_reached(script: ModuleType) -> None:
    """The first evaluation at or below the target counts, in updates and in seconds; never is
    infinite; differences are of the part asked for.
    """
    curve = script.Curve(losses=[2.0, 1.0, 0.5, 0.7], seconds=[1.0, 2.0, 4.0])
    assert [curve.reached(t) for t in (3, 1, 0.6, 0.1)] == [0, 10, 20, math.inf]
    assert [curve.seconds_to(t) for t in (3, 1, 0.6, 0.1)] == [0, 1, 3, math.inf]
    other = script.Curve(losses=[2.0, 1.25, 0.5, 0.2])
    assert curve.difference(other, 20) == 0.25
    assert curve.difference(other, 30) == pytest.approx(0.5)


def test_choice(script: ModuleType) -> None:
    """Everyone gets the learning rate that did best for it; LSTMs with layer normalization share
    one.
    """
    tried = [
        script.Tried(n, rate, loss, [])
        for n, losses in ((script.LSTM, (3, 1, 2)), (script.EAGER, (1, 2, 3)))
        for rate, loss in enumerate(losses)
    ]
    chosen = script.choose(tried, script.Settings())
    assert chosen == {script.LSTM: 1, script.EAGER: 0, script.OURS: 0, script.MOVED: 0}


def test_command(script: ModuleType, tmp_path: Path) -> None:
    """The command prints the table and leaves it, its facts and a plot; what was not reached says
    so.
    """
    app = typer.Typer()
    app.command()(script.main)
    given = (
        f"--seeds 2 --hidden {HIDDEN} --updates 20 --rates 0.001,0.01 --sweep-seeds 1 --targets"
        f" 2.2,1e-6 --output {tmp_path / 'out'}"
    )
    done = CliRunner().invoke(app, given.split())
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "digits.txt").read_text(encoding="utf-8")
    assert text in done.stdout
    assert all(name in text for name in script.CONTENDERS)
    assert "never (never..never), 0 of 2" in text
    facts = json.loads((tmp_path / "out" / "digits.json").read_text(encoding="utf-8"))
    assert [row["contender"] for row in facts["rows"]] == list(script.CONTENDERS)
    for row in facts["rows"]:
        runs = facts["curves"][row["contender"]]
        assert [len(run["losses"]) for run in runs] == [3, 3]
        assert row["not_reached"][1] == 2
        assert row["reached"][1] == [None, None, None]
        assert row["loss"][0] == sum(run["losses"][-1] for run in runs) / 2
        assert row["seconds"][1] == min(sum(run["seconds"]) for run in runs)
    assert [t["rate"] for t in facts["sweep"]] == [0.001, 0.001, 0.01, 0.01]
    png = (tmp_path / "out" / "digits.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_package(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scikit-learn the command says what to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find(name, *a)
    )
    app = typer.Typer()
    app.command()(script.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2
    assert "pip install scikit-learn\n" in done.stderr
