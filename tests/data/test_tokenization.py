"""Where pairs are cut: between two tokens and two characters, losing none of them."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.data.texts import Pair
from actors.data.tokenization import PairFilter, tokenise_pairs

TRICKY = [
    ("def f(x):\n    ", "return x"),
    ('def f(x):\n    """Doc."""\n\n', "    return x\n"),
    ("def f(x):", "\n        return x"),
    ("    return se", "lf.x"),  # `self` is one token that straddles the border
    ("größer \u3000\t", "→ 尺寸 🙂 é"),
    ("🙂", "🙂🙂"),
    ("e", "\u0301 combines"),
    ("a ", " b"),
    ("x" * 50, "y" * 50),
]


@pytest.mark.parametrize(("prompt", "completion"), TRICKY)
def test_prompt_and_completion_decode_to_the_whole_pair(prompt, completion, tokenizer):
    (pair,) = tokenise_pairs([Pair("name", prompt, completion)], tokenizer=tokenizer)
    assert pair.token_ids[-1] == tokenizer.eos_token_id
    head = tokenizer.decode(pair.token_ids[: pair.num_prompt_tokens])
    tail = tokenizer.decode(pair.token_ids[pair.num_prompt_tokens : -1])
    assert head + tail == prompt + completion
    assert pair.token_ids[:-1].tolist() == tokenizer.encode(prompt + completion, add_special_tokens=False)
    assert prompt.startswith(head) and head == head.rstrip()
    border = tokenizer.decode(pair.token_ids[pair.num_prompt_tokens]) if head else prompt
    assert len(head) <= len(prompt.rstrip()) < len(head + border)


def test_a_token_that_straddles_the_border_leaves_the_prompt(tokenizer):
    (pair,) = tokenise_pairs([Pair("name", "    return se", "lf.x")], tokenizer=tokenizer)
    assert tokenizer.decode(pair.token_ids[: pair.num_prompt_tokens]) == "    return"
    assert tokenizer.decode(pair.token_ids[pair.num_prompt_tokens]) == " self"


def test_no_character_is_divided_by_a_token_that_joins_two_characters():
    """`é` is the bytes Ã © to a byte-level tokenizer, and this one merges © with the Ã that follows."""
    vocab = {symbol: index for index, symbol in enumerate(["<eos>", "a", "Ã", "©", "©Ã"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("©", "Ã")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    (pair,) = tokenise_pairs([Pair("name", "aé", "é")], tokenizer=tokenizer)
    assert pair.token_ids.tolist() == [1, 2, 4, 3, 0]
    assert pair.num_prompt_tokens == 1


def test_answers_stay_with_their_pairs_when_others_are_left_out(tokenizer):
    pairs = [
        Pair("a", "x = 1", "2", "tests of a"),
        Pair("b", "y = 1", " ", "of an empty completion"),
        Pair("c", "x = 1", "2", "of a duplicate"),
        Pair("d", "z = 1", "3"),
    ]
    kept = PairFilter(tokenizer=tokenizer, document_tokens=32, horizon=8).keep(pairs, split="test")
    assert [(pair.name, pair.answer) for pair in kept] == [("a", "tests of a"), ("d", None)]
