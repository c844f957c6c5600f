"""Where a real browser is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from services import unavailable

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """DETENT_CHROMIUM, else a browser on PATH; without one the test is left out, or fails where one is promised."""
    named = os.environ.get("DETENT_CHROMIUM")
    if named:
        assert Path(named).is_file(), f"DETENT_CHROMIUM: expected a Chromium binary, was {named!r}"
        return named
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    return found or unavailable(f"none of {', '.join(BROWSERS)} is on PATH: install Chromium, or set DETENT_CHROMIUM")
