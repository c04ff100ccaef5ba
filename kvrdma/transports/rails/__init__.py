"""Rails: several transports to one peer as one. Batches are striped over the best that live; what fails is sent again.

A rail is a transport under a name; rails of one scheme are a tier. The best tier that has a living rail carries
everything, each rail as much as its measured speed allows; tiers below it take over when it has none left, or
for memory that it cannot take. A range is sent again only once the rail that failed is terminal, and a rail
that failed is tried again after a cool-down.
"""

from kvrdma.transports.rails.transport import RailsTransport

__all__ = ["RailsTransport"]
