"""BOS: before every text, prompt and packed row if the tokenizer has it so; never predicted, never text."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.config import DataConfig
from actors.data.documents import DocumentSplits, load_documents
from actors.data.tokenization import bos_ids
from actors.models.pretrained import EMBEDDED_FOLDER
from actors.rollout import Document, ground_truth_completions
from feature_server.packing import pack
from feature_server.verifiers.server import verifier_inputs
from orchestration.evaluation.checkpoint_evaluation import cross_entropy, evenly_spaced_anchors

EOS, BOS, SOP = 0, 512, 513
STRIDED = {"document_tokens": 16, "context_tokens": 2, "horizon": 3, "stride": 1, "held_out_frac": 0.25}
COMPLETION = {"mode": "completion", "document_tokens": 64, "horizon": 24, "held_out_frac": 0.25}
TEXTS = [f"def f{i}(x):\n    return x * {i}\n" * (i % 5) + f"x = {i}" for i in range(40)]


def opened_by(template: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with two more tokens, and this before each text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    assert backend.add_special_tokens(["<bos>", "<sop>"]) == 2 and backend.token_to_id("<sop>") == SOP
    special = [("<bos>", BOS), ("<sop>", SOP)]
    backend.post_processor = processors.TemplateProcessing(single=f"{template} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="module")
def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Gemma's and Llama's."""
    opened = opened_by("<bos>", tokenizer)
    assert opened("x = 3")["input_ids"] == [BOS, *opened("x = 3", add_special_tokens=False)["input_ids"]]
    return opened


def test_what_opens_a_text_is_asked_of_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, with_bos: PreTrainedTokenizerFast
) -> None:
    embedded = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    two = opened_by("<bos> <sop>", tokenizer)
    assert [bos_ids(one, "tokenizer") for one in (tokenizer, embedded, with_bos, two)] == [[], [], [BOS], [BOS, SOP]]
    assert [bos_ids(one, "never") for one in (tokenizer, embedded, with_bos, two)] == [[], [], [], []]
    assert [bos_ids(one, "always") for one in (embedded, with_bos, two)] == [[0], [BOS], [BOS, SOP]]
    with pytest.raises(ValueError, match=r"data.bos='always' needs a BOS token"):
        bos_ids(tokenizer, "always")


def text_documents(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> DocumentSplits:
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)
    return load_documents(DataConfig(source=str(folder), **{**STRIDED, **settings}), tokenizer)


@pytest.mark.parametrize("separate", [False, True])
def test_every_text_and_every_row_opens_with_bos_that_nothing_predicts(
    tmp_path: Path, with_bos: PreTrainedTokenizerFast, separate: bool
) -> None:
    splits = text_documents(tmp_path, with_bos, separate_texts=separate)
    plain = text_documents(tmp_path, with_bos, bos="never")
    for found, without in zip((splits.train, splits.validation), (plain.train, plain.validation), strict=True):
        tokens = np.concatenate([d.token_ids for d in without])
        texts = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)
        stream, rows = [token for text in texts for token in (BOS, *text.tolist())], []
        while len(stream) >= 16:
            if stream[0] != BOS:
                stream = [BOS, *stream]
            rows.append(stream[:16])
            stream = stream[16:]
        assert not (tokens == BOS).any() and len(rows) > 5
        kept = {int(d.document_id.partition("/")[2]): d for d in found}
        for row, ids in enumerate(rows):
            bos = [p for p, token in enumerate(ids) if token == BOS]
            inner = [*bos, 16]
            whole = [(start, end) for start, end in pairwise(inner)] if separate else [(0, 16)]
            anchors = [
                a
                for a in range(2, 14)
                if any(s + 2 <= a and a + 3 <= e for s, e in whole) and not {a, a + 1, a + 2} & set(bos)
            ]
            if not anchors:
                assert row not in kept
                continue
            document = kept[row]
            assert document.token_ids.tolist() == ids and document.bos_positions.tolist() == bos
            assert document.anchors.tolist() == anchors
            assert document.text_starts.tolist() == (bos if separate else [0])
            assert document.predicted_positions.tolist() == [p for p in range(16) if p not in bos]
            assert pack([document]).document_tokens.target.tolist() == [token for token in ids if token != BOS]


def test_what_opens_a_text_is_found_whatever_the_tokenizer_can_encode() -> None:
    vocabulary = {"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    letters = Tokenizer(models.BPE(vocabulary, []))
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="<s>")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == []
    assert bos_ids(tokenizer, "tokenizer") == bos_ids(tokenizer, "always") == [0]
    assert bos_ids(tokenizer, "never") == []


