"""What the learner needs to go on bit for bit, in host memory and on disk.

Each parameter is whole in one of the ranks' files, so the files do not depend on how ZeRO shards, and are read by any
number of ranks. `rank-00000.safetensors` and so on hold the tensors; `state.json` holds the rest.
"""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.weights.manifest import Probe
from learner.engine import LearnerEngine
from learner.optimizer_state import NUMBERS, OptimizerState
from learner.policy import saved_buffers

SUMMARY = "state.json"
REMEDY = "resume with the model of the run that wrote it (model.name)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the learner counts beside the numbers of its optimizer."""

    policy_version: int
    """Steps applied so far; the schedule of the learning rate is at the same place."""
    initial_probe: Probe | None
    """As in the manifest of a publication; None before the first one, and on all ranks but 0."""
    agreement: tuple[float, bool, float, int]
    """`Agreement.memory`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """One rank's share, in host memory: no later step changes it."""

    rank: int
    num_ranks: int
    progress: Progress
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write it into the folder, which all ranks share.

        Raises: OSError if the disk is full or cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(self.tensors, _file_of(folder, self.rank))
        except SafetensorError as error:  # it does not report a full disk as an OSError
            raise OSError(errno.EIO, str(error), str(folder)) from error
        if self.rank == 0:
            (folder / SUMMARY).write_text(_summary(self.progress, self.num_ranks), encoding="utf-8")


