"""Text to tokens: rows of packed texts, and prompt-completion pairs cut between two tokens.

Neither adds special tokens of the tokenizer's own; EOS ends each text and each pair.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int64
from transformers import PreTrainedTokenizerBase

from actors.data.texts import Pair, Split, content_place


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedPair:
    """Prompt and completion as one sequence of tokens."""

    name: str
    token_ids: np.ndarray
    """[P] int64. Prompt, completion, EOS."""
    num_prompt_tokens: int
    """Tokens that lie wholly within the prompt; the completion starts after them."""
    prompt: str
    """As `Pair.prompt`."""
    num_prompt_chars: int
    """Characters of the prompt in these tokens; the others are in the completion's."""
    answer: str | None = None
    """As `Pair.answer`."""


def packed_rows(
    batches: Iterable[Sequence[str]], *, tokenizer: PreTrainedTokenizerBase, document_tokens: int
) -> Iterator[tuple[Int64[np.ndarray, "row token"], Bool[np.ndarray, "row token"]]]:
    """Rows of `document_tokens` tokens cut from the texts' tokens in order, EOS after each text.

    The mask returned with the tokens is True where a text starts. (EOS does not mark it: a text may contain EOS too.)
    A text without tokens adds nothing, not even EOS. The tail that does not fill a row is dropped.
    """
    pending, starts = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
    for batch in batches:
        encoded = tokenizer(list(batch), add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded if ids]
        pending = np.concatenate([pending, *pieces])
        starts = np.concatenate([starts, *[np.arange(len(piece)) == 0 for piece in pieces]])
        num_whole = len(pending) // document_tokens * document_tokens
        if num_whole:
            yield pending[:num_whole].reshape(-1, document_tokens), starts[:num_whole].reshape(-1, document_tokens)
        pending, starts = pending[num_whole:], starts[num_whole:]


@dataclass(slots=True, kw_only=True)
class PairFilter:
    """Tokenises pairs, keeps those that fit, and counts the others by reason.

    One filter sees all splits of a source: of equal pairs the one that is read first survives, and a prompt only in the
    split in which it is read first (functions of two files may share one).
    """

    tokenizer: PreTrainedTokenizerBase
    document_tokens: int
    """Most tokens of prompt, completion and EOS together."""
    horizon: int
    """Most tokens of completion and EOS together."""
    num_left_out: Counter[str] = field(default_factory=Counter)
    """Pairs by the reason why they were not kept."""
    _seen: set[bytes] = field(default_factory=set)
    _split_of_prompt: dict[float, Split] = field(default_factory=dict)

    def keep(self, pairs: Sequence[Pair], *, split: Split) -> list[TokenisedPair]:
        """The pairs of a split that fit, in order."""
        kept = []
        worded = [pair for pair in pairs if pair.completion.strip()]
        if len(worded) < len(pairs):
            self.num_left_out["empty completion"] += len(pairs) - len(worded)
        prompts = [content_place(pair.prompt) for pair in worded]
        for prompt, pair in zip(prompts, tokenise_pairs(worded, tokenizer=self.tokenizer), strict=True):
            reason = self._rejection_reason(pair)
            if reason is None and self._split_of_prompt.get(prompt, split) != split:
                reason = "prompt of a held-out pair"
            if reason is None:
                self._seen.add(pair.token_ids.tobytes())
                self._split_of_prompt[prompt] = split
                kept.append(pair)
            else:
                self.num_left_out[reason] += 1
        return kept

    def _rejection_reason(self, pair: TokenisedPair) -> str | None:
        num_tokens = len(pair.token_ids)
        if pair.num_prompt_tokens == 0:
            return "no prompt token"
        if num_tokens > self.document_tokens:
            return f"over {self.document_tokens} tokens in all (document_tokens)"
        if num_tokens - pair.num_prompt_tokens > self.horizon:
            return f"completion over {self.horizon} tokens (horizon)"
        return "duplicate" if pair.token_ids.tobytes() in self._seen else None


def tokenise_pairs(pairs: Sequence[Pair], *, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedPair]:
    """Prompt and completion tokenised together, so that the border is one the model sees in running text.

    White space that ends the prompt opens the completion instead, and a token that straddles the border is
    the completion's. Decoded prompt tokens plus decoded completion tokens give the two strings back.

    Needs a tokenizer that reports character offsets (`is_fast`), untrimmed.
    """
    if not pairs:
        return []
    encoded = tokenizer(
        [pair.prompt + pair.completion for pair in pairs],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        _tokenised(pair, [*ids, tokenizer.eos_token_id], offsets)
        for pair, ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _tokenised(pair: Pair, token_ids: list[int], offsets: Sequence[tuple[int, int]]) -> TokenisedPair:
    num_prompt_tokens = _num_prompt_tokens(offsets, prompt_chars=len(pair.prompt.rstrip()))
    return TokenisedPair(
        name=pair.name,
        token_ids=np.array(token_ids, dtype=np.int64),
        num_prompt_tokens=num_prompt_tokens,
        prompt=pair.prompt,
        num_prompt_chars=offsets[num_prompt_tokens - 1][1] if num_prompt_tokens else 0,
        answer=pair.answer,
    )


def _num_prompt_tokens(offsets: Sequence[tuple[int, int]], *, prompt_chars: int) -> int:
    """Tokens before the first whose span [start, end) reaches beyond the prompt; no character is divided."""
    count = next((index for index, (_, end) in enumerate(offsets) if end > prompt_chars), len(offsets))
    while 0 < count < len(offsets) and offsets[count - 1][1] > offsets[count][0]:
        count -= 1
    return count
