"""Context and worker of UCX, and the one connection that a worker of ours has."""

from __future__ import annotations

import ctypes
import logging
import time
from collections import deque
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import Final

from kvrdma.errors import ProtocolError
from kvrdma.memory import Memory
from kvrdma.transports.ucx import declarations as c
from kvrdma.transports.ucx.library import Library

logger = logging.getLogger(__name__)

MAX_RKEY_NBYTES: Final = 4096
_PADDING: Final = bytes(256)  # UCX is not told where a packed key or address ends
_CLOSE_S: Final = 5.0
_LOST: Final = -80  # what UCX itself says of a peer that does not answer


class Context:
    """One for each transport: UCX's configuration, and the registrations. `register` and its like on any thread.

    Raises:
        TransportError: UCX finds no device for the lanes that the variables name.
    """

    def __init__(self, library: Library, variables: dict[str, str]) -> None:
        self.library = library
        self._ucp = ucp = library.ucp
        self._check = library.check
        self._handle = c_void_p()
        config = c_void_p()
        self._check("ucp_config_read", ucp.ucp_config_read(None, None, byref(config)))
        try:
            for name, value in variables.items():
                self._check(f"UCX_{name}={value}", ucp.ucp_config_modify(config, name.encode(), value.encode()))
            params = c.Params(
                c.PARAM_FEATURES | c.PARAM_MT_WORKERS_SHARED,
                c.FEATURE_RMA | c.FEATURE_WAKEUP,
                mt_workers_shared=1,
            )
            major, minor, _ = library.version
            status = ucp.ucp_init_version(major, minor, byref(params), config, byref(self._handle))
            self._check(f"ucp_init with {' '.join(f'UCX_{n}={v}' for n, v in variables.items())}", status)
        finally:
            ucp.ucp_config_release(config)

    @property
    def handle(self) -> c_void_p:
        """For the functions of UCX."""
        return self._handle

    def register(self, memory: Memory) -> int:
        """Map memory for remote access; gives UCX's handle. Raises `TransportError`."""
        mask = c.MEM_MAP_ADDRESS | c.MEM_MAP_LENGTH | c.MEM_MAP_MEMORY_TYPE
        params = c.MemMapParams(mask, memory.address, memory.nbytes, 0, 0, c.MEMORY_TYPE_HOST)
        memh = c_void_p()
        status = self._ucp.ucp_mem_map(self._handle, byref(params), byref(memh))
        self._check(
            f"registration of {memory.nbytes} bytes (ulimit -l, the limit on locked memory, must allow them)",
            status,
        )
        return memh.value or 0

    def deregister(self, memh: int) -> None:
        """Undo `register`: from now on no device reads or writes the memory."""
        self._ucp.ucp_mem_unmap(self._handle, memh)

    def pack(self, memh: int) -> bytes:
        """What a peer unpacks to reach registered memory."""
        buffer, nbytes = c_void_p(), c_size_t()
        self._check("ucp_rkey_pack", self._ucp.ucp_rkey_pack(self._handle, memh, byref(buffer), byref(nbytes)))
        try:
            return ctypes.string_at(buffer.value or 0, nbytes.value)
        finally:
            self._ucp.ucp_rkey_buffer_release(buffer)

    def close(self) -> None:
        """Give everything back; its workers are closed already."""
        self._ucp.ucp_cleanup(self._handle)


