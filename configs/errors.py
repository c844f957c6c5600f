"""Errors of configuration.

ValueError
└── ConfigError    a setting is unknown, out of range, or cannot be read (exit code 78)
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; one line per problem, each naming field, expected and actual."""
