"""A store of two processes, as the kernel sees it."""

import os
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from actors.weights.store import listening_store


def listening_at(port: int) -> set[str]:
    """The addresses at which this process takes connections on a port."""
    found = psutil.Process().net_connections("inet")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_it_listens_at_its_address_alone() -> None:
    store = listening_store("127.0.0.1", timeout_s=10.0)
    assert listening_at(store.port) == {"127.0.0.1"}
    there = TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=10), wait_for_workers=False)
    there.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(OSError, match="in use"):
        listening_store("127.0.0.1", store.port, timeout_s=10.0)


def test_what_is_asked_for_by_torch_alone_listens_everywhere() -> None:
    """Else this file of ours has no reason to be."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    assert listening_at(store.port) in ({"::"}, {"0.0.0.0"})


def test_nothing_of_it_stays_open() -> None:
    def descriptors() -> int:
        return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))

    before = descriptors()
    store = listening_store("127.0.0.1", timeout_s=10.0)
    assert descriptors() > before
    del store
    assert descriptors() == before
