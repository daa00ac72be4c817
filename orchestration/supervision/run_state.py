"""What the driver knows of a run, as a checkpoint keeps it: beside the learner's state, all that it takes to go on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from actors.rollout import Document
from feature_server.scored_rollout import ScoredRollout
from learner.batch import Example
from orchestration.buffer.buffer_state import BufferState
from orchestration.checkpoint.codec import load_objects, save_objects
from orchestration.evaluation.evaluation import Evaluation

STATE, ROLLOUTS = "run.safetensors", "rollouts.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Between two steps."""

    buffer: BufferState
    position: int
    """Documents taken from the data, since the start."""
    data_digest: str
    config: str
    """As JSON."""
    events_bytes: int
    """Of events.jsonl that were written by then."""
    metrics_bytes: int
    elapsed_s: float
    """Time that the run has taken, all its jobs together."""
    whitening_moment: Tensor | None
    first_evaluation: Evaluation | None
    """With which the last one is compared."""
    evaluated_step: int
    """Of the last evaluation; -1 before the first."""
    wandb_id: str


def write_run_state(folder: Path, state: RunState, payloads: Sequence[Example]) -> None:
    """`payloads`: what the tickets of the buffer brought, as `RolloutBuffer.state`. Raises: OSError."""
    save_objects(folder / STATE, [state])
    save_objects(folder / ROLLOUTS, payloads)


def read_run_state(folder: Path, *, samples: bool) -> tuple[RunState, Sequence[Example]]:
    """`samples`: the run trains on scored rollouts, rather than on documents.

    Raises: ValueError naming the file that is damaged or of another version.
    """
    return _read_state(folder), _read_payloads(folder, samples=samples)


@dataclass(frozen=True, slots=True)
class Resumed:
    """A checkpoint that was read."""

    checkpoint: Path
    state: RunState
    payloads: Sequence[Example]


def read_checkpoint(checkpoint: Path) -> Resumed:
    """Raises: ValueError as `read_run_state`."""
    state = _read_state(checkpoint)
    samples = json.loads(state.config)["learner"]["objective"] != "sft"
    return Resumed(checkpoint, state, _read_payloads(checkpoint, samples=samples))


def _read_state(folder: Path) -> RunState:
    (state,) = load_objects(folder / STATE, RunState)
    return state


def _read_payloads(folder: Path, *, samples: bool) -> Sequence[Example]:
    return load_objects(folder / ROLLOUTS, ScoredRollout) if samples else load_objects(folder / ROLLOUTS, Document)
