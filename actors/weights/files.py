"""Transport `files`: parts are safetensors files on a disk that learner and rollout workers share."""

import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from actors.weights.manifest import WeightMismatchError
from actors.weights.parts import Part, Receive
from actors.weights.transport import Transport


@dataclass(frozen=True, slots=True)
class WeightFile(Part):
    """A part on the shared disk."""

    path: str
    num_tensors: int

    def open(self, receive: Receive | None) -> list[np.ndarray]:
        """Read it.

        Raises: WeightMismatchError naming the file that is missing, cut, or holds another number of tensors.
        """
        try:
            with safe_open(self.path, framework="numpy") as file:
                buffers = [file.get_tensor(name) for name in sorted(file.keys())]
        except (OSError, SafetensorError) as error:
            raise WeightMismatchError(
                f"cannot read published weights from {self.path}: {error}; asynchrony.weight_folder must be on a disk "
                "that learner and rollout workers share"
            ) from error
        if len(buffers) != self.num_tensors:
            raise WeightMismatchError(
                f"{self.path} holds {len(buffers)} tensors, {self.num_tensors} were published in it"
            )
        return buffers


class FileTransport(Transport):
    """A folder for each run, in it one for each version, and a file in that for each part.

    Runs that share asynchrony.weight_folder do not meet: the run's folder is named by its start and a random number.
    """

    outlasts_process = True

    def __init__(self, *, device: torch.device, folder: str | None) -> None:
        """Nothing is written before the first part."""
        super().__init__(device=device, folder=folder)
        assert folder is not None, "the configuration refuses files without a folder"
        self._run_folder = Path(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex}")
        self._discarding = threading.Lock()

    def start(self, policy_version: int) -> None:
        """Parts that are shipped from now on go to this version's folder."""
        self._present, self._num_parts = self._version_folder(policy_version), 0

    def ship(self, tensors: Sequence[Tensor]) -> tuple[WeightFile, list[np.ndarray]]:
        """Write the next file."""
        buffers = [tensor.cpu().numpy() for tensor in tensors]
        file = write_part(buffers, self._present / f"{self._num_parts}.safetensors")
        self._num_parts += 1
        return file, buffers

    def discard(self, policy_version: int) -> None:
        """Remove this version's folder."""
        with self._discarding:
            if self._run_folder.exists():  # else the run is over, and this call was overtaken by that for all versions
                shutil.rmtree(self._version_folder(policy_version))

    def discard_all(self) -> None:
        """Remove the run's folder."""
        with self._discarding:
            if self._run_folder.exists():
                shutil.rmtree(self._run_folder)

    def _version_folder(self, policy_version: int) -> Path:
        return self._run_folder / f"{policy_version:08d}"


def write_part(buffers: Sequence[np.ndarray], path: Path) -> WeightFile:
    """Write a part where every node can read it; the file has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    save_file({f"{index:06d}": buffer for index, buffer in enumerate(buffers)}, aside)
    os.replace(aside, path)
    return WeightFile(str(path), len(buffers))
