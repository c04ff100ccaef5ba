"""Connectors: thin adapters between engines and the cache."""
