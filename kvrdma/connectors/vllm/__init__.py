"""The vLLM connector: `--kv-transfer-config '{"kv_connector": "KVRDMAConnector", ...}'`.

Importing this package is cheap and has no side effects: vLLM's parts are imported when the class is asked for.
"""

from typing import Any

__all__ = ["KVRDMAConnector"]


def __getattr__(name: str) -> Any:
    if name == "KVRDMAConnector":
        from kvrdma.connectors.vllm.connector import KVRDMAConnector

        return KVRDMAConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
