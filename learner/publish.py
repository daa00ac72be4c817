"""Publishing: the learner's weights in parts that travel, then a manifest with a probe to check them by."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from actors.weights.manifest import Probe, WeightManifest, checksum, flat_bytes
from actors.weights.parts import Part, in_parts
from actors.weights.transport import Transport
from learner.engine import LearnerEngine
from learner.policy import causal_logprobs


def publish(
    engine: LearnerEngine,
    *,
    policy_version: int,
    probe_ids: list[list[int]],
    rank: int,
    part_bytes: int,
    transport: Transport,
) -> Generator[Part, None, WeightManifest | None]:
    """All parameters in checkpoint order, shipped in parts of about `part_bytes`; returns their manifest.

    A tied head is the embedding under another name and is not sent twice. Every rank must go through the whole
    generator, because ZeRO-3 gathers; rank 0 alone yields weights and returns a manifest.
    """
    transport.start(policy_version)
    manifest = WeightManifest(
        policy_version=policy_version, names=[], dtypes=[], shapes=[], checksums=[], probe=_probe(engine, probe_ids)
    )
    for part in in_parts(_listed_tensors(engine, manifest, rank=rank), part_bytes=part_bytes):
        shipped, buffers = transport.ship(part)
        manifest.checksums.extend(checksum(buffer) for buffer in buffers)
        yield shipped
    return manifest if rank == 0 else None


def _listed_tensors(engine: LearnerEngine, manifest: WeightManifest, *, rank: int) -> Iterator[Tensor]:
    """On rank 0 all parameters as flat bytes, each added to the manifest, but for its checksum, as it is reached."""
    for name, parameter in engine.policy.causal_lm.named_parameters():
        with engine.gathered([parameter]), torch.no_grad():
            if rank == 0:
                manifest.names.append(name)
                manifest.dtypes.append(str(parameter.dtype).removeprefix("torch."))
                manifest.shapes.append(tuple(parameter.shape))
                flat = flat_bytes(parameter)
                yield flat.clone() if engine.shards_parameters else flat  # ZeRO-3 frees what it gathered


@torch.no_grad()
def _probe(engine: LearnerEngine, probe_ids: list[list[int]]) -> Probe:
    """All texts in one forward: where they are short it costs what it takes to read the weights, once."""
    policy = engine.policy.eval()
    rows = pad_sequence([torch.tensor(ids) for ids in probe_ids], batch_first=True).to(engine.device)
    logprobs = causal_logprobs(policy, rows).cpu().numpy()
    policy.train()
    return Probe(
        token_ids=probe_ids,
        logprobs=[row[: len(ids) - 1].copy() for row, ids in zip(logprobs, probe_ids, strict=True)],
    )
