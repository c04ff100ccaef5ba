"""What can go wrong. A miss is a value; a failure is one of these.

Everything kvrdma raises on purpose derives from `KVRDMAError`, so that a caller who wants to go on without
a cache catches one class.
"""


class KVRDMAError(Exception):
    """The root of every error that kvrdma raises on purpose."""


class ConfigError(KVRDMAError, ValueError):
    """A setting, URL or argument that cannot be meant: says what was wrong, where, and what would be right."""


class CapacityError(KVRDMAError):
    """Not enough memory, slots or queue space for a request as a whole; nothing was taken."""


class RegionError(KVRDMAError):
    """A range outside its region, a wrong or revoked key, or rights that were not granted."""


class TransportError(KVRDMAError):
    """A connection that could not be made, or that broke."""


class ProtocolError(TransportError):
    """A peer that speaks another version, or that sent what the protocol does not allow."""


class AuthenticationError(TransportError):
    """A peer that did not prove that it knows the token, or that wants a proof which this side cannot give."""


class DeadlineError(KVRDMAError, TimeoutError):
    """A wait that ended before what it waited for. The work itself may still be under way."""


class ReentryError(KVRDMAError):
    """A callback that called the very part that was calling it."""


class ClosedError(KVRDMAError):
    """A call on something that was closed or aborted."""


class BackendError(KVRDMAError):
    """An L2 store that answered with a failure."""


class CoordinationLost(KVRDMAError):  # noqa: N818 - the term of the design: a state, rather than a mistake
    """A rank that cannot know what the others decided; it must not go on with a value of its own."""
