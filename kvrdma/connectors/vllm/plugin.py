"""The `vllm.general_plugins` entry point: makes `KVRDMAConnector` known by name, without a module path."""


def register() -> None:
    """Tell vLLM's factory where the connector is. Idempotent, and imports nothing of it."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KVRDMAConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("KVRDMAConnector", "kvrdma.connectors.vllm", "KVRDMAConnector")
