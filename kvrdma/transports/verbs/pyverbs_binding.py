"""The binding on pyverbs, wherever the distribution put it.

Debian's python3-pyverbs belongs to the system's Python, but loads in any CPython of the same version. Only this one
package is taken from there: with the folder on `sys.path`, Debian's numpy or cffi would stand beside ours.
"""

from __future__ import annotations

import importlib
import itertools
import os
import select
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any, Final

from kvrdma.transports.verbs.binding import (
    HOPS,
    MIN_RNR_TIMER,
    RETRIES,
    TIMEOUT,
    Access,
    Completion,
    Limits,
    PairAddress,
    PortLimits,
    Wr,
)

DISTRIBUTION: Final = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")
_SIGNALED: Final = 2
_RC: Final = 2
_ERROR: Final = 6  # IBV_QPS_ERR
_QP_STATE: Final = 1
_CHANNEL_LINK: Final = "anon_inode:[infinibandevent]"
_making_channel = threading.Lock()


def load_pyverbs() -> None:
    """Make `import pyverbs` work; raises `ImportError` that says what is missing."""
    if "pyverbs" not in sys.modules:
        spec = PathFinder.find_spec("pyverbs") or PathFinder.find_spec("pyverbs", list(DISTRIBUTION))
        if spec is None or spec.loader is None:
            raise ImportError("there is no pyverbs (on Debian: apt-get install python3-pyverbs)")
        module = module_from_spec(spec)
        sys.modules["pyverbs"] = module
        spec.loader.exec_module(module)
    try:
        importlib.import_module("pyverbs.device")
    except ImportError as error:
        where = getattr(sys.modules.pop("pyverbs"), "__path__", ["?"])[0]
        raise ImportError(
            f"pyverbs in {where} does not load: {error}. It must be of this Python's version "
            f"({sys.version_info.major}.{sys.version_info.minor}) and of the very release of libibverbs "
            "(on Debian: python3-pyverbs and libibverbs1 of one version)"
        ) from error


@contextmanager
def _os_errors(what: str) -> Iterator[None]:
    """Raise pyverbs' errors as `OSError`."""
    from pyverbs.pyverbs_error import PyverbsError

    try:
        yield
    except PyverbsError as error:
        code = getattr(error, "error_code", 0) or 0
        raise OSError(code, f"{what}: {os.strerror(code) if code else error}") from error


class PyverbsBinding:
    """pyverbs; raises `ImportError` where it is not there, or does not fit libibverbs."""

    name = "pyverbs"

    def __init__(self) -> None:
        load_pyverbs()

    def open(self, device: str) -> PyverbsDevice:
        """Open a device by name."""
        return PyverbsDevice(device)


class PyverbsDevice:
    """A context and its protection domain."""

    def __init__(self, name: str) -> None:
        from pyverbs.device import Context
        from pyverbs.pd import PD

        with _os_errors(f"device {name}"):
            self._context: Any = Context(name=name)
            self._pd: Any = PD(self._context)
            found = self._context.query_device()
        self.limits = Limits(
            found.max_qp,
            found.max_qp_wr,
            found.max_cqe,
            max(1, min(found.max_qp_rd_atom, found.max_qp_init_rd_atom)),
        )

    def port(self, number: int) -> PortLimits:
        """What a port can do now."""
        with _os_errors(f"port {number}"):
            found = self._context.query_port(number)
        return PortLimits(found.active_mtu, found.max_msg_sz, found.lid)

    def register(self, address: int, nbytes: int, access: Access) -> Any:
        """Register memory that is mapped here."""
        from pyverbs.mr import MR

        with _os_errors(f"registering {nbytes} bytes"):
            return MR(self._pd, nbytes, int(access), address=address)

    def register_dmabuf(self, fd: int, offset: int, nbytes: int, address: int, access: Access) -> Any:
        """Register memory of a device that exports it as a dmabuf."""
        from pyverbs.mr import DmaBufMR

        with _os_errors(f"registering a dmabuf of {nbytes} bytes"):
            return DmaBufMR(self._pd, nbytes, int(access), dmabuf=fd, offset=offset)

    def make_queue(self, depth: int) -> PyverbsQueue:
        """A completion queue for `depth` requests."""
        return PyverbsQueue(self._context, self._pd, depth)

    def close(self) -> None:
        """Close the device. All that was made of it must be closed."""
        self._pd.close()
        self._context.close()


def _channel_fds() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == _CHANNEL_LINK:
                found.add(int(name))
        except OSError:  # closed meanwhile
            continue
    return found


class PyverbsQueue:
    """A completion queue and its channel."""

    def __init__(self, context: Any, pd: Any, depth: int) -> None:
        from pyverbs.cq import CQ, CompChannel

        with _os_errors("a completion queue"):
            # pyverbs does not tell the channel's descriptor, and its own wait for an event holds the GIL.
            with _making_channel:
                before = _channel_fds()
                self._channel: Any = CompChannel(context)
                self.fd = (_channel_fds() - before).pop()
            try:
                self._cq: Any = CQ(context, depth, None, self._channel, 0)
            except BaseException:
                self._channel.close()
                raise
        self._pd = pd
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def arm(self) -> None:
        """Make `fd` readable at the next completion."""
        self._cq.req_notify()

    def acknowledge(self) -> None:
        """Take the events that made `fd` readable."""
        while self._poll.poll(0):
            self._channel.get_cq_event(self._cq)
            self._cq.ack_events(1)

    def poll(self, n: int) -> list[Completion]:
        """At most `n` completions."""
        found, completions = self._cq.poll(n)
        return [Completion(c.wr_id, c.status) for c in completions] if found else []

    def make_pair(self, depth: int, chain: int) -> PyverbsPair:
        """A queue pair whose requests end here."""
        return PyverbsPair(self._pd, self._cq, depth, chain)

    def close(self) -> None:
        """Destroy the queue; its pairs must be closed."""
        with _os_errors("the end of a completion queue"):
            self._cq.close()
            self._channel.close()


