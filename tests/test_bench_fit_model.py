"""The fit of the model's constants to measured times, on times that the model made itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from lntune.backends import device_of
from lntune.backends.cuda import model
from lntune.backends.cuda.code import Work
from lntune.backends.cuda.model import Constants, Pair, Part

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "fit_model.py"
DEVICE = device_of("nvidia/nvidia-h200")
CARD = Constants(reached=0.8, latency=900, barrier=60, dependent=2.5, issued=0.8, gap=1500)
"""A card of the test's own."""
CHANGED = ("reached", "latency", "barrier", "dependent", "issued", "gap")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """bench/fit_model.py as a module."""
    spec = importlib.util.spec_from_file_location("fit_model", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured() -> list[Pair]:
    """Kernels bound in all ways, with the times that CARD has for them."""
    pairs = []
    for number, (slots, barriers, resident, rows) in enumerate(
        (slots, barriers, resident, rows)
        for slots in (60, 300, 1200)
        for barriers in (0, 4)
        for resident in (1, 4, 16)
        for rows in (64, 32768)
    ):
        least = rows * 1024 * 8
        part = Part(128, resident, rows, 1, Work(), Work(slots, 20, barriers, 8, 128), least)
        totals = Part(512, 2, 32, 1, Work(), Work(100, 0, 5, 40, 32), 0, number << 17)
        parts = (part, totals) if number % 2 else (part,)
        predicted, us = (model.predict(parts, least, DEVICE, c).us for c in (model.CONSTANTS, CARD))
        pairs.append(Pair(f"op {rows}x1024 float32 {number}", DEVICE, parts, least, predicted, us))
    return pairs


def test_a_fit_finds_what_made_the_times(script: ModuleType) -> None:
    """From the times of another card the constants become those by which its kernels' times come
    out, which the ones before are far from.
    """
    pairs = measured()
    assert script.distance(pairs, model.CONSTANTS) > 0.15
    fitted = script.fit(pairs, CHANGED)
    assert script.distance(pairs, fitted) < 0.02
    assert fitted.reached == pytest.approx(CARD.reached, rel=0.05)
    assert fitted.gap == pytest.approx(CARD.gap, rel=0.1)
    assert script.in_order(pairs, fitted) >= script.in_order(pairs, model.CONSTANTS)


def test_what_is_fixed_or_of_no_effect_stays(script: ModuleType) -> None:
    """A constant that is not to be fitted is left alone, and so is one that no time depends on."""
    alone = [pair for pair in measured() if len(pair.parts) == 1]
    fitted = script.fit(alone, ("reached", "gap"))
    assert (fitted.latency, fitted.gap) == (model.CONSTANTS.latency, model.CONSTANTS.gap)
    assert fitted.reached != model.CONSTANTS.reached


def test_the_script_prints_before_and_after(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files of predictions come in, a table of all constants goes out."""
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(pair) + b"\n" for pair in measured()[:8]))
    monkeypatch.setattr(sys, "argv", ["fit_model.py", "--fixed", "port,cached", str(path)])
    script.main()
    text = capsys.readouterr().out
    assert text.startswith("8 pairs of NVIDIA H200")
    assert all(f"| {name} |" in text for name in script.NAMES)
    assert "| port | 64 | 64 |" in text
