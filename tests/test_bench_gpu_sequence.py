"""The benchmark of sequences on a GPU: equal contenders, every case written as it comes, one that
fails costs itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from grids import product
from on_gpu import Here, here
from typer.testing import CliRunner

__all__ = ["here"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module", autouse=True)
def beside_the_script() -> Iterator[None]:
    """The script imports another one of its folder, as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
        yield


@pytest.mark.parametrize(
    ("mode", "dtype"), product(("inference", "training"), ("float32", "bfloat16"))
)
def test_contenders_agree_and_are_timed(
    here: Here, script: ModuleType, mode: str, dtype: str
) -> None:
    """Everyone is near float64, output and in training every gradient, before anyone is timed; on a
    GPU the eager loop is in a graph, too.
    """
    case = script.Case(mode, dtype, 2, here.pick(64, 16))
    result = script.measure(
        case, script.Settings(sequence=4, seconds=0.02, rounds=2), torch.device(here.name)
    )
    assert set(result.ms) == {script.EAGER, script.OURS} | (
        {script.GRAPH} if here.real else set()
    ), result.notes
    assert all(ms > 0 for ms in result.ms.values()) and set(result.faster) == set(result.ms) - {
        script.OURS
    }
    assert set(result.off) == {script.EAGER, script.OURS}
    at_first, in_the_end = result.copied
    assert at_first > 0 and 0 <= in_the_end <= at_first
    assert result.off[script.OURS] <= max(script.TOLERANCES[dtype], 2 * result.off[script.EAGER])


@pytest.mark.parametrize("name", ["bias_l0", "ln_hh_bias_l0", "weight_hh_l0"])
def test_a_contender_that_loses_a_parameter_is_refused(script: ModuleType, name: str) -> None:
    """Other mathematics than the eager loop's is not timed."""
    torch.manual_seed(0)
    source = script.lntune_module((16, 16, 1), torch.float32)
    modules = {script.EAGER: script.eager_modules(source), script.OURS: source}
    x, case = torch.randn(4, 2, 16), script.Case("inference", "float32", 2, 16)
    whole = script.lntune_module((16, 16, 1), torch.float32)
    whole.load_state_dict(source.state_dict())
    script.checked(modules, whole, x, case)
    with torch.no_grad():
        getattr(source, name).zero_()
    with pytest.raises(AssertionError, match=r"lntune is .* from float64 in inference float32"):
        script.checked(modules, whole, x, case)


def test_the_command(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table and JSON have every case that was measured; one that fails is named, the others are
    kept, and the exit code says so.
    """
    app = typer.Typer()
    app.command()(script.main)
    options = [
        "--target",
        "cpu",
        "--batch",
        "2",
        "--hidden",
        "8",
        "--dtype",
        "float32",
        "--sequence",
        "3",
        "--seconds",
        "0.01",
        "--rounds",
        "2",
    ]
    done = CliRunner().invoke(app, [*options, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "gpu_sequence.json").read_text())
    assert [r["case"]["mode"] for r in facts["results"]] == list(script.MODES) and facts[
        "failed"
    ] == {}
    assert facts["geomean"][script.EAGER] > 0 and facts["device"]["kind"] == "cpu"
    assert "geomean" in (tmp_path / "gpu_sequence.txt").read_text()
    measure = script.measure

    def fails_in_training(case: Any, *rest: Any) -> Any:
        if case.mode == "training":
            raise RuntimeError("out of memory")
        return measure(case, *rest)

    monkeypatch.setattr(script, "measure", fails_in_training)
    done = CliRunner().invoke(app, [*options, "--output", str(tmp_path)])
    assert done.exit_code == 1 and "out of memory" in done.output
    facts = json.loads((tmp_path / "gpu_sequence.json").read_text())
    assert [r["case"]["mode"] for r in facts["results"]] == ["inference"]
    assert list(facts["failed"].values()) == ["RuntimeError: out of memory"]


def test_without_a_gpu(script: ModuleType) -> None:
    """Without a CUDA device the command says so."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    app = typer.Typer()
    app.command()(script.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2 and "torch.cuda.is_available() is False" in " ".join(
        done.output.split()
    )
