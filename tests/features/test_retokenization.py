"""A feature model with another tokenizer reads what the policy wrote: plain text in its own tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from actors.rollout import Completions, Document, Rollout
from feature_server.config import FeatureConfig
from feature_server.features import feature_model as feature_model_module
from feature_server.features.feature_model import FeatureModel
from feature_server.features.retokenization import retokenized

LAYERS = [1, 2, 3]  # floor of 1.25, 2.5 and 3.75
SENTENCES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "größer 日本 🙂"] * 3
SOURCE = "def first(items):\n    return items[0]\n\ndef last(items):\n    return items[-1]\n"
TRICKY = "naïve Größe 日本語 🙂🙂 e\u0301 fin"


@pytest.fixture(scope="module")
def feature_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on other texts; its EOS has another id and another name."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = ["<pad>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@pytest.fixture(scope="module")
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, as SentencePiece makes them: alone, a word loses its space."""
    words = ["<eos>", "▁def", "▁first", "▁last", "▁return", "▁items", "▁=", "x"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    make_causal_lm: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    feature_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, str]:
    """The policy, its tokenizer with a larger network, and feature models with a tokenizer of their own."""
    folders = {}
    for name, kind, its_tokenizer, num_layers in (
        ("policy", "llama", tokenizer, 2),
        ("larger", "llama", tokenizer, 7),
        ("llama", "llama", feature_tokenizer, 5),
        ("gpt2", "gpt2", feature_tokenizer, 5),
    ):
        folder: Path = tmp_path_factory.mktemp(name)
        network = make_causal_lm(kind, num_layers=num_layers, vocab_size=len(its_tokenizer))
        network.save_pretrained(folder)
        its_tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def make_rollout(
    document_ids: list[int], anchors: list[int], completions: list[list[list[int]]], *, horizon: int | None = None
) -> Rollout:
    """`completions[group][j]` are the token ids of completion j."""
    horizon = horizon or max(len(ids) for group in completions for ids in group)
    padded = [[[*ids, *[7] * (horizon - len(ids))] for ids in group] for group in completions]
    versions = np.full((len(anchors), len(completions[0]), horizon), 3)
    versions[:, 0, 0] = 2
    return Rollout(
        ticket_id=5,
        document=Document(
            document_id="train/1",
            token_ids=np.array(document_ids),
            anchors=np.array(anchors),
            horizon=horizon,
            ends_with_eos=False,
        ),
        completion_ids=np.array(padded),
        completion_lengths=np.array([[len(ids) for ids in group] for group in completions]),
        behavior_logprobs=np.full((len(anchors), len(completions[0]), horizon), -1, dtype=np.float32),
        token_versions=versions,
    )


@pytest.fixture
def rollout(tokenizer: PreTrainedTokenizerFast) -> Rollout:
    """Three blocks in a text of ASCII, and one behind its end, in the next text."""
    ids = [*encode(tokenizer, SOURCE), 0, *encode(tokenizer, SOURCE[:30])]
    texts = [["x = 1", "items[1:]", "x = 1"], ["()", " else", "jumps"], ["\n\n", "0]", "y"], ["a", "b c", "\t"]]
    completions = [[encode(tokenizer, text) for text in group] for group in texts]
    return make_rollout(ids, [3, 9, 20, len(encode(tokenizer, SOURCE)) + 4], completions)


def windows_as_text(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[str], str, list[str]]]:
    """(texts up to the anchor, ground truth, completions) of each group, from character offsets: nothing is decoded."""
    whole = SOURCE + SOURCE[:30]
    first, second = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for text in (SOURCE, SOURCE[:30])
    )
    starts = [start for start, _ in first] + [len(SOURCE)] + [start + len(SOURCE) for start, _ in second]
    horizon = rollout.document.horizon
    texts = [["x = 1", "items[1:]", "x = 1"], ["()", " else", "jumps"], ["\n\n", "0]", "y"], ["a", "b c", "\t"]]
    groups = []
    for anchor, completions in zip(rollout.document.anchors.tolist(), texts, strict=True):
        end = starts[anchor + horizon] if anchor + horizon < len(starts) else len(whole)
        at = starts[anchor]
        context = [whole[:at]] if anchor <= len(first) else [SOURCE, whole[len(SOURCE) : at]]
        groups.append((context, whole[at:end], completions))
    return groups


