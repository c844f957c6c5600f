"""The decision stream: a copy of the ledger's live decisions, under their numbers and in their order.

An entry's id is `<seq>-0`. Redis takes no id twice and none out of order, so publishing again does nothing; and where
the stream ends earlier than it did, the server lost data, and what is missing is known by number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from redis.exceptions import RedisError, ResponseError

from serving.errors import LedgerError, StreamError
from serving.ledger.base import Ledger
from serving.records import Entry, Mode
from serving.stream.settings import StreamSettings

EVENT_FIELD = b"event_id"
HASH_FIELD = b"hash"
"""The entry's hash in the ledger."""
DECISION_FIELD = b"decision"
"""JSON of a `DecisionRecord`: the bytes of the ledger."""
PAGE = 500
"""Entries of the ledger that are read, and published, at once."""

# KEYS: decisions, features. ARGV: group, number that the stream ends with at least, entries to keep, number of
# messages, their ids, then seq, event, hash and record of each entry. A stream that ends earlier lost data: nothing is
# done then, and the caller is told where it ends.
_PUBLISH = """
local last = 0
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if not info.err then
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last = tonumber(string.match(info[i + 1], '^%d+')) end
  end
end
if last < tonumber(ARGV[2]) then return {-1, last} end
local added, first = 0, 5 + tonumber(ARGV[4])
for i = first, #ARGV, 4 do
  if tonumber(ARGV[i]) > last then
    local entry = {ARGV[i] .. '-0', 'event_id', ARGV[i + 1], 'hash', ARGV[i + 2], 'decision', ARGV[i + 3]}
    if ARGV[3] == '0' then
      redis.call('XADD', KEYS[1], unpack(entry))
    else
      redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], unpack(entry))
    end
    added = added + 1
  end
end
local done = 0
for i = 5, first - 1 do done = done + redis.call('XACK', KEYS[2], ARGV[1], ARGV[i]) end
return {added, done}
"""


class DecisionStream:
    """Publishes what is in a ledger and acknowledges the messages that it answers; for one caller at a time.

    It asks the ledger for entries only, never for its head: that is between the ledger and the engine.
    """

    def __init__(self, ledger: Ledger, settings: StreamSettings) -> None:
        self.ledger, self.settings = ledger, settings
        self._seen = 0
        """Number of the last ledger entry that was looked at."""
        self._published = 0
        """Number of the last one that is in the stream; those after it up to `_seen` do not belong there."""

    def find_end(self, client: Any) -> None:
        """Find out where to go on publishing.

        Raises: StreamError where the stream is not a copy of the ledger; one of `REDIS_ERRORS`; LedgerError.
        """
        key = self.settings.decisions
        try:
            info = client.xinfo_stream(key)
        except ResponseError as error:
            if "no such key" not in str(error):
                raise
            info = {"last-generated-id": b"0-0", "last-entry": None}
        # In this order: a ledger that is read later is never behind what was published from it.
        head = next((entry.seq for entry in self.ledger.read(-1)), 0)
        last, newest = info["last-generated-id"], info["last-entry"]
        seq, rest = map(int, last.split(b"-"))
        if rest != 0 or seq > head:
            raise StreamError(
                f"{key}: expected to end at {head}-0 or before, as ledger {self.ledger.account!r} does, ends at "
                f"{last.decode()}: it belongs to another ledger, or somebody else writes to it"
            )
        if newest and newest[0] == last:
            entry = next(iter(self.ledger.read(seq, seq)), None)
            if entry is None or entry.hash.encode() != newest[1].get(HASH_FIELD):
                raise StreamError(f"{key}: {last.decode()}: expected entry {seq} of the ledger, was another")
        # What trimming would remove at once is not published.
        kept = self.settings.decisions_maxlen
        self._published, self._seen = seq, seq or (max(0, head - kept) if kept else 0)

    def publish(self, client: Any, done: Sequence[bytes] = (), events: Iterable[str] = ()) -> tuple[int, int]:
        """Publish the entries since the last time, and acknowledge messages in the same script.

        Args: done: ids of messages; events: what they ask for.
        Returns: how many decisions were published and how many messages acknowledged.
        Raises: LedgerError where an event is not in the ledger, one of `REDIS_ERRORS`: nothing is acknowledged then.
        """
        added = acknowledged = 0
        waiting = set(events)
        last = False
        while not last:
            entries = list(self.ledger.read(self._seen + 1, self._seen + PAGE))
            last = len(entries) < PAGE
            lines = [(event, entry) for entry in entries if (event := _event_of(entry)) is not None]
            waiting.difference_update(event for event, _ in lines)
            if last:
                self._check_recorded(waiting)
            if lines or (last and done):
                counts = self._send(client, lines, done if last else ())
                added, acknowledged = added + counts[0], acknowledged + counts[1]
            if entries:
                self._seen = entries[-1].seq
        return added, acknowledged

    # Whatever the engine says: an event that is not in the ledger is not acknowledged.
    def _check_recorded(self, events: Iterable[str]) -> None:
        for event_id in events:
            if self.ledger.find(event_id) is None:
                raise LedgerError(f"event {event_id}: expected its decision in the ledger, was none")

    def _send(self, client: Any, lines: Sequence[tuple[str, Entry]], done: Sequence[bytes]) -> tuple[int, int]:
        settings = self.settings
        arguments: list[Any] = [settings.group, self._published, settings.decisions_maxlen, len(done), *done]
        for event_id, entry in lines:
            arguments += (entry.seq, event_id, entry.hash, entry.body)
        added, acknowledged = client.eval(_PUBLISH, 2, settings.decisions, settings.features, *arguments)
        if added < 0:
            raise RedisError(f"{settings.decisions}: expected to end at {self._published}-0, ends at {acknowledged}-0")
        if lines:
            self._published = lines[-1][1].seq
        return added, acknowledged


class _Line(msgspec.Struct, frozen=True):
    kind: str
    mode: str = ""
    event_id: str = ""


_LINES = msgspec.json.Decoder(_Line)


# Event of a live decision; None for other records.
def _event_of(entry: Entry) -> str | None:
    line = _LINES.decode(entry.body)
    return line.event_id if line.kind == "decision" and line.mode == Mode.LIVE else None