def copy_training_state(engine: LearnerEngine, progress: Progress) -> TrainingState:
    """Copy all that later steps depend on into host memory; every rank must call it, between two steps."""
    state = engine.optimizer_state()
    state.start()
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tensors = {
        f"buffer/{name}": _on_host(buffer) for name, buffer in saved_buffers(engine.policy.causal_lm) if rank == 0
    }
    steps = _steps(state, engine.device)
    for name, owner in _owners(state.shapes, num_ranks).items():
        for number in NUMBERS:
            whole = _whole(state, name, number, owner)
            if rank == owner:
                tensors[f"{number}/{name}"] = _on_host(whole)
        if rank == owner:
            tensors[f"step/{name}"] = torch.tensor(steps[name])
    tensors[f"rng/cpu/{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"rng/cuda/{rank}"] = torch.cuda.get_rng_state()
    return TrainingState(rank=rank, num_ranks=num_ranks, progress=progress, tensors=tensors)


def restore_training_state(engine: LearnerEngine, folder: Path) -> Progress:
    """Put the engine where it was when the state was copied, whatever the number of ranks was; every rank must call it.

    Raises: ValueError, on every rank and before anything is changed, naming file and tensor if a file is missing or
    does not fit the model.
    """
    progress, num_ranks = _read_summary(folder / SUMMARY)
    files = {path: _load(path) for path in (_file_of(folder, rank) for rank in range(num_ranks))}
    state = engine.optimizer_state()
    _require_fit(folder, files, state, dict(saved_buffers(engine.policy.causal_lm)))
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    state.start()
    for name in state.shapes:
        for number in NUMBERS:
            start, part = state.numbers(name, number)
            part.copy_(tensors[f"{number}/{name}"].view(-1)[start : start + len(part)])
        state.set_step(name, int(tensors[f"step/{name}"]))
    for name, buffer in saved_buffers(engine.policy.causal_lm):
        buffer.copy_(tensors[f"buffer/{name}"])
    _restore_random_state(tensors, num_ranks)
    engine.resume(progress.policy_version)
    return progress


def _whole(state: OptimizerState, name: str, number: str, owner: int) -> Tensor:
    """All ranks' parts together, in the parameter's shape; of value on the owner alone."""
    start, part = state.numbers(name, number)
    if not state.is_sharded:
        return part.view(state.shapes[name])
    whole = torch.zeros(state.shapes[name], device=part.device)
    whole.view(-1)[start : start + len(part)] = part
    # Elsewhere it is zero. Added as integers, the bits stay as they are, even those of a negative zero.
    torch.distributed.reduce(whole.view(torch.int32), dst=owner)
    return whole


def _steps(state: OptimizerState, device: torch.device) -> dict[str, int]:
    """Of each parameter, known to every rank."""
    steps = torch.tensor([state.step(name) for name in state.shapes], device=device)
    torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
    return dict(zip(state.shapes, steps.tolist(), strict=True))


def _owners(shapes: Mapping[str, torch.Size], num_ranks: int) -> dict[str, int]:
    """Which rank copies and writes each parameter: in turn the one that has least so far."""
    sizes = [0] * num_ranks
    owners: dict[str, int] = {}
    for name, shape in shapes.items():
        owners[name] = sizes.index(min(sizes))
        sizes[owners[name]] += shape.numel()
    return owners


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _restore_random_state(tensors: Mapping[str, Tensor], num_ranks: int) -> None:
    """Of this rank; of rank 0 where there were fewer."""
    rank = torch.distributed.get_rank()
    source = rank if rank < num_ranks else 0
    torch.set_rng_state(tensors[f"rng/cpu/{source}"].clone())
    if torch.cuda.is_available() and (of_device := tensors.get(f"rng/cuda/{source}")) is not None:
        torch.cuda.set_rng_state(of_device.clone())


def _require_fit(
    folder: Path, files: Mapping[Path, Mapping[str, Tensor]], state: OptimizerState, buffers: Mapping[str, Tensor]
) -> None:
    missing = dict(_expected(state, buffers))
    for path, tensors in files.items():
        for name, tensor in tensors.items():
            if name.startswith("rng/"):
                continue
            found, wanted = _described(tensor.dtype, tensor.shape), missing.pop(name, "not there")
            if found != wanted:
                raise ValueError(f"{path}: tensor {name} is {found}, in the model it is {wanted}; {REMEDY}")
    if missing:
        raise ValueError(f"{folder} lacks tensor {next(iter(missing))}, {next(iter(missing.values()))}; {REMEDY}")
    steps = {int(file[name]) for file in files.values() for name in file if name.startswith("step/")}
    if state.is_sharded and len(steps) > 1:
        raise ValueError(
            f"{folder}: some parameters had no gradient in some steps (they were stepped {sorted(steps)} times), which "
            "learner.zero_stage=0 alone keeps apart; resume with it"
        )


def _expected(state: OptimizerState, buffers: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Name and description of every tensor of the model."""
    for name, shape in state.shapes.items():
        yield from ((f"{number}/{name}", _described(torch.float32, shape)) for number in NUMBERS)
        yield f"step/{name}", _described(torch.int64, ())
    yield from ((f"buffer/{name}", _described(buffer.dtype, buffer.shape)) for name, buffer in buffers.items())


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05}.safetensors"


def _load(path: Path) -> dict[str, Tensor]:
    """Its tensors, mapped: bytes are read where they are used."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; resume from another checkpoint")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; resume from another checkpoint") from error


def _summary(progress: Progress, num_ranks: int) -> str:
    probe = progress.initial_probe
    logprobs = probe and [values.tolist() for values in probe.logprobs]
    values = {
        "policy_version": progress.policy_version,
        "num_ranks": num_ranks,
        "agreement": progress.agreement,
        "initial_probe": probe and {"token_ids": probe.token_ids, "logprobs": logprobs},
    }
    return json.dumps(values, allow_nan=False)


def _read_summary(path: Path) -> tuple[Progress, int]:
    """What it says, and the number of ranks that wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    probe = values["initial_probe"]
    if probe is not None:
        logprobs = [np.array(row, dtype=np.float32) for row in probe["logprobs"]]
        probe = Probe(token_ids=probe["token_ids"], logprobs=logprobs)
    allowed, is_calibrated, total, count = values["agreement"]
    progress = Progress(
        policy_version=values["policy_version"],
        initial_probe=probe,
        agreement=(allowed, is_calibrated, total, count),
    )
    return progress, values["num_ranks"]
