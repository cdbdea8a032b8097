"""The report in a real browser: drawn from one file, readable on a phone, in the light and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from ensemble_kd.analysis.report import Report, report
from ensemble_kd.distillation import distill

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium with its driver (Debian: apt-get install chromium chromium-driver)",
)
CLASSES = ["<script>", "<img src=x onerror=alert(1)>", "[b]", "x$\\frac$", "数字", "a" * 200]
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, curves: Any) -> Report:
    """A report on a run whose classes have such names, with a teacher that is trained in it."""
    root = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for k in range(24):
            pixels = generator.integers(0, 120, size=(8, 8, 3)) + 25 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "drawn", True)
        run = distill(
            ["lenet"],
            "lenet",
            data=f"imagefolder:{root / 'images'}",
            controls="labels,independent",
            epochs=2,
            teacher_epochs=2,
            out=root / "run",
        )
    return report(run.folder, quick=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # A container has neither the rights for Chromium's sandbox nor much shared memory; the page is our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def show(browser: Chrome, page: Path, width: int, scheme: str) -> None:
    """Open the page on a screen of that width, in that colour scheme."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of a computed `rgb(…)`."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """
const shown = element => {
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)' && behind.parentElement) behind = behind.parentElement;
  return [element.tagName, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
};
return [...document.querySelectorAll('h1, h2, p, li, a, th, td, small, caption, figcaption, summary, footer')].map(shown);
"""


def test_nothing_goes_wrong_and_nothing_leaves_the_file(browser: Chrome, hostile: Report) -> None:
    show(browser, hostile.page, 1200, "light")
    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance")]
    urls = [part.split('"')[0] for entry in asked if '"Network.requestWillBeSent"' in entry
            for part in entry.split('"url":"')[1:]]  # fmt: skip
    assert hostile.page.as_uri() in urls
    assert all(url.startswith("data:") or url == hostile.page.as_uri() for url in urls)


def test_all_pictures_are_drawn(browser: Chrome, hostile: Report) -> None:
    show(browser, hostile.page, 1200, "light")
    script = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, +i.getAttribute('width')])"
    sizes = browser.execute_script(script)
    (run,) = hostile.numbers["runs"]
    parts = ("agreement", "calibration", "features", "surface")
    assert len(sizes) == 1 + sum(len(run[part]["pictures"]) for part in parts)
    assert all(
        complete and width > 100 and height > 50 and width == told for complete, width, height, told in sizes
    )


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_the_page_does_not_scroll_sideways(width: int, browser: Chrome, hostile: Report) -> None:
    show(browser, hostile.page, width, "light")
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    page, screen = browser.execute_script(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    )
    assert page <= screen <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('table')].filter(t => t.scrollWidth > innerWidth)"
        ".map(t => getComputedStyle(t.parentElement).overflowX)"
    )
    assert wide
    assert set(wide) == {"auto"}


def test_hostile_names_are_text(browser: Chrome, hostile: Report) -> None:
    show(browser, hostile.page, 1200, "light")
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = browser.execute_script("return document.body.innerText")
    for name in CLASSES:
        assert name in shown
    assert (
        browser.execute_script("return [...document.images].filter(i => !i.src.startsWith('data:')).length")
        == 0
    )
    assert browser.execute_script("return document.scripts.length") == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_can_be_read(scheme: str, browser: Chrome, hostile: Report) -> None:
    show(browser, hostile.page, 390, scheme)
    found = browser.execute_script(COLOURS)
    assert len(found) > 200
    # 4.5 is what WCAG 2.2 asks of text of this size (AA).
    assert [row for row in found if contrast(row[1], row[2]) < 4.5] == []
    paper = luminance(
        browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    )
    assert paper > 0.9 if scheme == "light" else paper < 0.05
    card = browser.execute_script("return getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert luminance(card) > 0.9


def test_contents_and_skip_link_lead_there(browser: Chrome, hostile: Report) -> None:
    show(browser, hostile.page, 390, "light")
    for link in browser.find_elements("css selector", "nav a, .skip"):
        target = str(link.get_attribute("href")).partition("#")[2]
        assert browser.find_element("id", target).is_displayed()
    browser.find_element("css selector", "nav li:last-child a").click()
    top: Any = browser.execute_script("return document.getElementById('made').getBoundingClientRect().top")
    height: Any = browser.execute_script("return innerHeight")
    assert -5 <= top < height
