"""How new weights enter a running vLLM engine, and how that is verified.

The receiver owns the contract: a `WeightManifest` says what was published and a list of byte arrays holds it, one array
per tensor in the manifest's order. A worker verifies the checksums before the engine sees a byte, loads all tensors
between two engine steps, drops all keys and values of the old weights, and compares the engine's log-probabilities on
fixed probe texts with those the learner computed from the same weights. Rollouts leave it only if the two agree.
"""

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from jaxtyping import Float32


class WeightMismatchError(RuntimeError):
    """The weights that arrived, or that the engine computes with, are not those that were published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Fixed texts and the learner's log-probs of them: proof that engine and learner hold the same weights."""

    token_ids: list[list[int]]
    """The probe texts."""
    logprobs: list[Float32[np.ndarray, " _token"]]
    """Nats at temperature 1: the learner's log-probability of tokens 1..T-1 of each text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeError:
    """How far engine and learner disagree on the probe texts, or how far they may."""

    largest: float
    """Largest difference of a token's log-probability [nats]."""
    mean: float
    """Mean absolute difference over all tokens [nats]."""

    def __str__(self) -> str:
        return f"{self.largest:.3g} nats at most and {self.mean:.3g} nats in the mean"

    def is_within(self, allowed: "ProbeError") -> bool:
        """Whether both are allowed; what is not a number never is."""
        return self.largest <= allowed.largest and self.mean <= allowed.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What the learner published: metadata only, small enough for the controller to hold."""

    policy_version: int
    """Optimizer steps behind these weights; 0 = the initial model."""
    names: list[str]
    """Parameter names as in a Hugging Face checkpoint; a tied head is not sent twice."""
    dtypes: list[str]
    """torch dtypes, such as `float32`."""
    shapes: list[tuple[int, ...]]
    """Shapes, in the order of names."""
    checksums: list[str]
    """xxh3 of each tensor's bytes."""
    probe: Probe
    """Probe texts and the learner's log-probabilities of them under these weights."""
    initial_probe: Probe | None = None
    """The probe of version 0, by which an engine is judged that has only read the model's files; None if unknown."""

    @property
    def digest(self) -> str:
        """One checksum of all tensors: equal digests, equal weights."""
        return checksum(np.frombuffer("".join(self.checksums).encode(), dtype=np.uint8))

    @property
    def num_bytes(self) -> int:
        """Size of the published tensors [bytes]."""
        sizes = [getattr(torch, d).itemsize * int(np.prod(s)) for d, s in zip(self.dtypes, self.shapes, strict=True)]
        return sum(sizes)


def checksum(buffer: np.ndarray) -> str:
    """xxh3-128 of a contiguous byte array, as hexadecimal text."""
    return xxhash.xxh3_128_hexdigest(buffer.data)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values as flat uint8 where they are (any dtype, bfloat16 too); a view if they are contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """`flat_bytes` as an array on the CPU."""
    return flat_bytes(tensor).cpu().numpy()


def verified_tensors(manifest: WeightManifest, buffers: list[np.ndarray]) -> list[tuple[str, torch.Tensor]]:
    """Named tensors after every checksum was compared: views of `buffers`, which must not change while these last.

    They are read-only: the memory may be another process's, or not writable.

    Raises: WeightMismatchError that names the tensor whose bytes are missing, of another size or changed.
    """
    if len(buffers) != len(manifest.names):
        arrived = {checksum(buffer) for buffer in buffers}
        missing = [name for name, sent in zip(manifest.names, manifest.checksums, strict=True) if sent not in arrived]
        raise WeightMismatchError(
            f"version {manifest.policy_version}: {len(manifest.names)} tensors were published, {len(buffers)} arrived; "
            f"missing: {', '.join(missing) or 'none'}"
        )
    tensors = []
    for name, dtype, shape, expected, buffer in zip(
        manifest.names, manifest.dtypes, manifest.shapes, manifest.checksums, buffers, strict=True
    ):
        found = checksum(buffer)
        if found != expected:
            raise WeightMismatchError(
                f"version {manifest.policy_version}: tensor {name!r} arrived with checksum {found}, published was "
                f"{expected}; its {buffer.size} bytes were changed or cut on the way"
            )
        # The only way in torch to wrap an array without a warning about read-only memory, which Ray hands out.
        tensors.append((name, torch.from_dlpack(buffer).view(getattr(torch, dtype)).reshape(shape)))
    return tensors


def probe_error(probe: Probe, engine_logprobs: list[np.ndarray]) -> ProbeError:
    """Absolute differences between the engine's and the learner's log-probabilities of the probe."""
    differences = np.concatenate(
        [np.abs(engine - learner) for engine, learner in zip(engine_logprobs, probe.logprobs, strict=True)]
    )
    return ProbeError(largest=float(differences.max()), mean=float(differences.mean()))  # unlike max(), NaN wins


def agreed_probe_error(
    manifest: WeightManifest, engine_logprobs: list[np.ndarray], *, allowed: ProbeError
) -> ProbeError:
    """`probe_error` of an engine that was given these weights.

    Raises: WeightMismatchError if it exceeds what is allowed, or is not a number.
    """
    error = probe_error(manifest.probe, engine_logprobs)
    if not error.is_within(allowed):
        raise WeightMismatchError(
            f"after loading version {manifest.policy_version} the engine's log-probs differ from the learner's by "
            f"{error} on the probe texts, allowed are {allowed} (calibrated at version 0, and at most "
            "rollout.probe_tolerance): the engine does not compute with the weights it was sent"
        )
    return error
