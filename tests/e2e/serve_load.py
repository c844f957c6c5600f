"""Clients that ask for decisions until each is answered, whatever happens to the service."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from http_processes import OPERATOR_HEADERS

from serving.records import AccountSnapshot, DecisionRecord, DecisionRequest, Reason, decode_record, encode

PAIRS = 3
"""Pairs of clients; the two of a pair ask for the same events, mostly at the same time."""
UNRECORDED = (Reason.LEDGER_FAILED, Reason.INTERNAL_ERROR)


class Load:
    """What was asked and what was answered, by event."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self._seed = port, seed
        self.bodies: dict[str, bytes] = {}
        """Requests as they were sent."""
        self.answers: defaultdict[str, list[bytes]] = defaultdict(list)
        """Decisions that are said to be recorded."""
        self.unrecorded: list[DecisionRecord] = []
        """Decisions that are said not to be."""
        self.refused: list[tuple[int, bytes]] = []
        """Answers with another status than 200 and 503."""
        self.bar_time = time.time()
        self.deep = False
        """Whether equity may fall to where only smaller positions are allowed."""
        self._lock, self._stop, self._patient = threading.Lock(), threading.Event(), True
        self._threads = [threading.Thread(target=self._ask_on, args=(number // 2,)) for number in range(2 * PAIRS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self, *, patient: bool = True) -> None:
        """End. Args: patient: only once every event that was asked for is answered."""
        self._stop.set()
        self._patient = patient
        for thread in self._threads:
            thread.join()

    def next_bar(self, *, deep: bool) -> None:
        """Events that begin from now on are of a new bar."""
        with self._lock:
            self.bar_time, self.deep = self.bar_time + 0.1, deep

    @property
    def answered(self) -> int:
        """Events that have an answer."""
        return len(self.answers)

    def _ask_on(self, pair: int) -> None:
        client = _Client(self.port)
        number = 0
        while not self._stop.is_set():
            event = f"pair-{pair} event-{number}"
            self._ask(client, event, self._body(event))
            number += 1
        client.close()

    def _ask(self, client: _Client, event: str, body: bytes) -> None:
        while self._patient:
            found = client.decide(body)
            if found is None or found[0] == 503:
                time.sleep(0.01)
                continue
            status, answer = found
            with self._lock:
                if status != 200:
                    self.refused.append(found)
                    return
                record = decode_record(answer)
                assert isinstance(record, DecisionRecord)
                if record.reason not in UNRECORDED:
                    self.answers[event].append(answer)
                    return
                self.unrecorded.append(record)
            time.sleep(0.01)

    # Made by the first of a pair; the other sends the same.
    def _body(self, event: str) -> bytes:
        with self._lock:
            if event not in self.bodies:
                self.bodies[event] = encode(self._request(event))
            return self.bodies[event]

    def _request(self, event: str) -> DecisionRequest:
        rng = random.Random(f"{self._seed} {event}")
        return DecisionRequest(
            event_id=event,
            bar_time=self.bar_time,
            features={
                "gap_return": rng.gauss(0.0, 0.01),
                "intraday_return": rng.gauss(0.0, 0.01),
                "volatility_20": rng.uniform(0.05, 0.65),
                "momentum": rng.gauss(0.0, 0.1),
            },
            account=AccountSnapshot(
                equity=rng.uniform(900.0 if self.deep else 930.0, 1000.0),
                position=rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, 1.25]),
                holding_time=float(rng.randrange(20)),
            ),
            action_masks=tuple(rng.random() < 0.6 for _ in range(7)) if rng.random() < 0.3 else None,
        )


class _Client:
    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def decide(self, body: bytes) -> tuple[int, bytes] | None:
        """Status and body of the answer; None where there is none, or not all of it."""
        try:
            self._connection.request("POST", "/decide", body, OPERATOR_HEADERS)
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            self.close()
            return None

    def close(self) -> None:
        self._connection.close()


@contextmanager
def loading(port: int, seed: int) -> Iterator[Load]:
    """A load until the end of the block; a service must answer then."""
    load = Load(port, seed)
    load.start()
    try:
        yield load
    except BaseException:
        load.finish(patient=False)
        raise
    load.finish()
