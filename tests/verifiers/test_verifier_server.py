"""The verifier server: which texts are verified, in which order rewards come back, how failures are reported."""

import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.config import DataConfig
from actors.data.documents import load_documents
from actors.models.pretrained import EMBEDDED_FOLDER
from actors.rollout import Completions, Document, Rollout, ground_truth_completions
from feature_server.config import VerifierConfig
from feature_server.verifiers.server import VerifierServer, continued_text, verifier_inputs

HORIZON = 40


@pytest.fixture(scope="module")
def embedded() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)


def make_rollout(
    tokenizer: PreTrainedTokenizerFast,
    *,
    pieces: Sequence[str],
    completions: Sequence[Sequence[str]],
    answer: str | None = None,
) -> Rollout:
    """Group k continues the first k + 1 pieces. Completions end in EOS; after it stand words that must not be read."""
    ids = [tokenizer(piece)["input_ids"] for piece in pieces]
    shape = (len(completions), len(completions[0]))
    completion_ids = np.full((*shape, HORIZON), ids[0][0])
    lengths = np.zeros(shape, dtype=np.int64)
    for group, texts in enumerate(completions):
        for number, text in enumerate(texts):
            tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            completion_ids[group, number, : len(tokens)] = tokens
            lengths[group, number] = len(tokens)
    return Rollout(
        ticket_id=0,
        document=Document(
            document_id="document",
            token_ids=np.array([*chain(*ids), tokenizer.eos_token_id]),
            anchors=np.cumsum([len(piece) for piece in ids])[:-1],
            horizon=HORIZON,
            ends_with_eos=True,
            answer=answer,
        ),
        completion_ids=completion_ids,
        completion_lengths=lengths,
        behavior_logprobs=np.zeros((*shape, HORIZON), dtype=np.float32),
        token_versions=np.zeros((*shape, HORIZON), dtype=np.int64),
    )


def test_each_completion_is_verified_in_its_place(embedded: PreTrainedTokenizerFast) -> None:
    server = VerifierServer(model="embedded", config=VerifierConfig(name="numeric"))
    first = make_rollout(
        embedded,
        pieces=["1 + 1 =", " 2", "\n"],
        completions=[[" 2", " 3", "two, 2"], ["\n2", "\n1\n", "none"]],
        answer="#### 2",
    )
    second = make_rollout(embedded, pieces=["7", " 8"], completions=[["8", "-8", "8.0"]])
    scored = server.score([first, second])
    assert [one.rollout for one in scored] == [first, second]
    assert scored[0].verified.dtype == torch.float64
    assert scored[0].verified.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert scored[1].verified.tolist() == [[1, 0, 1]], "without an answer, the ground truth's text is it"
    assert [one.raw.gram.numel() for one in scored] == [0, 0]
    assert [one.whitened for one in scored] == [None, None]
    assert all(one.score_s > 0 for one in scored)
    assert set(server.startup_s) == {"imports", "tokenizer", "verifier"}
    assert server.status_counts.total() == 0


def test_a_document_without_completions_has_nothing_to_verify(embedded: PreTrainedTokenizerFast) -> None:
    server = VerifierServer(model="embedded", config=VerifierConfig(name="exact"))
    document = make_rollout(embedded, pieces=["a", "b"], completions=[["b"]]).document
    nothing = np.zeros((0, 0, HORIZON), dtype=np.int64)
    bare = Completions(document=document, completion_ids=nothing, completion_lengths=nothing[..., 0])
    assert server.verify([bare])[0].shape == (0, 0)
    assert server.verify([]) == server.score([]) == []


