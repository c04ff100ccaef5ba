"""kvrdma: offloads the KV cache of LLM inference engines and brings it back."""

__version__ = "0.1.0"
