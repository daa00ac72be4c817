"""Which checkpoint a run goes on from, and whether it may."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from orchestration.buffer.event_log import differing_keys, require_same_warmup
from orchestration.checkpoint.store import NAME, CheckpointStore
from orchestration.config import RunConfig
from orchestration.output.report import SUMMARY
from orchestration.output.run_folder import make_run_folder, run_folder
from orchestration.supervision.run_state import RunState

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the folder of a run."""

RESUME_MAY_DIFFER = (
    "resume",
    "replay",
    "chaos",
    "logging",
    "checkpoint",
    "recovery",
    "placement",
    "evaluation.every_steps",
    "learner.num_steps",
    "asynchrony.request_timeout_s",
    "asynchrony.weight_transport",
    "asynchrony.weight_folder",
)
"""Keys (or sections) with which a run may go on in another way than it began."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run writes, and what it goes on from."""

    folder: Path
    checkpoint: Path | None
    """None: it begins."""


def start_of(config: RunConfig) -> Start:
    """Find, or make, the folder of a run.

    Raises: OSError or FileExistsError as `make_run_folder`, the latter too if a run has ended there without a
    checkpoint; FileNotFoundError if there is nothing to resume from; ValueError if the checkpoint is not whole, which
    names the one before.
    """
    if config.resume is None:
        return Start(make_run_folder(config), None)
    if config.resume == "auto":
        return _automatic_start(config)
    folder = Path(config.resume).expanduser().absolute()
    if folder.parent.name == CHECKPOINTS and NAME.fullmatch(folder.name) and folder.is_dir():
        return _whole(Start(folder.parent.parent, folder))
    newest = CheckpointStore(folder / CHECKPOINTS, keep_last=1).newest() if (folder / CHECKPOINTS).is_dir() else None
    if newest is None:
        raise FileNotFoundError(
            f"resume={config.resume!r}: no checkpoint is there; give the folder of a run that has written one (in its "
            f"folder {CHECKPOINTS}), or one of them"
        )
    return _whole(Start(folder, newest))


def require_same_run(state: RunState, config: RunConfig, *, data_digest: str, checkpoint: Path) -> None:
    """Raises: ValueError naming every key that differs in a way that matters, another warm-up, or other data."""
    logged = json.loads(state.config)
    if differing := differing_keys(logged, config, may_differ=RESUME_MAY_DIFFER):
        raise ValueError(
            f"{checkpoint} is of another configuration: {'; '.join(differing)}; resume it with the "
            "config.toml of its run"
        )
    require_same_warmup(logged, config.learner)
    if data_digest != state.data_digest:
        raise ValueError(
            f"{checkpoint} was trained on other data: the digest of its training documents is {state.data_digest}, "
            f"that of data.source={config.data.source!r} is now {data_digest}; resume with the same data, or start anew"
        )
    if state.buffer.step > config.learner.num_steps:
        raise ValueError(
            f"{checkpoint} has done {state.buffer.step} steps, learner.num_steps={config.learner.num_steps}; raise it"
        )


def _automatic_start(config: RunConfig) -> Start:
    folder = run_folder(config)
    if not folder.exists():
        return Start(make_run_folder(config), None)
    newest = CheckpointStore(folder / CHECKPOINTS, keep_last=1).newest()
    if newest is None and (folder / SUMMARY).exists():
        raise FileExistsError(
            f"the run in {folder} has ended, without a checkpoint to go on from; choose another logging.run_name, so "
            "that its results are not overwritten"
        )
    if newest is None:
        logger.info("%s has no checkpoint yet: the run begins again", folder)
    return _whole(Start(folder, newest))


def _whole(start: Start) -> Start:
    if start.checkpoint is not None:
        CheckpointStore(start.folder / CHECKPOINTS, keep_last=1).require_whole(start.checkpoint)
    return start
