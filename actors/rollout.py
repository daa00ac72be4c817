"""What travels from a rollout worker to everybody downstream.

Every message is frozen, carries the policy version that produced it, and is checked once, where it is made.
Token ids and log-probabilities are numpy arrays, so that Ray's object store moves them without a copy.
"""

from dataclasses import dataclass, field, replace

import numpy as np

WeightSteps = tuple[tuple[int, int], ...]
"""(engine step, policy version) of all weights that a request saw, in order: those it began with, at step 0, and those
that came in before a later step (rollout.in_flight_updates = keep). With them a request can be done again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One tokenised ground-truth document and the places in it where completions start."""

    document_id: str
    """Stable name of the document: the same in every epoch and every run."""
    token_ids: np.ndarray
    """[P] int64. The context and the ground truth together."""
    anchors: np.ndarray
    """[B] int64, ascending. Group k continues what precedes anchors[k] (`context_ids`)."""
    horizon: int
    """G: most tokens a completion may have, and of the ground truth (`ground_truth_ids`)."""
    ends_with_eos: bool
    """True: a completion is whole when it samples EOS. False: it always has exactly G tokens."""
    num_prompt_tokens: int = 0
    """Leading tokens that carry no cross-entropy (the prompt of a prompt-completion pair)."""
    text_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    """[texts] int64, ascending from 0: starts of the texts, which do not see each other. [0]: all tokens are one."""
    answer: str | None = None
    """What a verifier is told: the expected answer or a program of tests; None: the ground truth's text."""

    def __post_init__(self) -> None:
        if self.text_starts[0] != 0 or (np.diff(self.text_starts, append=len(self.token_ids)) < 1).any():
            raise ValueError(
                f"document {self.document_id!r}: text_starts must ascend from 0 within its {len(self.token_ids)} "
                f"tokens, got {self.text_starts.tolist()}"
            )
        if len(self.anchors) == 0:
            return
        if self.anchors[0] < 1 or self.anchors[-1] >= len(self.token_ids):
            raise ValueError(
                f"document {self.document_id!r}: anchors must lie in [1, {len(self.token_ids) - 1}], got "
                f"{int(self.anchors[0])}..{int(self.anchors[-1])}; a context needs a token and so does its ground truth"
            )
        if self.horizon < 1:
            raise ValueError(f"document {self.document_id!r}: horizon must be at least 1 token, got {self.horizon}")
        if np.isin(self.anchors, self.text_starts).any():
            raise ValueError(
                f"document {self.document_id!r}: no anchor may be one of text_starts={self.text_starts.tolist()}, got "
                f"anchors {self.anchors.tolist()}: a text's first token has no context; leave such blocks out"
            )

    @property
    def context_starts(self) -> np.ndarray:
        """[B] int64. Where the text of each context starts; 0 for all when the document is one text."""
        return self.text_starts[np.searchsorted(self.text_starts, self.anchors, side="right") - 1]

    def context_ids(self, group: int) -> np.ndarray:
        """[C] int64. What group k continues: the tokens of its text before its anchor."""
        return self.token_ids[self.context_starts[group] : self.anchors[group]]

    def ground_truth_ids(self, group: int) -> np.ndarray:
        """[at most G] int64. What group k is compared with; the end of the document may cut it."""
        return self.token_ids[self.anchors[group] : self.anchors[group] + self.horizon]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Leave to sample one document. Tickets are numbered in the order in which they will be trained on."""

    ticket_id: int
    """Position in the run: ticket i is trained on in learner step i // documents_per_step."""
    document: Document
    seed: int
    """Makes the rollout a function of (weights, ticket): the same seed redoes the same completions."""
    completions_per_context: int
    """n: completions of each anchor."""
    min_policy_version: int
    """Oldest weights [learner steps] that may sample it, so that its lag stays within max_lag."""
    max_policy_version: int | None = None
    """Newest weights [learner steps] that may begin to sample it; None: any."""
    weight_steps: WeightSteps = ()
    """In a replay: the weights that its request has to see, all of its tickets the same. Empty: what comes in."""

    def allows(self, policy_version: int) -> bool:
        """Whether weights of this version may sample it."""
        newest = policy_version if self.max_policy_version is None else self.max_policy_version
        return self.min_policy_version <= policy_version <= newest

    def require_allowed(self, policy_version: int) -> None:
        """Raises: RuntimeError if a worker's weights are too old or too new to sample it."""
        if self.allows(policy_version):
            return
        needed, remedy = f"{self.min_policy_version} or newer", "the newest weights"
        if policy_version >= self.min_policy_version:
            needed, remedy = f"{self.max_policy_version} or older", "these weights"
        raise RuntimeError(
            f"ticket {self.ticket_id} needs weights of version {needed}, this worker has {policy_version}; send it "
            f"{remedy} first"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSummary:
    """What the controller sees of a rollout; the rollout itself travels by reference."""

    ticket_id: int
    min_policy_version: int
    """Oldest weights [learner steps] that sampled a token of it."""
    max_policy_version: int
    """Newest weights that sampled a token of it."""
    num_completion_tokens: int
    sample_s: float
    weight_steps: WeightSteps = ()
    """As `Rollout.weight_steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """n completions for each anchor of one document, as the behavior policy sampled them."""

    ticket_id: int
    document: Document
    completion_ids: np.ndarray
    """[B, n, G] int64. Positions from completion_lengths on hold 0 and mean nothing."""
    completion_lengths: np.ndarray
    """[B, n] int64, 1..G. Counts the EOS token when there is one."""
    behavior_logprobs: np.ndarray
    """[B, n, G] float32, nats, after the sampling temperature; 0 past the completion's length."""
    token_versions: np.ndarray
    """[B, n, G] int64. Weights [learner steps] that sampled each token; 0 past the completion's length."""
    sample_s: float = 0.0
    """Time of the engine for this document [s]."""
    weight_steps: WeightSteps = ()
    """What its request saw, whether it sampled a token of this document or not; empty where there was no engine."""

    def __post_init__(self) -> None:
        if self.behavior_logprobs is None or not np.issubdtype(self.behavior_logprobs.dtype, np.floating):
            raise ValueError(
                f"ticket {self.ticket_id}: every sampled token needs its behavior log-prob, got none (or no number) of "
                "them; the engine must be asked for log-probs"
            )
        shape = self.completion_ids.shape
        arrays = (self.behavior_logprobs, self.token_versions)
        if any(array.shape != shape for array in arrays) or self.completion_lengths.shape != shape[:2]:
            raise ValueError(
                f"ticket {self.ticket_id}: completion_ids {shape}, behavior_logprobs {self.behavior_logprobs.shape}, "
                f"token_versions {self.token_versions.shape} and completion_lengths {self.completion_lengths.shape} do "
                "not belong together"
            )
        lengths = self.completion_lengths
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= shape[2]:
            raise ValueError(
                f"ticket {self.ticket_id}: completions must have 1 to {shape[2]} tokens (horizon), got "
                f"{int(lengths.min())} to {int(lengths.max())}; an empty one has neither log-prob nor feature"
            )
        if (self.token_versions < 0).any():
            raise ValueError(
                f"ticket {self.ticket_id}: token_versions must be 0 or more, got {int(self.token_versions.min())}; "
                "they count the learner steps behind the weights that sampled a token"
            )
        if not np.isfinite(self.behavior_logprobs).all() or (self.behavior_logprobs > 0).any():
            raise ValueError(
                f"ticket {self.ticket_id}: behavior log-probs must be finite and <= 0, got "
                f"[{self.behavior_logprobs.min()}, {self.behavior_logprobs.max()}]; the engine's weights may be broken"
            )

    @property
    def is_token(self) -> np.ndarray:
        """[B, n, G] bool. Positions before the completion's end."""
        return np.arange(self.completion_ids.shape[-1]) < self.completion_lengths[..., None]

    @property
    def completion_versions(self) -> np.ndarray:
        """[B, n] int64. Oldest weights [learner steps] that sampled a token of each completion."""
        newest = np.iinfo(np.int64).max
        return self.token_versions.min(-1, initial=newest, where=self.is_token)

    @property
    def min_policy_version(self) -> int:
        """Oldest weights [learner steps] that sampled a token of it; 0 without completions."""
        return int(self.completion_versions.min()) if self.completion_lengths.size else 0

    @property
    def max_policy_version(self) -> int:
        """Newest weights [learner steps] that sampled a token of it; 0 without completions."""
        return int(self.token_versions.max(initial=0, where=self.is_token))

    def summary(self) -> RolloutSummary:
        """The few numbers that the controller needs."""
        return RolloutSummary(
            ticket_id=self.ticket_id,
            min_policy_version=self.min_policy_version,
            max_policy_version=self.max_policy_version,
            num_completion_tokens=int(self.completion_lengths.sum()),
            sample_s=self.sample_s,
            weight_steps=self.weight_steps,
        )


def constant_versions(completion_lengths: np.ndarray, horizon: int, policy_version: int | np.ndarray) -> np.ndarray:
    """[B, n, G] `token_versions` of completions [B, n] that one version each sampled: one for all, or [B, n, 1]."""
    return np.where(np.arange(horizon) < completion_lengths[..., None], policy_version, 0).astype(np.int64)


def unsampled(document: Document) -> Rollout:
    """The document with no completion at all: what supervised fine-tuning trains on, and cross-entropy needs."""
    return Rollout(
        ticket_id=-1,
        document=replace(document, anchors=np.zeros(0, dtype=np.int64)),
        completion_ids=np.zeros((0, 0, document.horizon), dtype=np.int64),
        completion_lengths=np.zeros((0, 0), dtype=np.int64),
        behavior_logprobs=np.zeros((0, 0, document.horizon), dtype=np.float32),
        token_versions=np.zeros((0, 0, document.horizon), dtype=np.int64),
    )
