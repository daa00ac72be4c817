"""VerifierServer: turns rollouts into rewards of whole completions, by their text.

Guarantee: what it returns depends on the rollout and the verifier alone, so a replica or a restarted server gives the
same answer, as far as the verifier does: a program near its time limit may pass once and not again.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actors.rollout import Completions, Document, Rollout, ground_truth_completions
from feature_server.config import VerifierConfig
from feature_server.scored_rollout import ScoredRollout, no_features
from feature_server.verifiers.verifiers import make_verifier

logger = logging.getLogger(__name__)

MAX_SHOWN_CHARS = 160
"""Of a text in a warning."""

CUT_SHORT = ("timeout", "memory", "forbidden", "crashed")
"""Ends of confined code that say nothing about its result: the limits may be at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierInput:
    """What a verifier is given for one completion."""

    prompt: str
    """As the source has it, wherever its tokens end; less of it where the completion does not go on with the rest."""
    completion: str
    """Without special tokens. Prompt and completion in one string are the text of their tokens in one sequence (as far
    as the tokenizer's decoding restores texts)."""
    answer: str


class VerifierServer:
    """One tokenizer, one verifier."""

    def __init__(self, *, model: str, config: VerifierConfig) -> None:
        """Load the tokenizer and make the verifier ready. Raises what `make_verifier` and `resolve_model` raise."""
        start = time.perf_counter()
        from actors.models.pretrained import load_tokenizer, resolve_model  # imports transformers: heavy

        imported = time.perf_counter()
        self._tokenizer = load_tokenizer(resolve_model(model))
        loaded = time.perf_counter()
        self._verifier = make_verifier(config)
        self._threads = ThreadPoolExecutor(config.processes, thread_name_prefix="verifier")
        self._warned = False
        self.startup_s = {
            "imports": imported - start,
            "tokenizer": loaded - imported,
            "verifier": time.perf_counter() - loaded,
        }

    @property
    def status_counts(self) -> Counter[str]:
        """Runs of confined code so far by how they ended; empty for verifiers that run none."""
        return Counter(self._verifier.status_counts)

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """The verifier's number for each completion of each rollout, in order; no features.

        Raises: what the verifier raises, see `make_verifier`.
        """
        scored = [self._score(rollout) for rollout in rollouts]
        self._warn_once()
        return scored

    def verify(self, written: Sequence[Completions]) -> list[Float64[Tensor, "group completion"]]:
        """As `score`, for completions from any source; returns the rewards alone."""
        verified = [self._verify(one) for one in written]
        self._warn_once()
        return verified

    def unearned(self, documents: Sequence[Document]) -> list[str]:
        """A line for each document whose own ground truth earns less than 1, the full reward of built-in verifiers."""
        return [line for document in documents if (line := self._unearned(document)) is not None]

    def _unearned(self, document: Document) -> str | None:
        ended_before = self.status_counts
        written = ground_truth_completions(document)
        rewards = self._verify(written).flatten()
        worst = int(rewards.argmin())
        if rewards[worst] >= 1:
            return None
        texts = verifier_inputs(written, self._tokenizer)[worst]
        told = ", ".join(f"{name} {_shortened(getattr(texts, name))}" for name in ("prompt", "completion", "answer"))
        ends = ", ".join(self.status_counts - ended_before)
        return f"{document.document_id} earned {rewards[worst]:g}{f' ({ends})' if ends else ''}: {told}"

    def _score(self, rollout: Rollout) -> ScoredRollout:
        start = time.perf_counter()
        verified = self._verify(rollout)
        seconds = time.perf_counter() - start
        return ScoredRollout(rollout=rollout, raw=no_features(), whitened=None, verified=verified, score_s=seconds)

    def _verify(self, written: Completions) -> Float64[Tensor, "group completion"]:
        rewards = list(self._threads.map(self._reward, verifier_inputs(written, self._tokenizer)))
        return torch.tensor(rewards, dtype=torch.float64).reshape(written.completion_lengths.shape)

    def _reward(self, texts: VerifierInput) -> float:
        return self._verifier(prompt=texts.prompt, completion=texts.completion, answer=texts.answer)

    def _warn_once(self) -> None:
        counts = self.status_counts
        cut_short = {status: counts[status] for status in CUT_SHORT if counts[status]}
        if cut_short and not self._warned:
            self._warned = True
            logger.warning(
                "%s of %d programs were cut short, reward 0: %s; later ones are counted without a warning. If they "
                "should have passed, raise verifier.timeout_s or verifier.memory_mib",
                sum(cut_short.values()),
                counts.total(),
                ", ".join(f"{count} {status}" for status, count in cut_short.items()),
            )


def verifier_inputs(written: Completions, tokenizer: PreTrainedTokenizerBase) -> list[VerifierInput]:
    """Prompt, completion and answer of every completion, group after group.

    The answer is the document's, or the text of its ground truth.
    """
    texts = []
    for group, (completions, lengths) in enumerate(
        zip(written.completion_ids, written.completion_lengths, strict=True)
    ):
        context = written.document.context_ids(group)
        answer = written.document.answer
        if answer is None:
            _, answer = _as_given(written.document, context, written.document.ground_truth_ids(group), tokenizer)
        for ids, length in zip(completions, lengths, strict=True):
            prompt, completion = _as_given(written.document, context, ids[:length], tokenizer)
            texts.append(VerifierInput(prompt=prompt, completion=completion, answer=answer))
    return texts


def _as_given(
    document: Document, context: np.ndarray, continuation: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Prompt and completion as texts, cut where the prompt ends and not where its tokens do.

    The tokens of `print(` + `"hi")` are `print` and `("hi")`: the model sees the first, and has to write the bracket.
    """
    prompt, completion = continued_text(context, continuation, tokenizer)
    if document.prompt is None:
        return prompt, completion
    rest = document.prompt[document.num_prompt_chars :]
    shared = _num_shared_chars(rest, completion)
    return document.prompt[: document.num_prompt_chars + shared], completion[shared:]


def continued_text(
    context: np.ndarray, continuation: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """The text of both token sequences as one, cut where the continuation's begins; special tokens have no text.

    Decoded alone, a continuation may lose its first space or the half of a character. A character that lies across
    the border belongs to the continuation.
    """
    whole = _decoded(np.concatenate([context, continuation]), tokenizer)
    alone = _decoded(context, tokenizer)
    border = _num_shared_chars(alone, whole)
    return whole[:border], whole[border:]


def _num_shared_chars(first: str, second: str) -> int:
    """Characters at the start of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _shortened(text: str) -> str:
    half = MAX_SHOWN_CHARS // 2
    return repr(text if len(text) <= MAX_SHOWN_CHARS else f"{text[:half]} ... {text[-half:]}")


def _decoded(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(token_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list of texts is for a list of lists
    return text
