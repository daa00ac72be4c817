"""A store where processes meet, which listens at one address of this machine.

torch's own servers listen at every address, so that whoever reaches the machine could join, or end, a process group.
"""

import socket
from datetime import timedelta

from torch.distributed import TCPStore


def listening_store(address: str, port: int = 0, *, timeout_s: float) -> TCPStore:
    """The server's end; 0: a free port, which `.port` tells. timeout_s: longest wait of its own calls [s].

    Raises: OSError if the address is not this machine's or the port is taken.
    Test: test_store.py
    """
    listener = socket.create_server((address, port))
    return TCPStore(
        address,
        listener.getsockname()[1],
        None,
        True,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )
