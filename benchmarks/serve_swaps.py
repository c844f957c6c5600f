"""Hot swaps under load: a link moves from bundle to bundle, the service follows, and every answer is one bundle's."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency import Percentiles
from benchmarks.serve_answers import ROWS, Expected, Tally, Verdict
from benchmarks.serve_calls import Requests
from benchmarks.serve_client import Answer, Connection, infer_request, post, read_http
from benchmarks.serve_process import START_TIMEOUT, Service
from serving import open_bundle
from serving.records import encode

WATCH_S = 0.02
"""Seconds between two looks of the service at the link."""


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """Requests answered while bundles changed: inferences and decisions in turn, back to back."""

    swaps: int
    """Changes of the bundle that answers told of."""
    seconds: float
    bundles: int
    telling_rows: int
    """Of `ROWS`: on these no two of the bundles give equal probabilities."""
    tally: Tally
    latency: Percentiles

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "rows": ROWS, "watch_seconds": WATCH_S}


class SwapClient:
    """Asks a service, says which bundle answered, and counts what is not that bundle's answer."""

    def __init__(self, port: int, expected: Expected) -> None:
        self._expected, self._connection = expected, Connection(port, read_http)
        self._messages = [infer_request("policy", expected.rows[row : row + 1], binary=True) for row in range(ROWS)]
        self._requests = Requests(expected, "swap")
        self.tally, self.milliseconds = Tally(), list[float]()

    def ask(self, allowed: Sequence[str]) -> str:
        """Ask once. Args: allowed: hashes that may be in force. Returns: the one that was; empty where none is."""
        begin = time.perf_counter()
        number = self.tally.asked
        try:
            verdict, version = self._inference(number % ROWS) if number % 2 else self._decision()
        except OSError as error:
            verdict, version = Verdict("failed", repr(error)), ""
        if version and version not in allowed:
            verdict = Verdict("wrong", f"bundle: expected one of {list(allowed)}, was {version}")
        self.tally.count(verdict)
        self.milliseconds.append(1e3 * (time.perf_counter() - begin))
        return version

    def close(self) -> None:
        """Nothing more is asked."""
        self._connection.close()

    def _inference(self, row: int) -> tuple[Verdict, str]:
        answer = self._connection.exchange(self._messages[row])
        return self._expected.judge_inference(row, answer), self._version(answer)

    def _decision(self) -> tuple[Verdict, str]:
        row, request = self._requests.take()
        answer = self._connection.exchange(post("/decide", encode(request)))
        return self._expected.judge_answer(row, request.event_id, answer), self._version(answer)

    def _version(self, answer: Answer) -> str:
        return next((name for name in self._expected.bundles if name.encode() in answer.body), "")


def measure_swaps(
    folder: Path, bundles: Sequence[Path], *, requests: int, swaps: int, options: Sequence[str] = ()
) -> SwapReport:
    """Ask a service at least so often while it changes its bundle at least so often.

    Args: folder: of the service, created; bundles: put in force in turn; options: more of `detent serve`.
    Raises: ValueError where bundles cannot be told apart; TimeoutError where the service does not follow the link.
    """
    opened = [open_bundle(path) for path in bundles]
    expected = Expected(opened)
    if len(expected.bundles) < 2 or expected.telling_rows == 0:
        raise ValueError(
            f"bundles: expected two or more with different probabilities on some of {ROWS} rows, "
            f"was {len(expected.bundles)} with {expected.telling_rows} such rows"
        )
    folder.mkdir(parents=True)
    link = folder / "bundle"
    move_link(link, bundles[0])
    service = Service(link, folder / "service", "--no-planner", "--no-fsync", "--watch-seconds", str(WATCH_S), *options)
    client = SwapClient(service.port, expected)
    begin = time.perf_counter()
    try:
        done = _swap(client, link, list(zip(bundles, (one.hash for one in opened), strict=True)), requests, swaps)
    finally:
        client.close()
        service.close()
    return SwapReport(
        swaps=done,
        seconds=time.perf_counter() - begin,
        bundles=len(expected.bundles),
        telling_rows=expected.telling_rows,
        tally=client.tally,
        latency=Percentiles.of(np.array(client.milliseconds)),
    )


def move_link(link: Path, target: Path) -> None:
    """Let a link point somewhere else; whoever looks sees the old or the new target."""
    fresh = link.with_name(f"{link.name}.next")
    fresh.symlink_to(target.resolve())
    os.replace(fresh, link)


def _swap(client: SwapClient, link: Path, bundles: Sequence[tuple[Path, str]], requests: int, swaps: int) -> int:
    done, deadline = 0, time.monotonic() + START_TIMEOUT
    move_link(link, bundles[1][0])
    while done < swaps or client.tally.asked < requests:
        before, after = bundles[done % len(bundles)], bundles[(done + 1) % len(bundles)]
        if client.ask([before[1], after[1]]) == after[1]:
            done, deadline = done + 1, time.monotonic() + START_TIMEOUT
            move_link(link, bundles[(done + 1) % len(bundles)][0])
        elif time.monotonic() > deadline:
            raise TimeoutError(f"swap {done + 1}: expected {after[1]} within {START_TIMEOUT:g} s, was {before[1]}")
    return done
