"""What the driver knows of a run, to a file and back: equal in every field and every bit."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arrivals import finish
from run_states import make_buffer, run_state
from torch import Tensor

from actors.data.documents import DocumentStream
from actors.rollout import Document, Rollout
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout
from learner.batch import Example
from orchestration.buffer.buffer_state import BufferState
from orchestration.buffer.event_log import as_logged
from orchestration.buffer.lag_rule import LAG_RULES
from orchestration.buffer.reuse import ReusePool
from orchestration.buffer.rollout_buffer import RolloutBuffer
from orchestration.config import RunConfig
from orchestration.evaluation.evaluation import Evaluation
from orchestration.supervision.run_state import ROLLOUTS, STATE, RunState, read_run_state, write_run_state

MakeDocument = Callable[[int], Document]
MakeRollout = Callable[..., Rollout]


def same(one: Any, other: Any) -> bool:
    """Equal in type and in every bit."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return one == other or (one != one and other != other)


@dataclass
class Played:
    """A buffer in the midst of its work."""

    state: BufferState
    payloads: list[Document]


def played(documents: Sequence[Document], lag_rule: str) -> Played:
    """Two steps; a worker failed, a document was set aside, some arrived, some are out, some came back."""
    pool = ReusePool(documents_per_step=4, max_uses=2, max_reuse_lag=None, order="fifo", seed=0)
    buffer: RolloutBuffer[Document] = RolloutBuffer(
        DocumentStream(documents, seed=3).take,
        pool=pool,
        num_steps=9,
        lag_rule=lag_rule,
        max_lag=2,
        prefetch_steps=2,
        completions_per_context=3,
        seed=5,
        record=lambda row: None,
    )

    async def arrive(count: int) -> None:
        for _ in range(count):
            (ticket,) = await buffer.claim(1)
            await finish(buffer, ticket, ticket.document, version=buffer.state()[0].step)

    async def scenario() -> Played:
        for _ in range(3):
            (ticket,) = await buffer.claim(1)
            await buffer.give_back([ticket], error="died")
        await arrive(5)
        for version in (1, 2):
            await buffer.take()
            await buffer.advance(version)
            await arrive(2)
        await buffer.give_back(await buffer.claim(1), error="died")
        assert await buffer.claim(1)
        return Played(*buffer.state())

    return asyncio.run(scenario())


def evaluation(make_rollout: MakeRollout) -> Evaluation:
    rollouts = [
        make_rollout(num_tokens=12, anchors=[2, 5], lengths=[[4, 1], [3, 4]], horizon=4, seed=seed) for seed in (1, 2)
    ]
    return Evaluation(
        policy_version=3,
        cross_entropy=np.array([1 / 3, math.inf]),
        cfm_loss=np.array([-0.0, math.nan]),
        rollouts=rollouts,
        seconds=0.1,
    )


def scored(make_rollout: MakeRollout, seed: int) -> ScoredRollout:
    rollout = make_rollout(num_tokens=12, anchors=[2, 5], lengths=[[4, 1, 2], [3, 4, 1]], horizon=4, seed=seed)
    rollout = replace(rollout, sample_s=1.25, weight_steps=((0, 3), (17, 4)))
    features = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    statistics = gram_statistics(features, features[:, 0])
    verified = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    return ScoredRollout(rollout=rollout, raw=statistics, whitened=statistics, verified=verified, score_s=0.5)


def written_and_read(
    folder: Path, state: RunState, payloads: Sequence[Example], *, samples: bool
) -> tuple[RunState, Sequence[Example]]:
    write_run_state(folder, state, payloads)
    return read_run_state(folder, samples=samples)


@pytest.mark.parametrize("lag_rule", sorted(LAG_RULES))
def test_a_run_in_the_midst_of_its_work_comes_back(
    lag_rule: str, tmp_path: Path, make_document: MakeDocument, make_rollout: MakeRollout
) -> None:
    found = played([make_document(index) for index in range(12)], lag_rule)
    buffer = found.state
    told = [buffer.set_aside, buffer.failures, buffer.requests, buffer.arrived, buffer.pool]
    assert all(told) and buffer.num_failed and len(buffer.all_arrived) == len(found.payloads), "nothing to lose"
    config = json.dumps(as_logged(RunConfig.model_validate({"learner": {"max_importance_weight": math.inf}})))
    state = replace(run_state(buffer, config=config), first_evaluation=evaluation(make_rollout), evaluated_step=2)
    payloads = [scored(make_rollout, seed) for seed in range(len(found.payloads))]
    assert same(written_and_read(tmp_path, state, payloads, samples=True), (state, payloads))


def test_a_run_without_rollouts_comes_back(tmp_path: Path, make_document: MakeDocument) -> None:
    found = played([make_document(index) for index in range(12)], "in_order")
    state = run_state(found.state)
    assert same(written_and_read(tmp_path, state, found.payloads, samples=False), (state, found.payloads))


@pytest.mark.parametrize("samples", [False, True])
def test_a_run_at_its_start_comes_back(samples: bool, tmp_path: Path, make_document: MakeDocument) -> None:
    state = replace(run_state(make_buffer([make_document(0)]).state()[0]), whitening_moment=None)
    assert same(written_and_read(tmp_path, state, [], samples=samples), (state, []))


@pytest.mark.parametrize("name", [field.name for field in fields(RunState)])
def test_control_another_value_of_any_field_is_seen(
    name: str, tmp_path: Path, make_document: MakeDocument, make_rollout: MakeRollout
) -> None:
    state = replace(run_state(make_buffer([make_document(0)]).state()[0]), first_evaluation=evaluation(make_rollout))
    others = {
        "buffer": replace(state.buffer, num_claimed=state.buffer.num_claimed + 1),
        "whitening_moment": state.whitening_moment + torch.eye(2, 3) * 1e-6,
        "first_evaluation": replace(state.first_evaluation, cfm_loss=np.array([0.0, math.nan])),
        "elapsed_s": math.nextafter(state.elapsed_s, 1),
    }
    value = getattr(state, name)
    other = others[name] if name in others else value + (1 if isinstance(value, int) else " ")
    assert not same(written_and_read(tmp_path, replace(state, **{name: other}), [], samples=True)[0], state)


def test_damage_is_refused_by_file(tmp_path: Path, make_document: MakeDocument) -> None:
    documents = [make_document(index) for index in range(3)]
    write_run_state(tmp_path, run_state(make_buffer(documents).state()[0]), documents)
    with pytest.raises(ValueError, match=rf"{ROLLOUTS}: it holds Document, not ScoredRollout"):
        read_run_state(tmp_path, samples=True)
    for name in (STATE, ROLLOUTS):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name}: .*it is damaged, or of another version"):
            read_run_state(tmp_path, samples=False)
        (tmp_path / name).write_bytes(whole)
    read_run_state(tmp_path, samples=False)
