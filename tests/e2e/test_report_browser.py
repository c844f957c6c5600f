"""A report in a real browser: nothing missing, nothing fetched, readable on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, Request
from report_worlds import interval, png, report, results

from evaluation.report import Column, Figure, Section, Table, write_report


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A page with everything that is hard to fit: a wide table, long words, wide figures, long commands."""
    wide = Table(
        "A wide table",
        (Column("policy"), *(Column(f"measure {index}", "share of bars", ".3f", interval=True) for index in range(8))),
        tuple((f"policy {row}", *(interval(0.1 * row, -1.0, 2.0) for _ in range(8))) for row in range(4)),
    )
    steps = Table("Next steps", (Column("verdict"), Column("next step")), (("NO-GO", "word " * 40),))
    small = Table("A small table", (Column("a"), Column("b")), (("x", 1),))
    figures = (
        Figure("Equity", png(9.0), "A line.", "After costs."),
        Figure("Drawdown", png(9.0), "Another line."),
    )
    long = report(
        title="Evaluation of a_policy_with_a_very_long_name_that_has_no_place_to_break_at_all",
        results=results(policy="policy_with_a_very_long_name_that_has_no_place_to_break"),
        sections=(Section("Evidence", ("word " * 80,), (wide, steps, small), figures),),
        reproduce=("detent evaluate --suite " + "--set a.b.c=1 " * 20,),
        facts={"config hash": "0123456789abcdef" * 4},
    )
    return write_report(long, tmp_path_factory.mktemp("report")).html.as_uri()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page at 400 px, watched: any complaint, failure or request to elsewhere fails the test."""
    trouble: list[str] = []

    def watch(request: Request) -> None:
        if request.url != address and not request.url.startswith("data:"):
            trouble.append(f"request to {request.url}")

    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.on("console", lambda message: trouble.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("request", watch)
    page.on("requestfailed", lambda request: trouble.append(f"failed: {request.url[:80]}"))
    page.goto(address, wait_until="load")
    yield page
    page.close()
    assert trouble == []


def test_every_image_is_there(opened: Page) -> None:
    widths = opened.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
    assert widths == [900, 900]


@pytest.mark.parametrize("width", [320, 400, 700, 1200, 1920])
def test_the_page_never_scrolls_sideways_and_what_is_wide_scrolls_in_its_box(opened: Page, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    boxes = opened.eval_on_selector_all(
        ".scroll",
        """boxes => boxes.map(box => {
            box.scrollLeft = 1e6;
            const inside = box.firstElementChild.getBoundingClientRect(), frame = box.getBoundingClientRect();
            return {left: frame.left, right: frame.right, end: inside.right, tab: box.tabIndex};
        })""",
    )
    assert len(boxes) == 7
    for box in boxes:
        assert box["left"] >= 0
        assert box["right"] <= width
        # Scrolled to its end, the last column is inside the frame; the keyboard gets there too.
        assert box["end"] <= box["right"] + 1
        assert box["tab"] == 0


def test_what_is_wide_says_so_on_a_phone(opened: Page) -> None:
    tables = opened.eval_on_selector_all(
        "figure.table",
        """figures => figures.map(figure => {
            const box = figure.querySelector(".scroll");
            const hint = getComputedStyle(figure.querySelector("figcaption"), "::after").content;
            return {id: figure.id, wide: box.scrollWidth > box.clientWidth, hint: hint.includes("swipe")};
        })""",
    )
    assert {table["id"] for table in tables if table["wide"]} >= {"table-a-wide-table"}
    assert {table["id"]: table["hint"] for table in tables} == {table["id"]: table["wide"] for table in tables}
    opened.set_viewport_size({"width": 1200, "height": 800})
    content = opened.eval_on_selector("figcaption", "one => getComputedStyle(one, '::after').content")
    assert "swipe" not in content


def test_names_break_after_underscores_only(opened: Page) -> None:
    lines = opened.evaluate(
        """() => {
            const name = document.querySelector("#table-results tbody th"), walker =
                document.createTreeWalker(name, NodeFilter.SHOW_TEXT), found = [];
            for (let node = walker.nextNode(); node; node = walker.nextNode()) {
                const range = document.createRange();
                range.selectNodeContents(node);
                found.push([node.data.trim(), range.getClientRects().length]);
            }
            return found.filter(([text]) => text);
        }"""
    )
    assert [text for text, _ in lines][:3] == ["policy_", "with_", "a_"]
    assert {rows for _, rows in lines} == {1}


def test_a_table_takes_the_whole_width_of_the_page(opened: Page) -> None:
    opened.set_viewport_size({"width": 1280, "height": 800})
    box = opened.locator("#table-a-wide-table .scroll").bounding_box()
    assert box is not None
    assert box["width"] >= 1200


def test_prose_in_a_table_has_room(opened: Page) -> None:
    width = opened.eval_on_selector("td.prose", "cell => cell.getBoundingClientRect().width")
    assert width >= 18 * 16


def test_names_stay_in_sight_while_a_table_scrolls(opened: Page) -> None:
    name = opened.locator("#table-a-wide-table tbody th").first
    before = name.bounding_box()
    opened.eval_on_selector("#table-a-wide-table .scroll", "box => { box.scrollLeft = 500; }")
    assert name.bounding_box() == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(opened: Page, scheme: str) -> None:
    opened.emulate_media(color_scheme=scheme)
    colours = opened.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ["page", "card", "ink", "soft", "link", "good", "warn", "bad",
                           "good-wash", "warn-wash", "bad-wash"];
            return Object.fromEntries(names.map(name => [name, style.getPropertyValue("--" + name).trim()]));
        }"""
    )
    dark = luminance(colours["page"]) < 0.1
    assert dark is (scheme == "dark")
    pairs = [(text, ground) for text in ("ink", "soft", "link", "good", "warn", "bad") for ground in ("page", "card")]
    pairs += [(text, tone + "-wash") for tone in ("good", "warn", "bad") for text in (tone, "ink")]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    # WCAG 2.2, level AA for body text.
    assert {pair: round(value, 2) for pair, value in low.items() if value < 4.5} == {}


def test_contents_lead_to_their_sections(opened: Page) -> None:
    links = opened.locator("nav a")
    for index in range(links.count()):
        target = links.nth(index).get_attribute("href")
        links.nth(index).click()
        assert opened.evaluate("location.hash") == target
        assert opened.locator(target).count() == 1


def test_printing_shows_whole_tables_on_white(opened: Page) -> None:
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.eval_on_selector("body", "body => getComputedStyle(body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.eval_on_selector_all(
        ".scroll", "boxes => boxes.every(box => getComputedStyle(box).overflowX === 'visible')"
    )
    assert opened.pdf(format="A4").startswith(b"%PDF-")


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" by WCAG 2.2."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
