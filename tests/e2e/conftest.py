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


def find_browser() -> str:
    """DETENT_CHROMIUM, else a browser on PATH; without one skip, or fail where CI promises one."""
    named = os.environ.get("DETENT_CHROMIUM")
    if named:
        assert Path(named).is_file(), f"DETENT_CHROMIUM: expected a Chromium binary, was {named!r}"
        return named
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        looked = f"looked for {', '.join(BROWSERS)} on PATH"
        if os.environ.get("CI") == "true":
            pytest.fail(f"no browser where CI promises one: {looked}")
        pytest.skip(reason="no browser: install Chromium, or name one in DETENT_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser without a page."""
    path = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGS)
        yield browser
        browser.close()
