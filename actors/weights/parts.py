"""The parts in which published weights travel: arrays, files, memory of the learner that others map, or its sendings.

A part holds some tensors of a manifest, in its order. Whoever sends them decides how; the receiver opens every kind,
and `verified_tensors` compares every checksum afterwards, so no way of travelling has to be trusted.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from actors.weights.manifest import WeightMismatchError
from actors.weights.shared_memory import SharedMemory

Buffer = TypeVar("Buffer", np.ndarray, Tensor)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A part on a disk that sender and receivers share."""

    path: str
    num_tensors: int


@dataclass(frozen=True, slots=True)
class MappedPart:
    """A part in memory that the learner keeps and processes of its node map."""

    memory: SharedMemory
    sizes: list[int]
    """Bytes of each tensor; they follow each other without a gap."""


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the learner keeps, and sends in one piece when a worker's channel asks for it."""

    sizes: list[int]
    """Bytes of each tensor; they follow each other without a gap."""


Part = list[np.ndarray] | WeightFile | MappedPart | SentPart
"""Byte arrays of some tensors, or where they come from."""


def in_parts(buffers: Iterable[Buffer], *, part_bytes: int) -> Iterator[list[Buffer]]:
    """The arrays in order, in lists of at most `part_bytes` each (a larger array has a list of its own).

    Lists are made while the arrays are, so that the first can travel before the last is copied out of the learner.
    """
    part: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if part and size + buffer.nbytes > part_bytes:
            yield part
            part, size = [], 0
        part.append(buffer)
        size += buffer.nbytes
    if part:
        yield part


def version_folder(folder: str | Path, policy_version: int) -> Path:
    """Where the files of one version are."""
    return Path(folder) / f"{policy_version:08d}"


def write_part(part: list[np.ndarray], path: Path) -> WeightFile:
    """Write a part where every node can read it; the file has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    save_file({f"{index:06d}": buffer for index, buffer in enumerate(part)}, aside)
    os.replace(aside, path)
    return WeightFile(str(path), len(part))


def unpacked(packed: Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    """The byte arrays that lie in [sum(sizes)] uint8 one after the other; views of it if it is on the CPU."""
    return [buffer.numpy() for buffer in packed.cpu().split(list(sizes))]


def open_parts(parts: Sequence[Part], receive: Callable[[int], Tensor] | None = None) -> list[np.ndarray]:
    """The byte arrays of all parts, in order. `receive` takes so many bytes from the channel of parts that are sent.

    Raises: WeightMismatchError naming the file that is missing, cut, or holds another number of tensors, or the memory
    that is not there for this process; what `receive` raises.
    """
    return [buffer for part in parts for buffer in _opened(part, receive)]


def _opened(part: Part, receive: Callable[[int], Tensor] | None) -> list[np.ndarray]:
    match part:
        case WeightFile():
            return _read(part)
        case MappedPart():
            return unpacked(part.memory.map(), part.sizes)
        case SentPart():
            return unpacked(receive(sum(part.sizes)), part.sizes)
    return part


def _read(part: WeightFile) -> list[np.ndarray]:
    try:
        with safe_open(part.path, framework="numpy") as file:
            buffers = [file.get_tensor(name) for name in sorted(file.keys())]
    except (OSError, SafetensorError) as error:
        raise WeightMismatchError(
            f"cannot read published weights from {part.path}: {error}; asynchrony.weight_folder must be on a disk that "
            "learner and rollout workers share"
        ) from error
    if len(buffers) != part.num_tensors:
        raise WeightMismatchError(f"{part.path} holds {len(buffers)} tensors, {part.num_tensors} were published in it")
    return buffers
