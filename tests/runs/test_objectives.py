"""Every objective, and the rarer settings together, as real runs of a few steps in one process."""

import json
from pathlib import Path

import pytest
from own_cluster import SMOKE
from whole_runs import few_texts, one_process_run, succeeded

from actors.models.pretrained import EMBEDDED_FOLDER

pytestmark = pytest.mark.engine

FEW = ["--learner.num-steps", "3", "--evaluation.documents", "2"]
TASK = ["orchestration/configs/rlvr.toml", *FEW, "--learner.documents-per-step", "16", "--data.task-size", "400"]
RARE = [
    *("--data.separate-texts", "True", "--data.document-tokens", "64"),
    *("--feature.pooled-moment", "document"),
    *("--feature.random-weights", "True", "--feature.pooling", "mean", "--rollout.temperature", "0.8"),
    *("--learner.correction", "m2po", "--learner.reward-weights", "self_normalised"),
    *("--learner.ess-learning-rate", "True", "--learner.cross-entropy-coef", "0.1"),
]
WARM = ["--model.policy", str(EMBEDDED_FOLDER), "--model.feature-model", "embedded"]
RUNS = {
    "rlvr": TASK,
    "self_likelihood": [SMOKE, *FEW, *WARM, "--learner.objective", "self_likelihood"],
    "sft": [SMOKE, *FEW, "--learner.objective", "sft"],
    "rare": [SMOKE, *FEW, *RARE],
}


def train(name: str, folder: Path) -> list[dict[str, float]]:
    """Metrics of the steps of a run that succeeded."""
    texts = () if name == "rlvr" else few_texts(folder)
    ended = succeeded(one_process_run(folder / name, *RUNS[name], *texts))
    assert "cfm_loss" in json.loads((ended.folder / "summary.json").read_text())
    steps = [row for row in ended.rows if "time/step_s" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    return steps


def test_a_verifiers_reward_is_a_fraction_of_correct_completions(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    for row in train("rlvr", tmp_path):
        assert 0 <= row["reward/total/mean"] <= 1
        assert "reward/alignment/mean" not in row and "reward/cfm_loss/mean" not in row, "no feature was computed"
        assert row["optim/grad_norm"] > 0


def test_ground_truth_that_earns_nothing_is_warned_of_before_the_first_step(tmp_path: Path) -> None:
    """The answer of a task is the problem for its scorer, which no completion equals."""
    pytest.importorskip("reasoning_gym")
    own_scorer = succeeded(one_process_run(tmp_path / "right", *TASK, "--learner.num-steps", "0"))
    assert "the ground truth of" not in own_scorer.finished.output
    text = succeeded(one_process_run(tmp_path / "wrong", *TASK, "--learner.num-steps", "0", "--verifier.name", "exact"))
    assert "the ground truth of 8 of 8 documents earns less than 1 from verifier.name='exact'" in text.finished.output


def test_self_likelihood_rewards_log_probs(tmp_path: Path) -> None:
    for row in train("self_likelihood", tmp_path):
        assert row["reward/total/mean"] < -1, "four tokens of a small model cost several nats"
        assert "reward/alignment/mean" not in row


def test_supervised_fine_tuning_samples_nothing(tmp_path: Path) -> None:
    for row in train("sft", tmp_path):
        assert not any(name.startswith(("rollout/", "reward/", "off_policy/", "lag/")) for name in row)
        assert row["loss/cross_entropy"] > 0 and row["optim/grad_norm"] > 0


def test_rare_settings_work_together(tmp_path: Path) -> None:
    steps = train("rare", tmp_path)
    for row in steps:
        assert 0 <= row["off_policy/masked_frac"] < 1 and 0 < row["off_policy/ess_frac"] <= 1
        assert row["reward/alignment/mean"] != 0 and row["optim/grad_norm"] > 0
    assert steps[-1]["lag/max"] == 1
