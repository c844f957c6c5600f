"""Where a real browser is, and what of the tests needs one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """DETENT_CHROMIUM, else a browser on PATH."""
    named = os.environ.get("DETENT_CHROMIUM")
    if named:
        assert Path(named).is_file(), f"DETENT_CHROMIUM: expected a Chromium binary, was {named!r}"
        return named
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


# CI promises a browser: there the fixture fails without one.
ABSENT = os.environ.get("CI") != "true" and find_browser() is None
needs_browser = pytest.mark.skipif(ABSENT, reason="no browser on PATH: install Chromium, or set DETENT_CHROMIUM")
