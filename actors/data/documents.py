"""Documents to match: tokenised, split by text, in an order that can be resumed.

Splits and documents depend on the texts' contents: neither their names, nor the order of files on disk, nor the run's
seed enters. Tokens are kept in an unlinked temporary file (see `stored_rows`): a `DocumentSplits` takes little memory
and stays in the process that loaded it, while its documents may travel.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args, overload

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from actors.config import DataConfig
from actors.data.blocks import anchors_within_texts, anchors_without, strided_anchors
from actors.data.text_splits import TEXTS_PER_BATCH, Columns, column_batches, digest, split_texts, stored_rows
from actors.data.texts import Pair, Split
from actors.data.tokenization import PackedRows, PairFilter, TokenisedPair, bos_ids, packed_rows
from actors.rollout import Document

_DOCUMENT_SCHEMA = pa.schema(
    {
        "document_id": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "num_prompt_tokens": pa.int32(),
        "text_starts": pa.list_(pa.int32()),
        "bos_positions": pa.list_(pa.int32()),
        "answer": pa.large_string(),
        "origin": pa.string(),
        "prompt": pa.large_string(),
        "num_prompt_chars": pa.int32(),
    }
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentSplits:
    """The documents of a source; no split is empty, and no text is in two of them."""

    train: Sequence[Document]
    validation: Sequence[Document]
    """Used while settings are chosen."""
    test: Sequence[Document]
    """Held out for a final confirmation."""
    digest: str
    """Of all training documents, in their order."""


def load_documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DocumentSplits:
    """Reads, tokenises and splits the source; each document is built when it is asked for.

    strided: the distinct texts of a split in the order of a hash of their contents, EOS after each, cut into rows of
    document_tokens; the incomplete tail is dropped. Row r of a split has the id `split/r`. With separate_texts, rows
    in which no text holds a block are left out and counted in the log.
    completion: one document per pair, with one anchor where its completion starts; pairs that do not fit and
    repetitions are left out and counted in the log. The id is the pair's name.

    Raises: ValueError for a tokenizer or a source that cannot be used and for a split without documents;
    FileNotFoundError for a path that does not exist.
    """
    _check_tokenizer(tokenizer, config=config)
    datasets.disable_progress_bars()
    texts = split_texts(config)
    left_out: Counter[str] = Counter()
    opening = bos_ids(tokenizer, config.bos)
    pair_filter = PairFilter(
        tokenizer=tokenizer,
        opening=opening,
        document_tokens=config.document_tokens,
        horizon=config.horizon,
        num_left_out=left_out,
    )
    documents: dict[Split, _StoredDocuments] = {}
    # Held-out splits first: of equal pairs, the held-out one must be kept, not the training one.
    for split in ("test", "validation", "train"):
        if config.mode == "strided":
            rows = _packed_rows(texts[split], tokenizer=tokenizer, opening=opening, config=config)
            names = list(texts[split]["name"])
            columns = _packed_columns(rows, names=names, split=split, config=config, num_left_out=left_out)
        else:
            columns = _pair_columns(texts[split], split=split, pair_filter=pair_filter)
        documents[split] = _StoredDocuments(stored_rows(columns, schema=_DOCUMENT_SCHEMA), config=config)
        if len(documents[split]) == 0:
            raise ValueError(_why_empty(split, texts=texts, config=config, left_out=left_out))
    _log_counts(documents, config=config, left_out=left_out)
    return DocumentSplits(**documents, digest=documents["train"].digest())


class DocumentStream:
    """Endless, resumable order of documents: each epoch visits all of them once, shuffled by (seed, epoch).

    The document at a position depends on (seed, position) alone: a stream made at position p continues one
    that has returned p documents.
    """

    def __init__(self, documents: Sequence[Document], *, seed: int, position: int = 0) -> None:
        if len(documents) == 0 or position < 0:
            raise ValueError(f"a stream needs a document and a position from 0, got {len(documents)} and {position}")
        self._documents = documents
        self._seed = seed
        self._position = position
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def position(self) -> int:
        """Documents taken since the start of the run, over all epochs."""
        return self._position

    def take(self, count: int) -> list[Document]:
        """The next `count` documents; may cross into the next epoch."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Document:
        epoch, place = divmod(self._position, len(self._documents))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._documents))
            self._epoch = epoch
        self._position += 1
        return self._documents[int(self._order[place])]


