"""Where libraries keep what they write on their own: font caches, compiled kernels, scratch files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def keep_caches_in(workdir: Path) -> None:
    """Keep caches and temporary files of this process and its children below a work directory.

    Libraries would otherwise write to the home directory and /tmp. Call it before they are imported.
    """
    cache = workdir.resolve() / "cache"
    temporary = cache / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["MPLCONFIGDIR"] = str(cache / "matplotlib")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "torchinductor")
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)


@contextmanager
def no_caches() -> Iterator[None]:
    """Leave nothing behind: matplotlib, which others import, writes a list of fonts when it is loaded."""
    before = os.environ.get("MPLCONFIGDIR")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MPLCONFIGDIR"] = scratch
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]
            if before is not None:
                os.environ["MPLCONFIGDIR"] = before