def test_special_tokens_and_what_follows_the_end_have_no_text(embedded: PreTrainedTokenizerFast) -> None:
    rollout = make_rollout(embedded, pieces=["def f", "(x):\n", "    pass\n"], completions=[["(y):", ""], ["\n", "  "]])
    texts = verifier_inputs(rollout, embedded)
    assert [text.prompt for text in texts] == ["def f"] * 2 + ["def f(x):\n"] * 2
    assert [text.completion for text in texts] == ["(y):", "", "\n", "  "]
    assert [text.answer for text in texts] == ["(x):\n    pass\n"] * 2 + ["    pass\n"] * 2


def documents_of(folder: Path, rows: list[dict[str, str]], **settings: object) -> dict[int, Document]:
    """Documents that a run would make of these rows, by the row's index; two in each split at least."""
    filler = [{"prompt": f"fill {i}", "completion": f" {i}", "answer": str(i)} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *filler]))
    config = DataConfig(
        source=str(folder / "rows.jsonl"), mode="completion", document_tokens=96, horizon=40, **settings
    )
    splits = load_documents(config, AutoTokenizer.from_pretrained(EMBEDDED_FOLDER))
    documents = [*splits.train, *splits.validation, *splits.test]
    by_row = {int(document.document_id.rpartition(":")[2]) - 1: document for document in documents}
    return {row: by_row[row] for row in range(len(rows))}


BORDERS = [
    ("print(", '"hi")'),
    ("print(", "42)"),
    ("x = [1,", "2]"),
    ("def f(x):\n    ", "return x"),
    ('def f(x):\n    """Doc."""\n\n', "    return x\n"),
    ("    return se", "lf.x"),
    ("Q: 2 + 2?\n", "4"),
    ("Q: 2 + 2? ", "4"),
    ("größer \u3000\t", "→ 尺寸 🙂 é"),
    ("e", "\u0301 combines"),
]


