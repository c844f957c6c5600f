"""Bundles that decide differently, and one that calls itself another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.serve_variants import make_variant
from serving import Bundle, open_bundle


@pytest.fixture(scope="module")
def variants(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("variants")
    return [bundle_path, make_variant(bundle_path, folder / "one"), make_variant(bundle_path, folder / "two", 2)]


@pytest.fixture
def impostor(bundle: Bundle, variants: list[Path]) -> Bundle:
    """Decides as a variant does and calls itself the bundle."""
    return dataclasses.replace(open_bundle(variants[1]), manifest=bundle.manifest)
