"""The page in Debian's chromium, from disk, with the network blocked. No browser is a failure, not a skip."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"
OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
ARGUMENTS = ("--no-sandbox", "--no-first-run", *(f"--disable-{feature}" for feature in OFF))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


def problems(browser: Browser, path: Path, *, width: int, scheme: Literal["light", "dark"]) -> list[str]:
    """What a reader with this window would suffer from, one sentence each."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
    complaints: list[str] = []

    def only_files(route: Route) -> None:
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            complaints.append(f"asks for {route.request.url}")
            route.abort()

    context.route("**/*", only_files)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.goto(path.as_uri())
    limits = {"scrollWidth": width, "scrollHeight": 6000 if width > 1000 else 12_000}
    for name, limit in limits.items():
        if (size := page.evaluate(f"document.documentElement.{name}")) > limit:
            complaints.append(f"{name}: {size} > {limit}")
    if page.locator("h1").count() != 1 or page.locator("h2").count() < 2 or page.locator("main").count() != 1:
        complaints.append("headings or landmarks are missing")
    context.close()
    return complaints


def unfolded(browser: Browser, report: Path, **options: Any) -> Page:
    page = browser.new_page(**options)
    page.goto((report / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_reads_well(browser: Browser, report: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    assert problems(browser, report / "index.html", width=width, scheme=scheme) == []


def test_a_phone_hides_and_clips_nothing(browser: Browser, report: Path) -> None:
    page = unfolded(browser, report, viewport={"width": 390, "height": 844})
    outside = """() => [...document.querySelectorAll('main td, main th, main svg, main svg text, main p, main dd')]
        .filter((node) => node.getClientRects().length && !node.closest('thead'))
        .filter((node) => { const box = node.getBoundingClientRect(); return box.left < -1 || box.right > 391; })
        .map((node) => node.textContent.slice(0, 40))"""
    assert page.evaluate(outside) == []
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((n) => n.scrollWidth <= n.clientWidth)")
    cells = page.locator("tbody tr", has_text="Without it, ReLU is better").first.locator("td")
    titles = cells.evaluate_all("cells => cells.map((cell) => getComputedStyle(cell, '::before').content)")
    assert {'"Verdict"', '"Compared"', '"Measured"'} <= set(titles)
    page.close()


def test_a_click_on_a_title_sorts_its_column(browser: Browser, report: Path) -> None:
    page = unfolded(browser, report)
    table = page.locator("table", has_text="Validation perplexity after training")
    for order, compare in (("ascending", sorted), ("descending", lambda values: sorted(values, reverse=True))):
        table.locator("th button", has_text="Perplexity").first.click()
        cells = table.locator("tbody tr td:nth-child(2)").all_inner_texts()
        numbers = [float(cell.split()[0]) for cell in cells if not cell.startswith("NaN")]
        assert numbers == compare(numbers), order
        assert cells[-1].startswith("NaN")
    page.close()


def test_the_keyboard_reaches_every_scroll_area_and_scrolls_it(browser: Browser, report: Path) -> None:
    # wait_for_function evaluates a string again at every frame, which the page's own policy forbids.
    page = unfolded(browser, report, viewport={"width": 600, "height": 844}, bypass_csp=True)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = 0
    for _ in range(400):
        page.keyboard.press("Tab")
        reached += page.evaluate("document.activeElement.classList.contains('scroll')")
    assert reached >= page.locator(".scroll").count() >= 5
    page.locator(".scroll").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
    page.close()
