"""The learner's end of each weight transport: one class for each, whose parts open themselves at the other end.

Lifecycle of a version: start -> ship, part by part -> (send or kept_part, where it is kept) -> discard.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from actors.weights.parts import Part, unpacked


class Transport(ABC):
    """One thread may publish while another sends, reads or discards."""

    keeps_weights: ClassVar[bool] = False
    """What is published stays in the learner's process until it is discarded: a part is of no use without it."""
    outlasts_process: ClassVar[bool] = False
    """What is published has a name outside of the learner's process, which it would leave behind: `discard_all`."""
    backend: ClassVar[Literal["gloo", "nccl"] | None] = None
    """Of the channels that it sends through, for which learner and worker need a rendezvous; None: it sends nothing."""

    def __init__(self, *, device: torch.device, folder: str | None) -> None:
        """`device`: the learner's. `folder`: asynchrony.weight_folder."""
        self._device, self._folder = device, folder

    @abstractmethod
    def start(self, policy_version: int) -> None:
        """Parts that are shipped from now on belong to this version, which has none yet."""

    @abstractmethod
    def ship(self, tensors: Sequence[Tensor]) -> tuple[Part, list[np.ndarray]]:
        """From some flat uint8 tensors on the learner's device to the part that travels, and their bytes on the CPU."""

    @abstractmethod
    def discard(self, policy_version: int) -> None:
        """This version will not be requested any more."""

    @abstractmethod
    def discard_all(self) -> None:
        """No version will be requested any more."""


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """The tensors of a part, one after the other."""

    packed: Tensor
    """[sum(sizes)] uint8."""
    sizes: list[int]
    """Bytes of each."""


class KeepingTransport(Transport):
    """Keeps a copy of what is published, apart from the weights that the next step changes.

    A version is kept until it is discarded, so several workers may take several versions at once.
    """

    keeps_weights = True

    def __init__(self, *, device: torch.device, folder: str | None) -> None:
        """Copies are kept on the device."""
        super().__init__(device=device, folder=folder)
        self._versions: dict[int, list[PackedTensors]] = {}

    def start(self, policy_version: int) -> None:
        """Parts that are shipped from now on belong to this version, which has none yet."""
        self._versions[policy_version] = []
        self._present = policy_version

    def ship(self, tensors: Sequence[Tensor]) -> tuple[Part, list[np.ndarray]]:
        """Copy the tensors into one packed buffer and keep it."""
        kept = PackedTensors(self._allocate(sum(t.nbytes for t in tensors)), [t.nbytes for t in tensors])
        torch.cat([tensor.to(self._device) for tensor in tensors], out=kept.packed)
        self._versions[self._present].append(kept)
        return self._part(kept), unpacked(kept.packed, kept.sizes)  # the copy to the CPU ends after that on the device

    def kept(self, policy_version: int) -> list[PackedTensors]:
        """The parts of one version, in order.

        Raises: RuntimeError with the versions there are if it is not kept.
        """
        if policy_version not in self._versions:
            raise RuntimeError(
                f"weights of version {policy_version} were asked for, the learner keeps {sorted(self._versions)}; they "
                "were discarded before their last use"
            )
        return self._versions[policy_version]

    def discard(self, policy_version: int) -> None:
        """This version will not be requested any more; its memory is freed once no process maps it."""
        del self._versions[policy_version]

    def discard_all(self) -> None:
        """No version will be requested any more."""
        self._versions.clear()

    @abstractmethod
    def _allocate(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 on the device."""

    @abstractmethod
    def _part(self, kept: PackedTensors) -> Part:
        """What a worker opens."""
