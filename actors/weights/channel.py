"""A channel of two: the learner sends packed bytes, a rollout worker receives them; gloo on CPUs, NCCL on GPUs.

Each channel is a process group of its own, built from a store where its two members meet, in addition to any groups
that the processes already have. So workers join and leave, each with the version it asked for, and a failed channel is
discarded without affecting the others.

Waits poll the store as well as the group. A member that fails leaves its error there, so the other's wait ends with
that text; and no wait outlasts the deadline of the rendezvous, past which gloo would only report a timeout, and NCCL
would end the whole process.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, Store, TCPStore, Work

from actors.weights.shared_memory import device_id

SENDER, RECEIVER = 0, 1
MEMBERS = ("learner", "rollout worker")

LONGEST_PAUSE_S = 0.02
"""Interval between two polls of a long transfer [s]; the first polls follow each other faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where two members meet, and how long they wait for each other. After any failure the driver makes a new one,
    with another number."""

    worker: str
    number: int
    backend: Literal["gloo", "nccl"]
    address: str
    port: int
    timeout_s: float
    """Longest wait for the other to connect, and for a buffer to be sent or received [s]."""

    def __str__(self) -> str:
        return f"{self.backend} channel {self.number} of {self.worker}"


@runtime_checkable
class Group(Protocol):
    """The part of ProcessGroupGloo and ProcessGroupNCCL used here; torch declares less than they have."""

    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions) -> Work:
        """Begin to send, or to receive."""

    def abort(self) -> None:
        """Abort all running operations."""


class Channel:
    """One member's end. As a context: an exception inside closes both ends, and the other end raises with its text."""

    def __init__(self, rendezvous: Rendezvous, member: int) -> None:
        """Connect to the other member.

        Raises: TimeoutError if it does not connect in time; ConnectionError with its error if it failed meanwhile;
        ValueError if NCCL is to connect two processes of one GPU.
        """
        self.rendezvous = rendezvous
        self._member, self._other = member, MEMBERS[1 - member]
        self._device = torch.device("cuda", torch.cuda.current_device()) if rendezvous.backend == "nccl" else _CPU
        timeout = timedelta(seconds=rendezvous.timeout_s)
        try:
            store = TCPStore(rendezvous.address, rendezvous.port, None, False, timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise ConnectionError(
                f"{rendezvous}: its members meet at {rendezvous.address}:{rendezvous.port}, out of reach here: {error}"
            ) from error
        self._store = PrefixStore(str(rendezvous), store)
        self._group: Group | None = None
        with self:
            self._group = self._connect(timeout)

    def send(self, packed: Tensor) -> None:
        """Send all bytes of [n] uint8 on the backend's device; they must not change before this returns.

        Raises: ConnectionError with the receiver's error; TimeoutError if it does not take them in time.
        """
        self._transfer(packed)

    def receive(self, num_bytes: int) -> Tensor:
        """The [num_bytes] uint8 that were sent, on the backend's device.

        Raises: ConnectionError with the sender's error; TimeoutError if it does not send in time.
        """
        packed = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._transfer(packed)
        return packed

    def close(self) -> None:
        """Release the group, which ends a transfer of the other member."""
        if self._group is not None:
            self._group.abort()
            self._group = None

    def __enter__(self) -> "Channel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._store.set(_failed(self._member), f"{type(error).__name__}: {error}")
            self.close()

    def _connect(self, timeout: timedelta) -> Group:
        mine = device_id(self._device)
        self._store.set(_device(self._member), mine)
        with self._deadline("connect") as wait:
            wait(lambda: self._store.check([_device(1 - self._member)]))
            if self.rendezvous.backend == "nccl" and self._store.get(_device(1 - self._member)).decode() == mine:
                raise ValueError(
                    f"learner and {self.rendezvous.worker} share the GPU {mine}, and weight_transport='nccl' needs a "
                    "GPU for each (NCCL refuses two processes on one); set asynchrony.weight_transport='ipc', or raise "
                    "placement.rollout.num_gpus and placement.learner.num_gpus to 1"
                )
            return _BACKENDS[self.rendezvous.backend](self._store, self._member, timeout)

    def _transfer(self, packed: Tensor) -> None:
        assert self._group is not None, f"{self.rendezvous} is closed"
        with self._deadline("take part") as wait:
            # Between two members a broadcast is a send, and, unlike gloo's own, one that can be asked if it is done.
            work = self._group.broadcast([packed], BroadcastOptions())
            wait(work.is_completed)
            work.wait()

    @contextmanager
    def _deadline(self, what: str) -> Iterator[Callable[[Callable[[], bool]], None]]:
        """Yields a function that waits until a condition holds; `what`: what the other member is to do meanwhile."""
        deadline = time.monotonic() + self.rendezvous.timeout_s

        def wait(is_over: Callable[[], bool]) -> None:
            pause_s = 1e-4
            while not is_over():
                if self._store.check([_failed(1 - self._member)]) or time.monotonic() > deadline:
                    raise self._failure(what, is_late=True)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

        try:
            yield wait
        except RuntimeError as error:  # gloo and NCCL know no other, their own limits of time included
            raise self._failure(what, is_late=time.monotonic() > deadline) from error

    def _failure(self, what: str, *, is_late: bool) -> OSError:
        """Why the other member did not do `what`; it leaves its error in the store before it releases its end."""
        failed = _failed(1 - self._member)
        if self._store.check([failed]):
            return ConnectionError(f"{self.rendezvous}: the {self._other} failed: {self._store.get(failed).decode()}")
        if is_late:
            return TimeoutError(
                f"{self.rendezvous}: the {self._other} did not {what} within {self.rendezvous.timeout_s:g} s; see its "
                "log, or raise asynchrony.request_timeout_s"
            )
        return ConnectionError(f"{self.rendezvous}: the {self._other} died, or the network to it failed")


class Channels:
    """The channels of one process, at most one for each worker; built when first used, discarded when one fails."""

    def __init__(self, member: int) -> None:
        self._member = member
        self._channels: dict[str, Channel] = {}

    @contextmanager
    def at(self, rendezvous: Rendezvous) -> Iterator[Channel]:
        """The channel of this rendezvous; the worker's channel of an earlier one is closed.

        Raises: what `Channel` raises, and what is raised inside, which ends the channel on both sides.
        """
        channel = self._channels.pop(rendezvous.worker, None)
        if channel is None or channel.rendezvous != rendezvous:
            if channel is not None:
                channel.close()
            channel = Channel(rendezvous, self._member)
        with channel:
            yield channel
            self._channels[rendezvous.worker] = channel

    def close(self, worker: str) -> None:
        """This worker has left; nothing happens if it never had a channel."""
        channel = self._channels.pop(worker, None)
        if channel is not None:
            channel.close()


_CPU = torch.device("cpu")


def _gloo(store: Store, member: int, timeout: timedelta) -> Group:
    from torch.distributed import ProcessGroupGloo

    return cast(Group, ProcessGroupGloo(store, member, 2, timeout))


def _nccl(store: Store, member: int, timeout: timedelta) -> Group:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # past it NCCL's watchdog ends the process; the channel has given up by then
    return cast(Group, ProcessGroupNCCL(store, member, 2, options))


_BACKENDS = {"gloo": _gloo, "nccl": _nccl}


def _device(member: int) -> str:
    return f"device of {MEMBERS[member]}"


def _failed(member: int) -> str:
    return f"error of {MEMBERS[member]}"
