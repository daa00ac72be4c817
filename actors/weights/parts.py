"""The parts in which published weights travel by any transport: each holds some tensors of a manifest, in its order.

The sender decides what a part is (`Transport.ship`); it opens itself where it arrives, and `verified_tensors` then
compares every checksum, so no transport has to be trusted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

Buffer = TypeVar("Buffer", np.ndarray, Tensor)

Receive = Callable[[int], Tensor]
"""Receives this many bytes from the channel between learner and worker, as [bytes] uint8."""


class Part(ABC):
    """Byte arrays of some tensors, or where they come from; small enough to travel, or in arrays that travel well."""

    @abstractmethod
    def open(self, receive: Receive | None) -> list[np.ndarray]:
        """Its byte arrays, one per tensor; they may be read-only. `receive`: for parts that are sent through a channel.

        Raises: WeightMismatchError if they cannot be read here; what `receive` raises.
        """


def in_parts(buffers: Iterable[Buffer], *, part_bytes: int) -> Iterator[list[Buffer]]:
    """The arrays in order, in lists of at most `part_bytes` each (a larger array has a list of its own).

    Lists are made while the arrays are, so that the first can travel before the last is copied out of the learner.
    """
    part: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if part and size + buffer.nbytes > part_bytes:
            yield part
            part = []
            size = 0
        part.append(buffer)
        size += buffer.nbytes
    if part:
        yield part


def unpacked(packed: Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    """The byte arrays that lie in [sum(sizes)] uint8 one after the other; views of it if it is on the CPU."""
    return [buffer.numpy() for buffer in packed.cpu().split(list(sizes))]


def open_parts(parts: Sequence[Part], receive: Receive | None = None) -> list[np.ndarray]:
    """The byte arrays of all parts, in order; `receive` and what is raised as in `Part.open`."""
    return [buffer for part in parts for buffer in part.open(receive)]
