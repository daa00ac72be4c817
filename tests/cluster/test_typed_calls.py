"""A type checker sees a wrong call to another process, though only a name and some arguments travel."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CALLS = """
from functools import partial

from actors.config import RolloutConfig
from actors.rollout import Document, Rollout, Ticket
from actors.weights.manifest import WeightManifest
from actors.worker import RolloutWorker
from feature_server.scored_rollout import ScoredRollout
from learner.worker import LearnerWorker
from orchestration.cluster.process_specs import ProcessSpec
from orchestration.cluster.remote import Reference, Remote, arriving
from orchestration.config import RoleConfig


async def calls(
    rank: Remote[LearnerWorker],
    worker: Remote[RolloutWorker],
    rollout: Reference[Rollout],
    scored: Reference[ScoredRollout],
    manifest: WeightManifest,
    documents: list[Document],
    tickets: list[Ticket],
) -> None:
    values: list[float] = await rank.call(LearnerWorker.cross_entropy, documents)
    number: int = await rank.call(LearnerWorker.cross_entropy, documents)  # wrong result
    await rank.call(LearnerWorker.cross_entropi, documents)  # wrong name
    await worker.call(LearnerWorker.cross_entropy, documents)  # wrong worker
    await rank.call(LearnerWorker.train_step, arriving(scored), lags=[1])
    await rank.call(LearnerWorker.train_step, arriving(rollout), lags=[1])  # wrong reference
    await rank.call(LearnerWorker.train_step, arriving(scored), lag=[1])  # wrong keyword
    await worker.call_concurrently(RolloutWorker.hold_weights, manifest)
    await worker.call_concurrently(RolloutWorker.hold_weights)  # argument missing
    rank.notify(LearnerWorker.discard_weights, 1)
    rank.notify(LearnerWorker.discard_weights, "1")  # wrong argument
    await rank.stream(LearnerWorker.publish, [[1]], 4096)
    await rank.stream(LearnerWorker.cross_entropy, documents)  # not a stream
    await worker.call_each(RolloutWorker.sample, tickets, Rollout.summary)
    await worker.call_each(RolloutWorker.sample, documents, Rollout.summary)  # wrong items
    await worker.call_each(RolloutWorker.sample, tickets, ScoredRollout.summary)  # wrong summary


def spec(role: RoleConfig, config: RolloutConfig) -> ProcessSpec[RolloutWorker]:
    right = partial(RolloutWorker, model="m", config=config, dtype="float32", max_tokens=8)
    wrong = partial(RolloutWorker, model="m", config=config, dtipe="float32", max_tokens=8)  # wrong keyword
    return ProcessSpec(name="rollout worker", role=role, build=right, environment={})


def incomplete(role: RoleConfig, config: RolloutConfig) -> ProcessSpec[RolloutWorker]:
    build = partial(RolloutWorker, model="m", config=config, dtype="float32")
    return ProcessSpec(name="rollout worker", role=role, build=build, environment={})  # argument missing
"""


def test_every_wrong_call_is_reported_and_no_other(tmp_path: Path) -> None:
    file, settings = tmp_path / "calls.py", tmp_path / "pyrefly.toml"
    file.write_text(CALLS)
    places = f'search-path = ["{ROOT}"]\npython-interpreter-path = "{sys.executable}"\n'
    settings.write_text(f'{places}preset = "strict"\n')  # as in pyproject.toml
    command = [
        Path(sys.executable).with_name("pyrefly"),
        "check",
        "--config",
        settings,
        "--output-format",
        "json",
        file,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    reported = {error["line"] for error in json.loads(result.stdout)["errors"]}
    wrong = {number for number, line in enumerate(CALLS.splitlines(), 1) if "  # " in line}
    assert reported == wrong, result.stdout
