"""A transport around another one, with planned faults: for tests and drills, never chosen unless it is named.

Faults befall the batches that are posted here; a peer's requests are served by the inner transport as ever.
Whatever happens, the contract holds: holds are let go when a transfer is terminal and not before, and every
transfer with a time-out becomes terminal. That the bytes are the right ones is no transport's promise: who
needs that has checksums.

    plan = FaultPlan.script(None, Fault(FaultKind.CORRUPT))  # the second batch arrives with a flipped byte
    transport = FaultyTransport(TcpTransport(), plan)
    transports.add("faulty", FaultyTransport.with_plan(plan))  # for whoever names it in an order of transports
"""

from kvrdma.transports.faulty.plan import Fault, FaultKind, FaultPlan
from kvrdma.transports.faulty.transport import FaultyTransport

__all__ = ["Fault", "FaultKind", "FaultPlan", "FaultyTransport"]
