"""The page in a real browser: what a person sees and can press."""

import base64
import os
import shutil
from pathlib import Path

import pytest

from safediffusion.report.page import write_report


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser, page, width, height=844):
    """Open the page in a window of exactly that many CSS pixels, as a phone has them."""
    colours(browser, "light")
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def colours(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def screenshot(browser, name):
    """Keep the whole page as a picture when SAFEDIFFUSION_SCREENSHOTS names a folder: for people, not for asserts."""
    if folder := os.environ.get("SAFEDIFFUSION_SCREENSHOTS"):
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder, name).write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_real_browser(browser, run_dir, tmp_path, width):
    from selenium.webdriver.common.by import By

    show(browser, write_report([run_dir], tmp_path / "out"), width)
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) == 18
    assert all(image.get_property("naturalWidth") == 32 for image in images)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    screenshot(browser, f"page-{width}.png")
    colours(browser, "dark")
    screenshot(browser, f"dark-{width}.png")

    cover = browser.find_element(By.CSS_SELECTOR, "button.cover")
    picture = cover.find_element(By.TAG_NAME, "img")
    assert "blur" in picture.value_of_css_property("filter")
    browser.execute_script("arguments[0].style.transition = 'none'", picture)
    cover.click()
    assert cover.get_attribute("aria-pressed") == "true"
    assert picture.value_of_css_property("filter") == "none"
    cover.send_keys(" ")
    assert "blur" in picture.value_of_css_property("filter")

    everything = browser.find_element(By.CSS_SELECTOR, "button.all")
    pressed = "return [...document.querySelectorAll('button.cover')].map(b => b.getAttribute('aria-pressed'))"
    everything.click()
    assert set(browser.execute_script(pressed)) == {"true"}
    assert everything.text == "Blur all"
    everything.click()
    assert set(browser.execute_script(pressed)) == {"false"}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_comparison_in_a_real_browser(document, fill, browser, tmp_path, width):
    other = document()["protocol"] | {"id": "core-v1"}
    folders = [
        fill(tmp_path / "steering", document()),
        fill(tmp_path / "without-guards-and-a-long-name", document(unsafe=(0.94, 0.02), composition=(0.7, 0.21), diversity=(0.31, 0.06))),
        fill(tmp_path / "another", document(protocol=other)),
    ]
    show(browser, write_report(folders, tmp_path / "out"), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    repeated = "const all = [...document.querySelectorAll('[id]')].map(e => e.id); return all.length - new Set(all).size"
    assert browser.execute_script(repeated) == 0
    screenshot(browser, f"comparison-{width}.png")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
