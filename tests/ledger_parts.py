"""What tests write into ledgers, and how they change one behind its back."""

from __future__ import annotations

import contextlib
import sqlite3

from serving.ledger.base import Ledger, chain
from serving.records import ControlRecord, RiskState, encode


def body(risk: RiskState, text: str = "") -> bytes:
    """JSON of a record that holds this state and this text."""
    return encode(ControlRecord(time=0.0, command="drift", person="test", detail=text, bundle_hash="", risk=risk))


def bodies(*numbers: int) -> list[bytes]:
    """What `fill` writes."""
    return [body(risk(number), str(number)) for number in numbers]


def execute(where: str, statement: str, *values: object) -> None:
    """Change the tables behind the ledger's back."""
    if where.startswith("postgresql:"):
        import psycopg

        with psycopg.connect(where) as connection:
            connection.execute("SET search_path = detent")
            connection.execute(statement.replace("?", "%s").encode(), values)
    else:
        with contextlib.closing(sqlite3.connect(where)) as connection, connection:
            connection.execute(statement, values)


def risk(number: int) -> RiskState:
    return RiskState(peak=100.0 + number, equity=100.0, bar_time=float(number))


def fill(ledger: Ledger, count: int, first: int = 1) -> None:
    for number in range(first, first + count):
        ledger.append(body(risk(number), str(number)), event_id=f"event-{number}")


def put_foreign(where: str, ledger: Ledger, text: bytes) -> str:
    """Write the next entry as somebody else would; its hash."""
    head = ledger.head()
    digest = chain(head.hash, text)
    statement = "INSERT INTO entries VALUES (?, ?, ?, 'foreign')"
    if where.startswith("postgresql:"):
        statement = "INSERT INTO entries VALUES ('default', ?, ?, ?, 'foreign')"
    execute(where, statement, head.seq + 1, text, digest)
    return digest
