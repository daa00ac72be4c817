"""Published weights that stay with the learner: copies, apart from the weights that the next step changes.

Each part is one packed buffer, which workers of the node map (`ipc`) or which is sent to each of them when it asks
(`gloo`, `nccl`). A version is kept until it is discarded, so several workers may take several versions at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.weights.parts import MappedPart, Part, SentPart, unpacked
from actors.weights.shared_memory import allocate, share


@dataclass(frozen=True, slots=True)
class KeptPart:
    """The tensors of a part, one after the other."""

    packed: Tensor
    """[sum(sizes)] uint8."""
    sizes: list[int]
    """Bytes of each."""


class KeptWeights:
    """One thread may publish and another read or discard."""

    def __init__(self, transport: str, device: torch.device) -> None:
        """`device`: the learner's; gloo sends from the CPU."""
        self._transport = transport
        self._device = torch.device("cpu") if transport == "gloo" else device
        self._versions: dict[int, list[KeptPart]] = {}

    def start(self, policy_version: int) -> None:
        """Parts that are kept from now on belong to this version, which has none yet."""
        self._versions[policy_version] = []
        self._present = policy_version

    def keep(self, tensors: Sequence[Tensor]) -> tuple[Part, list[np.ndarray]]:
        """Copy some flat uint8 tensors. Returns what a worker opens, and the copies' bytes on the CPU."""
        sizes = [tensor.nbytes for tensor in tensors]
        if self._transport == "ipc":
            packed = allocate(sum(sizes), self._device)
        else:
            packed = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        torch.cat([tensor.to(self._device) for tensor in tensors], out=packed)
        self._versions[self._present].append(KeptPart(packed, sizes))
        part = MappedPart(share(packed), sizes) if self._transport == "ipc" else SentPart(sizes)
        return part, unpacked(packed, sizes)  # the copy to the CPU ends after the one on the device

    def parts(self, policy_version: int) -> list[KeptPart]:
        """Of one version, in order.

        Raises: RuntimeError with the versions there are if it is not kept.
        """
        if policy_version not in self._versions:
            raise RuntimeError(
                f"weights of version {policy_version} were asked for, the learner keeps {sorted(self._versions)}; they "
                "were discarded before their last use"
            )
        return self._versions[policy_version]

    def discard(self, policy_version: int) -> None:
        """Nobody will ask for this version any more; its memory is free once those who map it have let go."""
        del self._versions[policy_version]

    def discard_all(self) -> None:
        """Nobody will ask for any version any more."""
        self._versions.clear()
