"""Append-only, hash-chained records in SQLite or PostgreSQL, and what an auditor asks of them."""
