"""Messages from a rollout worker to everything downstream.

Every message is frozen, carries the policy version that produced it, and is checked once, where it is made.
Token ids and log-probabilities are numpy arrays, so that Ray's object store moves them without a copy.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int64

WeightSteps = tuple[tuple[int, int], ...]
"""(engine step, policy version) of all weights that a request saw, in order: those it began with, at step 0, and those
loaded before a later step (rollout.in_flight_updates = keep). They suffice to repeat a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One tokenised ground-truth document and the places in it where completions start."""

    document_id: str
    """Stable name of the document: the same in every epoch and every run."""
    token_ids: Int64[np.ndarray, " token"]
    """The context and the ground truth together."""
    anchors: Int64[np.ndarray, " group"]
    """Ascending. Group k continues what precedes anchors[k] (`context_ids`)."""
    horizon: int
    """G: most tokens a completion may have, and of the ground truth (`ground_truth_ids`)."""
    ends_with_eos: bool
    """True: a completion ends when it samples EOS. False: it always has exactly G tokens."""
    num_prompt_tokens: int = 0
    """Leading tokens that carry no cross-entropy (the prompt of a prompt-completion pair)."""
    text_starts: Int64[np.ndarray, " text"] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    """Ascending from 0: starts of the texts, which do not see each other. [0]: all tokens are one."""
    bos_positions: Int64[np.ndarray, " position"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Ascending: tokens that open a text (BOS). Nothing predicts them, and no ground truth holds one."""
    answer: str | None = None
    """What a verifier is given: the expected answer or a test program; None: the ground truth's text."""
    origin: str | None = None
    """The text that most of its tokens are of, or the prompt that it may share with others. None: it shares nothing."""
    prompt: str | None = None
    """The prompt as its source has it (one anchor); None: the context has no text but that of its tokens."""
    num_prompt_chars: int = 0
    """Characters of `prompt` that the context's tokens hold; the others open the ground truth, as tokens are whole."""

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
    def cluster(self) -> str:
        """Documents of one cluster resemble each other: what is measured on them is correlated."""
        return self.document_id if self.origin is None else self.origin

    @property
    def predicted_positions(self) -> Int64[np.ndarray, " position"]:
        """Tokens that carry cross-entropy: those after the prompt that the tokens before them in their text predict."""
        candidates = np.arange(self.num_prompt_tokens, len(self.token_ids))
        return np.setdiff1d(candidates, np.concatenate([self.text_starts, self.bos_positions]))

    @property
    def context_starts(self) -> Int64[np.ndarray, " group"]:
        """Where the text of each context starts; 0 for all when the document is one text."""
        return self.text_starts[np.searchsorted(self.text_starts, self.anchors, side="right") - 1]

    def context_ids(self, group: int) -> Int64[np.ndarray, " token"]:
        """What group k continues: the tokens of its text before its anchor."""
        return self.token_ids[self.context_starts[group] : self.anchors[group]]

    def ground_truth_ids(self, group: int) -> Int64[np.ndarray, " token"]:
        """What group k is compared with, at most `horizon` tokens; the end of the document may cut it."""
        return self.token_ids[self.anchors[group] : self.anchors[group] + self.horizon]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Permission to sample one document. Tickets are numbered in the order in which they are claimed."""

    ticket_id: int
    """Position among all tickets of the run, from 0; the lag rule decides which learner step trains on it."""
    document: Document
    seed: int
    """Makes the rollout a function of (weights, ticket): the same seed reproduces the same completions."""
    completions_per_context: int
    """n: completions of each anchor."""
    min_policy_version: int
    """Oldest weights [learner steps] that may sample it, so that its lag stays within max_lag."""
    max_policy_version: int | None = None
    """Newest weights [learner steps] that may begin to sample it; None: any."""
    weight_steps: WeightSteps = ()
    """In a replay: the weights that its request must see, the same for all its tickets. Empty: whatever arrives."""

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
class Completions:
    """Completions at the anchors of a document, whatever their source: all that a packed forward needs."""

    document: Document
    completion_ids: Int64[np.ndarray, "group completion token"]
    """Positions from completion_lengths on hold 0 and mean nothing."""
    completion_lengths: Int64[np.ndarray, "group completion"]
    """Tokens, 1..horizon. Counts the EOS token when there is one."""

    def __post_init__(self) -> None:
        shape, lengths = self.completion_ids.shape, self.completion_lengths
        if lengths.shape != shape[:2]:
            raise ValueError(
                f"document {self.document.document_id!r}: completion_ids {shape} and completion_lengths "
                f"{lengths.shape} have shapes that do not match"
            )
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= shape[2]:
            raise ValueError(
                f"document {self.document.document_id!r}: completions must have 1 to {shape[2]} tokens (horizon), got "
                f"{int(lengths.min())} to {int(lengths.max())}; an empty one has neither log-prob nor feature"
            )

    @property
    def is_token(self) -> Bool[np.ndarray, "group completion token"]:
        """Positions before the completion's end."""
        return np.arange(self.completion_ids.shape[-1]) < self.completion_lengths[..., None]


def ground_truth_completions(document: Document) -> Completions:
    """The ground truth of every anchor as its one completion."""
    texts = [document.ground_truth_ids(group) for group in range(len(document.anchors))]
    ids = np.zeros((len(texts), 1, document.horizon), dtype=np.int64)
    for group, text in enumerate(texts):
        ids[group, 0, : len(text)] = text
    lengths = np.array([[len(text)] for text in texts], dtype=np.int64)
    return Completions(document=document, completion_ids=ids, completion_lengths=lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Completions):
    """n completions for each anchor of one document, as the behavior policy sampled them."""

    ticket_id: int
    behavior_logprobs: Float32[np.ndarray, "group completion token"]
    """Nats, after the sampling temperature; 0 past the completion's length."""
    token_versions: Int64[np.ndarray, "group completion token"]
    """Weights [learner steps] that sampled each token; 0 past the completion's length."""
    sample_s: float = 0.0
    """Engine time for this document [s]."""
    weight_steps: WeightSteps = ()
    """What its request saw, whether it sampled a token of this document or not; empty where there was no engine."""

    def __post_init__(self) -> None:
        Completions.__post_init__(self)  # super() would look for the class as it was before it had slots
        if self.behavior_logprobs is None or not np.issubdtype(self.behavior_logprobs.dtype, np.floating):
            raise ValueError(
                f"ticket {self.ticket_id}: every sampled token needs its behavior log-prob, got none (or no number) of "
                "them; the engine must be asked for log-probs"
            )
        shape = self.completion_ids.shape
        if self.behavior_logprobs.shape != shape or self.token_versions.shape != shape:
            raise ValueError(
                f"ticket {self.ticket_id}: completion_ids {shape}, behavior_logprobs {self.behavior_logprobs.shape} "
                f"and token_versions {self.token_versions.shape} have shapes that do not match"
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
    def completion_versions(self) -> Int64[np.ndarray, "group completion"]:
        """Oldest weights [learner steps] that sampled a token of each completion."""
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
