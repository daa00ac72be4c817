"""Which combinations of lag and reuse are refused, and the bound they promise."""

from typing import get_args

import pytest
from pydantic import ValidationError

from orchestration.asynchrony_config import AsynchronyConfig
from orchestration.buffer.lag_rule import LAG_RULES
from orchestration.config import RunConfig


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mode": "exact", "lag_rule": "drop"}, ["lag_rule='drop'", "mode='bounded'", "'exact'"]),
        ({"max_lag": 2, "prefetch_steps": 1}, ["prefetch_steps=1", "max_lag=2", "set max_lag alone"]),
        ({"mode": "exact", "max_lag": 2, "prefetch_steps": 3}, ["prefetch_steps=3", "max_lag=2"]),
        (
            {"lag_rule": "wait", "max_lag": 1, "prefetch_steps": 3},
            ["prefetch_steps=3", "max_lag=1", "4 steps", "2 can be trained"],
        ),
        ({"lag_rule": "drop", "max_lag": 0, "prefetch_steps": 1}, ["prefetch_steps=1", "max_lag=0"]),
        ({"max_reuse_lag": 3}, ["max_reuse_lag=3", "max_uses=1"]),
        ({"reuse_order": "uniform"}, ["reuse_order='uniform'", "max_uses=1"]),
        ({"max_uses": 2, "reuse_order": "uniform"}, ["needs max_reuse_lag", "max_reuse_lag=5"]),
        ({"mode": "exact", "max_uses": 3, "max_reuse_lag": 2}, ["max_reuse_lag=2", "max_lag + max_uses - 1 = 3"]),
        ({"mode": "exact", "max_uses": 2, "max_reuse_lag": 9, "reuse_order": "uniform"}, ["'uniform'", "not exact"]),
        ({"weight_transport": "files"}, ["weight_transport='files'", "weight_folder=None", "set both"]),
        ({"weight_folder": "w"}, ["weight_transport='object_store'", "weight_folder='w'", "leave out both"]),
        ({"weight_transport": "ipc", "weight_folder": "w"}, ["weight_transport='ipc'", "weight_folder='w'"]),
        ({"weight_transport": "rdma"}, ["weight_transport", "object_store", "nccl"]),
        ({"max_uses": 0}, ["max_uses"]),
        ({"max_lag": -1}, ["max_lag"]),
    ],
)
def test_inconsistent_settings_are_refused_with_the_numbers(settings: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        AsynchronyConfig(**settings)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 1),
        ({"max_lag": 0}, 0),
        ({"mode": "exact", "max_lag": 3}, 3),
        ({"mode": "free", "max_lag": 3}, None),
        ({"max_lag": 2, "max_uses": 4}, 5),
        ({"max_lag": 2, "max_uses": 4, "max_reuse_lag": 3}, 3),
        ({"max_lag": 4, "max_uses": 2, "max_reuse_lag": 1}, 4),
        ({"max_lag": 1, "max_uses": 2, "max_reuse_lag": 8, "reuse_order": "uniform"}, 8),
    ],
)
def test_bound_on_the_lag_of_any_use(settings: dict[str, object], bound: int | None) -> None:
    assert AsynchronyConfig(**settings).lag_bound == bound


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (
            {"asynchrony": {"max_uses": 3}, "learner": {"documents_per_step": 8}},
            ["learner.documents_per_step=8", "asynchrony.max_uses=3"],
        ),
        (
            {"asynchrony": {"max_uses": 2}, "learner": {"objective": "sft"}},
            ["asynchrony.max_uses=2", "learner.objective='sft'"],
        ),
    ],
)
def test_reuse_must_suit_the_learner(sections: dict[str, dict[str, object]], parts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(sections)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("transport", "placement", "parts"),
    [
        ("nccl", {}, ["'nccl' connects GPUs", "learner.num_gpus=0", "rollout.num_gpus=0", "'gloo'"]),
        ("nccl", {"learner": {"num_gpus": 1}}, ["learner.num_gpus=1", "rollout.num_gpus=0"]),
        ("ipc", {"learner": {"num_gpus": 0.5}}, ["'ipc'", "one device", "learner.num_gpus=0.5", "rollout.num_gpus=0"]),
        ("ipc", {"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}, ["shares that add up to at most 1"]),
        ("gloo", {"one_process": True}, ["'gloo' connects processes", "one_process=True"]),
        ("ipc", {"one_process": True}, ["'ipc' connects processes", "one_process=True"]),
    ],
)
def test_weights_must_be_able_to_reach_workers(transport: str, placement: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"asynchrony": {"weight_transport": transport}, "placement": placement})
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("transport", "placement"),
    [
        ("ipc", {}),
        ("gloo", {}),
        ("gloo", {"learner": {"num_gpus": 1}}),
        ("ipc", {"learner": {"num_gpus": 0.4}, "rollout": {"num_gpus": 0.6}}),
        ("nccl", {"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}),
    ],
)
def test_transports_that_reach_the_workers_are_accepted(transport: str, placement: dict[str, object]) -> None:
    RunConfig.model_validate({"asynchrony": {"weight_transport": transport}, "placement": placement})


def test_every_mode_and_lag_rule_has_its_function() -> None:
    """`bounded` alone is no rule: `lag_rule` chooses one."""
    modes, rules = (get_args(AsynchronyConfig.model_fields[name].annotation) for name in ("mode", "lag_rule"))
    assert {*modes, *rules} - {"bounded"} == set(LAG_RULES)
