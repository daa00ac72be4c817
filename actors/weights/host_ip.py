"""Where other machines find this one."""

import socket

ANY_OTHER_MACHINE = ("203.0.113.1", 9)
"""An address kept for documentation; nothing is sent to it."""


def host_ip() -> str:
    """Address of the interface that leads to other machines; that of the loopback if none does.

    The host's name is not asked: many machines give it to their loopback, where nobody else could connect to.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        try:
            unsent.connect(ANY_OTHER_MACHINE)  # of a datagram socket this only chooses the interface
        except OSError:
            return "127.0.0.1"
        return unsent.getsockname()[0]
