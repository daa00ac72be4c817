"""Which of two threads may step an engine: the one that samples, or the one that loads weights.

The lock has a slot for one `WeightLoad`. While it is held for sampling, the holder checks the slot between two
engine steps; a plain lock would not do, because a thread that releases and reacquires one starves those that wait.

Guarantees: no sampling begins while weights are in the slot; weights that are withdrawn before they were checked leave
the engine quarantined, because it may hold a part of them; every release, check and withdrawal wakes the threads that
wait.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic

from actors.engine.request_batch import Output
from actors.engine.weight_load import WeightLoad


class EngineLock(Generic[Output]):
    """The lock, its slot, and the version of the weights that sampling may use."""

    def __init__(self, policy_version: int) -> None:
        self._changed = threading.Condition()
        self._is_held = False
        self._load: WeightLoad[Output] | None = None
        self._policy_version: int | None = policy_version

    @property
    def load(self) -> WeightLoad[Output] | None:
        """Weights that wait to be installed, or whose probes are being sampled."""
        return self._load

    @property
    def policy_version(self) -> int | None:
        """Version of the newest weights that passed their check; None: quarantined."""
        return self._policy_version

    def quarantine(self) -> None:
        """Refuse to begin sampling until weights pass their check."""
        with self._changed:
            self._policy_version = None

    @contextmanager
    def held_to_sample(self) -> Iterator[int]:
        """Hold the lock; yields the version to begin with. Waits until it is free and the slot is empty.

        Raises: RuntimeError if the engine is quarantined.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_held and self._load is None)
            if self._policy_version is None:
                raise RuntimeError(
                    "this worker's last weight update failed its checks; it samples again after a good one"
                )
            self._is_held, policy_version = True, self._policy_version
        try:
            yield policy_version
        finally:
            self._release()

    @contextmanager
    def offered(self, load: WeightLoad[Output]) -> Iterator[None]:
        """Put weights into the slot, which wakes no thread; withdraw them at the end."""
        self._offer(load)
        try:
            yield
        finally:
            self._withdraw(load)

    @contextmanager
    def held_to_load(self, load: WeightLoad[Output]) -> Iterator[bool]:
        """Wait for the sampling thread. Yields False if it has checked the weights, else True, holding the lock.

        True means that it finished, or failed, before it could check them.
        """
        with self._changed:
            self._changed.wait_for(lambda: load.is_checked or not self._is_held)
            is_left_to_us = not load.is_checked
            self._is_held |= is_left_to_us
        try:
            yield is_left_to_us
        finally:
            if is_left_to_us:
                self._release()

    def settle(self, load: WeightLoad[Output]) -> None:
        """The holder has checked the weights: sampling may use them, or is refused if they failed."""
        with self._changed:
            load.is_checked = True
            self._load = None
            self._policy_version = None if load.failure is not None else load.policy_version
            self._changed.notify_all()

    def _offer(self, load: WeightLoad[Output]) -> None:
        with self._changed:
            assert self._load is None, "one thread at a time loads weights"
            self._load = load

    def _release(self) -> None:
        with self._changed:
            self._is_held = False
            self._changed.notify_all()

    def _withdraw(self, load: WeightLoad[Output]) -> None:
        with self._changed:
            if self._load is load:
                self._load = None
            if not load.is_checked:  # the engine may hold part of them
                self._policy_version = None
            self._changed.notify_all()
