"""Transport `object_store`: parts hold the bytes themselves, and Ray's object store takes them to their readers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from actors.weights.parts import Part, Receive
from actors.weights.transport import Transport


@dataclass(frozen=True, slots=True)
class ArrayPart(Part):
    """Byte arrays that travel without a copy."""

    buffers: list[np.ndarray]

    def open(self, receive: Receive | None) -> list[np.ndarray]:
        """They are here already."""
        return self.buffers


class ObjectStoreTransport(Transport):
    """The store frees a version when the last reference to it goes, so nothing is done here."""

    def start(self, policy_version: int) -> None:
        """Nothing to begin."""

    def discard(self, policy_version: int) -> None:
        """Nothing to free."""

    def discard_all(self) -> None:
        """Nothing to free."""

    def ship(self, tensors: Sequence[Tensor]) -> tuple[ArrayPart, list[np.ndarray]]:
        """On CPU views of the learner's memory, to be copied before the next step."""
        buffers = [tensor.cpu().numpy() for tensor in tensors]
        return ArrayPart(buffers), buffers
