"""Pictures of a page: as wide as asked for, in both schemes, and small."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
from page_logs import comparison, result
from PIL import Image, ImageStat

from lntune.report.page import write

pytest.importorskip("selenium", reason="selenium is not installed")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("Chromium or its driver is not installed", allow_module_level=True)


def test_pictures_are_taken(script: ModuleType, tmp_path: Path) -> None:
    """Each has the width and the height that were asked for; light and dark differ."""
    page = tmp_path / "compare.html"
    write.save(page, write.compare([result(comparison())], "lntune compare a b"))
    script.take(page, tmp_path / "new", (360,), height=500)
    shots = {path.stem: Image.open(path) for path in (tmp_path / "new").glob("*.png")}
    assert {name: shot.size for name, shot in shots.items()} == {
        "compare_360_light": (360, 500),
        "compare_360_dark": (360, 500),
    }
    light, dark = (shots[f"compare_360_{s}"].convert("L") for s in script.SCHEMES)
    assert ImageStat.Stat(light).mean[0] > 200 and ImageStat.Stat(dark).mean[0] < 60
