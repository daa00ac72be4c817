"""Transport `ipc`: parts stay in memory of the learner's process, which workers of its node (or its GPU) map."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from actors.weights.parts import Part, Receive, unpacked
from actors.weights.shared_memory import SharedMemory, allocate, share
from actors.weights.transport import KeepingTransport, PackedTensors


@dataclass(frozen=True, slots=True)
class MappedPart(Part):
    """A part in memory that the learner keeps and other processes map."""

    memory: SharedMemory
    sizes: list[int]
    """Bytes of each tensor; they follow each other without a gap."""

    def open(self, receive: Receive | None) -> list[np.ndarray]:
        """Views of the learner's own memory.

        Raises: WeightMismatchError if it is not there for this process.
        """
        return unpacked(self.memory.map(), self.sizes)


class IpcTransport(KeepingTransport):
    """Keeps every version in memory that can be shared."""

    outlasts_process = True

    def _allocate(self, num_bytes: int) -> Tensor:
        return allocate(num_bytes, self._device)

    def _part(self, kept: PackedTensors) -> MappedPart:
        return MappedPart(share(kept.packed), kept.sizes)
