"""Publishing: the learner's weights in parts that travel, then a manifest with a probe to check them by."""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from actors.weights.manifest import Probe, WeightManifest, checksum, flat_bytes
from actors.weights.parts import Part, in_parts
from actors.weights.transport import Transport
from learner.engine import LearnerEngine
from learner.policy import causal_logprobs, saved_buffers

if TYPE_CHECKING:  # heavy (8 s)
    from transformers import PreTrainedModel


def publish(
    engine: LearnerEngine,
    *,
    policy_version: int,
    probe_ids: list[list[int]],
    rank: int,
    part_bytes: int,
    transport: Transport,
    initial_probe: Probe | None = None,
) -> Generator[Part, None, WeightManifest | None]:
    """The whole model under the names of its checkpoint, in parts of about `part_bytes`; returns their manifest.

    A tied head is the embedding under another name and is not sent twice. `initial_probe`: of version 0, if this is
    another. Every rank must go through the whole generator, because ZeRO-3 gathers; rank 0 alone yields weights and
    returns a manifest.

    Raises: FloatingPointError naming a tensor that is not finite.
    """
    transport.start(policy_version)
    probe = _probe(engine, probe_ids)
    manifest = WeightManifest(
        policy_version=policy_version,
        names=[],
        dtypes=[],
        shapes=[],
        checksums=[],
        probe=probe,
        initial_probe=initial_probe or probe,
    )
    for part in in_parts(_listed_tensors(engine, manifest, rank=rank), part_bytes=part_bytes):
        shipped, buffers = transport.ship(part)
        manifest.checksums.extend(checksum(buffer) for buffer in buffers)
        yield shipped
    return manifest if rank == 0 else None


def _listed_tensors(engine: LearnerEngine, manifest: WeightManifest, *, rank: int) -> Iterator[Tensor]:
    """On rank 0 all tensors as flat bytes, each added to the manifest, but for its checksum, as it is reached."""
    for name, held in model_tensors(engine.policy.causal_lm):
        with engine.gathered([held]), torch.no_grad():
            if rank == 0:
                _require_finite(name, held, manifest.policy_version)
                for saved_name, tensor in checkpoint_tensors(engine.policy.causal_lm, name, held):
                    manifest.names.append(saved_name)
                    manifest.dtypes.append(str(tensor.dtype).removeprefix("torch."))
                    manifest.shapes.append(tuple(tensor.shape))
                    flat = flat_bytes(tensor)
                    yield flat.clone() if engine.shards_parameters else flat  # ZeRO-3 frees what it gathered


def _require_finite(name: str, tensor: Tensor, policy_version: int) -> None:
    """No worker is to load, and no checkpoint to hold, what an update has destroyed."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(
            f"{name} is not finite in version {policy_version}, which is not published; the newest version is the one "
            "before. Lower learner.learning_rate, or check the data"
        )


def model_tensors(causal_lm: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """Everything a checkpoint holds: parameters, and the buffers that are saved, such as a router's bias."""
    yield from causal_lm.named_parameters()
    yield from saved_buffers(causal_lm)


def checkpoint_tensors(causal_lm: "PreTrainedModel", name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor of the network under its names in the model's files.

    transformers keeps all experts of a layer in one parameter, and every file (and vLLM) each by itself.
    """
    from transformers.core_model_loading import revert_weight_conversion  # as save_pretrained does

    return list(revert_weight_conversion(causal_lm, {name: tensor}).items())


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
