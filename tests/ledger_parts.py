"""What tests write into a ledger where only its risk state matters."""

from __future__ import annotations

from serving.records import ControlRecord, RiskState, encode


def body(risk: RiskState, text: str = "") -> bytes:
    """JSON of a record that holds this state and this text."""
    return encode(ControlRecord(time=0.0, command="drift", person="test", detail=text, bundle_hash="", risk=risk))