class PyverbsPair:
    """A queue pair, and requests that are kept and retargeted: to make one anew costs twelve times as much.

    The requests are linked once. A chain of k is the last k of them, so the last one is always the one that asks for
    a completion. `wr_id` is a request's place in its chain counted from the end: the last has 0.
    """

    def __init__(self, pd: Any, cq: Any, depth: int, chain: int) -> None:
        from pyverbs.qp import QP, QPCap, QPInitAttr
        from pyverbs.wr import SGE, SendWR

        cap = QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        with _os_errors("a queue pair"):
            # Signals of its own: QPInitAttr's default asks for a completion of every request.
            self._qp: Any = QP(pd, QPInitAttr(qp_type=_RC, scq=cq, rcq=cq, cap=cap, sq_sig_all=0))
        self.number: int = self._qp.qp_num
        self._entries: list[Any] = [SGE(0, 0, 0) for _ in range(chain)]
        self._requests: list[Any] = []
        for place, entry in enumerate(self._entries):
            left = chain - 1 - place
            request = SendWR(wr_id=left, opcode=int(Wr.READ), num_sge=1, sg=[entry], send_flags=0)
            request.sg_list = entry
            self._requests.append(request)
        self._requests[-1].send_flags = _SIGNALED
        for one, other in itertools.pairwise(self._requests):
            one.next_wr = other
        self._opcode = Wr.READ

    def connect(self, here: PairAddress, there: PairAddress, port: int, gid_index: int, is_global: bool) -> None:
        """Go to INIT, RTR and RTS."""
        from pyverbs.addr import GID, AHAttr, GlobalRoute
        from pyverbs.qp import QPAttr

        with _os_errors("connecting a queue pair"):
            attr = QPAttr(port_num=port)
            attr.qp_access_flags = int(Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE)
            attr.dest_qp_num = there.pair
            attr.path_mtu = min(here.mtu, there.mtu)
            attr.rq_psn, attr.sq_psn = there.psn, here.psn
            attr.max_rd_atomic = min(here.max_reads, there.max_reads)
            attr.max_dest_rd_atomic = here.max_reads
            attr.min_rnr_timer, attr.timeout = MIN_RNR_TIMER, TIMEOUT
            attr.retry_cnt = attr.rnr_retry = RETRIES
            if is_global:
                text = ":".join(f"{there.gid[i]:02x}{there.gid[i + 1]:02x}" for i in range(0, 16, 2))
                route = GlobalRoute(dgid=GID(text), sgid_index=gid_index, hop_limit=HOPS)
                attr.ah_attr = AHAttr(gr=route, is_global=1, port_num=port, dlid=there.lid)
            else:
                attr.ah_attr = AHAttr(is_global=0, port_num=port, dlid=there.lid)
            self._qp.to_rts(attr)

    def post(
        self,
        opcode: Wr,
        addresses: Sequence[int],
        nbytes: Sequence[int],
        lkeys: Sequence[int],
        remote_addresses: Sequence[int],
        rkeys: Sequence[int],
    ) -> None:
        """Post one chain; only its last request will say that it ended, unless one fails."""
        first = self.prepare(opcode, addresses, nbytes, lkeys, remote_addresses, rkeys)
        with _os_errors("posting"):
            self._qp.post_send(first)

    def prepare(
        self,
        opcode: Wr,
        addresses: Sequence[int],
        nbytes: Sequence[int],
        lkeys: Sequence[int],
        remote_addresses: Sequence[int],
        rkeys: Sequence[int],
    ) -> Any:
        """Retarget the requests of a chain; its first one."""
        if opcode is not self._opcode:
            self._opcode = opcode
            for request in self._requests:
                request.opcode = int(opcode)
        first = len(self._requests) - len(addresses)
        requests, entries = self._requests[first:], self._entries[first:]
        for request, entry, address, length, lkey, remote_address, rkey in zip(
            requests, entries, addresses, nbytes, lkeys, remote_addresses, rkeys, strict=True
        ):
            entry.addr = address
            entry.length = length
            entry.lkey = lkey
            request.set_wr_rdma(rkey, remote_address)
        return requests[0]

    def fail(self) -> None:
        """Go to ERROR: what is posted ends flushed."""
        from pyverbs.qp import QPAttr

        with _os_errors("a queue pair's way to ERROR"):
            self._qp.modify(QPAttr(qp_state=_ERROR), _QP_STATE)

    def close(self) -> None:
        """Destroy the pair: nothing of what was posted touches memory any more."""
        with _os_errors("the end of a queue pair"):
            self._qp.close()
