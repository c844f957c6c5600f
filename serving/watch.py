"""Hot reload: another bundle is verified, warmed and put in force between two decisions; a bad one is refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from masking import TradingState
from serving.bundle import Bundle, open_bundle
from serving.deciders import Deciders
from serving.engine import DecisionEngine
from serving.errors import BundleError, BundleMismatchError, ServingError
from serving.manifest import MANIFEST_FILE

log = logging.getLogger(__name__)

WARM_UP = 20
"""Decisions on golden rows before a bundle is put in force: first calls are slow."""
GRACE_S = 5.0
"""How long a service that ends waits for a look under way."""


class Found(NamedTuple):
    """Where a bundle lies."""

    path: Path
    bundle_hash: str | None = None
    """As its registry names it; None trusts the manifest."""


BundleSource = Callable[[], Found | None]
"""Says which bundle is wanted now; None where there is none.

Raises: BundleError where what is wanted is damaged; ServingError or OSError if it cannot tell.
"""


def directory_source(path: Path) -> BundleSource:
    """A directory, or a link to one that is moved on."""
    return lambda: Found(path.resolve())


def warmed(found: Found, *, planner: bool, seed: int) -> Bundle:
    """Open a bundle and decide with it until it is warm.

    Raises: BundleError where it is damaged, or decides here otherwise than in training.
    """
    bundle = open_bundle(found.path, found.bundle_hash)
    deciders, golden = Deciders(bundle, planner=planner, seed=seed), bundle.golden
    for index in range(WARM_UP):
        row = index % len(golden.state)
        state, callers = golden.state[row : row + 1].copy(), golden.caller_masks[row : row + 1]
        deciders.fill_uncertainty(state)
        deciders.by_policy(state, callers)
        if deciders.has_planner:
            deciders.by_planner(state, callers)
        deciders.judge(state, callers, TradingState.ACTIVE.value)
    return bundle


class BundleWatcher:
    """Looks at intervals for another bundle, for the champion and for the challenger."""

    def __init__(
        self, engine: DecisionEngine, champion: BundleSource, challenger: BundleSource | None, *, interval: float
    ) -> None:
        """Args: interval: seconds between two looks."""
        self._engine, self._champion, self._challenger, self._interval = engine, champion, challenger, interval
        self._refused: set[object] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bundles", daemon=True)

    def start(self) -> None:
        """Look from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a look under way may wait for a registry and is waited for no longer than `GRACE_S`."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_S)

    def look(self) -> None:
        """One look, here and now; never raises."""
        for look in (self._look_for_champion, self._look_for_challenger):
            try:
                look()
            # A registry, a disk or a ledger that is away may be back at the next look.
            except (ServingError, OSError) as error:
                log.warning("bundles cannot be looked at now: %s", error)
            # A mistake of ours must not end the thread: nothing would be reloaded any more, and nobody would know.
            except Exception as error:
                log.exception("bundles cannot be looked at now, the one in force stays: %r", error)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()

    def _look_for_champion(self) -> None:
        engine, found = self._engine, self._ask(self._champion)
        if found is None or _is(found, engine.bundle):
            return
        bundle = self._opened(found)
        if bundle is not None:
            engine.use(bundle)
            if engine.challenger is not None and engine.challenger.hash == bundle.hash:
                engine.challenge(None)

    def _look_for_challenger(self) -> None:
        if self._challenger is None:
            return
        engine, found = self._engine, self._ask(self._challenger)
        if found is None or _is(found, engine.bundle):
            # Nobody is on trial, or who was is in force by now.
            if engine.challenger is not None and not self._stop.is_set():
                engine.challenge(None)
        elif not _is(found, engine.challenger):
            bundle = self._opened(found)
            if bundle is not None:
                engine.challenge(bundle)

    def _ask(self, source: BundleSource) -> Found | None:
        try:
            return source()
        except BundleError as error:
            self._refuse(str(error), str(error))
            raise

    # None where it is refused, now or before.
    def _opened(self, found: Found) -> Bundle | None:
        content = _content(found)
        if content in self._refused or self._stop.is_set():
            return None
        settings = self._engine.settings
        try:
            bundle = warmed(found, planner=settings.planner, seed=settings.seed)
            self._check_layout(bundle)
        except BundleError as error:
            self._refuse(content, f"{found.path}: {error}")
            return None
        return bundle

    def _check_layout(self, bundle: Bundle) -> None:
        expected, actual = self._engine.bundle.manifest.layout_hash, bundle.manifest.layout_hash
        if actual != expected:
            raise BundleMismatchError(
                f"layout_hash: expected {expected}, was {actual}; callers send another layout: start the service anew "
                "with it"
            )

    def _refuse(self, content: object, words: str) -> None:
        if content in self._refused:
            return
        log.error("bundle refused, the one in force stays: %s", words)
        self._engine.note("refused_bundle", words)
        self._refused.add(content)


def _is(found: Found, bundle: Bundle | None) -> bool:
    if bundle is None:
        return False
    if found.bundle_hash is not None:
        return found.bundle_hash == bundle.hash
    return _manifest(found.path) == bundle.manifest.to_bytes()


# Names what is there before anything of it is trusted; a file that is written anew is something else.
def _content(found: Found) -> object:
    if found.bundle_hash is not None:
        return found.bundle_hash
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(found.path.iterdir())]
    return _manifest(found.path), tuple(files)


def _manifest(path: Path) -> bytes:
    return (path / MANIFEST_FILE).read_bytes()
