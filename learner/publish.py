"""Publishing: the learner's weights as a manifest and plain byte arrays, with a probe to check them by."""

import numpy as np
import torch

from actors.weights import Probe, WeightManifest, as_bytes, checksum
from learner.engine import LearnerEngine
from learner.policy import causal_logprobs


@torch.no_grad()
def publish(
    engine: LearnerEngine, *, policy_version: int, probe_ids: list[list[int]]
) -> tuple[WeightManifest, list[np.ndarray]]:
    """Copies of all parameters in checkpoint order, and the learner's log-probs of the probe texts under them.

    A tied head is the embedding under another name and is not sent twice. Every rank must call it (ZeRO-3 gathers).
    """
    policy = engine.policy.eval()
    probe = Probe(
        token_ids=probe_ids,
        logprobs=[causal_logprobs(policy, torch.tensor(ids, device=engine.device)).cpu().numpy() for ids in probe_ids],
    )
    policy.train()
    names, tensors, buffers = [], [], []
    for name, parameter in policy.causal_lm.named_parameters():
        with engine.gathered([parameter]):
            names.append(name)
            tensors.append((str(parameter.dtype).removeprefix("torch."), tuple(parameter.shape)))
            buffers.append(as_bytes(parameter).copy())
    manifest = WeightManifest(
        policy_version=policy_version,
        names=names,
        dtypes=[dtype for dtype, _ in tensors],
        shapes=[shape for _, shape in tensors],
        checksums=[checksum(buffer) for buffer in buffers],
        probe=probe,
    )
    return manifest, buffers
