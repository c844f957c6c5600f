"""Opening a ledger by its address."""

from __future__ import annotations

from serving.errors import LedgerError
from serving.ledger.base import Ledger
from serving.ledger.sqlite import Fsync, SqliteLedger

POSTGRES_SCHEMES = ("postgresql://", "postgres://")


def open_ledger(
    where: str,
    account: str | None = "default",
    *,
    read_only: bool = False,
    fsync: Fsync = "always",
    wait: bool = False,
) -> Ledger:
    """A ledger in PostgreSQL for `postgresql://...`, else in the SQLite file of that path.

    Args:
        account: whose; None takes the one that is there, for reading.
        fsync: of SQLite; see `SqliteLedger`.
        wait: of PostgreSQL; see `PostgresLedger`.

    Raises: LedgerError.
    """
    if where.startswith(POSTGRES_SCHEMES):
        # Loaded where it is used: most ledgers are files.
        try:
            from serving.ledger.postgres import PostgresLedger
        except ImportError as error:
            raise LedgerError(f"ledger: a postgresql:// address needs the package psycopg: {error}") from error

        return PostgresLedger(where, account, wait=wait, read_only=read_only)
    return SqliteLedger(where, account, fsync=fsync, read_only=read_only)
