"""The operator page in a real browser: by keyboard alone, from its own server alone, and honest when that is gone."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_processes import OPERATOR, Service, bundle_path, running
from playwright.sync_api import Browser, Page, Request, expect
from test_report_browser import contrast

READ = "read-token-0123456789"
PATIENCE_MS = 120_000.0
FEATURES = {"gap_return": 0.001, "intraday_return": 0.002, "volatility_20": 0.2, "momentum": 0.1}
Opener = Callable[..., Page]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_path(tmp_path_factory)


@pytest.fixture
def service(bundle: Path, tmp_path: Path) -> Iterator[Service]:
    with running(bundle, tmp_path / "ledger.db") as service:
        yield service


@pytest.fixture
def guarded(bundle: Path, tmp_path: Path) -> Iterator[Service]:
    tokens = {"DETENT_READ_TOKEN": READ, "DETENT_OPERATOR_TOKEN": OPERATOR}
    with running(bundle, tmp_path / "guarded.db", tokens=tokens) as service:
        yield service


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opener]:
    """Opens the page, watched: a complaint or a request to elsewhere fails the test."""
    trouble: list[str] = []
    pages: list[Page] = []

    def open_page(service: Service, *, width: int = 1280, refused: bool = False, **options: Any) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)

        def watch(request: Request) -> None:
            if not request.url.startswith((service.url + "/", "data:")):
                trouble.append(f"request to {request.url}")

        def listen(message: Any) -> None:
            # The browser itself reports what the server refuses.
            if not (refused and "Failed to load resource" in message.text):
                trouble.append(f"console {message.type}: {message.text}")

        page.on("request", watch)
        page.on("console", listen)
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.goto(service.url + "/")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert trouble == []


def post(service: Service, path: str, body: dict[str, Any], token: str | None = None) -> dict[str, Any]:
    headers = {"content-type": "application/json"} | ({} if token is None else {"authorization": f"Bearer {token}"})
    request = urllib.request.Request(service.url + path, json.dumps(body).encode(), headers)  # noqa: S310 - loopback
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
        return answer


def decide(service: Service, event: str, token: str | None = None, **changes: Any) -> dict[str, Any]:
    account = {"equity": 1000.0, "position": 0.0} | changes.pop("account", {})
    body = {"event_id": event, "bar_time": time.time() - 60.0, "features": FEATURES, "account": account, **changes}
    return post(service, "/decide", body, token)


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id"))


def tab_to(page: Page, target: str) -> None:
    for _ in range(30):
        if focused(page) == target:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{target} cannot be reached with Tab")


def test_the_kill_switch_by_keyboard_alone(guarded: Service, opened: Opener) -> None:
    page = opened(guarded, refused=True)
    state = page.locator("#state")
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type(OPERATOR)
    page.keyboard.press("Enter")
    expect(state).to_have_text("ACTIVE")
    tab_to(page, "kill")
    # Where the focus is can be seen.
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert focused(page) == "person"
    page.keyboard.type("Ada")
    page.keyboard.press("Tab")
    assert focused(page) == "reason"
    page.keyboard.type("a test of the switch")
    page.keyboard.press("Enter")
    expect(state).to_have_text("HALTED, kill switch latched")
    expect(page.locator("#outcome")).to_contain_text("Trading is halted")
    assert focused(page) == "kill"
    assert page.title().startswith("HALTED")
    assert decide(guarded, "after", OPERATOR)["executed"] == 0
    # And back again; the name is known now.
    tab_to(page, "reset")
    page.keyboard.press("Space")
    assert focused(page) == "reason"
    assert page.locator("#person").input_value() == "Ada"
    page.keyboard.type("it works")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "confirm"
    page.keyboard.press("Space")
    expect(state).to_have_text("ACTIVE")


def test_without_tokens_nobody_resets_and_the_page_says_why(service: Service, opened: Opener) -> None:
    page = opened(service, refused=True)
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Your name").fill("Ada")
    page.get_by_label("Reason").fill("a test")
    page.locator("#confirm").click()
    expect(page.locator("#dialog-error")).to_contain_text("DETENT_OPERATOR_TOKEN, this service was started without one")


@pytest.mark.parametrize("leave", ["Escape", "cancel"])
def test_a_command_that_is_not_confirmed_is_not_given(service: Service, opened: Opener, leave: str) -> None:
    page = opened(service)
    page.get_by_role("button", name="Kill switch").click()
    expect(page.get_by_role("dialog", name="Pull the kill switch?")).to_be_visible()
    # Without a name and a reason there is no sending.
    page.get_by_role("button", name="Halt trading").click()
    page.get_by_label("Your name").fill("Ada")
    page.get_by_label("Reason").fill("   ")
    page.get_by_role("button", name="Halt trading").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    if leave == "cancel":
        page.get_by_role("button", name="Cancel").click()
    else:
        page.keyboard.press(leave)
    expect(page.get_by_role("dialog")).to_be_hidden()
    decide(service, "still active")
    expect(page.locator("#decisions tbody tr")).to_have_count(1)
    expect(page.locator("#state")).to_have_text("ACTIVE")


def test_reduce_only_shows(service: Service, opened: Opener) -> None:
    page = opened(service)
    page.get_by_role("button", name="Reduce only").click()
    page.get_by_label("Your name").fill("Ada")
    page.get_by_label("Reason").fill("a test")
    page.get_by_role("dialog").get_by_role("button", name="Reduce only").click()
    expect(page.locator("#state")).to_have_text("REDUCE_ONLY")


def test_decisions_with_masks_and_reasons(service: Service, opened: Opener) -> None:
    page = opened(service)
    expect(page.locator("#no-decisions")).to_be_visible()
    decide(service, "first", action_masks=[True, False, True, True, True, True, True])
    decide(service, "odd", features={})
    rows = page.locator("#decisions tbody tr")
    expect(rows).to_have_count(2)
    # Newest first.
    expect(rows.first).to_contain_text("missing feature")
    expect(rows.first).to_contain_text("features: expected")
    first = rows.last
    expect(first.locator(".masks li")).to_have_count(7)
    expect(first.locator(".masks .valid").first).to_have_text("✓ hold valid")
    expect(first.locator(".masks .chosen")).to_have_count(1)
    first.locator("summary").click()
    expect(first.locator("details li", has_text="target 0: caller")).to_be_visible()
    expect(first.locator("details li", has_text="target 1.25: max_position_change")).to_be_visible()
    # What somebody reads stays open while new decisions come.
    decide(service, "third")
    expect(rows).to_have_count(3)
    expect(first.locator("details li").first).to_be_visible()
    expect(page.locator("#latency rect")).to_have_count(17)
    expect(page.locator("#latency-words")).to_contain_text("3 decisions: median")
    expect(page.locator("#champion")).to_contain_text("Planneryes")
    expect(page.locator("#challenger")).to_contain_text("none")


def test_names_are_text_and_nothing_else(service: Service, opened: Opener) -> None:
    page = opened(service)
    event = "<img src=http://127.0.0.1:9/x onerror=\"document.title='owned'\"><script>alert(1)</script>"
    decide(service, event)
    expect(page.locator("#decisions tbody th")).to_have_text(event)
    assert page.locator("main img, main script").count() == 0
    assert page.title().startswith("ACTIVE")


def test_a_server_that_is_gone_is_seen_and_so_is_its_return(
    bundle: Path, tmp_path: Path, service: Service, opened: Opener
) -> None:
    page = opened(service, refused=True)
    expect(page.locator("#state")).to_have_text("ACTIVE")
    expect(page.locator("#stale")).to_be_hidden()
    service.process.terminate()
    service.process.wait(60)
    expect(page.get_by_role("alert").first).to_contain_text("The service does not answer")
    expect(page.locator("body")).to_have_class("stale")
    # A command now is not taken for given.
    page.get_by_role("button", name="Kill switch").click()
    page.get_by_label("Your name").fill("Ada")
    page.get_by_label("Reason").fill("a test")
    page.get_by_role("button", name="Halt trading").click()
    expect(page.locator("#dialog-error")).to_contain_text("whether it took the command is not known")
    page.keyboard.press("Escape")
    with running(bundle, tmp_path / "ledger.db", "--port", service.url.rpartition(":")[2]):
        expect(page.locator("#stale")).to_be_hidden()
        expect(page.locator("#state")).to_have_text("ACTIVE")


def test_tokens_are_asked_for_and_kept_for_the_tab(guarded: Service, opened: Opener) -> None:
    page = opened(guarded, refused=True)
    token = page.get_by_label("Token")
    expect(token).to_be_focused()
    expect(page.locator("#main")).to_be_hidden()
    page.keyboard.type("a-wrong-token-0123456789")
    page.keyboard.press("Enter")
    expect(page.locator("#token-hint")).to_contain_text("Not accepted")
    token.fill(READ)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ACTIVE")
    page.reload()
    expect(page.locator("#state")).to_have_text("ACTIVE")
    assert page.evaluate("[sessionStorage.getItem('detent-token'), localStorage.length, document.cookie]") == [
        READ,
        0,
        "",
    ]
    # Who may read may not halt, and is told.
    page.get_by_role("button", name="Kill switch").click()
    page.get_by_label("Your name").fill("Ada")
    page.get_by_label("Reason").fill("a test")
    page.get_by_role("button", name="Halt trading").click()
    expect(page.locator("#dialog-error")).to_contain_text("expected the role operator, was read")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Change token").click()
    token.fill(OPERATOR)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ACTIVE")
    assert post(guarded, "/kill", {"person": "Ada", "reason": "a test"}, OPERATOR)["command"] == "kill"
    expect(page.locator("#state")).to_have_text("HALTED, kill switch latched")


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_the_page_never_scrolls_sideways(service: Service, opened: Opener, width: int) -> None:
    decide(service, "a_long_name_that_has_no_place_to_break_at_all_" * 4)
    page = opened(service, width=width)
    expect(page.locator("#decisions tbody tr")).to_have_count(1)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Kill switch").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_a_reader_of_the_screen_gets_roles_names_and_news(service: Service, opened: Opener) -> None:
    decide(service, "first")
    for width in (400, 1280):
        page = opened(service, width=width)
        expect(page.get_by_role("row")).to_have_count(2)
        expect(page.get_by_role("rowheader", name="first")).to_be_visible()
        assert page.locator("#state").get_attribute("aria-live") == "polite"
        assert page.locator("#stale").get_attribute("role") == "alert"
        expect(page.get_by_role("img", name="Latency of decisions")).to_be_visible()
        for heading in ("Trading state", "Newest decisions", "Latency of decisions", "Bundles"):
            expect(page.get_by_role("region", name=heading)).to_be_visible()
        unlabelled = "inputs => inputs.filter(input => !input.labels.length).length"
        assert page.eval_on_selector_all("input", unlabelled) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(service: Service, opened: Opener, scheme: str) -> None:
    page = opened(service, color_scheme=scheme)
    expect(page.locator("#state")).to_have_text("ACTIVE")
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ["page", "card", "ink", "soft", "link", "good", "warn", "bad",
                           "good-wash", "warn-wash", "bad-wash"];
            return Object.fromEntries(names.map(name => [name, style.getPropertyValue("--" + name).trim()]));
        }"""
    )
    pairs = [(text, ground) for text in ("ink", "soft", "link", "good", "warn", "bad") for ground in ("page", "card")]
    pairs += [(tone, tone + "-wash") for tone in ("good", "warn", "bad")]
    # WCAG 2.2, level AA for body text.
    assert [pair for pair in pairs if contrast(colours[pair[0]], colours[pair[1]]) < 4.5] == []
