"""Transports `gloo` and `nccl`: parts stay with the learner, which sends them to each worker through its channel."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.weights.channel import SENDER, Channels, Rendezvous
from actors.weights.parts import Part, Receive, unpacked
from actors.weights.transport import KeepingTransport, PackedTensors


@dataclass(frozen=True, slots=True)
class SentPart(Part):
    """A part that the learner sends in one piece when a worker connects at the rendezvous."""

    sizes: list[int]
    """Bytes of each tensor; they follow each other without a gap."""

    def open(self, receive: Receive | None) -> list[np.ndarray]:
        """Take it from the channel. Raises: what `receive` raises."""
        assert receive is not None, "weights that are sent were announced without a rendezvous"
        return unpacked(receive(sum(self.sizes)), self.sizes)


class ChannelTransport(KeepingTransport):
    """Keeps every version, and a channel to each worker that has asked for one."""

    def __init__(self, *, device: torch.device, folder: str | None) -> None:
        super().__init__(device=device, folder=folder)
        self._channels = Channels(SENDER)

    def send(self, policy_version: int, rendezvous: Rendezvous) -> None:
        """Send a version to the worker that connects at this rendezvous.

        Raises: RuntimeError if it is not kept; ConnectionError or TimeoutError if the worker failed or did not connect.
        """
        with self._channels.at(rendezvous) as channel:
            for part in self.kept(policy_version):
                channel.send(part.packed)

    def close_channel(self, worker: str) -> None:
        """This worker has left; nothing happens if it never had a channel."""
        self._channels.close(worker)

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _part(self, kept: PackedTensors) -> SentPart:
        return SentPart(kept.sizes)


class GlooTransport(ChannelTransport):
    """Sends from the CPU."""

    backend = "gloo"

    def __init__(self, *, device: torch.device, folder: str | None) -> None:
        super().__init__(device=torch.device("cpu"), folder=folder)


class NcclTransport(ChannelTransport):
    """Sends from the learner's GPU."""

    backend = "nccl"
