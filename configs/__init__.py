"""Settings of Detent: one typed, frozen tree (`configs.schema`), YAML profiles, and the loader that joins them.

A leaf: it imports nothing else of the project, so every package may read its sections.
"""

from configs.errors import ConfigError
from configs.fields import flat_values
from configs.loader import config_hash, json_schema, list_profiles, load_config, resolved_yaml
from configs.schema import DetentConfig

__all__ = [
    "ConfigError",
    "DetentConfig",
    "config_hash",
    "flat_values",
    "json_schema",
    "list_profiles",
    "load_config",
    "resolved_yaml",
]
