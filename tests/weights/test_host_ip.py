"""An address at which a connection to this machine is really accepted."""

import socket

import pytest

from actors.weights import host_ip as module
from actors.weights.host_ip import host_ip


def test_a_connection_to_it_is_accepted() -> None:
    with socket.create_server((host_ip(), 0)) as server, socket.create_connection(server.getsockname(), 5) as there:
        accepted, address = server.accept()
        accepted.close()
        assert address == there.getsockname()


def test_it_is_that_of_the_interface_that_leads_to_the_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANY_OTHER_MACHINE", ("127.0.0.2", 9))
    assert host_ip().startswith("127.")


def test_without_a_route_to_other_machines_it_is_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "ANY_OTHER_MACHINE", ("255.255.255.255", 9)
    )  # refused to sockets that may not broadcast
    assert host_ip() == "127.0.0.1"