def slow_feature(model: PreTrainedModel, context: list[int], window: list[int], pooling: str) -> Tensor:
    """phi(context : window) from a sequence of its own, by the whole network."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([context + window]), output_hidden_states=True)
    tokens = torch.cat([output.hidden_states[layer][0, len(context) :] for layer in LAYERS], dim=-1)
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    return tokens[-1] if pooling == "last" else tokens.mean(0)


@pytest.mark.parametrize(
    ("kind", "pooling", "groups_per_forward"), [("llama", "last", 16), ("llama", "mean", 3), ("gpt2", "last", 3)]
)
def test_features_are_those_of_the_plain_text(
    kind: str,
    pooling: str,
    groups_per_forward: int,
    folders: dict[str, str],
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerFast,
    feature_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_model_module, "GROUPS_PER_FORWARD", groups_per_forward)
    config = FeatureConfig(foreign_tokenizer="retokenize", pooling=pooling)
    network = FeatureModel(folders[kind], config, dtype="float32", max_tokens=64, policy=folders["policy"])
    (completions, other), (ground_truth, _) = network([rollout, rollout])
    assert completions.shape == (4, 3, 96) and ground_truth.shape == (4, 96)
    assert torch.equal(other, completions)
    model = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    for group, (context, truth, texts) in enumerate(windows_as_text(rollout, tokenizer)):
        prefix = encode(feature_tokenizer, context[0])
        for text in context[1:]:
            prefix += [1, *encode(feature_tokenizer, text)]
        found = [*completions[group], ground_truth[group]]
        for feature, text in zip(found, [*texts, truth], strict=True):
            expected = slow_feature(model, prefix, encode(feature_tokenizer, text), pooling)
            torch.testing.assert_close(feature, expected, rtol=0, atol=2e-6)


def as_ids(group: Completions) -> tuple[list[int], list[int], list[list[int]]]:
    """Context, ground truth and completions of one group."""
    lengths = group.completion_lengths[0].tolist()
    completions = [ids[:length].tolist() for ids, length in zip(group.completion_ids[0], lengths, strict=True)]
    return group.document.context_ids(0).tolist(), group.document.ground_truth_ids(0).tolist(), completions


def test_each_eos_becomes_the_feature_models(
    tokenizer: PreTrainedTokenizerFast, feature_tokenizer: PreTrainedTokenizerFast
) -> None:
    """In the context and in windows: at the end, in the middle, alone, twice. Id 0 is the policy's, 1 the other's."""
    x, y = encode(tokenizer, "x ="), encode(tokenizer, "yes")
    fx, fy = encode(feature_tokenizer, "x ="), encode(feature_tokenizer, "yes")
    one = make_rollout([*x, 0, *y, *x, 0], [len(x) + 1 + len(y)], [[[0], [*y, 0], [*x, 0, *y], [0, 0]]], horizon=9)
    (group,) = retokenized(one, policy_tokenizer=tokenizer, feature_tokenizer=feature_tokenizer)
    context, ground_truth, completions = as_ids(group)
    assert context == [*fx, 1, *fy]
    assert ground_truth == [*fx, 1]
    assert completions == [[1], [*fy, 1], [*fx, 1, *fy], [1, 1]]
    after_eos = make_rollout([*x, 0, *y], [len(x) + 1], [[y, [0]]])
    (group,) = retokenized(after_eos, policy_tokenizer=tokenizer, feature_tokenizer=feature_tokenizer)
    assert as_ids(group) == ([*fx, 1], fy, [fy, [1]])
    only_eos = make_rollout([0, *y], [1], [[y, [0]]])
    (group,) = retokenized(only_eos, policy_tokenizer=tokenizer, feature_tokenizer=feature_tokenizer)
    assert as_ids(group) == ([1], fy, [fy, [1]])
    assert type(group) is Completions, "no engine sampled these tokens"


def with_bos(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedTokenizerFast, int]:
    """The same tokenizer, but it opens every text with BOS; and the id of it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token, bos_token="<bos>"), bos


