"""Texts instead of token ids, for a feature model whose tokenizer is not the policy's.

Guarantee: the feature model reads the text that the policy wrote, in its own tokens. Each window is encoded by itself,
so that completions with equal text have equal tokens, and a context never depends on what continues it. A character
whose bytes are divided between context and window belongs to the window as a whole; one that the policy's tokens leave
incomplete at the window's end becomes the replacement character U+FFFD. Called by FeatureModel.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.rollout import Completions, Document

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""


def retokenized(
    written: Completions, *, policy_tokenizer: PreTrainedTokenizerBase, feature_tokenizer: PreTrainedTokenizerBase
) -> list[Completions]:
    """Each group by itself, in order: context, ground truth and completions in the feature model's tokens.

    No special token is added. The policy's EOS becomes the feature model's, and a window without text is that EOS.

    Raises: ValueError if a tokenizer has no EOS, or if the policy's decodes a context differently when it is continued.
    Test: test_retokenization.py::test_features_are_those_of_the_plain_text
    """
    reader = _Reader(policy_tokenizer, feature_tokenizer)
    return [_group(written, group, reader) for group in range(len(written.document.anchors))]


class _Reader:
    """From the policy's tokens to text to the feature model's tokens."""

    def __init__(self, policy: PreTrainedTokenizerBase, feature: PreTrainedTokenizerBase) -> None:
        for tokenizer in (policy, feature):
            if tokenizer.eos_token_id is None:
                raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token to end a text with; set one")
        self._policy, self._feature = policy, feature

    def context(self, ids: Sequence[int]) -> list[int]:
        """The feature model's tokens of a context; bytes at its end that are no whole character are the window's."""
        *texts, last = map(self._decode, self._split(ids))
        return self._encode([*texts, last.rstrip(REPLACEMENT)])

    def window(self, context_ids: Sequence[int], ids: Sequence[int]) -> list[int]:
        """The feature model's tokens of the text by which `ids` prolong the context."""
        tail = self._split(context_ids)[-1]
        known = self._decode(tail).rstrip(REPLACEMENT)
        first, *others = self._split(ids)
        whole = self._decode([*tail, *first])  # together: a token alone may lack its leading space, or half a character
        if not whole.startswith(known):
            raise ValueError(
                f"the policy's tokenizer decodes a context to {known[-40:]!r} when it stands alone and to "
                f"{whole[: len(known)][-40:]!r} when it is continued, so the completion's text cannot be told from it; "
                "use a feature model with the policy's tokenizer"
            )
        return self._encode([whole[len(known) :], *map(self._decode, others)])

    def _split(self, ids: Sequence[int]) -> list[list[int]]:
        """The tokens between one EOS and the next, before the first and after the last."""
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token == self._policy.eos_token_id:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return pieces

    def _decode(self, ids: list[int]) -> str:
        text = self._policy.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # lists are for batches
        return text

    def _encode(self, texts: Sequence[str]) -> list[int]:
        """The texts' tokens with EOS between them."""
        eos = self._feature.eos_token_id
        encoded = self._feature(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [token for ids in encoded for token in (*ids, eos)][:-1] or [eos]


def _group(written: Completions, group: int, reader: _Reader) -> Completions:
    context_ids = written.document.context_ids(group).tolist()
    context = reader.context(context_ids)
    ground_truth = reader.window(context_ids, written.document.ground_truth_ids(group).tolist())
    completions = [
        reader.window(context_ids, ids[:length].tolist())
        for ids, length in zip(written.completion_ids[group], written.completion_lengths[group], strict=True)
    ]
    horizon = max(map(len, [ground_truth, *completions]))
    padded = [[*ids, *[0] * (horizon - len(ids))] for ids in completions]
    return Completions(
        document=Document(
            document_id=written.document.document_id,
            token_ids=np.array(context + ground_truth, dtype=np.int64),
            anchors=np.array([len(context)], dtype=np.int64),
            horizon=horizon,
            ends_with_eos=written.document.ends_with_eos,
        ),
        completion_ids=np.array([padded], dtype=np.int64),
        completion_lengths=np.array([[len(ids) for ids in completions]], dtype=np.int64),
    )
