"""Conformance suites: what any transport, policy, backend or coordinator, ours or a third party's, inherits and passes.

Needs pytest and hypothesis: `pip install kvrdma[testing]`. Subclass a suite in a test module, give it what its
factory methods ask for, and pytest collects the tests:

    class TestMyTransport(TransportSuite):
        def make_transport(self) -> Transport:
            return MyTransport()
"""

from kvrdma.testing.backends import StorageBackendSuite
from kvrdma.testing.coordinators import CoordinatorSuite
from kvrdma.testing.policies import EvictionPolicySuite
from kvrdma.testing.transports import TransportSuite

__all__ = ["CoordinatorSuite", "EvictionPolicySuite", "StorageBackendSuite", "TransportSuite"]