def chosen_documents(splits: DocumentSplits, split: Split, count: int, *, key: str) -> list[Document]:
    """`count` documents of a split, evenly spaced. `key`: of the configuration that `count` is the value of.

    Raises: ValueError if the split holds fewer.
    """
    documents: Sequence[Document] = getattr(splits, split)
    if len(documents) < count:
        raise ValueError(
            f"{key}={count}, but the {split} split holds {len(documents)}; lower it, or "
            f"{'lower' if split == 'train' else 'raise'} data.held_out_frac"
        )
    return evenly_spaced(documents, count)


def evenly_spaced(documents: Sequence[Document], count: int) -> list[Document]:
    """`count` documents at equal distances: neighbours come from the same text and would be redundant."""
    return [documents[index * len(documents) // count] for index in range(count)]


class _StoredDocuments(Sequence[Document]):
    """Documents over rows of _DOCUMENT_SCHEMA, each built when it is asked for."""

    def __init__(self, rows: datasets.Dataset, *, config: DataConfig) -> None:
        self._rows = rows
        self._config = config

    def digest(self) -> str:
        """Of all of them."""
        return digest(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self._rows[index]
        settings = self._config
        strided = settings.mode == "strided"
        text_starts, bos = (np.array(row[name], dtype=np.int64) for name in ("text_starts", "bos_positions"))
        return Document(
            document_id=row["document_id"],
            token_ids=np.array(row["token_ids"], dtype=np.int64),
            anchors=_strided_anchors(text_starts, bos, settings)
            if strided
            else np.array([row["num_prompt_tokens"]], dtype=np.int64),
            horizon=settings.horizon,
            ends_with_eos=not strided,
            num_prompt_tokens=row["num_prompt_tokens"],
            text_starts=text_starts,
            bos_positions=bos,
            answer=row["answer"],
            origin=row["origin"],
            prompt=row["prompt"],
            num_prompt_chars=row["num_prompt_chars"],
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, config: DataConfig) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token, which ends every text; set its eos_token"
        )
    if config.mode == "completion" and not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} reports no character offsets (is_fast=False), and "
            "data.mode='completion' cuts pairs by them; use its fast version, or set --data.mode strided"
        )


def _strided_anchors(text_starts: np.ndarray, bos_positions: np.ndarray, config: DataConfig) -> np.ndarray:
    """[B] int64 anchors of a packed row whose texts start there; no block holds BOS, which nothing predicts."""
    anchors = strided_anchors(config.document_tokens, config.context_tokens, config.horizon, config.stride)
    return anchors_within_texts(
        anchors_without(bos_positions, anchors, horizon=config.horizon),
        text_starts,
        document_tokens=config.document_tokens,
        context_tokens=config.context_tokens,
        horizon=config.horizon,
    )


def _packed_rows(
    texts: datasets.Dataset, *, tokenizer: PreTrainedTokenizerBase, opening: list[int], config: DataConfig
) -> Iterator[PackedRows]:
    batches = (batch["text"] for batch in column_batches(texts, TEXTS_PER_BATCH))
    return packed_rows(batches, tokenizer=tokenizer, opening=opening, document_tokens=config.document_tokens)


def _packed_columns(
    batches: Iterable[PackedRows],
    *,
    names: Sequence[str],
    split: Split,
    config: DataConfig,
    num_left_out: Counter[str],
) -> Iterator[Columns]:
    """`names`: of the texts, by their numbers in the rows."""
    start = 0
    for rows in batches:
        text_starts = [_text_starts(of_row, separate=config.separate_texts) for of_row in rows.text]
        bos = [np.flatnonzero(mask) for mask in rows.is_bos]
        kept = range(len(bos))
        if config.separate_texts or rows.is_bos.any():  # else every row has the same blocks
            kept = [row for row in kept if len(_strided_anchors(text_starts[row], bos[row], config))]
        if len(kept) < len(bos):
            num_left_out["without a block within one text"] += len(bos) - len(kept)
        yield {
            "document_id": [f"{split}/{start + index}" for index in kept],
            "token_ids": list(rows.token_ids[list(kept)].astype(np.int32)),
            "num_prompt_tokens": [0] * len(kept),
            "text_starts": [text_starts[index].astype(np.int32) for index in kept],
            "bos_positions": [bos[index].astype(np.int32) for index in kept],
            "answer": [None] * len(kept),
            "origin": [names[_most_frequent(rows.text[index])] for index in kept],
            "prompt": [None] * len(kept),
            "num_prompt_chars": [0] * len(kept),
        }
        start += len(bos)


