"""Names, sizes and times of the Redis Streams transport."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Names, sizes and times of a worker; see `for_account`."""

    features: str
    """Stream of requests."""
    decisions: str
    """Stream of decisions; shares its hash tag with `features`, so that a cluster keeps both on one node."""
    group: str = "detent"
    consumer: str = field(default_factory=socket.gethostname)
    """Name within the group; one that lasts over restarts finds its own pending messages."""
    batch: int = 16
    """Messages taken at once; their decisions are published together."""
    block_ms: int = 500
    """How long to wait for new messages before looking whether to stop."""
    timeout_s: float = 5.0
    """For a connection and for each answer."""
    takeover_idle_ms: int = 0
    """Take over what other consumers left pending this long. 0 takes it at once and keeps the order of events, which is
    safe as a ledger has one writer; raise it where a group serves several ledgers."""
    upkeep_s: float = 5.0
    """Time between two rounds of taking over and of trimming the feature stream."""
    decisions_maxlen: int = 100_000
    """Entries of the decision stream that are kept, about; 0 keeps all."""
    features_maxlen: int = 100_000
    """Above this, about, requests that every group is done with are removed; 0 keeps all."""
    max_request_bytes: int = 1 << 20
    """Longer requests are refused unread."""
    backoff_first_s: float = 0.05
    backoff_longest_s: float = 5.0
    cluster: bool = False
    """Redis Cluster."""

    def __post_init__(self) -> None:
        tags = {name: hash_tag(getattr(self, name)) for name in ("features", "decisions")}
        if not tags["features"] or tags["features"] != tags["decisions"] or self.features == self.decisions:
            raise ValueError(
                "features, decisions: expected two keys with the same {hash tag}, so that Redis Cluster keeps them in "
                f"one slot, was {self.features!r} and {self.decisions!r}"
            )
        for name, low in {"batch": 1, "block_ms": 1, "takeover_idle_ms": 0, "decisions_maxlen": 0,
                          "features_maxlen": 0, "max_request_bytes": 1}.items():  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, was {getattr(self, name)}")
        for name in ("timeout_s", "upkeep_s", "backoff_first_s", "backoff_longest_s"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: expected more than 0 seconds, was {getattr(self, name)}")

    @classmethod
    def for_account(cls, account: str, **changes: Any) -> StreamSettings:
        """`detent:{account}:features` and `detent:{account}:decisions`, the braces being the hash tag's."""
        if not account or "{" in account or "}" in account:
            raise ValueError(f"account: expected a name without braces, was {account!r}")
        names = {name: f"detent:{{{account}}}:{name}" for name in ("features", "decisions")}
        return cls(**{**names, **changes})


@dataclass(slots=True)
class StreamStatus:
    """What a worker is doing; counts since its start."""

    connected: bool = False
    decided: int = 0
    """Answers of the engine, repeated ones too."""
    refused: int = 0
    """Of these: requests that could not be read."""
    published: int = 0
    acknowledged: int = 0
    deleted: int = 0
    """Messages that somebody removed from the stream before they were acknowledged."""
    failures: int = 0
    last_error: str = ""
    ended: bool = False
    """It gave up: the stream is no copy of the ledger, and a person has to look."""


def hash_tag(key: str) -> str:
    """The part of a key that decides on its slot in Redis Cluster; empty where that is the whole key."""
    found = re.match(r"[^{]*\{([^}]+)\}", key)
    return found.group(1) if found else ""
