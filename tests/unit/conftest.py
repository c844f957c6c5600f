"""A small bundle, written once per test run and shared by everything that reads bundles."""

from __future__ import annotations

from pathlib import Path

import pytest


# The helper imports torch; packages that never read a bundle should not wait for it.
@pytest.fixture(scope="session")
def bundle_info(tmp_path_factory):
    import bundle_parts

    return bundle_parts.write(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="session")
def bundle_path(bundle_info) -> Path:
    return bundle_info.path


@pytest.fixture(scope="session")
def bundle(bundle_path):
    from serving import open_bundle

    return open_bundle(bundle_path)


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """A bundle with a planner."""
    import bundle_parts

    from serving import open_bundle

    return open_bundle(bundle_parts.write_planned(tmp_path_factory.mktemp("bundles") / "planned").path)