@pytest.mark.parametrize("policy_has_bos", [False, True])
def test_texts_open_as_the_feature_models_tokenizer_opens_them(
    policy_has_bos: bool, tokenizer: PreTrainedTokenizerFast, feature_tokenizer: PreTrainedTokenizerFast
) -> None:
    """At the start, after each EOS that a text follows, and in no window's own first text."""
    policy, own = with_bos(tokenizer)
    feature, bos = with_bos(feature_tokenizer)
    opening = [own] if policy_has_bos else []
    x, y = encode(tokenizer, "x ="), encode(tokenizer, "yes")
    fx, fy = encode(feature_tokenizer, "x ="), encode(feature_tokenizer, "yes")

    def read(document: list[int], anchor: int, completions: list[list[int]]) -> tuple[object, ...]:
        one = make_rollout(document, [anchor], [completions], horizon=9)
        places = np.flatnonzero(one.document.token_ids == own) if policy_has_bos else np.zeros(0, dtype=np.int64)
        one = replace(one, document=replace(one.document, bos_positions=places))
        (group,) = retokenized(one, policy_tokenizer=policy, feature_tokenizer=feature)
        return as_ids(group)

    document = [*opening, *x, 0, *opening, *y, *x, 0]
    anchor = 2 * len(opening) + len(x) + 1 + len(y)
    ends = [[0], [*y, 0], [*x, 0, *opening, *y], [0, 0]]
    expected = ([bos, *fx, 1, bos, *fy], [*fx, 1], [[1], [*fy, 1], [*fx, 1, bos, *fy], [1, 1]])
    assert read(document, anchor, ends) == expected
    after_eos = [*opening, *x, 0, *opening, *y]
    context = ([bos, *fx, 1, bos], fy, [fy, [1]])
    assert read(after_eos, 2 * len(opening) + len(x) + 1, [y, [0]]) == context
    plain = [*opening, *x, *y]
    assert read(plain, len(opening) + len(x), [y]) == ([bos, *fx], fy, [fy])