class Worker:
    """One for each connection, so that the end of one touches no other. On one thread at a time.

    UCX pairs the connections between two workers by the order in which each side makes them. With a worker for
    each connection there is one on either side, and nothing to mix up; and a connection whose requests do not end
    can be ended with its worker.
    """

    def __init__(self, context: Context) -> None:
        self._ucp = ucp = context.library.ucp
        self._check = context.library.check
        self._handle = c_void_p()
        self._ep = c_void_p()
        self._error_handler = c.ErrorHandler(self._on_error)  # UCX keeps no reference
        self._param = c.RequestParam()
        self.failure: int | None = None
        self.established = False
        """Whether the first bytes have come over it, in either direction: set by whoever knows."""
        self._under_way: deque[tuple[int, Callable[[int], None]]] = deque()
        params = c.WorkerParams(c.WORKER_PARAM_THREAD_MODE, c.THREAD_MODE_SERIALIZED)
        self._check("ucp_worker_create", ucp.ucp_worker_create(context.handle, byref(params), byref(self._handle)))
        fd = c_int()
        self._check("ucp_worker_get_efd", ucp.ucp_worker_get_efd(self._handle, byref(fd)))
        self.event_fd = fd.value
        """Readable once there is something to do, after `arm`."""

    @property
    def n_under_way(self) -> int:
        """Requests that are not complete."""
        return len(self._under_way)

    def address(self) -> bytes:
        """What a peer connects to."""
        address, nbytes = c_void_p(), c_size_t()
        self._check(
            "ucp_worker_get_address", self._ucp.ucp_worker_get_address(self._handle, byref(address), byref(nbytes))
        )
        try:
            return ctypes.string_at(address.value or 0, nbytes.value)
        finally:
            self._ucp.ucp_worker_release_address(self._handle, address)

    def connect(self, address: bytes) -> None:
        """Make the connection to the worker of an authenticated peer; raises `TransportError`."""
        params = c.EpParams(
            c.EP_PARAM_REMOTE_ADDRESS | c.EP_PARAM_ERR_HANDLING_MODE | c.EP_PARAM_ERR_HANDLER,
            address + _PADDING,
            c.ERR_HANDLING_MODE_PEER,
            ctypes.cast(self._error_handler, c_void_p),
        )
        self._check("ucp_ep_create", self._ucp.ucp_ep_create(self._handle, byref(params), byref(self._ep)))

    def unpack(self, packed: bytes) -> int:
        """A peer's packed key as a handle that `get` and `put` take; raises `TransportError`."""
        if not 0 < len(packed) <= MAX_RKEY_NBYTES:
            raise ProtocolError(f"ucx: a packed key of {len(packed)} bytes; 1 to {MAX_RKEY_NBYTES} are possible")
        rkey = c_void_p()
        self._check("ucp_ep_rkey_unpack", self._ucp.ucp_ep_rkey_unpack(self._ep, packed + _PADDING, byref(rkey)))
        return rkey.value or 0

    def forget_key(self, rkey: int) -> None:
        """Undo `unpack`; no request uses it."""
        self._ucp.ucp_rkey_destroy(rkey)

    def get(self, address: int, nbytes: int, remote: int, rkey: int, memh: int, on_end: Callable[[int], None]) -> None:
        """Read a peer's bytes; `on_end` is called with the status when they are here."""
        self._started(self._ucp.ucp_get_nbx(self._ep, address, nbytes, remote, rkey, self._moves(memh)), on_end)

    def put(self, address: int, nbytes: int, remote: int, rkey: int, memh: int, on_end: Callable[[int], None]) -> None:
        """Write bytes to a peer; `on_end` says that they have left. That they are there, a `flush` after it says."""
        self._started(self._ucp.ucp_put_nbx(self._ep, address, nbytes, remote, rkey, self._moves(memh)), on_end)

    def flush(self, on_end: Callable[[int], None]) -> None:
        """Call back when everything so far is complete at the peer."""
        self._param.op_attr_mask = 0
        self._started(self._ucp.ucp_ep_flush_nbx(self._ep, self._param), on_end)

    def progress(self) -> bool:
        """Let UCX work, and end what is complete. Whether anything happened."""
        busy: bool = self._ucp.ucp_worker_progress(self._handle) != 0
        under_way = self._under_way
        # They complete in order, or nearly: whoever overtook the first is found when that one ends.
        while under_way and (status := self._ucp.ucp_request_check_status(under_way[0][0])) != c.IN_PROGRESS:
            request, on_end = under_way.popleft()
            self._ucp.ucp_request_free(request)
            busy = True
            on_end(status)
        return busy

    def arm(self) -> bool:
        """Whether one may wait for `event_fd` now; if not there is something to do already."""
        return bool(self._ucp.ucp_worker_arm(self._handle) == c.OK)

    def disconnect(self, *, drain_s: float) -> None:
        """End the connection by force, and wait for its requests: with an error, or with success where all had come.

        One that is not established ends only with the worker: UCX 1.13 would end the process, by an assertion.
        """
        if not self.established:
            return
        until = time.monotonic() + drain_s
        while self._under_way and time.monotonic() < until:
            self.progress()
        param = c.RequestParam(c.OP_ATTR_FLAGS, c.EP_CLOSE_FORCE)
        self._started(self._ucp.ucp_ep_close_nbx(self._ep, byref(param)), lambda _: None)
        until = time.monotonic() + _CLOSE_S
        while self._under_way and time.monotonic() < until:
            self.progress()

    def destroy(self) -> None:
        """Give the worker back; its keys are forgotten already.

        Once it returns no device reads or writes on behalf of either end: the worker's queue pairs are gone. Only
        then do requests end that `disconnect` waited for in vain.
        """
        left = list(self._under_way)
        self._under_way.clear()
        self._ucp.ucp_worker_destroy(self._handle)
        if left and self.established:
            logger.warning("ucx: %d requests did not end in %.0f s after a connection's end", len(left), _CLOSE_S)
        for _, on_end in left:
            on_end(_LOST)

    def _moves(self, memh: int) -> c.RequestParam:
        self._param.op_attr_mask = c.OP_ATTR_MEMORY_TYPE | c.OP_ATTR_MEMH
        self._param.memory_type = c.MEMORY_TYPE_HOST
        self._param.memh = memh
        return self._param

    def _started(self, pointer: int | None, on_end: Callable[[int], None]) -> None:
        status = c.status_of(pointer)
        if status is None:
            self._under_way.append((pointer or 0, on_end))
        else:
            on_end(status)

    def _on_error(self, argument: int | None, ep: int | None, status: int) -> None:
        """Within UCX, which must not be called from here: whoever calls `progress` looks."""
        self.failure = status
