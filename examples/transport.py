"""The transport without any cache: two processes, one-sided READ and WRITE on exported memory.

Run it: python examples/transport.py
"""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np

from kvrdma.memory import Memory
from kvrdma.transports import Opcode, RemoteRegion, Rights, TransferBatch
from kvrdma.transports.tcp import TcpTransport

NBYTES = 1 << 20


def passive(pipe: Connection) -> None:
    """Exports memory, tells the other process where it is, and does nothing more: the I/O is one-sided."""
    memory = Memory.of(np.arange(NBYTES, dtype=np.uint8))
    with TcpTransport() as transport:
        exported = transport.export(transport.register(memory), Rights.READ | Rights.WRITE)
        listener = transport.listen("127.0.0.1:0")
        pipe.send((listener.contact_address, exported.scheme, exported.nbytes, exported.token))
        pipe.recv()  # until the other process is done
        pipe.send(bytes(memory.array()[:4]))


def main() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=passive, args=(there,))
    process.start()
    address, scheme, nbytes, token = here.recv()
    remote = RemoteRegion(scheme, nbytes, token)

    memory = Memory.of(np.zeros(NBYTES, dtype=np.uint8))
    column = lambda *values: np.array(values, dtype=np.int64)  # noqa: E731
    with TcpTransport() as transport:
        region = transport.register(memory)
        with transport.connect(address, timeout=5) as endpoint:
            # Two ranges in one batch: bytes 0..4095 and 8192..12287, to the start of our memory.
            read = TransferBatch(
                Opcode.READ,
                [region],
                [remote],
                local_rows=column(0, 0),
                local_offsets=column(0, 4096),
                remote_rows=column(0, 0),
                remote_offsets=column(0, 8192),
                nbytes=column(4096, 4096),
            )
            ok = endpoint.post(read, timeout=5).result()
            print("READ", ok, bytes(memory.array()[1:5]))

            memory.array()[:4] = [9, 9, 9, 9]
            write = TransferBatch(
                Opcode.WRITE, [region], [remote], column(0), column(0), column(0), column(0), column(4)
            )
            print("WRITE", endpoint.post(write, timeout=5).result())
    here.send("done")
    print("the other process sees", here.recv())
    process.join()


if __name__ == "__main__":
    main()
