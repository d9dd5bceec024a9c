"""`recipes/space` in a headless Chromium. `SCREENSHOTS=folder` keeps a picture of every test's page."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import space
from helpers.pictures import picture

pytest.importorskip("gradio", reason="the app needs `pip install -e '.[space]'`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install -e '.[test-recipes]'`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
]
# The machine may be busy with other tests.
SECONDS = 120
MODEL_CARDS = space.CLONE / "model_cards"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app with two tiny subnetworks, started as people start it."""
    folder = tmp_path_factory.mktemp("cards")
    space.save_cards(folder)
    with serving(folder / "half", folder / "quarter") as url:
        yield url


class serving:
    """Run `python recipes/space/app.py` with arguments, and give the address that it prints."""

    def __init__(self, *arguments):
        self.command = [sys.executable, "-u", str(space.SPACE / "app.py"), *map(str, arguments)]

    def __enter__(self):
        environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                return found[0]
        raise AssertionError("".join(lines))

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(chromium, address, request):
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    opened(page, address)
    yield page
    if "SCREENSHOTS" in os.environ:
        name = re.sub(r"\W+", "-", request.node.name).strip("-")
        page.screenshot(path=Path(os.environ["SCREENSHOTS"], f"{name}.png"), full_page=True)
    page.close()


def opened(page, address):
    """Open the app and wait for the first results."""
    page.set_default_timeout(1000 * SECONDS)
    page.goto(address)
    page.locator("#remarks p").wait_for()
    page.locator("#kept img").wait_for()


def expect(locator):
    playwright.expect.set_options(timeout=1000 * SECONDS)
    return playwright.expect(locator)


def bars(page, side):
    return page.locator(f"#{side}_bars").inner_text()


def seen(page):
    return page.locator("#seen img").get_attribute("src")


def test_the_page_shows_both_sides_and_fits_its_width(page):
    expect(page.locator("#dense_facts")).to_contain_text("Pruned, on dense kernels")
    expect(page.locator("#pruned_facts")).to_contain_text("Pruned: half")
    for side in ("dense", "pruned"):
        expect(page.locator(f"#{side}_facts")).to_contain_text(re.compile(r"[\d.]+ ms an image"))
        expect(page.locator(f"#{side}_bars")).to_contain_text("bright")
    expect(page.locator("#prompt img")).to_be_visible()
    expect(page.locator("#prompt_caption")).to_contain_text("Prompt, up to ±102/255")
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_choose_and_upload_an_image(page, tmp_path):
    first = seen(page)
    page.locator("#examples button").nth(4).click()
    expect(page.locator("#seen img")).not_to_have_attribute("src", first)
    second = seen(page)
    picture(1, size=(50, 40)).save(tmp_path / "mine.jpg")
    upload(page, tmp_path / "mine.jpg")
    expect(page.locator("#seen img")).not_to_have_attribute("src", second)


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(path)


def test_slide_to_another_sparsity(page):
    expect(page.locator("#sparsity")).to_contain_text("Sparsity: 50% (there are 50%, 75%)")
    kept, before = page.locator("#kept img").get_attribute("src"), bars(page, "pruned")
    page.locator("#sparsity input[type=range]").press("ArrowRight")
    expect(page.locator("#sparsity")).to_contain_text("Sparsity: 75% (there are 50%, 75%)")
    expect(page.locator("#pruned_facts")).to_contain_text("Pruned: quarter")
    assert page.locator("#kept img").get_attribute("src") != kept
    assert bars(page, "pruned") != before


def test_toggle_the_prompt(page):
    before = seen(page)
    page.get_by_label("Add the visual prompt").click()
    expect(page.locator("#pruned_facts")).to_contain_text("Pruned: half, with prompt")
    assert seen(page) != before
    page.get_by_label("Add the visual prompt").click()
    expect(page.locator("#pruned_facts")).not_to_contain_text("with prompt")


def test_a_broken_image_is_refused_in_words_and_the_next_one_is_shown(page, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    upload(page, tmp_path / "broken.png")
    expect(page.locator("#problem")).to_contain_text("This image cannot be read")
    expect(page.locator("#problem")).to_contain_text("broken.png: no image that Pillow can read")
    expect(page.locator("#pruned_facts")).not_to_contain_text("ms an image")
    expect(page.locator("#pruned_bars")).not_to_contain_text("bright")
    page.locator("#examples button").first.click()
    expect(page.locator("#problem")).not_to_be_visible()
    expect(page.locator("#pruned_bars")).to_contain_text("bright")


@pytest.mark.skipif(not any(MODEL_CARDS.glob("*/model*.safetensors")), reason="model_cards/ holds no weights")
def test_it_starts_on_the_subnetworks_of_the_repository(chromium):
    with serving() as url:
        page = chromium.new_page()
        opened(page, url)
        expect(page.locator("#pruned_bars")).to_contain_text("Ankle boot")
        expect(page.locator("#sparsity")).to_contain_text("Sparsity: ")
        page.close()
