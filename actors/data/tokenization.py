"""Text to tokens: rows of packed texts, and prompt-completion pairs cut between two tokens.

EOS ends each text and each pair; what opens them is given (`bos_ids`). No other special token is added.
"""

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64
from transformers import PreTrainedTokenizerBase

from actors.data.texts import Pair, Split, content_place


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedPair:
    """Prompt and completion as one sequence of tokens."""

    name: str
    token_ids: np.ndarray
    """[P] int64. BOS, prompt, completion, EOS."""
    num_prompt_tokens: int
    """BOS and the tokens that lie wholly within the prompt; the completion starts after them."""
    num_bos: int
    """How many of them are BOS."""
    prompt: str
    """As `Pair.prompt`."""
    num_prompt_chars: int
    """Characters of the prompt in these tokens; the others are in the completion's."""
    answer: str | None = None
    """As `Pair.answer`."""


def bos_ids(tokenizer: PreTrainedTokenizerBase, bos: Literal["tokenizer", "never", "always"]) -> list[int]:
    """The tokens that open every text; `tokenizer`: what it puts before a text that it encodes, [] for many.

    Raises: ValueError if BOS is demanded of a tokenizer that has none.
    """
    if bos == "never":
        return []
    text = next((sign for sign in string.printable if tokenizer(sign, add_special_tokens=False)["input_ids"]), "")
    with_special, plain = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    borders = range(len(with_special) - len(plain) + 1)
    opening = with_special[: next((at for at in borders if with_special[at : at + len(plain)] == plain), 0)]
    if opening or bos == "tokenizer":
        return opening
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"data.bos='always' needs a BOS token, and tokenizer {tokenizer.name_or_path!r} has none; set its "
            "bos_token, or data.bos='tokenizer'"
        )
    return [tokenizer.bos_token_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows of packed texts."""

    token_ids: Int64[np.ndarray, "row token"]
    text: Int64[np.ndarray, "row token"]
    """The number of each token's text, counted over all batches. (EOS does not tell: a text may contain EOS too.)"""
    is_bos: Bool[np.ndarray, "row token"]


def packed_rows(
    batches: Iterable[Sequence[str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    opening: Sequence[int],
    document_tokens: int,
) -> Iterator[PackedRows]:
    """Rows of `document_tokens` tokens cut from the texts' tokens in order, `opening` before and EOS after each text.

    A row that begins within a text has `opening` before it as well: it is all that a network sees of the text.
    A text without tokens adds nothing, not even EOS. The tail that does not fill a row is dropped.

    Raises: ValueError if `opening` fills a row.
    """
    if len(opening) >= document_tokens:
        raise ValueError(
            f"data.document_tokens={document_tokens} has no room for text behind the {len(opening)} tokens that open "
            "it; raise it, or set data.bos='never'"
        )
    bos = _stream(opening, text=0, is_bos=True)
    pending, num_texts = bos[:, :0], 0
    for batch in batches:
        encoded = tokenizer(list(batch), add_special_tokens=False, verbose=False)["input_ids"]
        texts = [
            np.hstack([_of_text(bos, text), _stream([*ids, tokenizer.eos_token_id], text=text)])
            for text, ids in enumerate(encoded, start=num_texts)
            if ids
        ]
        num_texts += len(encoded)
        (token_ids, text, is_bos), pending = _cut(np.hstack([pending, *texts]), bos, document_tokens)
        if len(token_ids):
            yield PackedRows(token_ids=token_ids, text=text, is_bos=is_bos.astype(bool))


def _stream(token_ids: Sequence[int], *, text: int, is_bos: bool = False) -> Int64[np.ndarray, "3 token"]:
    """Tokens, the number of their text, and whether each is BOS."""
    ids = np.array(token_ids, dtype=np.int64)
    return np.stack([ids, np.full_like(ids, text), np.full_like(ids, is_bos)])


def _of_text(bos: Int64[np.ndarray, "3 bos"], text: int) -> Int64[np.ndarray, "3 bos"]:
    """The same BOS, of another text."""
    return np.stack([bos[0], np.full_like(bos[1], text), bos[2]])


def _cut(
    stream: Int64[np.ndarray, "3 token"], bos: Int64[np.ndarray, "3 bos"], document_tokens: int
) -> tuple[Int64[np.ndarray, "3 row row_token"], Int64[np.ndarray, "3 rest"]]:
    """The rows that the stream fills, and what is left of it."""
    if not bos.shape[1]:
        end = stream.shape[1] // document_tokens * document_tokens
        return stream[:, :end].reshape(3, -1, document_tokens), stream[:, end:]
    rows = [np.empty((3, 0, document_tokens), dtype=np.int64)]
    at = 0
    while at < stream.shape[1]:
        _, text, begins_with_bos = stream[:, at].tolist()
        head = bos[:, :0] if begins_with_bos else _of_text(bos, text)
        end = at + document_tokens - head.shape[1]
        if end > stream.shape[1]:
            break
        rows.append(np.hstack([head, stream[:, at:end]])[:, None])
        at = end
    return np.concatenate(rows, axis=1), stream[:, at:]


@dataclass(slots=True, kw_only=True)
class PairFilter:
    """Tokenises pairs, keeps those that fit, and counts the others by reason.

    One filter sees all splits of a source: of equal pairs the one that is read first survives, and a prompt only in the
    split in which it is read first (functions of two files may share one).
    """

    tokenizer: PreTrainedTokenizerBase
    opening: Sequence[int] = ()
    """Before each prompt."""
    document_tokens: int
    """Most tokens of BOS, prompt, completion and EOS together."""
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
        tokenised = tokenise_pairs(worded, tokenizer=self.tokenizer, opening=self.opening)
        prompts = [content_place(pair.prompt) for pair in worded]
        for prompt, pair in zip(prompts, tokenised, strict=True):
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
        if pair.num_prompt_tokens == pair.num_bos:
            return "no prompt token"
        if num_tokens > self.document_tokens:
            return f"over {self.document_tokens} tokens in all (document_tokens)"
        if num_tokens - pair.num_prompt_tokens > self.horizon:
            return f"completion over {self.horizon} tokens (horizon)"
        return "duplicate" if pair.token_ids.tobytes() in self._seen else None


def tokenise_pairs(
    pairs: Sequence[Pair], *, tokenizer: PreTrainedTokenizerBase, opening: Sequence[int] = ()
) -> list[TokenisedPair]:
    """Prompt and completion tokenised together, so that the border is one the model sees in running text.

    `opening` stands before each prompt.

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
        _tokenised(pair, [*ids, tokenizer.eos_token_id], offsets, opening=opening)
        for pair, ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _tokenised(
    pair: Pair, token_ids: list[int], offsets: Sequence[tuple[int, int]], *, opening: Sequence[int]
) -> TokenisedPair:
    num_prompt_tokens = _num_prompt_tokens(offsets, prompt_chars=len(pair.prompt.rstrip()))
    return TokenisedPair(
        name=pair.name,
        token_ids=np.array([*opening, *token_ids], dtype=np.int64),
        num_prompt_tokens=len(opening) + num_prompt_tokens,
        num_bos=len(opening),
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
