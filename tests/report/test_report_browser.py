"""The page in Debian's chromium, from disk, with the network blocked. No browser is a failure, not a skip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"
OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
ARGUMENTS = ("--no-sandbox", "--no-first-run", *(f"--disable-{feature}" for feature in OFF))
# Contrast (WCAG) of every text node against the first painted background behind it, SVG text included
# unless it stands on a coloured cell or bar.
LOWEST_CONTRAST = """
() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let lowest = 99;
  for (const node of document.querySelectorAll('h1,h2,p,li,a,td,th,dt,dd,figcaption,caption span,svg text')) {
    const style = getComputedStyle(node);
    const inSvg = node.tagName === 'text';
    if (inSvg && !(node.getAttribute('style') || '').includes('var(')) continue;
    const a = light(rgb(inSvg ? style.fill : style.color)), b = light(behind(node));
    lowest = Math.min(lowest, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return lowest;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


def problems(browser: Browser, path: Path, *, width: int, scheme: str) -> list[str]:
    """What a reader with this window would suffer from, one sentence each."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    found: list[str] = []

    def only_files(route: Route) -> None:
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            found.append(f"asks for {route.request.url}")
            route.abort()

    context.set_offline(True)
    context.route("**/*", only_files)
    page = context.new_page()
    page.on("console", lambda message: found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.goto(path.as_uri())
    found += layout_problems(page, width)
    context.close()
    return found


def layout_problems(page: Page, width: int) -> list[str]:
    found = []
    scroll = page.evaluate("document.documentElement.scrollWidth")
    if scroll > width:
        found.append(f"scrolls sideways: {scroll} > {width}")
    if (contrast := page.evaluate(LOWEST_CONTRAST)) < 4.5:
        found.append(f"text contrast {contrast:.2f}")
    if page.locator("h1").count() != 1 or page.locator("h2").count() < 2 or page.locator("main").count() != 1:
        found.append("headings or landmarks are missing")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_reads_well(browser: Browser, report: Path, width: int, scheme: str) -> None:
    assert problems(browser, report / "index.html", width=width, scheme=scheme) == []


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        ("<p style='width: 900px'>wide</p>", "scrolls sideways"),
        ("<p style='color: #777; background: #888'>pale</p>", "text contrast"),
        ("<img alt='' src='http://example.invalid/x.png'>", "Content Security Policy"),
        ("<h1>another</h1>", "headings"),
    ],
)
def test_a_broken_page_is_caught(browser: Browser, report: Path, tmp_path: Path, harm: str, complaint: str) -> None:
    broken = tmp_path / "index.html"
    broken.write_text((report / "index.html").read_text().replace("</main>", f"{harm}</main>"))
    assert any(complaint in found for found in problems(browser, broken, width=390, scheme="light"))


def test_a_click_on_a_title_sorts_its_column(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.goto((report / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
    table = page.locator("table", has_text="Validation perplexity after training")
    for order, compare in (("ascending", sorted), ("descending", lambda values: sorted(values, reverse=True))):
        table.locator("th button", has_text="Perplexity").first.click()
        cells = table.locator("tbody tr td:nth-child(2)").all_inner_texts()
        numbers = [float(cell.split()[0]) for cell in cells if not cell.startswith("NaN")]
        assert numbers == compare(numbers), order
        assert cells[-1].startswith("NaN")
    page.close()


def test_a_folded_page_is_short(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 844})
    page.goto((report / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    page.close()


def test_the_two_schemes_differ(browser: Browser, report: Path) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((report / "index.html").as_uri())
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        colours.add(page.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        page.close()
    assert len(colours) == 4


def test_the_keyboard_reaches_every_scroll_area_and_scrolls_it(browser: Browser, report: Path) -> None:
    # wait_for_function evaluates a string again at every frame, which the page's own policy forbids.
    page = browser.new_page(viewport={"width": 390, "height": 844}, bypass_csp=True)
    page.goto((report / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    wanted = page.locator(".scroll").count()
    reached = 0
    for _ in range(400):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('scroll')"):
            assert page.evaluate("document.activeElement.getAttribute('tabindex')") == "0"
            reached += 1
    assert reached >= wanted >= 5
    page.locator(".scroll").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
    page.close()
