"""Decisions over Redis Streams, each event once, and limits that another system keeps in Redis."""
