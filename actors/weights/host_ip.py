"""The address at which other machines reach this one."""

import socket

ANY_OTHER_MACHINE = ("203.0.113.1", 9)
"""An address reserved for documentation; nothing is sent to it."""


def host_ip() -> str:
    """Address of the interface that leads to other machines; that of the loopback if none does.

    The host name is not resolved: many machines map it to their loopback, to which no other machine can connect.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        try:
            unsent.connect(ANY_OTHER_MACHINE)  # of a datagram socket this only chooses the interface
        except OSError:
            return "127.0.0.1"
        return unsent.getsockname()[0]
