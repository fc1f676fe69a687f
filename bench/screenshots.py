"""Pictures of the HTML page of a report, and of a comparison: at the widths of a phone, a tablet
and a desk, in light and in dark, by headless Chromium.

    python bench/screenshots.py report.html bench/results/report

writes FOLDER/<page>_<width>_<scheme>.png. It needs Chromium with its driver, and the `test` extra.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from selenium import webdriver

WIDTHS = (360, 768, 1280)
SCHEMES = ("light", "dark")
COLOURS = 200
"""A picture of few colours is small, and nobody sees the difference."""


def browser() -> webdriver.Chrome:
    """A Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = shutil.which("chromedriver")
    return webdriver.Chrome(options, webdriver.ChromeService(driver) if driver else None)


def picture(chrome: webdriver.Chrome, page: Path, width: int, scheme: str, height: int) -> bytes:
    """The page at a width and in a scheme as a PNG, from its top to `height` (0: to its end)."""
    chrome.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    chrome.get(page.resolve().as_uri())
    # sections outside of the window would be laid out only when they are scrolled to
    chrome.execute_script(
        "document.head.append(Object.assign(document.createElement('style'),"
        " {textContent: 'section {content-visibility: visible !important}'}))"
    )
    whole = chrome.execute_script("return document.documentElement.scrollHeight")
    sizes["height"] = min(whole, height or whole)
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    # two frames later it is on the screen
    chrome.execute_async_script(
        "requestAnimationFrame(() => requestAnimationFrame(arguments[arguments.length - 1]))"
    )
    return base64.b64decode(chrome.get_screenshot_as_base64())


def ready(chrome: webdriver.Chrome) -> float:
    """Milliseconds from opening the page until its script has run and the browser waits."""
    script = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    return float(chrome.execute_script(script))


def take(page: Path, folder: Path, widths: Iterable[int], height: int = 0) -> None:
    """Put pictures of a page into a folder; say how large they are and how soon it was ready."""
    folder.mkdir(parents=True, exist_ok=True)
    chrome = browser()
    try:
        for width in widths:
            for scheme in SCHEMES:
                path = folder / f"{page.stem}_{width}_{scheme}.png"
                shot = Image.open(io.BytesIO(picture(chrome, page, width, scheme, height)))
                shot.convert("RGB").quantize(COLOURS, kmeans=1).save(path, optimize=True)
                print(f"{path}: {path.stat().st_size} bytes, page ready in {ready(chrome):.0f} ms")
    finally:
        chrome.quit()


def main(
    page: Annotated[Path, typer.Argument(help="The HTML file.")],
    folder: Annotated[Path, typer.Argument(help="Where the pictures go.")],
    height: Annotated[int, typer.Option(help="Cut off there; 0: the whole page.")] = 0,
    widths: Annotated[str, typer.Option(help="In pixels.")] = ",".join(map(str, WIDTHS)),
) -> None:
    """Take pictures of a page at several widths, in light and in dark."""
    take(page, folder, map(int, widths.split(",")), height)


if __name__ == "__main__":
    typer.run(main)
