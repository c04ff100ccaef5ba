"""What is used of libucp, as ctypes: UCX's `ucp.h`, from 1.13 on.

Every structure begins with a mask of the fields that are set, and later versions only append fields: what is
declared here lies at the same place in all of them. `ucs_status_t` is an enum packed into one signed byte.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int8, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any, Final

OK: Final = 0
IN_PROGRESS: Final = 1
ERR_BUSY: Final = -15

FEATURE_RMA: Final = 1 << 1
FEATURE_WAKEUP: Final = 1 << 4
PARAM_FEATURES: Final = 1 << 0
PARAM_MT_WORKERS_SHARED: Final = 1 << 5
WORKER_PARAM_THREAD_MODE: Final = 1 << 0
THREAD_MODE_SERIALIZED: Final = 1
EP_PARAM_REMOTE_ADDRESS: Final = 1 << 0
EP_PARAM_ERR_HANDLING_MODE: Final = 1 << 1
EP_PARAM_ERR_HANDLER: Final = 1 << 2
ERR_HANDLING_MODE_PEER: Final = 1
MEM_MAP_ADDRESS: Final = 1 << 0
MEM_MAP_LENGTH: Final = 1 << 1
MEM_MAP_MEMORY_TYPE: Final = 1 << 4
MEMORY_TYPE_HOST: Final = 0
OP_ATTR_FLAGS: Final = 1 << 4
OP_ATTR_MEMORY_TYPE: Final = 1 << 6
OP_ATTR_MEMH: Final = 1 << 8
EP_CLOSE_FORCE: Final = 1 << 0

_LAST_ERROR: Final = -100  # a pointer with such a value is a status


class Params(ctypes.Structure):
    """`ucp_params_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
    ]


class WorkerParams(ctypes.Structure):
    """`ucp_worker_params_t`."""

    _fields_ = [("field_mask", c_uint64), ("thread_mode", c_int)]


class EpParams(ctypes.Structure):
    """`ucp_ep_params_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("address", c_char_p),
        ("err_mode", c_int),
        ("err_handler", c_void_p),
        ("err_handler_arg", c_void_p),
        ("user_data", c_void_p),
    ]


class MemMapParams(ctypes.Structure):
    """`ucp_mem_map_params_t`."""

    _fields_ = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("flags", c_uint),
        ("prot", c_uint),
        ("memory_type", c_int),
    ]


class RequestParam(ctypes.Structure):
    """`ucp_request_param_t`."""

    _fields_ = [
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("callback", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
    ]


ErrorHandler = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int8)
"""`ucp_err_handler_cb_t`: argument, endpoint, status."""

_STRUCT = ctypes.POINTER
_OUT = ctypes.POINTER(c_void_p)
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "ucs_status_string": (c_char_p, [c_int8]),  # of libucs, which comes with it
    "ucp_get_version": (None, [ctypes.POINTER(c_uint)] * 3),
    "ucp_config_read": (c_int8, [c_char_p, c_char_p, _OUT]),
    "ucp_config_modify": (c_int8, [c_void_p, c_char_p, c_char_p]),
    "ucp_config_release": (None, [c_void_p]),
    "ucp_init_version": (c_int8, [c_uint, c_uint, _STRUCT(Params), c_void_p, _OUT]),
    "ucp_cleanup": (None, [c_void_p]),
    "ucp_mem_map": (c_int8, [c_void_p, _STRUCT(MemMapParams), _OUT]),
    "ucp_mem_unmap": (c_int8, [c_void_p, c_void_p]),
    "ucp_rkey_pack": (c_int8, [c_void_p, c_void_p, _OUT, ctypes.POINTER(c_size_t)]),
    "ucp_rkey_buffer_release": (None, [c_void_p]),
    "ucp_worker_create": (c_int8, [c_void_p, _STRUCT(WorkerParams), _OUT]),
    "ucp_worker_destroy": (None, [c_void_p]),
    "ucp_worker_get_address": (c_int8, [c_void_p, _OUT, ctypes.POINTER(c_size_t)]),
    "ucp_worker_release_address": (None, [c_void_p, c_void_p]),
    "ucp_worker_get_efd": (c_int8, [c_void_p, ctypes.POINTER(c_int)]),
    "ucp_ep_create": (c_int8, [c_void_p, _STRUCT(EpParams), _OUT]),
    "ucp_ep_close_nbx": (c_void_p, [c_void_p, _STRUCT(RequestParam)]),
    "ucp_ep_rkey_unpack": (c_int8, [c_void_p, c_char_p, _OUT]),
}
_QUICK: Final[dict[str, tuple[Any, list[Any]]]] = {
    "ucp_worker_progress": (c_uint, [c_void_p]),
    "ucp_worker_arm": (c_int8, [c_void_p]),
    "ucp_get_nbx": (c_void_p, [c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, _STRUCT(RequestParam)]),
    "ucp_put_nbx": (c_void_p, [c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, _STRUCT(RequestParam)]),
    "ucp_ep_flush_nbx": (c_void_p, [c_void_p, _STRUCT(RequestParam)]),
    "ucp_request_check_status": (c_int8, [c_void_p]),
    "ucp_request_free": (None, [c_void_p]),
    "ucp_rkey_destroy": (None, [c_void_p]),
}


class Ucp:
    """The functions of one loaded libucp, by their names in C.

    Those of the data path take a microsecond or less and keep Python's lock (`PyDLL`): to let go of it at every
    call would hand it each time to whatever Python thread is busy, for 5 ms.

    Raises:
        AttributeError: the library lacks one of them.
    """

    def __init__(self, path: str) -> None:
        slow, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        for library, signatures in ((slow, _SIGNATURES), (quick, _QUICK)):
            for name, (result, arguments) in signatures.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for the type checker: the constructor sets them all
        raise AttributeError(name)


def status_of(pointer: int | None) -> int | None:
    """The status that a `ucs_status_ptr_t` holds at once; None where it is a request that is under way."""
    if not pointer:
        return OK
    status = pointer - (1 << 64)
    return status if status >= _LAST_ERROR else None
