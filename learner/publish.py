"""Publishing: the learner's weights in parts that travel, then a manifest with a probe to check them by."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from actors.weight_parts import Part, in_parts, version_folder, write_part
from actors.weights import Probe, WeightManifest, as_bytes, checksum
from learner.engine import LearnerEngine
from learner.policy import causal_logprobs


def publish(
    engine: LearnerEngine,
    *,
    policy_version: int,
    probe_ids: list[list[int]],
    rank: int,
    part_bytes: int,
    folder: Path | None,
) -> Iterator[Part | WeightManifest | None]:
    """All parameters in checkpoint order, in parts of about `part_bytes`; then their manifest.

    Parts are views of the learner's memory, or, with a `folder`, files in it: whoever takes a part must have copied it
    before the next step. A tied head is the embedding under another name and is not sent twice. Every rank must go
    through the whole iterator, because ZeRO-3 gathers; rank 0 alone yields weights and manifest, the others one None.
    """
    probe = _probe(engine, probe_ids)
    names, dtypes, shapes, checksums = [], [], [], []

    def buffers() -> Iterator[np.ndarray]:
        for name, parameter in engine.policy.causal_lm.named_parameters():
            with engine.gathered([parameter]), torch.no_grad():
                if rank == 0:
                    # Outside of `gathered` ZeRO-3 frees what it gathered.
                    buffer = as_bytes(parameter).copy() if engine.shards_parameters else as_bytes(parameter)
                    names.append(name)
                    dtypes.append(str(parameter.dtype).removeprefix("torch."))
                    shapes.append(tuple(parameter.shape))
                    checksums.append(checksum(buffer))
                    yield buffer

    if folder is not None:
        folder = version_folder(folder, policy_version)
    for index, part in enumerate(in_parts(buffers(), part_bytes=part_bytes)):
        yield part if folder is None else write_part(part, folder / f"{index}.safetensors")
    yield (
        WeightManifest(
            policy_version=policy_version,
            names=names,
            dtypes=dtypes,
            shapes=shapes,
            checksums=checksums,
            probe=probe,
        )
        if rank == 0
        else None
    )


@torch.no_grad()
def _probe(engine: LearnerEngine, probe_ids: list[list[int]]) -> Probe:
    policy = engine.policy.eval()
    logprobs = [causal_logprobs(policy, torch.tensor(ids, device=engine.device)).cpu().numpy() for ids in probe_ids]
    policy.train()
    return Probe(token_ids=probe_ids, logprobs=logprobs)
