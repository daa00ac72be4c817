"""Publishing: the learner's weights as a manifest and plain byte arrays, with a probe to check them by."""

import numpy as np
import torch

from actors.weights import Probe, WeightManifest, as_bytes, checksum
from learner.engine import LearnerEngine
from learner.policy import causal_logprobs


@torch.no_grad()
def publish(
    engine: LearnerEngine, *, policy_version: int, probe_ids: list[list[int]], rank: int
) -> tuple[WeightManifest, list[np.ndarray]] | tuple[None, None]:
    """Copies of all parameters in checkpoint order, and the learner's log-probs of the probe texts under them.

    A tied head is the embedding under another name and is not sent twice. Every rank must call it, because ZeRO-3
    gathers; rank 0 alone copies and returns the weights, the others return nothing.
    """
    policy = engine.policy.eval()
    probe = Probe(
        token_ids=probe_ids,
        logprobs=[causal_logprobs(policy, torch.tensor(ids, device=engine.device)).cpu().numpy() for ids in probe_ids],
    )
    policy.train()
    names, dtypes, shapes, buffers = [], [], [], []
    for name, parameter in policy.causal_lm.named_parameters():
        with engine.gathered([parameter]):
            if rank == 0:
                names.append(name)
                dtypes.append(str(parameter.dtype).removeprefix("torch."))
                shapes.append(tuple(parameter.shape))
                buffers.append(as_bytes(parameter).copy())
    if rank != 0:
        return None, None
    manifest = WeightManifest(
        policy_version=policy_version,
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        checksums=[checksum(buffer) for buffer in buffers],
        probe=probe,
    )
    return manifest, buffers
