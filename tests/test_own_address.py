"""An address at which a connection to this machine is really accepted."""

import socket

import pytest

from actors import own_address as module
from actors.own_address import own_address


def test_a_connection_to_it_is_accepted() -> None:
    with socket.create_server((own_address(), 0)) as server, socket.create_connection(server.getsockname(), 5) as there:
        accepted, address = server.accept()
        accepted.close()
        assert address == there.getsockname()


def test_it_is_that_of_the_interface_that_leads_to_the_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANY_OTHER_MACHINE", ("127.0.0.2", 9))
    assert own_address().startswith("127.")


def test_without_a_way_to_others_it_is_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "ANY_OTHER_MACHINE", ("255.255.255.255", 9)
    )  # refused to sockets that may not broadcast
    assert own_address() == "127.0.0.1"