def _text_starts(numbers: np.ndarray, *, separate: bool) -> np.ndarray:
    """Where the texts of a row start; its first token counts as one, as the text it continues is in another row."""
    return np.flatnonzero(np.diff(numbers, prepend=-1)) if separate else np.zeros(1, dtype=np.int64)


def _most_frequent(numbers: np.ndarray) -> int:
    """Of the texts of a row, the one with the most tokens; the first of several."""
    return int(numbers[0] + np.bincount(numbers - numbers[0]).argmax())


def _pair_origin(pair: TokenisedPair) -> str:
    """The module that the pair is a function of, if its name tells one; else its prompt, which may have several
    answers."""
    module, separator, _ = pair.name.partition(".py::")
    prompt = pair.token_ids[: pair.num_prompt_tokens]
    return f"{module}.py" if separator else f"prompt {hashlib.sha256(prompt.tobytes()).hexdigest()[:16]}"


def _pair_columns(pairs: datasets.Dataset, *, split: Split, pair_filter: PairFilter) -> Iterator[Columns]:
    for batch in column_batches(pairs, TEXTS_PER_BATCH):
        values = zip(batch["name"], batch["prompt"], batch["completion"], batch["answer"], strict=True)
        kept = pair_filter.keep([Pair(*value) for value in values], split=split)
        yield {
            "document_id": [pair.name for pair in kept],
            "token_ids": [pair.token_ids.astype(np.int32) for pair in kept],
            "num_prompt_tokens": [pair.num_prompt_tokens for pair in kept],
            "text_starts": [np.zeros(1, dtype=np.int32)] * len(kept),
            "bos_positions": [np.arange(pair.num_bos, dtype=np.int32) for pair in kept],
            "answer": [pair.answer for pair in kept],
            "origin": [_pair_origin(pair) for pair in kept],
            "prompt": [pair.prompt for pair in kept],
            "num_prompt_chars": [pair.num_prompt_chars for pair in kept],
        }


def _log_counts(
    documents: Mapping[Split, Sequence[Document]], *, config: DataConfig, left_out: Mapping[str, int]
) -> None:
    sizes = ", ".join(f"{len(documents[split])} {split}" for split in get_args(Split))
    logger.info("%s: %s documents", config.source, sizes)
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        items = "packed rows" if config.mode == "strided" else "pairs"
        logger.info("%s: left out %d %s: %s", config.source, sum(left_out.values()), items, reasons)


def _why_empty(
    split: Split, *, texts: Mapping[Split, datasets.Dataset], config: DataConfig, left_out: Counter[str]
) -> str:
    num_texts = len(texts[split])
    total = sum(len(rows) for rows in texts.values())
    empty = (
        f"the {split} split of data.source={config.source!r} has no document: {num_texts} of its {total} "
        f"{'distinct texts' if config.mode == 'strided' else 'pairs'} fall into it by a hash of their contents"
    )
    if num_texts == 0:
        change = "lower" if split == "train" else "raise"
        return f"{empty}; give more texts (a .txt file is one), or {change} --data.held-out-frac"
    if config.mode == "strided":
        crossing = f", or hold no block within one text (rows left out so far: {left_out.total()})" if left_out else ""
        return (
            f"{empty}, and they do not fill document_tokens={config.document_tokens}{crossing}; "
            "give more or longer texts, or lower --data.document-tokens"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return (
        f"{empty}, and none of them is kept (pairs left out so far: {reasons}); give more or shorter pairs, "
        "or raise --data.document-tokens or --data.horizon"
    )