def test_a_verifier_is_told_the_prompt_and_the_completion_as_the_data_has_them(
    embedded: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Wherever the tokens end: the ground truth earns 1, from the answer's column and without one."""
    rows = [{"prompt": prompt, "completion": completion, "answer": completion} for prompt, completion in BORDERS]
    server = VerifierServer(model="embedded", config=VerifierConfig(name="exact"))
    num_divided = 0
    for columns in ({}, {"answer_column": "answer"}):
        for row, document in documents_of(tmp_path, rows, **columns).items():
            prompt, completion = BORDERS[row]
            written = ground_truth_completions(document)
            told = [(text.prompt, text.completion, text.answer) for text in verifier_inputs(written, embedded)]
            assert told == [(prompt, completion, completion)]
            assert server.verify([written])[0].tolist() == [[1]]
            num_divided += embedded.decode(document.context_ids(0)) != prompt
    assert num_divided > 10


def test_a_completion_that_leaves_the_prompt_is_told_from_there(
    embedded: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The parts are always the text that was written, so a program is never run with a bracket nobody wrote."""
    rows = [{"prompt": "print(", "completion": '"hi")'}, {"prompt": "if x:\n    ", "completion": "pass"}]
    first, second = documents_of(tmp_path, rows).values()

    def told(document: Document, text: str) -> tuple[str, str]:
        ids = np.array([[[*embedded(text)["input_ids"], embedded.eos_token_id]]])
        written = Completions(document=document, completion_ids=ids, completion_lengths=np.array([[ids.size]]))
        (texts,) = verifier_inputs(written, embedded)
        return texts.prompt, texts.completion

    assert told(first, "(x)") == ("print(", "x)")
    assert told(first, "[x)") == ("print", "[x)")
    assert told(first, "") == ("print", "")
    assert told(second, "\n    pass") == ("if x:\n    ", "pass")
    assert told(second, "\n  pass") == ("if x:\n  ", "pass")
    assert told(second, " pass") == ("if x:", " pass")


def test_ground_truth_that_earns_too_little_is_told_with_its_texts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "def f(x):", "completion": "\n    return 2 * x", "answer": "assert f(3) == 6"},
        {"prompt": "def f(y):", "completion": "\n    return 2 * y", "answer": "assert f(3) == 7"},
        {"prompt": "def f(z):", "completion": "\n    while z: pass", "answer": "f(" + 99 * "1" + ")"},
    ]
    config = VerifierConfig(name="unit_tests", memory_mib=128, processes=2, timeout_s=2)
    documents = documents_of(tmp_path, rows, answer_column="answer")
    wrong, hangs = VerifierServer(model="embedded", config=config).unearned(list(documents.values()))
    assert wrong == (
        "rows:2 earned 0 (failed): prompt 'def f(y):', completion '\\n    return 2 * y', answer 'assert f(3) == 7'"
    )
    assert hangs.startswith("rows:3 earned 0 (timeout): prompt 'def f(z):', completion '\\n    while z: pass', answer")


def test_the_border_never_changes_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Cut after any token, within characters too: the parts are the text, and whole characters stay where they are."""
    text = "größer 漢字 🙂🙂 \ufffd def f(x):\n    return x  # é"
    ids = np.array(tokenizer(text)["input_ids"])
    inside = 0
    for cut in range(1, len(ids)):
        prompt, completion = continued_text(ids[:cut], ids[cut:], tokenizer)
        assert prompt + completion == text
        alone = tokenizer.decode(ids[:cut].tolist(), clean_up_tokenization_spaces=False)
        if text.startswith(alone):
            assert prompt == alone
        else:
            inside += 1
            assert prompt == alone.rstrip("\ufffd")
    assert inside > 5, "decoded alone, halves of characters would be lost"


def test_the_first_space_of_a_completion_is_kept() -> None:
    """Decoders of the SentencePiece kind drop the space that begins a text."""
    words = {"<eos>": 0, "▁if": 1, "▁x": 2, "▁return": 3}
    bare = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    bare.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")
    assert continued_text(np.array([1, 2]), np.array([3, 2, 0]), tokenizer) == ("if x", " return x")
    assert tokenizer.decode([3, 2]) == "return x", "decoded alone, it is lost"


def test_programs_that_are_cut_short_are_reported_once(
    embedded: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    config = VerifierConfig(name="unit_tests", memory_mib=128, processes=2)
    server = VerifierServer(model="embedded", config=config)
    completions = ["return 2 * x", "return x", "bytearray(10**9)", "open('x', 'w')", "return 2*x # ok"]
    pieces, answer = ["def f(x):\n    ", "pass"], "assert f(3) == 6"
    first = make_rollout(embedded, pieces=pieces, completions=[completions], answer=answer)
    second = make_rollout(embedded, pieces=pieces, completions=[completions[3:]], answer=answer)
    with caplog.at_level(logging.WARNING):
        assert server.score([first])[0].verified.tolist() == [[1, 0, 0, 0, 1]]
        assert server.score([second])[0].verified.tolist() == [[0, 1]]
    assert server.status_counts == {"passed": 3, "failed": 1, "memory": 1, "forbidden": 2}
    (message,) = [record.getMessage() for record in caplog.records if record.name == "feature_server.verifiers.server"]
    assert message.startswith("2 of 5 programs were cut short, reward 0: 1 memory, 1 forbidden;")


def test_a_verifier_that_fails_ends_the_run(embedded: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def judge(prompt, completion, answer): return len(completion) / (len(answer) - 2)"
    )
    server = VerifierServer(model="embedded", config=VerifierConfig(name=f"{tmp_path / 'mine.py'}:judge"))
    rollout = make_rollout(embedded, pieces=["a", "b"], completions=[["four", "fives"]], answer="four")
    assert server.score([rollout])[0].verified.tolist() == [[2, 2.5]]
    rollout = make_rollout(embedded, pieces=["a", "b"], completions=[["four", "fives"]], answer="by")
    with pytest.raises(ValueError, match=r"(?s)mine.py:judge raised.*ZeroDivisionError.*The completion was 'four'"):
        server.score([rollout])
