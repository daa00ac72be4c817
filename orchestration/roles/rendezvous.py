"""Where the learner and each worker meet to build a channel: a store in this process, which outlives them both."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from actors.weights.channel import Rendezvous
from actors.weights.host_ip import host_ip
from actors.weights.store import listening_store


class RendezvousStore:
    """One rendezvous for each worker, and a new one after each failure."""

    def __init__(self, backend: Literal["gloo", "nccl"], *, timeout_s: float) -> None:
        """Open the store at a free port of this machine."""
        self._backend, self._timeout_s = backend, timeout_s
        self._address = host_ip()
        self._store = listening_store(self._address, timeout_s=timeout_s)
        self._numbers: dict[str, int] = {}

    def of(self, worker: str) -> Rendezvous:
        """The current one of this worker."""
        return Rendezvous(
            worker=worker,
            number=self._numbers.setdefault(worker, 1),
            backend=self._backend,
            address=self._address,
            port=self._store.port,
            timeout_s=self._timeout_s,
        )

    @contextmanager
    def renewed_on_failure(self, worker: str) -> Iterator[Rendezvous]:
        """The current one of this worker; if the body raises, the next update gets another."""
        with ExitStack() as on_failure:
            on_failure.callback(self.renew, worker)
            yield self.of(worker)
            on_failure.pop_all()

    def renew(self, worker: str) -> None:
        """The channel of this worker has failed: the next update needs another."""
        self._numbers[worker] += 1
