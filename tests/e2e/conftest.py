from __future__ import annotations

from collections.abc import Iterator

import pytest
from browsers import find_browser
from playwright.sync_api import Browser, sync_playwright
from smoke_runs import SmokeRun, smoke_run

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser without a page."""
    path = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGS)
        yield browser
        browser.close()
