"""Pages in a browser without a window: three widths, two colour schemes; nothing overflows, tables
sort and filter, figures are said where the pointer is, records open, and nothing is fetched.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_logs import CPU, comparison, knob_trials, many, result

from lntune import ops, schedule
from lntune.case import Case
from lntune.certainty import VERDICTS
from lntune.compare.comparison import Missing
from lntune.log.wanted import Wanted
from lntune.report.page import facts, write

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("neither Chromium nor its driver is installed", allow_module_level=True)

WIDTHS = (360, 768, 1280)
SCHEMES = ("light", "dark")
HEIGHT = 800

CONTRAST = r"""
const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
const luminance = ([r, g, b]) => {
  const part = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = parse(getComputedStyle(element).backgroundColor);
    if (colour.length === 3 || colour[3] > 0.99) return colour;
  }
  return [255, 255, 255];
};
const poor = new Set();
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
  if (element.closest("script, style, noscript, option, .hidden")) continue;
  const style = getComputedStyle(element);
  const colour = parse(element.closest("svg") ? style.fill : style.color);
  const [low, high] = [luminance(colour), luminance(behind(element))].sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < 4.5)
    poor.add(`${element.tagName}.${element.className} ${style.color} ${contrast.toFixed(2)}`);
}
return [...poor];
"""
"""What text has less than the contrast that WCAG 2.1 asks of small text."""

OVERFLOW = """
const width = document.documentElement.clientWidth; // without the scroll bar
const wide = [...document.querySelectorAll("body *")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width && box.right > width + 1 && !one.closest("svg, pre, .hidden, option");
});
return [document.documentElement.scrollWidth - width,
  wide.slice(0, 3).map((one) => one.outerHTML.slice(0, 120))];
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a report and one of a comparison, as files."""
    folder = tmp_path_factory.mktemp("pages")
    logs = [*many(70), *knob_trials(20, 0.5)]
    device = facts.gather(CPU, logs, schedule.all_schedules(), Wanted())
    cases = [
        comparison(Case(op, hidden, dtype, 512), VERDICTS[hidden // 512 % 4])
        for op in ops.OPS
        for dtype in ("float32", "bfloat16")
        for hidden in (512, 1024, 1536, 2048)
    ]
    cases.append(comparison(Case("layer_norm", 96, "float32", 1), "UNSURE", low=0.0, high=math.inf))
    missing = Missing(Case("layer_norm", 64, "float16", 1), "B", "no record", "lntune tune " * 20)
    texts = {
        "report": write.report([device], "lntune report --html report.html"),
        "compare": write.compare([result(*cases, missing=(missing,))], "lntune compare a b"),
    }
    for name, text in texts.items():
        write.save(folder / f"{name}.html", text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser of all tests of this file."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield chrome
    chrome.quit()


def opened(browser: Any, page: Path, width: int = 1280, scheme: str = "light", at: str = "") -> Any:
    """The browser with a page opened anew at a width and in a scheme."""
    for name in ("browser", "performance"):
        browser.get_log(name)  # what others left
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get(page.as_uri() + at)
    return browser


def all_of(browser: Any, selector: str) -> list[Any]:
    """The elements that a selector finds."""
    found: list[Any] = browser.find_elements("css selector", selector)
    return found


def one_of(browser: Any, selector: str) -> Any:
    """The first of them."""
    return browser.find_element("css selector", selector)


def column(browser: Any, place: int) -> list[str]:
    """What the rows of the table that are shown have in a column."""
    script = """return [...document.querySelectorAll("table.cases tbody tr:not(.record)")]
      .filter((row) => !row.hidden).map((row) => row.cells[arguments[0]].textContent)"""
    found: list[str] = browser.execute_script(script, place)
    return found


def hover(browser: Any, element: Any) -> None:
    """Put the pointer on an element: on its middle, on the beginning of a path."""
    script = """arguments[0].scrollIntoView({block: "center"});
      return new Promise((done) => setTimeout(done, 50))"""  # scrolling hides the tip
    browser.execute_script(script, element)
    place = """const one = arguments[0], box = one.getBoundingClientRect();
      if (!one.getPointAtLength) return [box.x + box.width / 2, box.y + box.height / 2];
      const at = one.getPointAtLength(0).matrixTransform(one.getScreenCTM());
      return [at.x, at.y]"""
    x, y = browser.execute_script(place, element)
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})


def heading(browser: Any, name: str) -> int:
    """The place of a column."""
    return [th.text.strip() for th in all_of(browser, "table.cases th")].index(name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_is_whole_at_every_width(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    """Nothing is wider than the screen, also with a record open; all text can be read; the console
    has no error and nothing but the file is asked for.
    """
    opened(browser, pages[name], width, scheme, "#case-3")
    assert len(all_of(browser, "tr.record")) == 1
    assert browser.execute_script(OVERFLOW) == [0, []]
    assert browser.execute_script(CONTRAST) == []
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"].endswith("BeSent")]
    assert {url.partition("#")[0] for url in asked} <= {pages[name].as_uri(), "data:,"}


def test_schemes_differ(browser: Any, pages: dict[str, Path]) -> None:
    """The page is light or dark as the system is, and the button changes that."""
    background = "return getComputedStyle(document.body).backgroundColor"
    shades = [
        opened(browser, pages["report"], scheme=scheme).execute_script(background)
        for scheme in SCHEMES
    ]
    assert shades[0] != shades[1]
    button = one_of(browser, "#scheme")
    button.click()
    assert (button.text, browser.execute_script(background)) == ("Light", shades[0])
    button.click()
    assert (button.text, browser.execute_script(background)) == ("Dark", shades[1])


def test_a_heading_sorts(browser: Any, pages: dict[str, Path]) -> None:
    """Figures are sorted by their size, the largest first and at the next press the smallest; what
    is not known comes last; words are sorted from A on.
    """
    opened(browser, pages["report"])
    place = heading(browser, "tuned µs")
    before = [float(v) for v in column(browser, place)]
    button = all_of(browser, "table.cases th button")[place]
    button.click()
    assert [float(v) for v in column(browser, place)] == sorted(before, reverse=True)
    button.click()
    assert [float(v) for v in column(browser, place)] == sorted(before)
    all_of(browser, "table.cases th button")[0].click()
    words = column(browser, 0)
    assert words == sorted(words) and len(set(words)) > 1


@pytest.mark.parametrize("name", ["report", "compare"])
def test_choices_and_text_filter(browser: Any, pages: dict[str, Path], name: str) -> None:
    """A choice leaves the rows that have it, text those in which all words are; the number of cases
    follows.
    """
    opened(browser, pages[name])
    every = column(browser, 0)
    script = """const [select, value] = arguments;
      select.value = value; select.dispatchEvent(new Event("input", {bubbles: true}))"""
    choice, text = one_of(browser, ".filters select"), one_of(browser, ".filters input")
    wanted = "layer_norm_backward"
    browser.execute_script(script, choice, wanted)
    count = every.count(wanted)
    assert column(browser, 0) == [wanted] * count and 0 < count < len(every)
    assert one_of(browser, ".filters output").text == f"{count} cases"
    dtypes = column(browser, 1)
    text.send_keys("bfloat16 LANES=4")
    assert column(browser, 1) == ["bfloat16"] * dtypes.count("bfloat16")
    assert 0 < dtypes.count("bfloat16") < count
    text.send_keys(" nothing-has-this")
    assert column(browser, 0) == [] and one_of(browser, ".filters output").text == "0 cases"


def test_every_verdict_can_be_chosen(browser: Any, pages: dict[str, Path]) -> None:
    """The filter of verdicts has them all and leaves those cases."""
    opened(browser, pages["compare"])
    place = heading(browser, "verdict")
    select = one_of(browser, f".filters select[data-column='{place}']")
    script = """const [select, value] = arguments;
      select.value = value; select.dispatchEvent(new Event("input", {bubbles: true}))"""
    for verdict in VERDICTS:
        browser.execute_script(script, select, verdict)
        assert set(column(browser, place)) == {verdict}


@pytest.mark.parametrize("selector", [".heat td a", ".dot a path", ".curve a path"])
def test_figures_are_said_where_the_pointer_is(
    browser: Any, pages: dict[str, Path], selector: str
) -> None:
    """Over a cell, a point or a curve the tip has the case with its times, inside the window; away
    from all of them there is none.
    """
    opened(browser, pages["report"])
    hover(browser, all_of(browser, selector)[-1])
    tip = one_of(browser, "#tip")
    assert tip.is_displayed() and " µs" in tip.text and "over eager" in tip.text
    box = tip.rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
    away = {"type": "mouseMoved", "x": 2, "y": 300}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", away)
    assert not tip.is_displayed()


def test_ratios_are_said_where_the_pointer_is(browser: Any, pages: dict[str, Path]) -> None:
    """Over a line of the chart of ratios the tip has both sides."""
    opened(browser, pages["compare"])
    hover(browser, all_of(browser, ".ratio b")[2])
    tip = one_of(browser, "#tip").text
    assert "2.000" in tip and "A 100 µs" in tip and "B 50.00 µs" in tip
    hover(browser, one_of(browser, f"a.ratio[href='#case-{len(column(browser, 0)) - 1}'] b"))
    assert "0.000 to unbounded" in one_of(browser, "#tip").text
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_figure_leads_to_its_record(browser: Any, pages: dict[str, Path], width: int) -> None:
    """Pressing a cell opens the record of its case below its row; pressing the row shuts it."""
    opened(browser, pages["report"], width)
    cell = one_of(browser, ".heat td a")
    number = cell.get_attribute("href").rpartition("-")[2]
    browser.execute_script("arguments[0].click()", cell)
    row = one_of(browser, f"#case-{number}")
    record = one_of(browser, f"#case-{number} + .record")
    assert record.is_displayed() and '"schedule": "cached_rows"' in record.text
    assert "lntune why" in record.text and '"device": {"kind":"cpu"' in record.text
    browser.execute_script("arguments[0].click()", row)
    assert all_of(browser, ".record") == []


def test_a_record_that_is_filtered_out_is_shown_all_the_same(
    browser: Any, pages: dict[str, Path]
) -> None:
    """Where a figure leads to a hidden row, the filters are taken off."""
    opened(browser, pages["report"])
    one_of(browser, ".filters input").send_keys("nothing-has-this")
    browser.execute_script("location.hash = '#case-5'")
    browser.execute_script("return new Promise((done) => setTimeout(done, 50))")
    assert one_of(browser, "#case-5 + .record").is_displayed()
    assert one_of(browser, ".filters input").get_attribute("value") == ""


def test_a_case_is_followed_through_the_charts(browser: Any, pages: dict[str, Path]) -> None:
    """Choosing a case marks it in the heat map, both charts of limits and its curve."""
    opened(browser, pages["report"])
    script = """const select = document.querySelector("select.follow");
      select.focus();
      select.value = "5"; select.dispatchEvent(new Event("input", {bubbles: true}));
      return [...document.querySelectorAll("a.on")].map((a) => a.getAttribute("href"))"""
    assert browser.execute_script(script) == ["#case-5"] * 4
    assert "5 trials" in one_of(browser, ".pick output").text


def test_a_page_can_be_printed(browser: Any, pages: dict[str, Path]) -> None:
    """On paper the page is light also where the screen is dark, and has no controls."""
    opened(browser, pages["report"], scheme="dark")
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    background = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(background) == "rgb(255, 255, 255)"
    assert not one_of(browser, ".filters").is_displayed()
    assert browser.execute_script(CONTRAST) == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
