"""What only a CUDA device can show. Skipped, with the reason, where there is none."""

import json
from pathlib import Path

import pytest
import torch
from own_cluster import SMOKE, own_environment, run, run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]

SHARED_DEVICE = {"rollout": "0.4", "feature": "0.2", "learner": "0.4"}
"""Shares of one device: all three roles on it."""


@pytest.mark.parametrize(
    ("dtype", "attention", "transport", "tolerance"),
    [
        ("float32", "sdpa", "ipc", 1e-2),
        ("bfloat16", "sdpa", "object_store", 0.25),
        ("bfloat16", "flex_attention", "object_store", 0.25),
    ],
)
def test_all_roles_on_one_device(dtype: str, attention: str, transport: str, tolerance: float, tmp_path: Path) -> None:
    arguments = [SMOKE, "--logging.output-dir", str(tmp_path), "--logging.run-name", "gpu", "--model.dtype", dtype]
    arguments += ["--model.attention", attention]
    arguments += ["--rollout.probe-tolerance", str(tolerance), "--asynchrony.weight-transport", transport]
    for role, share in SHARED_DEVICE.items():
        arguments += [f"--placement.{role}.num-gpus", share]
    finished = run(run_command(*arguments), environment=own_environment(), timeout_s=600)
    assert finished.returncode == 0, finished.output
    rows = [json.loads(line) for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()]
    errors = [row["weights/probe_error"] for row in rows if "weights/probe_error" in row]
    assert len([row for row in rows if "time/step_s" in row]) == 3
    assert errors and max(errors) <= tolerance
