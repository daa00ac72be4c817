"""A version without tensors, as `WeightSync` and the fakes of a learner and its workers see it."""

from dataclasses import dataclass

from actors.weights.manifest import Probe, WeightManifest


@dataclass(frozen=True)
class FakePublication:
    """Nothing to send and nothing to free."""

    manifest: WeightManifest
    publish_s: float

    def discard(self) -> None:
        """It will not be requested any more."""


def fake_manifest(version: int, *digests: str) -> WeightManifest:
    """Of one tensor for each digest, which stands for its checksum."""
    return WeightManifest(
        policy_version=version,
        names=[f"tensor {index}" for index in range(len(digests))],
        dtypes=["float32"] * len(digests),
        shapes=[(1,)] * len(digests),
        checksums=list(digests),
        probe=Probe(token_ids=[], logprobs=[]),
    )
