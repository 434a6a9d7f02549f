"""The report in a browser: sorting, filtering, keyboard, contrast, phones, and not one network request."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest

import pydefect
from pydefect.report import write_report
from pydefect.run import Run, read_run

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install selenium")

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("page") / "report.html", progress=False)


@pytest.fixture
def opened(browser, page: Path):
    """The report, fresh, at the width of a desktop."""
    resize(browser, DESKTOP)
    # Without it the page scrolls smoothly, away from under a click.
    emulate(browser, {"prefers-reduced-motion": "reduce"})
    browser.get(page.as_uri())
    return browser


def resize(browser, size: tuple[int, int]) -> None:
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE},
    )


def emulate(browser, preferences: dict[str, str]) -> None:
    features = [{"name": name, "value": value} for name, value in preferences.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def shown(browser, field: str) -> list[str]:
    """A field of every card that can be seen, in the order of the page."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#cards > li')].filter(c => c.offsetParent !== null)"
        f".map(c => c.dataset.{field})"
    )


def choose(browser, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", name)).select_by_value(value)


def test_the_gallery_sorts(opened, run):
    assert len(shown(opened, "name")) == len(run.images)
    first = shown(opened, "outcome")
    wrong = [outcome in ("miss", "false_alarm") for outcome in first]
    assert wrong == sorted(wrong, reverse=True)
    scores = sorted(image.image_score for image in run.images)
    choose(opened, "sort", "lowest")
    assert [float(score) for score in shown(opened, "score")] == scores
    choose(opened, "sort", "highest")
    assert [float(score) for score in shown(opened, "score")] == scores[::-1]
    choose(opened, "sort", "name")
    assert shown(opened, "name") == sorted(image.name for image in run.images)
    choose(opened, "sort", "errors")
    assert shown(opened, "outcome") == first


def test_the_gallery_filters(opened, run):
    def message() -> str:
        return opened.find_element("id", "shown").text

    total = len(run.images)
    errors = run.evaluation["misses"] + run.evaluation["false_alarms"]
    choose(opened, "outcome", "errors")
    assert set(shown(opened, "outcome")) == {"miss", "false_alarm"}
    assert message() == f"{errors} of {total} images"
    choose(opened, "outcome", "miss")
    assert shown(opened, "outcome") == ["miss"] * run.evaluation["misses"]
    choose(opened, "outcome", "")
    choose(opened, "kind", "good")
    assert set(shown(opened, "kind")) == {"good"}
    assert message() == f"{total - run.evaluation['defective']} of {total} images"
    search = opened.find_element("id", "search")
    search.send_keys("GOOD/003")
    assert shown(opened, "name") == ["test/good/003.png"]
    search.send_keys("?")
    assert shown(opened, "name") == []
    assert opened.find_element("id", "none").is_displayed()


def test_outlines_can_be_hidden(opened):
    def visible(which: str) -> int:
        script = "return [...document.querySelectorAll('#cards path.' + arguments[0])].filter(p => "
        return opened.execute_script(script + "getComputedStyle(p).display !== 'none').length", which)

    for which in ("found", "truth"):
        before = visible(which)
        assert before > 0
        box = opened.find_element("id", f"show-{which}")
        box.click()
        assert visible(which) == 0
        box.click()
        assert visible(which) == before


def test_the_viewer_works_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    names = shown(opened, "name")
    viewer = opened.find_element("id", "viewer")
    buttons = opened.find_elements("css selector", "#cards .enlarge")
    buttons[0].send_keys(Keys.ENTER)
    assert viewer.get_attribute("open") is not None
    assert viewer.get_attribute("aria-label") == names[0]
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert viewer.get_attribute("aria-label") == names[1]
    opened.switch_to.active_element.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert viewer.get_attribute("aria-label") == names[0]
    assert names[0] in opened.find_element("id", "stage").text
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert viewer.get_attribute("open") is None
    assert opened.switch_to.active_element == buttons[0]


def test_every_control_has_a_name(opened):
    for tag in ("select", "input", "button"):
        for element in opened.find_elements("css selector", f"main {tag}"):
            if element.is_displayed():
                assert element.accessible_name.strip(), element.get_attribute("outerHTML")
    levels = [int(element.tag_name[1]) for element in opened.find_elements("css selector", "h1, h2, h3")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened, scheme):
    """WCAG 2.2, success criterion 1.4.3: 4.5 to 1 for text."""
    emulate(opened, {"prefers-color-scheme": scheme})
    pairs = opened.execute_script("""
        const background = (element) => {
          for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
          }
        };
        return [...document.querySelectorAll("p, h1, h2, h3, td, th, dt, dd, small, label, a, summary, "
          + "button, select, input, output, caption, legend, figcaption, li, .glyph")]
          .filter((element) => element.offsetParent && element.textContent.trim())
          .map((element) => [element.tagName + "." + element.className, getComputedStyle(element).color,
            background(element)]);
    """)
    assert len({background for _, _, background in pairs}) > 2
    for what, ink, paper in pairs:
        # What lies on a picture lies on nearly black.
        if paper.startswith("rgba"):
            paper = "rgb(0, 0, 0)"
        lights = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (lights[0] + 0.05) / (lights[1] + 0.05) >= 4.5, (what, ink, paper)


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_fits_its_screen(opened, size, tmp_path):
    resize(opened, size)
    assert opened.execute_script("return document.documentElement.scrollWidth") == size[0]
    shot = tmp_path / "screen.png"
    assert opened.save_screenshot(str(shot))
    pixels = cv2.imread(str(shot))
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels.std() > 5
    for control in opened.find_elements("css selector", "#controls select, #controls input, .enlarge"):
        assert control.size["width"] + control.location["x"] <= size[0]


@pytest.fixture(scope="module")
def awkward(product: Path, colours, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a rod, a strip, and a defect with a name of many words."""
    folder = tmp_path_factory.mktemp("awkward")
    long = folder / "data/test" / " ".join(["scratch"] * 20)
    for place in (folder / "data/train/good", folder / "data/test/good", long):
        place.mkdir(parents=True)
    image = cv2.imread(str(product / "test/good/000.png"))
    cv2.imwrite(str(folder / "data/train/good/0.png"), image)
    cv2.imwrite(str(folder / "data/test/good/rod.png"), cv2.resize(image, (40, 400)))
    cv2.imwrite(str(folder / "data/test/good/strip.png"), cv2.resize(image, (400, 40)))
    cv2.imwrite(str(long / "0.png"), image)
    pydefect.evaluate(colours(), folder / "data", out=folder / "run", progress=False)
    return write_report(read_run(folder / "run"), progress=False)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_rods_strips_and_long_names_fit_too(browser, awkward, size):
    resize(browser, size)
    browser.get(awkward.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == size[0]
    photo = {
        card.get_attribute("data-name"): card.find_element("class name", "photo").size
        for card in browser.find_elements("css selector", "#cards > li")
    }
    assert photo["test/good/rod.png"]["height"] < 0.6 * size[1]
    card = browser.find_element("css selector", "#cards > li").size
    assert photo["test/good/strip.png"]["width"] > 0.9 * card["width"]


def test_no_chart_is_cut_off(opened):
    outside = opened.execute_script("""
        return [...document.querySelectorAll(".chart svg text")].filter((text) => {
          const [its, all] = [text, text.closest("svg")].map((one) => one.getBoundingClientRect());
          return its.left < all.left - 1 || its.right > all.right + 1
            || its.top < all.top - 1 || its.bottom > all.bottom + 1;
        }).map((text) => text.textContent);
    """)
    assert outside == []


def test_nothing_is_requested_and_nothing_complains(browser, page):
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())
    browser.execute_script("document.querySelector('#cards .enlarge').click()")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert page.as_uri() in requested
    assert {url for url in requested if not url.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []
