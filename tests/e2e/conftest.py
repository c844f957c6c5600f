from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from smoke_runs import SmokeRun, smoke_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """One complete smoke run, shared by the tests that only read it."""
    return smoke_run(tmp_path_factory.mktemp("first") / "var")


def find_browser() -> str | None:
    """DETENT_CHROMIUM, else a browser on PATH."""
    named = os.environ.get("DETENT_CHROMIUM")
    if named:
        assert Path(named).is_file(), f"DETENT_CHROMIUM: expected a Chromium binary, was {named!r}"
        return named
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser leave out the tests that open one, and only them; CI promises one, so there they fail."""
    absent = os.environ.get("CI") != "true" and find_browser() is None
    reason = f"no browser ({', '.join(BROWSERS)}) on PATH: install Chromium, or name one in DETENT_CHROMIUM"
    without_browser = pytest.mark.skipif(absent, reason=reason)
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(without_browser)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser without a page."""
    path = find_browser()
    assert path is not None, f"no browser where CI promises one: looked for {', '.join(BROWSERS)} on PATH"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGS)
        yield browser
        browser.close()
