"""The parts in which published weights travel: arrays in memory, or files that every node can read.

A part holds some tensors of a manifest, in its order. Whoever sends them decides how; the receiver opens either kind,
and `verified_tensors` compares every checksum afterwards, so no way of travelling has to be trusted.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from actors.weights import WeightMismatchError


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A part on a disk that sender and receivers share."""

    path: str
    num_tensors: int


Part = list[np.ndarray] | WeightFile
"""Byte arrays of some tensors, or the file that holds them."""


def in_parts(buffers: Iterable[np.ndarray], *, part_bytes: int) -> Iterator[list[np.ndarray]]:
    """The arrays in order, in lists of at most `part_bytes` each (a larger array has a list of its own).

    Lists are made while the arrays are, so that the first can travel before the last is copied out of the learner.
    """
    part: list[np.ndarray] = []
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


def open_parts(parts: Sequence[Part]) -> list[np.ndarray]:
    """The byte arrays of all parts, in order.

    Raises: WeightMismatchError naming the file that is missing, cut, or holds another number of tensors.
    """
    return [buffer for part in parts for buffer in (_read(part) if isinstance(part, WeightFile) else part)]


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