def test_a_row_must_hold_more_than_what_opens_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    two = opened_by("<bos> <sop>", tokenizer)
    tiny = {"document_tokens": 2, "context_tokens": 1, "horizon": 1}
    with pytest.raises(ValueError, match=r"data.document_tokens=2 has no room for text behind the 2 tokens that open"):
        text_documents(tmp_path, two, **tiny)
    assert text_documents(tmp_path, two, **tiny, bos="never").train[0].token_ids.shape == (2,)


def test_bos_that_is_also_eos_is_told_from_it_by_its_place(tmp_path: Path) -> None:
    """The embedded tokenizer has one token for both: the end of a text is predicted, the start of the next is not."""
    embedded = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    splits = text_documents(tmp_path, embedded, bos="always")
    never = text_documents(tmp_path, embedded)
    assert all(d.bos_positions.size == 0 and d.predicted_positions.tolist() == list(range(1, 16)) for d in never.train)
    pairs = 0
    for document in splits.train:
        ids, bos = document.token_ids.tolist(), document.bos_positions.tolist()
        assert ids[0] == EOS and bos[0] == 0
        ends = [p for p, token in enumerate(ids) if token == EOS and p not in bos]
        assert bos[1:] == [p + 1 for p in ends if p < 15]
        assert pack([document]).document_tokens.target.tolist().count(EOS) == len(ends)
        pairs += len(bos) - 1
    assert pairs > 5


def test_a_pair_opens_with_bos_in_its_prompt(tmp_path: Path, with_bos: PreTrainedTokenizerFast) -> None:
    pairs = [(f"f({i}) ", f"= {i}") for i in range(40)]
    rows = "".join(json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs)
    (tmp_path / "pairs.jsonl").write_text(rows)
    splits = load_documents(DataConfig(source=str(tmp_path / "pairs.jsonl"), **COMPLETION), with_bos)
    plain = load_documents(DataConfig(source=str(tmp_path / "pairs.jsonl"), bos="never", **COMPLETION), with_bos)
    for document, without in zip(splits.train, plain.train, strict=True):
        assert document.token_ids.tolist() == [BOS, *without.token_ids.tolist()]
        assert document.anchors.tolist() == [document.num_prompt_tokens] == [1 + without.num_prompt_tokens]
        assert document.bos_positions.tolist() == [0] and without.bos_positions.size == 0
        assert len(document.predicted_positions) == len(without.predicted_positions)
        told, as_told = (verifier_inputs(ground_truth_completions(d), with_bos) for d in (document, without))
        assert told == as_told
        assert (told[0].prompt, told[0].completion) == pairs[int(document.document_id.partition(":")[2]) - 1]
    longest = max(len(document.token_ids) for document in splits.train)
    kept = []
    for limit in (longest, longest - 1):
        limits = {**COMPLETION, "document_tokens": limit, "horizon": longest - 2}
        kept.append(len(load_documents(DataConfig(source=str(tmp_path / "pairs.jsonl"), **limits), with_bos).train))
    assert kept[0] == len(splits.train) > kept[1], "BOS counts"


class CountingSampler:
    """Gives token t of a text, from 1 on, the log-prob -10 ** (its id)."""

    def score_tokens(self, texts: Sequence[list[int]]) -> list[np.ndarray]:
        return [-(10.0 ** np.array(text[1:])) for text in texts]


@pytest.mark.parametrize("starts", [[0], [0, 3]])
def test_the_cross_entropy_of_a_checkpoint_leaves_bos_out(starts: list[int]) -> None:
    document = Document(
        document_id="d",
        token_ids=np.array([5, 2, 3, 5, 1, 2]),
        anchors=np.array([2]),
        horizon=1,
        ends_with_eos=False,
        bos_positions=np.array([0, 3]),
        text_starts=np.array(starts),
    )
    all_tokens, answers = cross_entropy([document], CountingSampler())
    assert all_tokens.values == answers.values == {"d": (100 + 1000 + 10 + 100) / 4}
    prompted = replace(document, num_prompt_tokens=2)
    assert cross_entropy([prompted], CountingSampler())[1].values == {"d": (1000 + 10 + 100) / 3}


def test_completions_of_an_evaluation_are_placed_around_bos() -> None:
    document = Document(
        document_id="d",
        token_ids=np.arange(20),
        anchors=np.array([2]),
        horizon=1,
        ends_with_eos=False,
        bos_positions=np.array([0, 9]),
    )
    data = DataConfig(document_tokens=20, context_tokens=2, horizon=3, stride=1)
    anchors = evenly_spaced_anchors(document, count=99, data=data, horizon=3)
    assert anchors.tolist() == [*range(2, 7), *range(10, 18)]