def test_divided_characters_belong_to_the_window(
    tokenizer: PreTrainedTokenizerFast, feature_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Wherever the context ends, its whole characters and the window's text are the text."""
    ids = encode(tokenizer, TRICKY)
    divided = 0
    for anchor in range(1, len(ids)):
        rest = ids[anchor:]
        one = make_rollout(ids, [anchor], [[rest, [*rest, 0]]])
        (group,) = retokenized(one, policy_tokenizer=tokenizer, feature_tokenizer=feature_tokenizer)
        context, ground_truth, (completion, ended) = as_ids(group)
        whole = bytes_of(tokenizer, ids[:anchor]).decode(errors="ignore")
        divided += len(whole.encode()) < len(bytes_of(tokenizer, ids[:anchor]))
        assert context == (encode(feature_tokenizer, whole) or [1])
        assert completion == ground_truth == encode(feature_tokenizer, TRICKY[len(whole) :])
        assert ended == [*completion, 1]
    assert divided > 10


def bytes_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """What the tokens stand for; byte-level BPE writes each byte as one character (bytes_to_unicode of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(byte_of[character] for token in tokenizer.convert_ids_to_tokens(ids) for character in token)


def test_a_character_cut_at_the_end_of_a_window_is_replaced(
    tokenizer: PreTrainedTokenizerFast, feature_tokenizer: PreTrainedTokenizerFast
) -> None:
    smile = encode(tokenizer, "🙂")
    assert len(smile) == 4
    a, b = encode(tokenizer, "a"), encode(tokenizer, "b")
    completions = [[*a, *smile], [*a, *smile[:2]], smile[:1], [*smile[:2], *b]]
    one = make_rollout([*b, *a], [1], [completions])
    (group,) = retokenized(one, policy_tokenizer=tokenizer, feature_tokenizer=feature_tokenizer)
    texts = [feature_tokenizer.decode(ids) for ids in as_ids(group)[2]]
    assert texts[0] == "a🙂"
    assert [text.rstrip("\ufffd") for text in texts[1:3]] == ["a", ""] and all(t.endswith("\ufffd") for t in texts[1:3])
    assert texts[3].strip("\ufffd") == "b" and texts[3].startswith("\ufffd")
    only_half = make_rollout(smile, [2], [[smile[2:]]])
    (group,) = retokenized(only_half, policy_tokenizer=tokenizer, feature_tokenizer=feature_tokenizer)
    context, _, (completion,) = as_ids(group)
    assert context == [1] and feature_tokenizer.decode(completion) == "🙂"  # no text is EOS


def test_a_window_keeps_the_space_before_its_first_word(
    spaced_tokenizer: PreTrainedTokenizerFast, feature_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = encode(spaced_tokenizer, "def first return items")
    assert [spaced_tokenizer.decode(i) for i in (ids, ids[2:])] == ["def first return items", "return items"]
    one = make_rollout(ids, [2], [[encode(spaced_tokenizer, "last items"), [0]]])
    (group,) = retokenized(one, policy_tokenizer=spaced_tokenizer, feature_tokenizer=feature_tokenizer)
    context, ground_truth, completions = as_ids(group)
    assert context == encode(feature_tokenizer, "def first")
    assert ground_truth == encode(feature_tokenizer, " return items")
    assert completions == [encode(feature_tokenizer, " last items"), [1]]
    after_eos = make_rollout([*ids, 0, *ids], [len(ids) + 1], [[ids]])
    (group,) = retokenized(after_eos, policy_tokenizer=spaced_tokenizer, feature_tokenizer=feature_tokenizer)
    assert as_ids(group)[1] == encode(feature_tokenizer, "def first return items")  # a text's first word has none


def test_equal_texts_have_exactly_equal_features(folders: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Equal ids, and other ids for the same text; what stands behind a completion's end does not count."""
    whole, letters = encode(tokenizer, "return"), [i for c in "return" for i in encode(tokenizer, c)]
    assert len(whole) < len(letters)
    other = encode(tokenizer, "retur")
    one = make_rollout(
        encode(tokenizer, SOURCE), [4, 8], [[letters, whole, other, whole], [other, whole, other, letters]]
    )
    config = FeatureConfig(foreign_tokenizer="retokenize")
    (features,), _ = FeatureModel(folders["llama"], config, dtype="float32", max_tokens=64, policy=folders["policy"])(
        [one]
    )
    equal = [[[bool(torch.equal(a, b)) for b in group] for a in group] for group in features]
    first = [[(j != 2 and k != 2) or j == k for k in range(4)] for j in range(4)]
    assert equal == [first, [[(j % 2) == (k % 2) for k in range(4)] for j in range(4)]]


@pytest.mark.parametrize("foreign_tokenizer", ["refuse", "retokenize", "reuse_ids"])
def test_a_warm_start_reads_ids_as_they_are(foreign_tokenizer: str, folders: dict[str, str], rollout: Rollout) -> None:
    """The policy is a tuned checkpoint or a smaller network of the family: one tokenizer, saved twice."""
    config = FeatureConfig(foreign_tokenizer=foreign_tokenizer)
    warm = FeatureModel(folders["larger"], config, dtype="float32", max_tokens=64, policy=folders["policy"])([rollout])
    plain = FeatureModel(folders["larger"], FeatureConfig(), dtype="float32", max_tokens=64)([rollout])
    for found, expected in zip(warm, plain, strict=True):
        assert torch.equal(found[0], expected[0])


def test_a_foreign_tokenizer_is_refused_unless_configured(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"do not share a tokenizer: \d+ tokens differ.*'retokenize'"):
        FeatureModel(folders["llama"], FeatureConfig(), dtype="float32", max_tokens=64, policy=folders["policy"])


def test_reused_ids_are_read_as_they_are_or_refused_with_the_numbers(folders: dict[str, str], rollout: Rollout) -> None:
    """The policy has more tokens than the foreign network; the other way round all ids exist."""
    config = FeatureConfig(foreign_tokenizer="reuse_ids")
    refusal = r"token id \d+ of the policy is outside of the feature model's vocabulary of 322 tokens"
    with pytest.raises(ValueError, match=refusal):
        FeatureModel(folders["llama"], config, dtype="float32", max_tokens=64, policy=folders["policy"])
    with pytest.raises(ValueError, match=refusal):  # for any completion: an index error would say less
        FeatureModel(folders["llama"], config, dtype="float32", max_tokens=64)([rollout])
    reused = FeatureModel(folders["policy"], config, dtype="float32", max_tokens=64, policy=folders["llama"])([rollout])
    plain = FeatureModel(folders["policy"], FeatureConfig(), dtype="float32", max_tokens=64)([rollout])
    assert all(torch.equal(found[0], expected[0]) for found, expected in zip(reused, plain, strict=True))


def test_texts_beyond_the_networks_positions_are_refused(
    folders: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = encode(tokenizer, SOURCE * 12)
    one = make_rollout(ids, [len(ids) - 3], [[ids[:2]]])
    network = FeatureModel(
        folders["gpt2"],
        FeatureConfig(foreign_tokenizer="retokenize"),
        dtype="float32",
        max_tokens=64,
        policy=folders["policy"],
    )
    with pytest.raises(ValueError, match=r"take \d+ tokens of the feature model, which was made for 256"):
        network([one])


def test_a_tokenizer_without_eos_is_refused(
    tokenizer: PreTrainedTokenizerFast, feature_tokenizer: PreTrainedTokenizerFast, rollout: Rollout
) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=feature_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no EOS token"):
        retokenized(rollout, policy_tokenizer=tokenizer, feature_tokenizer=without)


def test_a_tokenizer_that_decodes_by_what_follows_is_refused(feature_tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "-": 2, "b": 3}, unk_token="<eos>"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("-b", "b")])
    tidy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert [tidy.decode(ids) for ids in ([1, 2], [1, 2, 3])] == ["a-", "ab"]
    with pytest.raises(ValueError, match="decodes a context to 'a-' when it stands alone and to 'ab' when"):
        retokenized(make_rollout([1, 2, 3], [2], [[[3]]]), policy_tokenizer=tidy, feature_tokenizer=feature_tokenizer)
