"""Decisions over HTTP: Open Inference Protocol v2, decisions with explanations, commands, metrics, operator page."""
