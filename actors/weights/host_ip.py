"""The address at which the other processes of a run reach this machine."""

import os
import socket

LOOPBACK_ONLY = "ASYNC_EBFT_LOOPBACK_ONLY"
"""Set in the environment of a run whose processes are all on this machine: nothing of it listens to others."""
LOOPBACK = "127.0.0.1"

ANY_OTHER_MACHINE = ("203.0.113.1", 9)
"""An address reserved for documentation; nothing is sent to it."""


def host_ip() -> str:
    """Address of the interface that leads to other machines; the loopback's if none does, or no other takes part.

    The host name is not resolved: many machines map it to their loopback, to which no other machine can connect.
    """
    if os.environ.get(LOOPBACK_ONLY):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        try:
            unsent.connect(ANY_OTHER_MACHINE)  # of a datagram socket this only chooses the interface
        except OSError:
            return LOOPBACK
        return unsent.getsockname()[0]
